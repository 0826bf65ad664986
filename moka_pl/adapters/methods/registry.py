"""Which method a configuration, a model or a directory speaks of, and what all methods have in common."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from moka_pl._compat import disable_adapters
from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.injection import moka_layers, replace_module
from moka_pl.adapters.methods.base import AdapterMethod
from moka_pl.adapters.methods.full import FullFineTuning, FullMethod, is_trained
from moka_pl.adapters.methods.moka import MokaMethod
from moka_pl.adapters.methods.peft_layers import merge_layer, merged_linear_of, peft_layers, unmerge_layer
from moka_pl.errors import AdapterError, ConfigError


def method_of(config: Any) -> AdapterMethod:
    """The method that a configuration configures.

    Args:
        config: A ``MokaConfig``, a ``FullFineTuning`` or a configuration of PEFT's.

    Raises:
        ConfigError: If it is something else.
    """
    if isinstance(config, MokaConfig):
        return MokaMethod(config)
    if isinstance(config, FullFineTuning):
        return FullMethod(config)
    if "peft" in sys.modules:
        from peft import PeftConfig

        if isinstance(config, PeftConfig):
            from moka_pl.adapters.methods.peft import PeftMethod

            return PeftMethod(config)
    raise ConfigError(
        f"adapter is a {type(config).__name__}; give a MokaConfig, a FullFineTuning or a configuration of "
        "PEFT such as peft.LoraConfig"
    )


def method_in(model: nn.Module) -> AdapterMethod | None:
    """The method by which a model was adapted; None for a plain one."""
    if moka_layers(model):
        return MokaMethod(MokaConfig())  # what it does to a model does not depend on the options
    if peft_layers(model):
        return method_of(model.peft_config["default"])  # type: ignore[index]
    return FullMethod(FullFineTuning()) if is_trained(model) else None


def config_from(described: Mapping[str, Any]) -> Any:
    """Builds a configuration from the contents of ``adapter_config.json``.

    Raises:
        AdapterError: If the method needs PEFT and PEFT does not know it.
    """
    kinds: dict[str, type] = {"MOKA": MokaConfig, "FULL": FullFineTuning}
    kind = kinds.get(described["peft_type"])
    if kind is None:
        from moka_pl.adapters.methods.peft import peft_config

        return peft_config(described)
    return kind(**{f.name: described[f.name] for f in fields(kind) if f.name in described})


def inject_adapter(model: nn.Module, config: Any, dtype: torch.dtype = torch.float32) -> list[str]:
    """Freezes the model and puts adapters into it, in place.

    Args:
        model: The model; afterwards only the adapters' tensors require gradients.
        config: What to adapt and how: a ``MokaConfig``, a configuration of PEFT's or a ``FullFineTuning``.
        dtype: Dtype of the trainable tensors.

    Returns:
        Names of the adapted layers.

    Raises:
        AdapterError: If nothing matches, a match cannot be adapted, or the model has adapters already.
        ConfigError: Where a listed filter does not fit into a layer (the message names it).
    """
    present = [*moka_layers(model), *peft_layers(model)]
    if present:
        raise AdapterError(f"the model has adapters already (at {present[0]}); unload them first")
    return method_of(config).inject(model, dtype)


def merge(model: nn.Module) -> None:
    """Folds every layer's update into a dense copy of its weight (undone by :func:`unmerge`).

    A fully fine-tuned model is its own merged model.
    """
    for layer in moka_layers(model).values():
        layer.merge()
    for name, other in peft_layers(model).items():
        merge_layer(other, name)


def unmerge(model: nn.Module) -> None:
    """Undoes :func:`merge`, bit for bit."""
    for layer in moka_layers(model).values():
        layer.unmerge()
    for other in peft_layers(model).values():
        unmerge_layer(other)


def unload(model: nn.Module, merge: bool = False) -> None:
    """Takes the adapters out, in place.

    Args:
        model: A model with adapters.
        merge: Leave dense layers ``W + ΔW`` instead of the frozen base.

    Raises:
        AdapterError: If the base itself was trained and is wanted back.
    """
    if is_trained(model) and not merge:
        raise AdapterError("full fine-tuning has changed the base itself; load the base anew")
    for name, layer in moka_layers(model).items():
        if merge:
            layer.merge()
        kept = layer.merged_layer if merge else layer.base_layer
        assert kept is not None
        replace_module(model, name, kept)
    others = peft_layers(model)
    for name, other in others.items():
        if merge:
            merge_layer(other, name)
        replace_module(model, name, merged_linear_of(other) if merge else other.get_base_layer())
    if others:
        del model.peft_config  # PEFT would warn of a second adapter


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as its frozen base.

    Raises:
        AdapterError: If the base itself was trained.
    """
    if is_trained(model):
        raise AdapterError("full fine-tuning has changed the base itself; load the base anew to compare")
    layers = moka_layers(model).values()
    others = peft_layers(model).values()
    before = [layer.enabled for layer in layers]
    # Not PEFT's enable_adapters, which changes what requires gradients.
    hidden = [(other, other.disable_adapters, other.__dict__.pop("forward", None)) for other in others]
    for layer in layers:
        layer.enabled = False
    for other in others:
        disable_adapters(other, True)
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        for other, disabled, merged in hidden:
            disable_adapters(other, disabled)
            if merged is not None:
                other.__dict__["forward"] = merged
