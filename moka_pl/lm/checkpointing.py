"""Layers that are computed again in the backward pass, which then need to keep their inputs alone."""

from typing import TYPE_CHECKING, Any

from moka_pl.errors import ConfigError
from moka_pl.lm.offload import offload_layer_inputs

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

#: What options of models and of their layers are called by which random numbers are drawn.
_DRAWING = ("drop", "jitter")


def checkpoint_layers(model: "PreTrainedModel", offload: bool = False) -> None:
    """Has the layers of a model computed again in the backward pass.

    Without reentrance: gradients reach the adapters although the embeddings need none, and DDP sees every
    parameter once. The state of the random generators is kept for the second time only where layers draw,
    so that steps without dropout can be recorded as CUDA graphs.

    Args:
        model: A causal language model, with its adapters.
        offload: Whether the layers' inputs wait in the host's memory.

    Raises:
        ConfigError: If transformers cannot do so with this kind of model.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"gradient_checkpointing: transformers has none for {type(model).__name__}; set it to false"
        )
    options = {"use_reentrant": False, "preserve_rng_state": draws(model)}
    # The older name is the only one in transformers 5.14, and warns in 5.24.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)(options)
    if offload:
        offload_layer_inputs(model)


def is_checkpointed(model: "nn.Module") -> bool:
    """Returns whether layers of a model are computed again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def draws(model: "PreTrainedModel") -> bool:
    """Returns whether a layer of a model may draw random numbers in training."""
    options = model.config.get_text_config().to_dict()
    return _draws_by(options) or any(
        _draws_by(vars(module)) or ("Drop" in type(module).__name__ and bool(getattr(module, "p", 0)))
        for module in model.modules()
    )


def _draws_by(options: dict[str, Any]) -> bool:
    """Whether one of the options, or of PEFT's by adapter, is the probability of a draw."""
    return any(
        isinstance(number, float) and number != 0.0
        for name, value in options.items()
        if any(part in name for part in _DRAWING)
        for number in (value.values() if isinstance(value, dict) else [value])
    )
