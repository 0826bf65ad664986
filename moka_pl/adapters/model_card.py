"""The README.md of an adapter directory."""

from collections.abc import Mapping
from typing import Any

from moka_pl.adapters.methods.base import AdapterMethod, name_ranks

_USAGE = """```python
from moka_pl import load_model

model, tokenizer = load_model("path/to/this/folder")
```"""


def model_card(stored: Mapping[str, Any], method: AdapterMethod) -> str:
    """Writes an adapter's model card from what ``adapter_config.json`` holds: Markdown with a YAML header."""
    from huggingface_hub import ModelCardData

    base, extra = stored["base_model_name_or_path"], stored["extra"]
    tags = [method.kind.lower(), *method.tags, "adapter"]
    header = ModelCardData(base_model=base, library_name="moka_pl", tags=tags).to_yaml()
    facts = {
        **method.facts(),
        **({"exact LoRA rank": name_ranks(ranks)} if (ranks := stored.get("exact_lora_rank")) else {}),
        "trainable parameters": f"{stored['trainable_parameters']:,}",
        "quantization of the base": stored["base_options"].get("quantization", "none"),
    }
    parts = [f"---\n{header}\n---\n# {method.title}", method.about(base), _table("option", facts)]
    if metrics := extra.get("metrics"):
        parts.append(_table("metric", {name: f"{value:.4f}" for name, value in sorted(metrics.items())}))
        step, metrics_step = extra.get("step"), extra.get("metrics_step")
        if metrics_step is not None and metrics_step != step:
            parts.append(
                f"The metrics were measured after step {metrics_step}; the weights are those of step {step}."
            )
    parts += [_USAGE, f"Written by moka_pl {stored['moka_pl_version']}."]
    return "\n\n".join(parts) + "\n"


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {title} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)
