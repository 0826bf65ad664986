"""What share of a model's linear weights is adapted, and what is left out."""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from moka_pl.adapters.injection import ALL_LINEAR, output_head, own_targets
from moka_pl.adapters.methods.registry import adapted_layers
from moka_pl.adapters.patterns import matching
from moka_pl.adapters.trained import TRAINED
from moka_pl.adapters.vocabulary.token_rows import TokenRows
from moka_pl.backbone.quantization import weight_count

#: Parts that a line names before it sums up the rest.
_NAMED = 4
#: How the names of linear layers end that stand beside the frozen one: PEFT's name of the adapter, copies.
_OF_ADAPTERS = (".default", f".{TRAINED}")


def left_out(model: nn.Module, config: Any) -> str:
    """Describes which linear weights that the configuration names are not adapted; empty if all are.

    Experts whose weights are fused into 3-D parameters are part of ``all-linear``, and never adapted.

    Args:
        model: The adapted model.
        config: The adapters' configuration, of any method.
    """
    targets = getattr(config, "target_modules", None)
    adapted = adapted_layers(model)
    if not targets or not adapted:
        return ""
    weights, fused = _linear_weights(model)
    named = list(weights) if targets == ALL_LINEAR else matching(weights, own_targets(weights, targets))
    kept = _adapted_weights(weights, fused, adapted)
    missed = set(named) - kept - set(matching(named, getattr(config, "exclude_modules", None)))
    total = sum(weights.values())
    parts: Counter[str] = Counter()
    for name in sorted(missed):
        parts[_part(name, fused, list(adapted))] += weights[name]
    if not parts:
        return ""
    shares = [f"{part} ({size / total:.1%})" for part, size in parts.most_common(_NAMED)]
    if others := len(parts) - len(shares):
        shares.append(f"{others} other parts")
    covered = sum(weights[name] for name in kept)
    return (
        f"adapted: {len(adapted)} layers, {covered / total:.1%} of the linear weights; not adapted: "
        f"{', '.join(shares)}"
    )


def renamed(model: nn.Module, config: Any) -> str:
    """Says what the default's layers are called in the adapted model; empty if they have the usual names.

    Args:
        model: The adapted model.
        config: The adapters' configuration, of any method.
    """
    targets = getattr(config, "target_modules", None)
    own = own_targets(_linear_weights(model)[0], targets)
    if own == targets or not isinstance(targets, list) or own is None:
        return ""
    return f"target_modules {', '.join(targets)}: in this model {', '.join(own)}"


def adapted_share(model: nn.Module) -> float:
    """Returns the share of a model's linear weights, those of experts included, that is adapted."""
    weights, fused = _linear_weights(model)
    kept = _adapted_weights(weights, fused, adapted_layers(model))
    return sum(weights[name] for name in kept) / sum(weights.values())


def _adapted_weights(weights: Iterable[str], fused: set[str], adapted: Collection[str]) -> set[str]:
    """Returns the weights that are adapted; PEFT adapts fused experts by the names of their modules."""
    return {
        name for name in weights if name in adapted or (name in fused and name.rpartition(".")[0] in adapted)
    }


def _linear_weights(model: nn.Module) -> tuple[dict[str, int], set[str]]:
    """Returns the weights of each linear layer but the head, by name, and which are fused experts."""
    head, sizes, fused = output_head(model), dict[str, int](), set[str]()
    head = head.base_layer if isinstance(head, TokenRows) else head
    for full, module in model.named_modules():
        name = full
        while name.endswith(".base_layer"):  # PEFT wraps fused experts once for each of their parameters
            name = name.removesuffix(".base_layer")
        if isinstance(module, nn.Linear) and module is not head and not name.endswith(_OF_ADAPTERS):
            sizes.setdefault(name, weight_count(module.weight))
        elif not isinstance(module, nn.Conv1d):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and min(parameter.shape) > 1:
                    sizes[f"{name}.{key}"] = parameter.numel()
                    fused.add(f"{name}.{key}")
    return sizes, fused


def _part(name: str, fused: set[str], adapted: list[str]) -> str:
    """Returns the outermost part of the model around a layer that is left out as a whole, for all blocks."""
    part = name.rpartition(".")[0] if name in fused else name
    kept = adapted if name in fused else [*adapted, *fused]
    while name not in fused and (outer := part.rpartition(".")[0]):
        if any(layer.startswith(f"{outer}.") for layer in kept):
            break
        part = outer
    return re.sub(r"\.\d+(?=\.|$)", ".*", part) + (" in fused weights" if name in fused else "")
