"""``moka-pl inspect``: what an adapter is and where its gates stand."""

import re
from collections.abc import Mapping
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import AdapterError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from moka_pl.adapters.reading import AdapterInfo

#: Bytes of tensors that are read whole.
_SMALL = 2**30


def inspect(adapter: Path, json: bool = False) -> None:
    """Print an adapter's options, base model, metrics and gates, without loading the base.

    Args:
        adapter: An adapter directory.
        json: Print one JSON object, for scripts.
    """
    from moka_pl.adapters.methods.base import name_ranks
    from moka_pl.adapters.methods.registry import method_of
    from moka_pl.adapters.reading import check_count, read_adapter, read_adapter_shapes, read_adapter_state

    info, shapes = read_adapter(adapter), read_adapter_shapes(adapter)
    check_count(adapter, shapes)
    small = sum(tensor.nbytes for tensor in shapes.values()) <= _SMALL
    state = read_adapter_state(adapter) if small else {}  # which looks for NaN in every number
    method, ranks = method_of(info.config), info.exact_lora_rank
    size = sum(tensor.numel() for tensor in shapes.values())
    step, found_at, metrics = (info.extra.get(key) for key in ("step", "metrics_step", "metrics"))
    gates = _gates(adapter, info, state)
    if json:
        contents = {
            "base_model": info.base.name,
            "base_fingerprint": info.base.fingerprint,
            "quantization": info.base.options.get("quantization", "none"),
            "method": method.title,
            "options": method.options(),
            "exact_lora_rank": ranks or None,
            "parameters": size,
            "metrics": metrics or {},
            "metrics_step": step if found_at is None else found_at,
            "step": step,
            "gates": {name: alpha for name, (_, alpha) in gates.items()},
        }
        print(dumps(contents, indent=2))
        return
    facts = {
        "base model": f"{info.base.name} (fingerprint {info.base.fingerprint})",
        "quantization": info.base.options.get("quantization", "none"),
        **method.facts(),
        **({"exact LoRA rank": name_ranks(ranks)} if ranks else {}),
        "parameters": f"{size:,}",
        **{name: f"{value:.4f}" for name, value in sorted((metrics or {}).items())},
    }
    if found_at is not None and found_at != step:
        facts["metrics measured at step"] = f"{found_at} (weights: step {step})"
    named = {printable(name): printable(str(value)) for name, value in facts.items()}
    width = max(30, *(len(name) + 2 for name in named))
    for name, value in named.items():
        print(f"{name:<{width}}{value}")
    if gates:
        print(f"\n{'gates by layer':<44}{'entropy':>8}  α_1 … α_{info.config.components}")
    for name, (entropy, alpha) in gates.items():
        print(f"{printable(name):<44}{entropy:>8.4f}  {' '.join(f'{a:.3f}' for a in alpha)}")


def _gates(
    adapter: Path, info: "AdapterInfo", state: "Mapping[str, Tensor]"
) -> dict[str, tuple[float, list[float]]]:
    """Returns the entropy and the gates α of each layer whose gates can move, in the model's order.

    Args:
        adapter: The adapter directory.
        info: What its configuration says.
        state: Its tensors.
    """
    from moka_pl.adapters.config import MokaConfig
    from moka_pl.ops.gating import can_move, gates_of, normalised_entropy

    config: Any = info.config
    if not isinstance(config, MokaConfig) or not can_move(config.gating, config.components):
        return {}
    logits = {name.removesuffix(".moka_gate"): t for name, t in state.items() if name.endswith(".moka_gate")}
    gates = {}
    for name in sorted(logits, key=_by_number):
        if logits[name].shape != (config.components,):
            raise AdapterError(
                f"{adapter} does not fit together: {name}.moka_gate is {tuple(logits[name].shape)}, but "
                f"components is {config.components}. Copy the adapter again"
            )
        alpha = gates_of(logits[name].float(), config.gating)  # (r,)
        gates[name] = float(normalised_entropy(alpha[None])), alpha.tolist()
    return gates


def _by_number(name: str) -> list[tuple[int, str]]:
    """Orders layers as the model does, 2 before 10."""
    return [(int(part[:18]), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
