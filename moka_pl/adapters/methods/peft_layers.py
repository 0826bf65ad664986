"""Layers of PEFT's, as adapted layers of this package: switched off and on, merged and unmerged."""

import copy
from typing import Any

import torch
from torch import nn

from moka_pl._compat import disable_adapters
from moka_pl.adapters.vocabulary.embedding import scaled_rows
from moka_pl.backbone.quantization import is_quantised, layer_compute_dtype
from moka_pl.errors import AdapterError

#: Where a merged layer's ``forward`` waits while its adapter is disabled.
_ASIDE = "_moka_merged_forward"


class PeftLayer:
    """A layer of PEFT's, as an :class:`moka_pl.adapters.methods.base.AdaptedLayer`."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module

    @property
    def enabled(self) -> bool:
        """Whether the adapter is applied."""
        return not self.module.disable_adapters

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        # Not PEFT's enable_adapters, which changes what requires gradients.
        disable_adapters(self.module, not enabled)
        source, target = (_ASIDE, "forward") if enabled else ("forward", _ASIDE)
        if (forward := self.module.__dict__.pop(source, None)) is not None:
            self.module.__dict__[target] = forward

    @property
    def base_layer(self) -> nn.Module:
        """The frozen layer."""
        base: nn.Module = self.module.get_base_layer()
        return base

    @property
    def merged_layer(self) -> nn.Module | None:
        """The dense layer that stands for both, if they are merged."""
        name = self._merged_name()
        return None if name is None else self.module.__dict__[name].dense

    def _merged_name(self) -> str | None:
        """Returns the attribute that holds the merged layer's ``forward``."""
        attributes = self.module.__dict__
        return next((n for n in ("forward", _ASIDE) if isinstance(attributes.get(n), _MergedForward)), None)

    def merge(self) -> None:
        """Lets the layer compute as one dense layer, without touching its frozen weight.

        PEFT's own merging changes the frozen weight, which in four bits is rounded again and cannot be had
        back. Every linear layer with an adapter maps x to ``W' x + b'``: W' is what it makes of the identity.
        The rows of an embedding's are what it makes of each token.

        Raises:
            AdapterError: If the layer is of another kind.
        """
        if self.merged_layer is not None:
            return
        layer, base = self.module, self.base_layer
        if isinstance(base, nn.Embedding):
            layer.__dict__["forward"] = _MergedForward(_merged_embedding(layer, base), any_dtype=False)
            return
        if not isinstance(base, nn.Linear):
            raise AdapterError(f"{self.name} is a {type(base).__name__}, which cannot be merged")
        dtype = layer_compute_dtype(base) if is_quantised(base) else base.weight.dtype
        was_training = layer.training
        layer.eval()
        with torch.no_grad():
            eye = torch.eye(base.in_features, dtype=dtype, device=base.weight.device)
            bias = layer(eye.new_zeros(1, base.in_features))  # (1, m)
            weight = layer(eye) - bias  # (n, m)
        layer.train(was_training)
        dense = nn.Linear(base.in_features, base.out_features, device="meta")
        dense.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        dense.bias = nn.Parameter(bias[0], requires_grad=False)
        layer.__dict__["forward"] = _MergedForward(dense, any_dtype=is_quantised(base))

    def unmerge(self) -> None:
        """Undoes :meth:`merge`."""
        if (name := self._merged_name()) is not None:
            del self.module.__dict__[name]


class SavedModule(PeftLayer):
    """A module that PEFT trains a copy of (``modules_to_save``)."""

    @property
    def base_layer(self) -> nn.Module:
        """The frozen module."""
        base: nn.Module = self.module.original_module
        return base

    @property
    def merged_layer(self) -> Any:
        """The trained copy, if it is asked for."""
        return self.module.modules_to_save["default"]

    def merge(self) -> None:
        """Does nothing: the trained copy needs no other."""

    def unmerge(self) -> None:
        """Does nothing."""


@torch.no_grad()
def _merged_embedding(layer: nn.Module, base: nn.Embedding) -> nn.Embedding:
    """Returns a copy of an embedding, of its own class, whose rows are those of the adapted one."""
    tokens = torch.arange(base.num_embeddings, device=base.weight.device)
    scale = scaled_rows(base, torch.ones_like(base.weight[:1, :1]))  # (1, 1)
    update = (layer(tokens) - base(tokens)) / scale  # (V, d)
    total = nn.Parameter(base.weight + update.to(base.weight.dtype), requires_grad=False)
    return copy.deepcopy(base, {id(base.weight): total})


class _MergedForward:
    """Stands in for a layer's ``forward``."""

    def __init__(self, dense: Any, any_dtype: bool) -> None:
        self.dense = dense
        self.any_dtype = any_dtype  # 4-bit layers take any dtype and return it

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor
        out = self.dense(x.to(self.dense.weight.dtype)).to(x.dtype) if self.any_dtype else self.dense(x)
        return out


def keep_dtype(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """A forward hook that returns the input's dtype: on 4-bit layers IA3 and RoAd return float32.

    Args:
        module: The layer.
        inputs: What it was given.
        output: What it made of that.
    """
    return output.to(inputs[0].dtype)
