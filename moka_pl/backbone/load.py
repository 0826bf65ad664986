"""Builds the frozen base model and its tokenizer from a configuration."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moka_pl.backbone.checks import (
    check_folder,
    check_loss,
    check_numbers,
    check_size,
    check_tokens,
    weight_bytes,
)
from moka_pl.backbone.config import BackboneConfig
from moka_pl.backbone.gguf import convert_gguf
from moka_pl.backbone.hub import reach_model
from moka_pl.backbone.loading import cache_root, loading, progress_bars
from moka_pl.backbone.quantization import (
    QuantisedError,
    import_quantiser,
    keep_weights,
    loading_options,
    stored_quantization,
)
from moka_pl.backbone.random_weights import SHAPES, byte_tokenizer, random_model, shape_config
from moka_pl.backbone.smollm2 import SHORT_NAME, bundled_gguf
from moka_pl.errors import BackboneError, one_line
from moka_pl.prompts.ends import open_prompts, stop_at_ends

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Backbone:
    """A frozen base model with its tokenizer.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        config: The options as they were applied, which may differ from those that were asked for; None where
            the model was not loaded from any.
        notes: Sentences on such differences, and on whatever else a user should know of the model.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    config: BackboneConfig | None = None
    notes: list[str] = field(default_factory=list)


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
        QuantisedError: If the checkpoint is quantised already in another way than ``config`` says.
        BackboneError: If the model is missing, gated, unreadable, or misread by bitsandbytes on this CPU;
            does not fit its tokenizer; or computes its loss in a way that is not known here.
    """
    device = torch.device(device)
    dtype = compute_dtype(config, device)
    if config.quantization != "none":
        import_quantiser()
    tokenizer = load_tokenizer(config)  # loads at once, and fails before the model has been waited for
    described = _describe(config)
    config, notes = described.settle(config)
    empty, config = _build_empty(described.shape, config, dtype, notes)
    random = config.weights == "random"
    check_tokens(tokenizer, described.shape, _rows(empty), config.name, random)
    bits = 8 * dtype.itemsize if config.quantization == "none" else 4
    check_size(empty, config.name, described.bytes, device, bits)
    if random:
        with loading(config.name):
            model = random_model(config, empty, dtype, device)
    else:
        del empty
        model = _pretrained(config, described, dtype, device, notes)
    keep_weights(model)
    stop_at_ends(model, tokenizer)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.eval()
    check_loss(model, config.name)
    return Backbone(model, tokenizer, config, notes)


def load_tokenizer(config: BackboneConfig) -> "PreTrainedTokenizerBase":
    """Loads the base model's tokenizer alone, with :func:`load_backbone`'s errors.

    It has a padding token, and puts nothing but a beginning-of-sequence token around a text.
    """
    from transformers import AutoTokenizer

    if config.weights == "random" and (config.name in SHAPES or not _has_tokenizer(config.name)):
        return byte_tokenizer()
    location = _location(config)
    with loading(config.name):
        _check_stored(location, config.name)
        tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=False)
    if tokenizer.pad_token is None:
        # Padding is never attended to nor trained on, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    open_prompts(tokenizer)
    return cast("PreTrainedTokenizerBase", tokenizer)


@dataclass
class _Description:
    """A model before it is loaded.

    Attributes:
        shape: Its configuration.
        location: Where transformers finds its weights; empty for random ones.
        bytes: Size of its weight files; None where they are not here.
    """

    shape: "PretrainedConfig"
    location: dict[str, Any]
    bytes: int | None

    def settle(self, config: BackboneConfig) -> tuple[BackboneConfig, list[str]]:
        """Returns the options that apply to this model, and what there is to say of them."""
        notes = []
        for shape in (self.shape, self.shape.get_text_config()):
            if getattr(shape, "output_router_logits", False):
                shape.output_router_logits = False
                notes.append(f"{config.name}: the auxiliary loss of its router is not part of the loss here")
        stored = getattr(self.shape, "quantization_config", None)
        if not stored:
            return config, notes
        kind, double = stored_quantization(stored, config.name)
        if kind != config.quantization:
            raise QuantisedError(config.name, kind, config.quantization)
        notes.append(f"{config.name} is quantised already: {kind}, as its checkpoint says")
        return replace(config, quantization=kind, double_quantization=double), notes


def _describe(config: BackboneConfig) -> _Description:
    """Reads the configuration of a model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if config.weights == "random":
        shape, location, size = shape_config(config.name), {}, None
        if hasattr(shape, "quantization_config"):
            del shape.quantization_config  # random weights are quantised as the options say
    else:
        location = _location(config)
        folder = Path(location["pretrained_model_name_or_path"])
        size = weight_bytes(folder) if folder.is_dir() else None
        with loading(config.name):
            shape = AutoConfig.from_pretrained(**location, trust_remote_code=False)
    if type(shape) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BackboneError(
            f"{config.name} cannot be loaded: transformers has no AutoModelForCausalLM of model_type "
            f"{shape.model_type!r}; give a causal language model"
        )
    return _Description(shape, location, size)


def _build_empty(
    shape: "PretrainedConfig", config: BackboneConfig, dtype: torch.dtype, notes: list[str]
) -> tuple["PreTrainedModel", BackboneConfig]:
    """Builds the model without memory for its weights, with an attention that it supports.

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


def _rows(model: "PreTrainedModel") -> int:
    """Number of tokens that the model has both an embedding and a logit of."""
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return int(min(head.weight.shape[0] for head in heads if getattr(head, "weight", None) is not None))


def _pretrained(
    config: BackboneConfig,
    described: _Description,
    dtype: torch.dtype,
    device: torch.device,
    notes: list[str],
) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    shape = described.shape
    options: dict[str, Any] = {
        **described.location,
        "config": shape,
        "dtype": dtype,
        "attn_implementation": config.attention,
        "device_map": {"": device.index or 0} if device.type == "cuda" else {"": device.type},
        "output_loading_info": True,
        "trust_remote_code": False,
    }
    if stored := getattr(shape, "quantization_config", None):
        shape.quantization_config = {**stored, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    else:
        options |= loading_options(config.quantization, config.double_quantization, dtype)
    folder = described.bytes is not None  # nothing to download: no bar needed
    with loading(config.name), progress_bars(show=not folder):
        model, info = AutoModelForCausalLM.from_pretrained(**options)
    if info["missing_keys"]:
        # transformers would continue with random values instead.
        raise BackboneError(
            f"{config.name} cannot be loaded: {len(info['missing_keys'])} of its weights are missing "
            f"(first {min(info['missing_keys'])}). Copy the model again"
        )
    if unused := info["unexpected_keys"]:
        notes.append(
            f"{config.name}: {len(unused)} tensors of its weight files are no part of the model that its "
            f"config.json describes, and are not used (first {min(unused)})"
        )
    return cast("PreTrainedModel", model)


def _check_stored(location: dict[str, Any], name: str) -> None:
    """Looks at a stored configuration before transformers builds anything of it."""
    from transformers import PretrainedConfig

    check_numbers(PretrainedConfig.get_config_dict(**location)[0], name)


def _location(config: BackboneConfig) -> dict[str, Any]:
    """Arguments that tell transformers what to load; GGUF files are converted, hub models looked up first."""
    name, cache = config.name, cache_root(config.cache_dir)
    if name == SHORT_NAME or name.endswith(".gguf"):
        file = bundled_gguf(cache) if name == SHORT_NAME else Path(name).expanduser()
        return {"pretrained_model_name_or_path": str(convert_gguf(file, cache))}
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
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
