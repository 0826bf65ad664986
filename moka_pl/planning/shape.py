"""The sizes of a base model: from local files, known ones, or ``config.json`` alone."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.checks import read_config
from moka_pl.backbone.description import Description, build_empty
from moka_pl.backbone.folder import check_folder
from moka_pl.backbone.hub import reach_model
from moka_pl.backbone.linear_layers import linearise
from moka_pl.backbone.load import load_tokenizer
from moka_pl.backbone.loading import cache_root
from moka_pl.backbone.random_weights import SHAPES, shape_config
from moka_pl.backbone.smollm2 import SHORT_NAME, local_gguf
from moka_pl.errors import BackboneError
from moka_pl.hub import offline_mode
from moka_pl.lm.experts import split_experts
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: Hub models whose sizes are known, by the end of their id, in lower case.
KNOWN = {
    SHORT_NAME: "smollm2-135m",
    "smollm2-135m": "smollm2-135m",
    "llama-2-7b-hf": "llama2-7b",
    "llama-2-7b-chat-hf": "llama2-7b",
    "llama-2-13b-hf": "llama2-13b",
    "llama-2-13b-chat-hf": "llama2-13b",
    "llama-2-70b-hf": "llama2-70b",
    "llama-2-70b-chat-hf": "llama2-70b",
    "meta-llama-3-8b": "llama3-8b",
    "meta-llama-3-8b-instruct": "llama3-8b",
    "llama-3.1-8b": "llama3-8b",
    "llama-3.1-8b-instruct": "llama3-8b",
    "llama-3.2-1b": "llama3-1b",
    "llama-3.2-1b-instruct": "llama3-1b",
}


def empty_model(
    config: BackboneConfig, dtype: torch.dtype, notes: list[str]
) -> tuple["PreTrainedModel", BackboneConfig]:
    """Builds the base without memory for its weights.

    Args:
        config: Its options.
        dtype: Compute dtype.
        notes: Where it is said how the sizes were found, if not from the model's own configuration.

    Returns:
        The model on the meta device, and the options that apply to it.

    Raises:
        BackboneError: If nothing tells its sizes.
    """
    shape = _shape(config, notes)
    if config.weights == "pretrained":
        config, more = Description(shape, {}, None).settle(config)
        notes += more
    model, config = build_empty(shape, config, dtype, notes)
    linearise(model)
    if config.quantization != "none":
        split_experts(model)
    return model, config


def tokenizer_at_hand(config: BackboneConfig) -> "PreTrainedTokenizerBase | None":
    """Returns the base's tokenizer if it can be read without a download, else None."""
    if config.name == SHORT_NAME and local_gguf(cache_root(config.cache_dir)) is None:
        return None
    with suppress(BackboneError), offline_mode():
        return load_tokenizer(config, weights=False)
    return None


def stored_bytes(config: BackboneConfig, parameters: int) -> int:
    """Returns the bytes of the weight files that a CPU maps while it loads the base; 0 for random weights.

    Args:
        config: The base's options.
        parameters: Its number of parameters, where the files are not here.
    """
    if config.weights == "random":
        return 0
    folder = expanded(config.name)
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
    if files:
        return sum(file.stat().st_size for file in files)
    converted = config.name == SHORT_NAME or config.name.endswith(".gguf")  # to float32
    return parameters * (4 if converted else 2)


def _shape(config: BackboneConfig, notes: list[str]) -> "PretrainedConfig":
    """Returns the configuration of the base."""
    name = config.name
    if config.weights == "random":
        return shape_config(name)
    folder = expanded(name)
    if folder.is_dir():
        check_folder(folder)
        return _read(name, pretrained_model_name_or_path=str(folder))
    if name.endswith(".gguf"):
        if not folder.is_file():
            raise BackboneError(f"{folder}: no such GGUF file")
        return _read(name, pretrained_model_name_or_path=str(folder.parent), gguf_file=folder.name)
    if name in SHAPES:
        raise BackboneError(f"{name!r} is a shape without weights; set weights: random, or give a hub id")
    known = KNOWN.get(name.rpartition("/")[2].lower())
    if name != SHORT_NAME:
        with suppress(BackboneError), offline_mode():
            if (cached := reach_model(name, config.revision)) is not None:
                return _read(name, pretrained_model_name_or_path=str(cached))
    if known is not None:
        notes.append(f"{name}: sizes of the known shape {known}; its config.json was not read")
        return shape_config(known)
    try:
        cached = reach_model(name, config.revision)
    except BackboneError as error:
        raise BackboneError(
            f"{error}; to plan, its config.json in a folder is enough (--model.backbone.name FOLDER), or a "
            f"known shape: --model.backbone.weights random --model.backbone.name {next(iter(SHAPES))} (also "
            f"{', '.join([*SHAPES][1:])})"
        ) from error
    return _read(name, pretrained_model_name_or_path=str(cached or name), revision=config.revision or "main")


def _read(name: str, **location: Any) -> "PretrainedConfig":
    """Reads a configuration of sizes that models have; of a hub model nothing else is fetched.

    Args:
        name: The model's name, for messages.
        **location: Where transformers finds it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    shape = read_config(name, **location)
    if type(shape) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BackboneError(
            f"{name} cannot be planned: transformers has no AutoModelForCausalLM of model_type "
            f"{shape.model_type!r}; give a causal language model"
        )
    return shape
