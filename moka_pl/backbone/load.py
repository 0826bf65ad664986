"""Builds the frozen base model and its tokenizer from a configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moka_pl.backbone.bundled import SHORT_NAME, bundled_gguf
from moka_pl.backbone.byte_tokenizer import byte_tokenizer
from moka_pl.backbone.cache import cache_root
from moka_pl.backbone.config import BackboneConfig
from moka_pl.backbone.gguf import convert_gguf
from moka_pl.backbone.hub import reach_model
from moka_pl.backbone.random_weights import random_model
from moka_pl.backbone.shapes import SHAPES
from moka_pl.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Backbone:
    """A frozen base model with its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"


def compute_dtype(config: BackboneConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of activations: the chosen one, or for ``auto`` the best of the device."""
    if config.compute_dtype != "auto":
        return cast(torch.dtype, getattr(torch, config.compute_dtype))
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def load_backbone(config: BackboneConfig, device: torch.device | str = "cpu") -> Backbone:
    """Loads, converts or draws the base model onto one device, and quantises its linear layers.

    Args:
        config: What to load and how to store it.
        device: Where the whole model lives (every rank of a data-parallel run has its own copy).

    Returns:
        Model and tokenizer; the model is frozen.

    Raises:
        BackboneError: If the model is absent, gated or unreadable, with the remedy.
    """
    device = torch.device(device)
    dtype = compute_dtype(config, device)
    if config.weights == "random":
        model = random_model(config, dtype, device)
    else:
        model = _pretrained(config, dtype, device)
    model.requires_grad_(False)
    model.config.use_cache = False
    return Backbone(model, load_tokenizer(config))


def load_tokenizer(config: BackboneConfig) -> "PreTrainedTokenizerBase":
    """Loads the base model's tokenizer alone; it always has a padding token.

    Raises:
        BackboneError: As :func:`load_backbone`.
    """
    from transformers import AutoTokenizer

    if config.weights == "random" and (config.name in SHAPES or not _has_tokenizer(config.name)):
        return byte_tokenizer()
    where = _where(config)
    tokenizer = _load(config.name, lambda: AutoTokenizer.from_pretrained(**where))
    if tokenizer.pad_token is None:
        # Padding is never attended to nor trained on, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_source(config: BackboneConfig) -> str:
    """Returns what transformers can load: a hub id, or a folder (converted first for GGUF files)."""
    cache = cache_root(config.cache_dir)
    if config.name == SHORT_NAME:
        return str(convert_gguf(bundled_gguf(cache), cache))
    if config.name.endswith(".gguf"):
        return str(convert_gguf(Path(config.name).expanduser(), cache))
    folder = Path(config.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"{folder} is not a model folder: it has no config.json")
        return str(folder)
    if config.name in SHAPES:
        raise BackboneError(
            f"{config.name!r} names a shape without weights; set weights: random, or give a hub id"
        )
    if config.name.startswith(("/", ".", "~")) or config.name.count("/") > 1:
        raise BackboneError(f"{config.name}: no such model folder")
    return config.name


def _pretrained(config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    options: dict[str, Any] = {
        **_where(config),
        "dtype": dtype,
        "attn_implementation": config.attention,
        "device_map": {"": device.index or 0} if device.type == "cuda" else {"": device.type},
    }
    if config.quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quantization,
            bnb_4bit_use_double_quant=config.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    small = Path(options["pretrained_model_name_or_path"]).is_dir()  # loads in seconds: no bar needed
    if small:
        logging.disable_progress_bar()
    try:
        return _load(config.name, lambda: AutoModelForCausalLM.from_pretrained(**options))
    finally:
        if small:
            logging.enable_progress_bar()


def _where(config: BackboneConfig) -> dict[str, Any]:
    """The arguments that tell transformers where to load from; a hub model is looked up first."""
    source = resolve_source(config)
    if Path(source).is_dir():
        return {"pretrained_model_name_or_path": source}
    reached = reach_model(source, config.revision)
    return {
        "pretrained_model_name_or_path": source,
        "revision": config.revision or "main",
        "local_files_only": not reached,
    }


def _has_tokenizer(name: str) -> bool:
    return any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


def _load(name: str, load: Callable[[], Any]) -> Any:
    """Runs a transformers loader; what it raises becomes one message that names the model."""
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BackboneError(f"{name} cannot be loaded: {error}") from error
