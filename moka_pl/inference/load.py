"""Loads a trained adapter with its base model."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moka_pl.adapters import (
    AdapterInfo,
    FullFineTuning,
    MokaConfig,
    hand_over_saving,
    inject_adapter,
    load_adapter,
    load_adapter_state,
    local_adapter,
    method_of,
    moka_layers,
    read_adapter,
)
from moka_pl.adapters.reading import CONFIG_NAME, read_adapter_state, read_counted_shapes
from moka_pl.adapters.vocabulary.token_rows import start_rows, token_rows
from moka_pl.backbone import Backbone, BackboneConfig, Unloaded, fingerprint, load_backbone, weight_samples
from moka_pl.backbone.quantization import QuantisedError
from moka_pl.backbone.random_weights import SHAPES
from moka_pl.backbone.weight_files import read_weight_files
from moka_pl.errors import AdapterError, ConfigError, MokaWarning
from moka_pl.prompts.new_tokens import new_token_pieces
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Preview:
    """An adapter with its base, before the base's weights are loaded.

    Attributes:
        model: The base on the meta device. An adapter of MoKA is in it with its own tensors.
        tokenizer: The base's tokenizer.
        quantised: Whether the base's checkpoint is quantised already.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    quantised: bool = False


def load_model(
    path: str | Path,
    device: torch.device | str | None = None,
    base: str | None = None,
    revision: str | None = None,
    before: Callable[[Preview], None] | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads an adapter together with its base model.

    The model is one of transformers, for ``generate``, pipelines and everything else. Its ``save_pretrained``
    and ``push_to_hub`` write the adapter directory again. Another base is refused before its weights are
    loaded, where sizes tell or its files are here.

    Args:
        path: An adapter directory, such as ``lightning_logs/smollm2/version_0/adapters/best``, or the hub id
            of one.
        device: The model's device; None is the GPU if there is one, else the CPU.
        base: Name or path of the base model; None is the one stored with the adapter. A stored revision is
            ignored if ``base`` is given.
        revision: Branch, tag or commit of the adapter on the hub.
        before: Is called before the base's weights are loaded, to refuse what cannot work.

    Returns:
        The model with its adapters, in evaluation mode, and the tokenizer.

    Raises:
        AdapterError: If the directory is damaged, of a newer format, or of another base model.
        BackboneError: If the base model cannot be loaded.
    """
    path = local_adapter(path, revision)
    info = read_adapter(path)
    check_kind(info, path, base)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        options = _base_options(info, base)
        config = BackboneConfig(base or info.base.name, None if base else info.base.revision, **options)
    except (ConfigError, TypeError) as error:
        raise AdapterError(
            f"{path}: base_options in {CONFIG_NAME} are damaged: {error}. Copy the adapter again"
        ) from error

    def look(unloaded: Unloaded) -> None:
        check_new_tokens(info, unloaded.tokenizer, path)
        preview = _preview(unloaded, path, info)
        if before is not None:
            before(preview)

    loaded = load_base(config, device, look)
    for note in loaded.notes:
        warnings.warn(note, MokaWarning, stacklevel=2)
    load_adapter(loaded.model, path, fingerprint(loaded.model))
    start_rows(loaded.model, new_token_pieces(loaded.tokenizer), trained=False)
    saved = info.base if base is None else replace(info.base, name=base, revision=None)
    hand_over_saving(loaded.model, info.config, saved, info.extra)
    loaded.model.config.use_cache = True
    return loaded.model.eval(), loaded.tokenizer


def _base_options(info: AdapterInfo, base: str | None) -> dict[str, Any]:
    """Returns the options that an adapter's base is loaded with."""
    # The adapter may have been trained on a device with another best dtype.
    options = info.base.options | {"compute_dtype": "auto"}
    given = None if base is None or base in SHAPES else expanded(base)
    if options.get("weights") == "random" and given is not None and read_weight_files(given) is not None:
        options["weights"] = "pretrained"  # whoever gives weights wants these
    return options


def check_new_tokens(info: AdapterInfo, tokenizer: "PreTrainedTokenizerBase", path: str | Path) -> None:
    """Refuses a tokenizer in which the new tokens of an adapter have other numbers than its rows.

    Args:
        info: What the adapter directory says.
        tokenizer: The base's tokenizer, with these tokens.
        path: The directory, for messages.

    Raises:
        AdapterError: Naming the first of them.
    """
    rows = getattr(info.config, "trainable_token_indices", None) or ()
    for token in info.base.options.get("new_tokens", ()):
        if (number := tokenizer.convert_tokens_to_ids(token)) not in rows:
            raise AdapterError(
                f"{path} was trained with another vocabulary: {token!r} is token {number} of this tokenizer, "
                "of which it has no row; give the base with the tokenizer of its training"
            )


def check_kind(info: AdapterInfo, path: Path, base: str | None) -> None:
    """Refuses an adapter of an image classifier, and one without a base.

    Args:
        info: What its directory says.
        path: The directory.
        base: Name or folder of the base that is given for it.

    Raises:
        AdapterError: Saying what to do instead.
    """
    if info.labels:
        raise AdapterError(
            f"{path} classifies images, and answers or scores no text; validate or test it with "
            "moka_pl.VisionModule, export it --to merged, or load it by moka_pl.vision.load_classifier"
        )
    if not (base or info.base.name):
        raise AdapterError(f"{path} does not name its base model; give base, its name or folder")


def _preview(unloaded: Unloaded, path: Path, info: AdapterInfo) -> Preview:
    """Puts an adapter into its base before that is loaded.

    Raises:
        AdapterError: If it is damaged, or of another base, as far as sizes and weight files tell.
    """
    model = unloaded.model
    if unloaded.files is not None:
        unloaded.files.map_into(model)
        _check_files(model, path, info)
        model.to("meta")
        model.tie_weights()  # as they were: moved to where no memory is, each weight becomes its own
    shapes = read_counted_shapes(path)
    state = read_adapter_state(path) if method_of(info.config).keeps_base else {}
    if isinstance(info.config, MokaConfig | FullFineTuning):  # PEFT's may read weights as they are put in
        try:
            inject_adapter(model, info.config, saved=shapes)
        except (AdapterError, ConfigError) as error:
            raise AdapterError(f"{path}: {error}") from error
        _fill(model, state, path)
    return Preview(model, unloaded.tokenizer, unloaded.quantised)


def _fill(model: "PreTrainedModel", state: dict[str, Tensor], path: Path) -> None:
    """Gives the adapters of a model on the meta device their tensors; methods other than MoKA have none."""
    layers = {**moka_layers(model), **token_rows(model)}
    if not layers:
        return
    for layer in layers.values():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    load_adapter_state(model, state, path)


def _check_files(model: "PreTrainedModel", path: Path, info: AdapterInfo) -> None:
    """Refuses another base by its weight files, as far as they hold the weights as the model has them."""
    if model.get_input_embeddings().weight.is_meta:
        return
    whole = not any(parameter.is_meta and parameter.ndim > 1 for parameter in model.parameters())
    with warnings.catch_warnings():  # which loading repeats
        warnings.simplefilter("ignore", MokaWarning)
        info.check_base(fingerprint(model), path, weight_samples(model) if whole else "")


def load_base(
    config: BackboneConfig,
    device: torch.device | str,
    before: Callable[[Unloaded], None] | None = None,
) -> Backbone:
    """Loads a base as ``config`` says, or if it is quantised already, as it is.

    Args:
        config: Its options.
        device: Where it lives.
        before: Is given the model before its weights are loaded.
    """
    try:
        return load_backbone(config, device, before)
    except QuantisedError as error:
        return load_backbone(replace(config, quantization=error.stored), device, before)
