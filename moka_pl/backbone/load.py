"""Builds the frozen base model and its tokenizer from a configuration."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moka_pl.backbone.config import BackboneConfig
from moka_pl.backbone.gguf import convert_gguf
from moka_pl.backbone.hub import reach_model
from moka_pl.backbone.loading import cache_root, loading, progress_bars
from moka_pl.backbone.quantization import import_quantiser, keep_weights, loading_options
from moka_pl.backbone.random_weights import SHAPES, byte_tokenizer, random_model
from moka_pl.backbone.smollm2 import SHORT_NAME, bundled_gguf
from moka_pl.errors import BackboneError
from moka_pl.prompts.ends import open_prompts, stop_at_ends

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
        # Older GPUs only emulate bfloat16, slowly.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.float32


def load_backbone(config: BackboneConfig, device: torch.device | str = "cpu") -> Backbone:
    """Loads the base model and its tokenizer onto one device, and quantises the linear layers.

    The model is frozen, in evaluation mode, and stops generating at every token that may end an answer in
    training. Every rank of a data-parallel run has its own copy.

    Raises:
        BackboneError: If the model is missing, gated, unreadable, or misread by bitsandbytes on this CPU.
    """
    device = torch.device(device)
    dtype = compute_dtype(config, device)
    if config.quantization != "none":
        import_quantiser()
    tokenizer = load_tokenizer(config)  # loads at once, and fails before the model has been waited for
    if config.weights == "random":
        with loading(config.name):
            model = random_model(config, dtype, device)
        rows = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise BackboneError(
                f"{config.name}: vocab_size is {rows}, but the tokenizer has {len(tokenizer)} tokens; "
                f"set vocab_size in config.json to at least {len(tokenizer)}"
            )
    else:
        model = _pretrained(config, dtype, device)
    keep_weights(model)
    stop_at_ends(model, tokenizer)
    model.requires_grad_(False)
    model.config.use_cache = False
    return Backbone(model.eval(), tokenizer)


def load_tokenizer(config: BackboneConfig) -> "PreTrainedTokenizerBase":
    """Loads the base model's tokenizer alone, with :func:`load_backbone`'s errors.

    It has a padding token, and puts nothing but a beginning-of-sequence token around a text.
    """
    from transformers import AutoTokenizer

    if config.weights == "random" and (config.name in SHAPES or not _has_tokenizer(config.name)):
        return byte_tokenizer()
    location = _location(config)
    with loading(config.name):
        tokenizer = AutoTokenizer.from_pretrained(**location)
    if tokenizer.pad_token is None:
        # Padding is never attended to nor trained on, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    open_prompts(tokenizer)
    return cast("PreTrainedTokenizerBase", tokenizer)


def _pretrained(config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        **_location(config),
        "dtype": dtype,
        "attn_implementation": config.attention,
        "device_map": {"": device.index or 0} if device.type == "cuda" else {"": device.type},
        "output_loading_info": True,
        **loading_options(config.quantization, config.double_quantization, dtype),
    }
    folder = Path(options["pretrained_model_name_or_path"]).is_dir()  # nothing to download: no bar needed
    with loading(config.name), progress_bars(show=not folder):
        model, info = AutoModelForCausalLM.from_pretrained(**options)
    if info["missing_keys"]:
        # transformers would continue with random values instead.
        raise BackboneError(
            f"{config.name} cannot be loaded: {len(info['missing_keys'])} of its weights are missing "
            f"(first {min(info['missing_keys'])}). Copy the model again"
        )
    return cast("PreTrainedModel", model)


def _location(config: BackboneConfig) -> dict[str, Any]:
    """Arguments that tell transformers what to load; GGUF files are converted, hub models looked up first."""
    name, cache = config.name, cache_root(config.cache_dir)
    if name == SHORT_NAME or name.endswith(".gguf"):
        file = bundled_gguf(cache) if name == SHORT_NAME else Path(name).expanduser()
        return {"pretrained_model_name_or_path": str(convert_gguf(file, cache))}
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(f"{folder} is not a model folder: it has no config.json")
        return {"pretrained_model_name_or_path": str(folder)}
    if name in SHAPES:
        raise BackboneError(f"{name!r} is a shape without weights; set weights: random, or give a hub id")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise BackboneError(f"{name}: no such model folder; check the path")
    if (cached := reach_model(name, config.revision)) is not None:
        return {"pretrained_model_name_or_path": str(cached)}
    return {"pretrained_model_name_or_path": name, "revision": config.revision or "main"}


def _has_tokenizer(name: str) -> bool:
    folder = Path(name).expanduser()
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
