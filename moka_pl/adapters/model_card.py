"""The README.md of an adapter directory."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from moka_pl.adapters.injection import moka_layers
from moka_pl.adapters.layer import MokaLayer
from moka_pl.adapters.methods.base import AdapterMethod, name_ranks
from moka_pl.adapters.metric_table import metric_table
from moka_pl.ops.gating import can_move, normalised_entropy
from moka_pl.utils import expanded

_USAGE = """```python
from moka_pl import load_model

model, tokenizer = load_model("path/to/this/folder")
```"""

_USAGE_OF_IMAGES = """```python
from moka_pl.vision import load_classifier

model, image_processor = load_classifier("path/to/this/folder")
```"""


def public_name(base: str) -> str:
    """Returns what others may know a base by: of a path its last part, else the name itself."""
    path = expanded(base)
    inside = base.startswith((".", "~")) or base.count("/") > 1 or base.endswith(".gguf")
    return path.resolve().name if inside or path.is_absolute() or path.is_dir() else base


def model_card(stored: Mapping[str, Any], method: AdapterMethod, model: nn.Module | None = None) -> str:
    """Writes an adapter's model card: Markdown with a YAML header.

    Args:
        stored: What ``adapter_config.json`` holds.
        method: The adapter's method.
        model: The adapted model, of whose gates the card tells.
    """
    from huggingface_hub import ModelCardData

    base, extra = public_name(stored["base_model_name_or_path"]), stored["extra"]
    known = base if base == stored["base_model_name_or_path"] else None  # the hub would link to another model
    tags = [method.kind.lower(), *method.tags, "adapter"]
    header = ModelCardData(base_model=known, library_name="moka_pl", tags=tags).to_yaml()
    options = stored["base_options"]
    facts = {
        "base model": f"`{base}`" + (f" ({stored['revision']})" if stored.get("revision") else ""),
        **method.facts(),
        **({"exact LoRA rank": name_ranks(ranks)} if (ranks := stored.get("exact_lora_rank")) else {}),
        "trainable parameters": f"{stored['trainable_parameters']:,}",
        "quantization of the base": options.get("quantization", "none"),
    }
    trained = {"data": extra.get("data"), **(extra.get("training") or {}), "prompt": extra.get("prompt")}
    trained |= {"steps": extra.get("step")} if trained["data"] else {}
    trained |= {"classes": ", ".join(map(str, extra.get("labels") or ()))}
    trained = {name: value for name, value in trained.items() if value not in (None, "")}
    parts = [
        f"---\n{header}\n---\n# {method.title}",
        method.about(base),
        _table(("option", "value"), facts.items()),
    ]
    if trained:
        parts.append(_table(("training", "value"), trained.items()))
    if metrics := extra.get("metrics"):
        table = metric_table(dict(sorted(metrics.items())))
        rows = ((name, *cells) for name, cells in table.rows)
        parts.append(_table((table.title or "metrics", *table.columns), rows))
        step, metrics_step = extra.get("step"), extra.get("metrics_step")
        if metrics_step is not None and metrics_step != step:
            parts.append(
                f"The metrics were measured after step {metrics_step}; the weights are those of step {step}."
            )
    parts += [] if model is None else _gates(moka_layers(model))
    usage = _USAGE_OF_IMAGES if extra.get("labels") else _USAGE
    parts += [usage, f"Written by moka_pl {stored['moka_pl_version']}."]
    return "\n\n".join(parts) + "\n"


def _gates(layers: Mapping[str, MokaLayer]) -> list[str]:
    """Returns what the gates have come to, by projection; nothing where they cannot move."""
    kinds: dict[str, list[MokaLayer]] = {}
    for name, layer in layers.items():
        if can_move(layer.gating, layer.components):
            kinds.setdefault(name.rpartition(".")[2], []).append(layer)
    if not kinds:
        return []
    rows = []
    for kind, members in kinds.items():
        with torch.no_grad():
            gates = torch.stack([layer.gates().float().cpu() for layer in members])  # (L, r)
        mean = gates.mean(0)  # (r,)
        top = int(mean.argmax())
        shapes = {layer.shapes[top] for layer in members}
        shape = f" ({shapes.pop()})" if len(shapes) == 1 else ""
        entropies = normalised_entropy(gates)  # (L,)
        rows.append(
            [
                kind,
                str(len(members)),
                f"{entropies.mean():.3f} (least {entropies.min():.3f})",
                f"{gates.min():.3f} to {gates.max():.3f}",
                f"{top + 1}{shape}: {mean[top]:.3f}",
            ]
        )
    r = len(mean)
    text = (
        f"Gates α of {r} components; all start at {1 / r:.3f}. An entropy of 1 is that of equal gates, "
        "one of 0 that of a single component."
    )
    return [text, _table(("layers", "number", "entropy", "α", "largest on average"), rows)]


def _table(heads: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def _cell(value: Any) -> str:
    """Returns a value as one cell of a table."""
    return " ".join(str(value).replace("|", "\\|").split())
