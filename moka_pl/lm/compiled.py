"""Decoder layers compiled for training by ``torch.compile``: few kernels for all that lies between products.

The layers of a model are alike, so one graph of a layer serves them all; that compiles in seconds, where a
whole model takes minutes. A first batch of another size compiles a graph for any size. The layers stay the
modules they were, and only steps with gradients use the graphs: evaluation and generation go on as before.
"""

import os
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from shutil import which
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from moka_pl.errors import BackboneError, ConfigError
from moka_pl.lm.replaced_forward import forward_maker, replace_forward, restore_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Compile = Literal["none", "layers"]
Model = TypeVar("Model", bound=nn.Module)

_COMPILERS = ("g++", "clang++")


def check_compiler(device: torch.device) -> None:
    """Refuses to compile where nothing can.

    Raises:
        ConfigError: Without Triton for a GPU, or without a C++ compiler for a CPU.
    """
    missing = None
    if device.type != "cpu":
        missing = None if find_spec("triton") else "Triton"
    elif not any(map(which, (os.environ.get("CXX", "g++"), *_COMPILERS))):
        missing = "a C++ compiler (g++ or clang++)"
    if missing is not None:
        raise ConfigError(
            f"backbone.compile is layers, which needs {missing}; install it, or set "
            "--model.backbone.compile none"
        )


def compile_layers(model: "PreTrainedModel", backend: str = "inductor") -> int:
    """Has the decoder layers of a model compiled where they train; returns their number.

    Args:
        model: The model, with its adapters.
        backend: What compiles, of ``torch.compile``'s backends.

    Raises:
        BackboneError: If the model has no list of layers.
    """
    restore_layers(model)
    layers = [layer for layer in _decoder_layers(model) if "forward" not in vars(layer)]
    if not layers:
        raise BackboneError(
            f"{type(model).__name__} has no list of decoder layers to compile; set "
            "--model.backbone.compile none"
        )
    for layer in layers:
        replace_forward(layer, _compiled, backend)
    return len(layers)


def restore_layers(model: "PreTrainedModel") -> None:
    """Undoes :func:`compile_layers`."""
    for layer in _decoder_layers(model):
        if forward_maker(layer) is _compiled:
            restore_forward(layer)


def uncompiled(model: Model) -> Model:
    """Returns the model within what ``torch.compile(model)`` returned, and any other model as it is.

    They share all modules, but within the former every name begins with ``_orig_mod.``.
    """
    inner: Any = model._modules.get("_orig_mod")
    return model if inner is None else inner


def _decoder_layers(model: "PreTrainedModel") -> list[nn.Module]:
    """The layers of the decoder, in its own lists."""
    lists = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return [layer for one in lists for layer in one]


def _compiled(kind: Any, backend: str) -> Callable[..., Any]:
    """The forward method of a class of layers, compiled where gradients are computed in training mode."""
    forward = kind.forward
    compiled = torch.compile(forward, backend=backend, dynamic=True)

    @wraps(forward)
    def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        trains = layer.training and torch.is_grad_enabled()
        return (compiled if trains else forward)(layer, *args, **kwargs)

    return run
