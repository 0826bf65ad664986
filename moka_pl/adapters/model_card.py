"""The README.md of an adapter directory."""

import json
from collections.abc import Mapping
from typing import Any

from moka_pl.adapters.methods.base import AdapterMethod
from moka_pl.ops.gating import GATINGS


def model_card(described: Mapping[str, Any], method: AdapterMethod) -> str:
    """Writes a model card from the contents of ``adapter_config.json``.

    Args:
        described: The dictionary that is stored as ``adapter_config.json``.
        method: The method of the adapter.

    Returns:
        Markdown with the YAML header that model hubs read.
    """
    moka = method.kind == "MOKA"
    options = described["base_options"]
    header = [
        "---",
        f"base_model: {json.dumps(described['base_model_name_or_path'])}",
        "library_name: moka_pl",
        "tags: [moka, kronecker, adapter]" if moka else f"tags: [{method.kind.lower()}, adapter]",
        "---",
    ]
    rows = {
        **method.facts(),
        "trainable parameters": f"{described['trainable_parameters']:,}",
        "quantization of the base": options.get("quantization", "none"),
    }
    extra = described["extra"]
    metrics = extra.get("metrics", {})
    base = described["base_model_name_or_path"]
    gates = GATINGS[described["gating"]] if moka else ""
    what = (
        f"A gated mixture of Kronecker adapters for `{base}`: `y = W x + s Σ α_i (A_i ⊗ B_i) x`, `{gates}`."
    )
    body = [
        "# MoKA adapter" if moka else f"# {method.title}",
        "",
        what if moka else f"Trained weights of {method.title} for `{base}`.",
        "",
        "| option | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    if metrics:
        body += ["", "| metric | value |", "|---|---|"]
        body += [f"| {name} | {value:.4f} |" for name, value in sorted(metrics.items())]
        step, found_at = extra.get("step"), extra.get("metrics_step")
        if found_at is not None and found_at != step:
            body += [
                "",
                f"The metrics were found after step {found_at}; the weights are those of step {step}.",
            ]
    body += [
        "",
        "```python",
        "from moka_pl import load_model",
        "",
        'model, tokenizer = load_model("path/to/this/folder")',
        "```",
        "",
        f"Written by moka_pl {described['moka_pl_version']}.",
    ]
    return "\n".join([*header, *body]) + "\n"
