"""``moka-pl inspect``: what an adapter is and where its gates stand."""

import re
from pathlib import Path

from moka_pl.errors import AdapterError, printable

#: Bytes of tensors that are read whole.
_SMALL = 2**30


def inspect(adapter: Path) -> None:
    """Print an adapter's options, base model, metrics and gates, without loading the base.

    Args:
        adapter: An adapter directory.
    """
    from moka_pl.adapters.config import MokaConfig
    from moka_pl.adapters.methods.base import name_ranks
    from moka_pl.adapters.methods.registry import method_of
    from moka_pl.adapters.reading import check_count, read_adapter, read_adapter_shapes, read_adapter_state
    from moka_pl.ops.gating import can_move, gates_of, normalised_entropy

    info, shapes = read_adapter(adapter), read_adapter_shapes(adapter)
    check_count(adapter, shapes)
    small = sum(tensor.nbytes for tensor in shapes.values()) <= _SMALL
    state = read_adapter_state(adapter) if small else {}  # which looks for NaN in every number
    step, found_at = info.extra.get("step"), info.extra.get("metrics_step")
    facts = {
        "base model": f"{info.base.name} (fingerprint {info.base.fingerprint})",
        "quantization": info.base.options.get("quantization", "none"),
        **method_of(info.config).facts(),
        **({"exact LoRA rank": name_ranks(info.exact_lora_rank)} if info.exact_lora_rank else {}),
        "parameters": f"{sum(t.numel() for t in shapes.values()):,}",
        **{name: f"{value:.4f}" for name, value in sorted((info.extra.get("metrics") or {}).items())},
    }
    if found_at is not None and found_at != step:
        facts["metrics measured at step"] = f"{found_at} (weights: step {step})"
    named = {printable(name): printable(str(value)) for name, value in facts.items()}
    width = max(30, *(len(name) + 2 for name in named))
    for name, value in named.items():
        print(f"{name:<{width}}{value}")
    gates = {name.removesuffix(".moka_gate"): t for name, t in state.items() if name.endswith(".moka_gate")}
    if not gates or not isinstance(info.config, MokaConfig):
        return
    components = info.config.components
    if not can_move(info.config.gating, components):
        return
    print(f"\n{'gates by layer':<44}{'entropy':>8}  α_1 … α_{components}")
    for name, logits in sorted(gates.items(), key=lambda gate: _by_number(gate[0])):
        if logits.shape != (components,):
            raise AdapterError(
                f"{adapter} does not fit together: {name}.moka_gate is {tuple(logits.shape)}, but components "
                f"is {components}. Copy the adapter again"
            )
        alpha = gates_of(logits.float(), info.config.gating)  # (r,)
        entropy = float(normalised_entropy(alpha[None]))
        print(f"{printable(name):<44}{entropy:>8.4f}  {' '.join(f'{a:.3f}' for a in alpha.tolist())}")


def _by_number(name: str) -> list[tuple[int, str]]:
    """Orders layers as the model does, 2 before 10."""
    return [(int(part[:18]), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
