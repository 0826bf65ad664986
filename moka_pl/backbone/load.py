"""Builds the frozen base model and its tokenizer from a configuration."""

import copy
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from moka_pl._compat import unused_tensors
from moka_pl.backbone.blocks.filling import is_complete, read_blocks
from moka_pl.backbone.blocks.frozen_tensors import BlockStore, decoder_blocks
from moka_pl.backbone.checks import (
    check_loss,
    check_numbers,
    check_size,
    check_special_tokens,
    check_tokens,
)
from moka_pl.backbone.config import BackboneConfig
from moka_pl.backbone.description import Description, build_empty, describe
from moka_pl.backbone.folder import check_folder, check_weights, tokenizer_fault
from moka_pl.backbone.gguf import convert_gguf
from moka_pl.backbone.hub import check_download, download_model, reach_model
from moka_pl.backbone.linear_layers import linearise, quantise_rest
from moka_pl.backbone.loading import cache_root, loading, progress_bars
from moka_pl.backbone.products.float8 import describe_float8, keep_scales, missing_for_float8
from moka_pl.backbone.products.frozen import fuse_products
from moka_pl.backbone.quantization import (
    check_layers,
    import_quantiser,
    keep_weights,
    loading_options,
    quantises_layers,
    stored_layers,
    weight_bytes,
)
from moka_pl.backbone.random_weights import SHAPES, byte_tokenizer, random_model, shape_config
from moka_pl.backbone.smollm2 import SHORT_NAME, bundled_gguf
from moka_pl.backbone.weight_files import WeightFiles
from moka_pl.errors import BackboneError
from moka_pl.lm.kernels import fuse_kernels
from moka_pl.prompts.ends import open_prompts, stop_at_ends
from moka_pl.prompts.new_tokens import add_new_tokens
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


#: A layer's number in the name of a tensor.
_NUMBER = re.compile(r"\.\d+\.")


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


@dataclass(frozen=True)
class Unloaded:
    """A base model before its weights are loaded.

    Attributes:
        model: The model on the meta device.
        tokenizer: Its tokenizer.
        files: Its weight files; None where they are not here, or weights are random.
        quantised: Whether its checkpoint is quantised already.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    files: WeightFiles | None = None
    quantised: bool = False


def compute_dtype(config: BackboneConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of activations: the chosen one, or for ``auto`` the best of the device."""
    if config.compute_dtype != "auto":
        return cast(torch.dtype, getattr(torch, config.compute_dtype))
    if device.type == "cuda":
        # Older GPUs only emulate bfloat16, slowly.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return torch.float32


def load_backbone(
    config: BackboneConfig,
    device: torch.device | str = "cpu",
    before: Callable[[Unloaded], None] | None = None,
    blocks: BlockStore | None = None,
) -> Backbone:
    """Loads the base model and its tokenizer onto one device, and quantises the linear layers.

    The model is frozen, in evaluation mode, and stops generating at every token that may end an answer in
    training. Every rank of a data-parallel run has its own copy, or with ``blocks`` a part.

    Args:
        config: Its options.
        device: Where it lives.
        before: Is given the model before any weight is loaded, to refuse what cannot work with it.
        blocks: Takes each decoder block as soon as that is loaded, so that the model is never there as a
            whole, then embedding and head; None leaves all where they are.

    Raises:
        QuantisedError: If the checkpoint is quantised already in another way than ``config`` says.
        BackboneError: If the model is missing, gated or unreadable; does not fit its tokenizer; or computes
            its loss in a way that is not known here.
    """
    device = torch.device(device)
    dtype = compute_dtype(config, device)
    import_quantiser(config.quantization)
    tokenizer = load_tokenizer(config)  # loads at once, and fails before the model has been waited for
    random, whole = config.weights == "random", blocks is None and not quantises_layers(config.quantization)
    with loading(config.name):
        described = describe(config, {} if random else model_location(config, whole))
        config, notes = described.settle(config)
        empty, config = build_empty(described.shape, config, dtype, notes)
        check_tokens(tokenizer, described.shape, _rows(empty), config.name, random, config.new_tokens)
        if described.files is not None:
            described.files.check(empty, config.name, quantised=described.quantization is not None)
        check_layers(empty, config.quantization)
        bits = 8 * weight_bytes(config.quantization, config.double_quantization, dtype)
        check_size(empty, config.name, device, bits * (1.0 if blocks is None else blocks.share))
    if before is not None:
        stored = described.quantization is not None
        before(Unloaded(copy.deepcopy(empty), tokenizer, described.files, stored))
    config = _settled_products(config, device, notes)
    settle = partial(_settle, config, dtype, described.quantization is None)
    store = None if blocks is None else _Settling(blocks, settle)
    model = _filled(empty, config, described, device, notes, store)
    check_special_tokens(model.generation_config, "generation_config.json", _rows(model), config.name)
    settle(model)
    keep_weights(model)
    stop_at_ends(model, tokenizer)
    model.requires_grad_(False)
    if blocks is not None:
        blocks.add_ends(model)
    model.config.use_cache = False
    model.eval()
    check_loss(model, config.name)
    if config.compile == "none" and device.type == "cuda":
        notes += _computed_fast(config, model)
    return Backbone(model, tokenizer, config, notes)


def _computed_fast(config: BackboneConfig, model: "PreTrainedModel") -> list[str]:
    """Puts the kernels into a model on a GPU that its options ask for; returns sentences on them."""
    notes = [fuse_kernels(model)] if config.kernels == "auto" else []
    if find_spec("triton") is not None and (config.kernels == "auto" or config.matmul == "fp8"):
        fuse_products(model)
    if config.matmul == "fp8":
        notes.append(describe_float8(model))
    return notes


def _settled_products(config: BackboneConfig, device: torch.device, notes: list[str]) -> BackboneConfig:
    """The options with products that the device has: evaluation needs no others, and ``fit`` has checked."""
    if config.matmul == "bf16":
        return config
    missing = "no backbone.compile" if config.compile != "none" else missing_for_float8(device)
    if missing is None:
        return config
    notes.append(f"no 8-bit products: they need {missing}")
    return replace(config, matmul="bf16")


def _settle(config: BackboneConfig, dtype: torch.dtype, plain: bool, module: nn.Module) -> None:
    """Makes what is linear in a model or a block an ``nn.Linear``, and quantises what is left to be."""
    linearise(module)
    if plain and config.quantization != "none":
        quantise_rest(module, config.quantization, config.double_quantization, dtype)
    if config.matmul == "fp8":
        keep_scales(module)  # now, as blocks may go elsewhere


@dataclass
class _Settling:
    """Hands blocks over once nothing of them will change any more."""

    blocks: BlockStore
    settle: Callable[[nn.Module], None]

    @property
    def share(self) -> float:
        return self.blocks.share

    def add(self, block: nn.Module) -> None:
        self.settle(block)
        self.blocks.add(block)

    def add_ends(self, model: nn.Module) -> None:
        self.blocks.add_ends(model)


def load_tokenizer(config: BackboneConfig, weights: bool = True) -> "PreTrainedTokenizerBase":
    """Loads the base model's tokenizer alone, with :func:`load_backbone`'s errors.

    It has a padding token, and puts nothing but a beginning-of-sequence token around a text.

    Args:
        config: The model's options.
        weights: Whether to look at the weight files in a folder, too, which are loaded later.

    Raises:
        BackboneError: As :func:`load_backbone`.
        ConfigError: If one of ``new_tokens`` is a token already.
    """
    from transformers import AutoTokenizer

    if config.weights == "random":
        shape_config(config.name)  # an unknown one is refused before texts are encoded
        if config.name in SHAPES or not _has_tokenizer(config.name):
            tokenizer = byte_tokenizer()
            add_new_tokens(tokenizer, config.new_tokens)
            return tokenizer
    location = model_location(config, weights=weights)
    folder = Path(location["pretrained_model_name_or_path"])
    with loading(config.name):
        _check_stored(location, config.name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(**location, trust_remote_code=False)
        except Exception as error:  # tokenizers raises Exception itself
            if (fault := tokenizer_fault(folder) if folder.is_dir() else None) is None:
                raise
            raise BackboneError(f"{config.name} cannot be loaded: {fault}") from error
    if tokenizer.pad_token is None:
        # Padding is never attended to nor trained on, so any token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    open_prompts(tokenizer)
    add_new_tokens(tokenizer, config.new_tokens)
    return cast("PreTrainedTokenizerBase", tokenizer)


def _rows(model: "PreTrainedModel") -> int:
    """Number of tokens that the model has both an embedding and a logit of."""
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    return int(min(head.weight.shape[0] for head in heads if getattr(head, "weight", None) is not None))


def _filled(
    empty: "PreTrainedModel",
    config: BackboneConfig,
    described: Description,
    device: torch.device,
    notes: list[str],
    store: BlockStore | None,
) -> "PreTrainedModel":
    """Returns the model with its weights; the blocks' are handed over as early as their files allow."""
    dtype, files = empty.dtype, described.files
    if config.weights == "random":
        linearise(empty)
        with loading(config.name):
            return random_model(config, empty, dtype, device, store)
    tensors = {} if files is None else files.tensors
    stored = stored_layers(described.quantization, config.quantization, tensors)
    whole = is_complete(files, empty, described.quantization, stored)
    if files is not None and whole and (store is not None or quantises_layers(config.quantization)):
        names = set(tensors) if stored is None else stored.names
        unused = set(unused_tensors(empty, names)) - (set() if stored is None else stored.biases)
        _judge_unused(unused, empty, config.name, notes)
        with loading(config.name):
            return read_blocks(empty, config, device, files, store, stored)
    if stored is not None:
        raise BackboneError(
            f"{config.name} cannot be loaded: its layers in {config.quantization} are not in safetensors "
            "files under the model's own names; give its unquantised original"
        )
    del empty
    model = _pretrained(config, described, dtype, device, notes)
    if store is not None:
        for block in decoder_blocks(model).values():
            store.add(block)
    return model


def _pretrained(
    config: BackboneConfig,
    described: Description,
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
    if stored := described.quantization:
        shape.quantization_config = {**stored, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    else:
        options |= loading_options(config.quantization, config.double_quantization, dtype)
    folder = described.files is not None  # nothing to download: no bar needed
    if not folder:
        check_download(config.name, config.revision)
    with loading(config.name), progress_bars(show=not folder):
        model, info = AutoModelForCausalLM.from_pretrained(**options)
    if info["missing_keys"]:
        # transformers would continue with random values instead.
        raise BackboneError(
            f"{config.name} cannot be loaded: {len(info['missing_keys'])} of its weights are missing "
            f"(first {min(info['missing_keys'])}). Copy the model again"
        )
    _judge_unused(info["unexpected_keys"], model, config.name, notes)
    return cast("PreTrainedModel", model)


def _judge_unused(unused: Collection[str], model: "PreTrainedModel", name: str, notes: list[str]) -> None:
    """Notes what stored tensors are not used, and refuses a model that lacks some of its layers."""
    if not unused:
        return
    parts = {_NUMBER.sub(".*.", key) for key in model.state_dict()}
    if cut := [key for key in unused if _NUMBER.sub(".*.", key) in parts]:
        raise BackboneError(
            f"{name} cannot be loaded: its weight files hold layers that config.json leaves out "
            f"(first {min(cut)}). Copy the model again"
        )
    notes.append(
        f"{name}: {len(unused)} tensors of its weight files are no part of the model that its "
        f"config.json describes, and are not used (first {min(unused)})"
    )


def _check_stored(location: dict[str, Any], name: str) -> None:
    """Looks at a stored configuration before transformers builds anything of it."""
    from transformers import PretrainedConfig

    check_numbers(PretrainedConfig.get_config_dict(**location)[0], name)


def model_location(config: BackboneConfig, whole: bool = True, weights: bool = True) -> dict[str, Any]:
    """Arguments that tell transformers what to load; GGUF files are converted, hub models looked up first.

    Args:
        config: The model's options.
        whole: Whether transformers loads it as a whole; otherwise it is downloaded here.
        weights: Whether to look at the weight files that are here, unless they are random.
    """
    weights = weights and config.weights == "pretrained"
    name, cache = config.name, cache_root(config.cache_dir)
    if name == SHORT_NAME or name.endswith(".gguf"):
        file = bundled_gguf(cache) if name == SHORT_NAME else expanded(name)
        return {"pretrained_model_name_or_path": str(convert_gguf(file, cache))}
    folder = expanded(name)
    if folder.is_dir():
        check_folder(folder)
        if weights:
            check_weights(folder, name)
        return {"pretrained_model_name_or_path": str(folder)}
    if name in SHAPES:
        raise BackboneError(f"{name!r} is a shape without weights; set weights: random, or give a hub id")
    if "://" in name:
        raise BackboneError(
            f"{name}: addresses are not read; give the hub id, as in organisation/model, or a folder"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise BackboneError(f"{name}: no such model folder; check the path")
    if (cached := reach_model(name, config.revision)) is not None:
        if weights:
            check_weights(cached, name)
        return {"pretrained_model_name_or_path": str(cached)}
    if not whole:
        return {"pretrained_model_name_or_path": str(download_model(name, config.revision))}
    return {"pretrained_model_name_or_path": name, "revision": config.revision or "main"}


def _has_tokenizer(name: str) -> bool:
    folder = expanded(name)
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
