"""``moka-pl inspect``: what an adapter is and where its gates stand."""

import math
from pathlib import Path


def inspect(adapter: Path) -> None:
    """Print an adapter's options, base model, metrics and gates (no base model is loaded).

    Args:
        adapter: An adapter directory.
    """
    from moka_pl.adapters.directory import read_adapter, read_adapter_state
    from moka_pl.filters import describe_filters

    info = read_adapter(adapter)
    state = read_adapter_state(adapter)
    config = info.config
    targets = config.target_modules
    step, found_at = info.extra.get("step"), info.extra.get("metrics_step")
    facts = {
        "base model": f"{info.base.name} (fingerprint {info.base.fingerprint})",
        "quantization": info.base.options.get("quantization", "none"),
        "components": config.components,
        "filters": describe_filters(config.filters),
        "gating": config.gating,
        "scaling": config.effective_scaling,
        "target modules": targets if isinstance(targets, str) else ", ".join(targets),
        "parameters": f"{sum(t.numel() for t in state.values()):,}",
        **{name: f"{value:.4f}" for name, value in sorted(info.extra.get("metrics", {}).items())},
    }
    if found_at is not None and found_at != step:
        facts["these metrics are of step"] = f"{found_at} (the weights are of step {step})"
    for name, value in facts.items():
        print(f"{name:<30}{value}")
    gates = {name.removesuffix(".moka_gate"): t for name, t in state.items() if name.endswith(".moka_gate")}
    if not gates:
        return
    print(f"\n{'gates by layer':<44}{'entropy':>8}  α_1 … α_{config.components}")
    for name, logits in gates.items():
        alpha = logits.float().softmax(0).tolist()
        entropy = -sum(a * math.log(a) for a in alpha if a > 0)
        entropy = entropy / math.log(len(alpha)) if len(alpha) > 1 else 1.0
        print(f"{name:<44}{entropy:>8.4f}  {' '.join(f'{a:.3f}' for a in alpha)}")
