"""What there is to know of a model before it is loaded."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moka_pl.backbone.checks import read_config
from moka_pl.backbone.config import BackboneConfig
from moka_pl.backbone.loading import loading
from moka_pl.backbone.quantization import QuantisedError, check_made, stored_quantization
from moka_pl.backbone.random_weights import shape_config
from moka_pl.backbone.weight_files import WeightFiles, read_weight_files
from moka_pl.errors import BackboneError, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass
class Description:
    """A model before it is loaded.

    Attributes:
        shape: Its configuration.
        location: Where transformers finds its weights; empty for random ones.
        files: Its weight files; None where they are not here.
    """

    shape: "PretrainedConfig"
    location: dict[str, Any]
    files: WeightFiles | None

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the checkpoint is quantised already, as its ``config.json`` says."""
        stored = getattr(self.shape, "quantization_config", None)
        return stored if isinstance(stored, Mapping) and stored else None

    def settle(self, config: BackboneConfig) -> tuple[BackboneConfig, list[str]]:
        """Returns the options that apply to this model, and what there is to say of them."""
        notes = []
        for shape in (self.shape, self.shape.get_text_config()):
            if getattr(shape, "output_router_logits", False):
                shape.output_router_logits = False
                notes.append(f"{config.name}: the auxiliary loss of its router is not part of the loss here")
        stored = self.quantization
        if stored is None:
            check_made(config.quantization, config.name)
            return config, notes
        kind, double = stored_quantization(stored, config.name)
        if kind != config.quantization:
            raise QuantisedError(config.name, kind, config.quantization)
        notes.append(f"{config.name} is quantised already: {kind}, as its checkpoint says")
        return replace(config, quantization=kind, double_quantization=double), notes


def describe(config: BackboneConfig, location: dict[str, Any]) -> Description:
    """Reads the configuration of a model, and the heads of its weight files.

    Args:
        config: Its options.
        location: Where transformers finds it; empty for random weights.

    Raises:
        BackboneError: If a file is damaged, or the model is no causal language model with layers.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.weights == "random":
        shape, files = shape_config(config.name), None
        if hasattr(shape, "quantization_config"):
            del shape.quantization_config  # random weights are quantised as the options say
    else:
        folder = Path(location["pretrained_model_name_or_path"])
        files = read_weight_files(folder) if folder.is_dir() else None
        shape = read_config(config.name, **location)
    if type(shape) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BackboneError(
            f"{config.name} cannot be loaded: transformers has no AutoModelForCausalLM of model_type "
            f"{shape.model_type!r}; give a causal language model"
        )
    layers = getattr(shape.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers < 1:
        raise BackboneError(
            f"{config.name} cannot be loaded: config.json has {layers!r} layers; copy the model again"
        )
    return Description(shape, location, files)


def build_empty(
    shape: "PretrainedConfig", config: BackboneConfig, dtype: torch.dtype, notes: list[str]
) -> tuple["PreTrainedModel", BackboneConfig]:
    """Builds the model without memory for its weights, with an attention that it supports.

    Args:
        shape: Its configuration.
        config: Its options.
        dtype: Compute dtype.
        notes: Where it is said if another attention takes the place of the one that was asked for.

    Returns:
        The model on the meta device, and the options with its attention.

    Raises:
        BackboneError: If the attention is not supported; instead of ``sdpa`` a model may get ``eager``.
    """
    from transformers import AutoModelForCausalLM

    shape = copy.deepcopy(shape)
    if hasattr(shape, "quantization_config"):
        del shape.quantization_config

    def build(attention: str) -> "PreTrainedModel":
        options = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
        with torch.device("meta"):
            return cast("PreTrainedModel", AutoModelForCausalLM.from_config(shape, **options))

    with loading(config.name):
        try:
            return build(config.attention), config
        except (ValueError, ImportError) as error:
            works = next((other for other in ("sdpa", "eager") if _works(build, other)), None)
            if works is None:  # it is not the attention
                raise
            if config.attention != "sdpa":
                raise BackboneError(
                    f"{config.name} cannot be loaded: {one_line(error).rstrip('. ')}; set "
                    f"--model.backbone.attention {works}"
                ) from error
    notes.append(f"{config.name} does not support attention sdpa; it computes with {works}")
    return build(works), replace(config, attention=cast(Any, works))


def _works(build: Callable[[str], Any], attention: str) -> bool:
    try:
        build(attention)
    except (ValueError, ImportError):
        return False
    return True
