"""The linear weights of a model: layers that are linear without being ``nn.Linear``, and how all are stored.

The Conv1D of GPT-2 becomes a linear layer, and so do quantised experts: all else knows one kind only. What a
model is on disk stays as transformers has it.
"""

import copy
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moka_pl.backbone.quantization import (
    Quantization,
    is_quantised,
    is_stored_quantised,
    quantised_linear,
    quantises_loading,
    weight_count,
)
from moka_pl.lm.experts import SplitExperts, fuse_experts, split_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

#: Share of the linear weights from which on it is said that they are not quantised, and parts that are named.
_WORTH_SAYING, _NAMED = 0.01, 4


def linearise(model: nn.Module) -> None:
    """Replaces each Conv1D of a model, whose weight is (n, m), by an ``nn.Linear`` with the same numbers."""
    for name, module in list(model.named_modules()):
        if name and is_conv1d(module):  # a model that is one itself has no place for another
            model.set_submodule(name, _linear(module))


def restore(model: nn.Module) -> None:
    """Undoes :func:`linearise`, and splitting of experts, but for quantised layers."""
    for name in conv1d_names(model):
        if type(layer := model.get_submodule(name)) is nn.Linear:
            model.set_submodule(name, _conv1d(layer))
    fuse_experts(model)


def quantise_rest(model: nn.Module, quantization: Quantization, double: bool, dtype: torch.dtype) -> None:
    """Quantises what transformers leaves as it is: fused experts, one by one, and kinds of ``nn.Linear``.

    What transformers does not quantise at all, it quantises all here, but for the output head.

    Args:
        model: The model, or a block of it, otherwise quantised.
        quantization: How linear weights are stored.
        double: Whether the block scales are quantised, too.
        dtype: Compute dtype.
    """
    split_experts(model)
    blocks = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, SplitExperts))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or is_quantised(layer) or layer is head:
            continue
        # Plain layers that transformers leaves, such as routers of some families, are meant to be.
        meant = quantises_loading(quantization) and not name.startswith(blocks)
        if not meant if type(layer) is nn.Linear else _multiplies(layer):
            new: Any = quantised_linear(layer, layer.weight.detach(), quantization, double, dtype)
            new.bias = layer.bias
            model.set_submodule(name, new.train(layer.training))


@torch.no_grad()
def _multiplies(layer: nn.Linear) -> bool:
    """Whether a kind of linear layer computes W x + b, and no more."""
    x = torch.ones(1, layer.in_features).to(layer.weight)  # (1, n)
    out, expected = layer(x), nn.functional.linear(x, layer.weight, layer.bias)  # (1, m)
    alike = isinstance(out, torch.Tensor) and out.shape == expected.shape
    return alike and torch.allclose(out, expected, rtol=1e-2)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers (which is not imported for other modules)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def conv1d_names(model: nn.Module) -> list[str]:
    """Returns the names of the layers that are a Conv1D in a new model of this class."""
    kind = type(model)
    if not hasattr(sys.modules.get(kind.__module__), "Conv1D") or not hasattr(model, "config"):
        return []
    with torch.device("meta"):
        new = kind(copy.deepcopy(model.config))
    return [name for name, module in new.named_modules() if is_conv1d(module)]


def _linear(layer: "Conv1D") -> nn.Linear:
    n, m = layer.weight.shape
    linear = nn.Linear(n, m, device="meta")
    linear.weight = _transposed(layer.weight)  # (m, n)
    linear.bias = layer.bias
    return linear.train(layer.training)


def _conv1d(layer: nn.Linear) -> "Conv1D":
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features)
    conv.weight = _transposed(layer.weight)  # (n, m)
    conv.bias = layer.bias
    return conv.train(layer.training)


def _transposed(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)


def describe_storage(model: "PreTrainedModel", asked: Quantization) -> str:
    """Describes how a model's linear weights are stored, and the share of those that are stored otherwise.

    Args:
        model: The model without adapters.
        asked: How linear weights were to be stored.
    """
    if asked == "none":
        return "linear weights none"
    quantised, other = _weights_by_storage(model)
    share = other.total() / max(1, quantised + other.total())
    if share < _WORTH_SAYING:
        return f"linear weights {asked}"
    parts = [name for name, _ in other.most_common(_NAMED)] + ["..."] * (len(other) > _NAMED)
    if not quantised:
        return f"linear weights none, as {asked} cannot store them ({', '.join(parts)})"
    return f"linear weights {asked}, but {share:.0%} of the weights are not ({', '.join(parts)})"


def quantised_share(model: "PreTrainedModel") -> float:
    """Returns the share of a model's linear weights, those of experts included, that is quantised."""
    quantised, other = _weights_by_storage(model)
    return quantised / max(1, quantised + other.total())


def _weights_by_storage(model: "PreTrainedModel") -> tuple[int, Counter[str]]:
    """Returns the number of quantised weights, and that of other matrices by name, for all blocks."""
    outside = {id(getattr(model.get_output_embeddings(), "weight", None))}  # those of images have none
    outside |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.Conv1d)}
    quantised, other = 0, Counter[str]()
    for name, parameter in model.named_parameters():
        if is_stored_quantised(parameter):
            quantised += weight_count(parameter)
        elif parameter.ndim > 1 and id(parameter) not in outside:
            other[re.sub(r"\.\d+(?=\.)", ".*", name)] += parameter.numel()
    return quantised, other
