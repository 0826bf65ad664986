"""``moka-pl inspect``: what an adapter is and where its gates stand."""

import re
from pathlib import Path


def inspect(adapter: Path) -> None:
    """Print an adapter's options, base model, metrics and gates, without loading the base.

    Args:
        adapter: An adapter directory.
    """
    from moka_pl.adapters.methods.registry import method_of
    from moka_pl.adapters.reading import read_adapter, read_adapter_state
    from moka_pl.ops.gating import gates_of, normalised_entropy

    info = read_adapter(adapter)
    state = read_adapter_state(adapter)
    step, found_at = info.extra.get("step"), info.extra.get("metrics_step")
    facts = {
        "base model": f"{info.base.name} (fingerprint {info.base.fingerprint})",
        "quantization": info.base.options.get("quantization", "none"),
        **method_of(info.config).facts(),
        "parameters": f"{sum(t.numel() for t in state.values()):,}",
        **{name: f"{value:.4f}" for name, value in sorted(info.extra.get("metrics", {}).items())},
    }
    if found_at is not None and found_at != step:
        facts["metrics measured at step"] = f"{found_at} (weights: step {step})"
    width = max(30, *(len(name) + 2 for name in facts))
    for name, value in facts.items():
        print(f"{name:<{width}}{value}")
    gates = {name.removesuffix(".moka_gate"): t for name, t in state.items() if name.endswith(".moka_gate")}
    if not gates:
        return
    print(f"\n{'gates by layer':<44}{'entropy':>8}  α_1 … α_{info.config.components}")
    for name, logits in sorted(gates.items(), key=lambda gate: _by_number(gate[0])):
        alpha = gates_of(logits.float(), info.config.gating)  # (r,)
        entropy = float(normalised_entropy(alpha[None]))
        print(f"{name:<44}{entropy:>8.4f}  {' '.join(f'{a:.3f}' for a in alpha.tolist())}")


def _by_number(name: str) -> list[tuple[int, str]]:
    """Orders layers as the model does, 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
