"""All adapter methods, and what is done to a model whichever of them adapted it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.injection import output_head
from moka_pl.adapters.layer import WrappedLayer
from moka_pl.adapters.methods.base import AdaptedLayer, AdapterMethod, check_dtype
from moka_pl.adapters.methods.full import FullMethod
from moka_pl.adapters.methods.moka import MokaMethod
from moka_pl.adapters.methods.peft import PeftMethod
from moka_pl.adapters.patterns import unmatched
from moka_pl.backbone.linear_layers import linearise, restore
from moka_pl.backbone.quantization import check_dense, release_saving, settle_saving
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.lm.architecture import QUERY_VALUE
from moka_pl.lm.compiled import uncompiled
from moka_pl.lm.experts import split_names
from moka_pl.utils import warn

#: In the order in which they are asked; PEFT's take every kind that the others do not know.
METHODS: tuple[type[AdapterMethod], ...] = (MokaMethod, FullMethod, PeftMethod)


def method_of(config: Any) -> AdapterMethod:
    """Returns the method of a ``MokaConfig``, a ``FullFineTuning`` or a configuration of PEFT's.

    Raises:
        ConfigError: If it is something else.
    """
    for method in METHODS:
        if method.accepts(config):
            return method(config)
    raise ConfigError(
        f"adapter is a {type(config).__name__}; use MokaConfig, FullFineTuning or a PEFT configuration such "
        "as peft.LoraConfig"
    )


def method_in(model: nn.Module) -> AdapterMethod | None:
    """Returns the method by which a model was adapted; None for a plain one."""
    plain = uncompiled(model)
    return next((used for method in METHODS if (used := method.in_model(plain)) is not None), None)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Returns the adapted layers of any method by name."""
    plain = uncompiled(model)
    return {name: layer for method in METHODS for name, layer in method.layers(plain).items()}


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdaptedLayer | None]]:
    """Yields a model's modules by name, but for what lies within adapted layers.

    Beside each stands the adapted layer that it is, or None.
    """
    layers, inside = adapted_layers(model), ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        layer = layers.get(name)
        if layer is not None:
            inside = f"{name}."
        yield name, module, layer


def config_from(stored: Mapping[str, Any]) -> Any:
    """Builds a configuration from the contents of ``adapter_config.json``.

    Raises:
        AdapterError: If the method needs PEFT and PEFT is missing or does not know it.
    """
    configs = (method.read_config(stored) for method in METHODS)
    return next(config for config in configs if config is not None)


def inject_adapter(
    model: nn.Module,
    config: Any,
    dtype: torch.dtype = torch.float32,
    saved: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Freezes a model and injects adapters, in place; returns the names of the adapted layers.

    Args:
        model: The model; afterwards only the adapters' tensors require gradients.
        config: A ``MokaConfig``, a ``FullFineTuning`` or a PEFT configuration.
        dtype: Dtype of the trainable tensors.
        saved: A saved adapter's tensors, perhaps on the meta device, that will be loaded next: its layers are
            adapted, and the model is left as it is if they do not fit.

    Raises:
        AdapterError: If no layer matches, a match cannot be adapted, or the model already has adapters.
        ConfigError: If a listed filter does not fit a layer, or nothing trains in this dtype.
    """
    check_dtype(dtype)
    model = uncompiled(model)
    if present := adapted_layers(model):
        raise AdapterError(f"the model already has adapters (at {next(iter(present))}); unload them first")
    linearise(model)
    names = [*dict(model.named_modules()), *split_names(model)]
    try:
        adapted = method_of(config).inject(model, dtype, saved)
    except Exception:
        restore(model)
        raise
    release_saving(model)
    if saved is None:
        _warn_of_unmatched(names, config)
    return adapted


def _warn_of_unmatched(names: list[str], config: Any) -> None:
    """Tells which entries of a list name nothing: a layer with a slip in its name is not adapted."""
    for option in ("target_modules", "exclude_modules"):
        entries = getattr(config, option, None)
        pattern = sorted(entries) if isinstance(entries, set) else entries  # PEFT makes sets of lists
        if pattern == QUERY_VALUE:  # which stand for the family's own names
            continue
        if missed := unmatched(names, pattern):
            warn(f"{option}: this model has no {', '.join(missed)}; correct the name, or leave it out")


def merge(model: nn.Module) -> None:
    """Merges every layer's update into a dense copy of its weight (undone by :func:`unmerge`).

    A fully fine-tuned model is its own merged model.

    Raises:
        AdapterError: If another library has quantised one of them; none is then merged.
    """
    _check_mergeable(model)
    for layer in adapted_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes :func:`merge`, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


def unload(model: nn.Module, merge: bool = False) -> None:
    """Removes the adapters, in place; ``merge`` leaves dense layers ``W + ΔW`` instead of the frozen ones.

    What the model saves from then on, transformers reads back; where it could not, saving is refused.

    Raises:
        AdapterError: If the base itself was trained and ``merge`` is False, or another library has quantised
            a layer that is to be merged. The model is then unchanged.
    """
    model = uncompiled(model)
    if merge:
        _check_mergeable(model)
    else:
        _check_base_is_frozen(model)
    if (method := method_in(model)) is not None:
        if merge and is_untied(model):
            untie(model.config)
        method.unload(model, merge)
        restore(model)
        settle_saving(model, merge)


def _check_mergeable(model: nn.Module) -> None:
    """Refuses to merge into what has no dense weight, before any layer is merged."""
    for layer in adapted_layers(model).values():
        if isinstance(layer, WrappedLayer):
            check_dense(layer.base_layer)


def is_untied(model: nn.Module) -> bool:
    """Whether adapters change the embedding or the output head, and not both as one weight."""
    layers = adapted_layers(model)
    if (head := output_head(model)) is None or not layers:
        return False
    ends = head, model.get_input_embeddings()  # type: ignore[operator]
    adapted = [layer for name, layer in layers.items() if model.get_submodule(name) in ends]
    return bool(adapted) and all(getattr(layer, "owns_factors", True) for layer in adapted)


def untie(config: Any) -> None:
    """Has a model's configuration say that the output head's weight is its own."""
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Disables the adapters within the block.

    Raises:
        AdapterError: If the base itself was trained.
    """
    _check_base_is_frozen(model)
    before = [(layer, layer.enabled) for layer in adapted_layers(model).values()]
    for layer, _ in before:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def _check_base_is_frozen(model: nn.Module) -> None:
    method = method_in(model)
    if method is not None and not method.keeps_base:
        raise AdapterError(f"{method.title} has changed the base's own weights; load the base again")
