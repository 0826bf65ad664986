"""Builds a frozen image classifier, with a head for the classes at hand, and its image processor."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from moka_pl.backbone import Backbone, BackboneConfig, compute_dtype
from moka_pl.backbone.checks import check_size, read_config
from moka_pl.backbone.load import model_location
from moka_pl.backbone.loading import loading, progress_bars
from moka_pl.backbone.quantization import (
    import_quantiser,
    keep_weights,
    quantised_linear,
)
from moka_pl.errors import BackboneError, one_line
from moka_pl.utils import expanded, silenced
from moka_pl.vision.images import channels_of, to_pixels

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

#: Shapes for ``weights: random`` that need no folder: a vision transformer for images of 8 × 8 grey pixels.
SHAPES: dict[str, dict[str, Any]] = {
    "vit-digits": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
    }
}


@dataclass
class ImageBackbone(Backbone):
    """A frozen image classifier with its image processor.

    Attributes:
        processor: Resizes and normalises images.
        heads: Full names of the linear layers that belong to its classes.
        new_head: Whether these are not the base's own, but start at zero.
    """

    processor: "BaseImageProcessor | None" = None
    heads: list[str] = field(default_factory=list)
    new_head: bool = False


def load_image_backbone(
    config: BackboneConfig, labels: Sequence[str], device: torch.device | str = "cpu"
) -> ImageBackbone:
    """Loads an image classifier onto one device, and quantises its linear layers but the head.

    A head of other classes, or a missing one, is replaced by one of zeros (as in "An Image is Worth 16x16
    Words", arXiv 2010.11929): before training every class is equally likely, and nothing is random.

    Args:
        config: Its options; ``kernels`` is for language models.
        labels: The classes in their order.
        device: Where it lives.

    Raises:
        BackboneError: If the model is missing or unreadable, or classifies no images.
    """
    device, name = torch.device(device), config.name
    dtype = compute_dtype(config, device)
    if config.compile != "none":
        raise BackboneError(f"{name}: compile {config.compile} is for language models; set compile: none")
    if config.matmul != "bf16":
        raise BackboneError(f"{name}: matmul {config.matmul} is for language models; set matmul: bf16")
    if name in SHAPES and config.weights != "random" and not Path(name).is_dir():
        raise BackboneError(f"{name!r} is a shape without weights; set weights: random, or give a hub id")
    import_quantiser(config.quantization)
    location = {} if config.weights == "random" else model_location(config)
    shape = _described(config, location)
    before = list(shape.id2label.values())
    shape.id2label, shape.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    heads = _head_names(shape, name)
    with torch.device("meta"):
        empty = _built(shape, dtype, name)
    check_size(empty, name, device, 8 * dtype.itemsize)
    if config.weights == "random":
        model, missing = _random(config, shape, dtype, device), set[str]()
    else:
        model, missing = _pretrained(config, shape, heads, dtype, device, location)
    _quantise(model, config, heads, dtype)
    new_head = before != list(labels) or bool(missing)
    if new_head:
        for head in heads:
            for parameter in model.get_submodule(head).parameters():
                parameter.data.zero_()
    keep_weights(model)
    processor = load_processor(config, shape)
    model.requires_grad_(False).eval()
    _check_runs(model, processor, len(labels), name)
    return ImageBackbone(model, cast(Any, None), config, [], processor, heads, new_head)


def load_processor(config: BackboneConfig, shape: "PretrainedConfig | None" = None) -> "BaseImageProcessor":
    """Loads a model's image processor; one that has none resizes to the model's size, and to -1 to 1.

    Args:
        config: Options of the model.
        shape: Its configuration, if that is read already.
    """
    import transformers
    from transformers import ImageProcessingMixin

    random = config.weights == "random"
    location = {} if random else model_location(config)
    shape = shape or _described(config, location)
    seen = getattr(shape, "vision_config", shape)
    channels, size = getattr(seen, "num_channels", 3), getattr(seen, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    stored: dict[str, Any] = {}
    with loading(config.name):
        folder = expanded(location.get("pretrained_model_name_or_path", config.name))
        if (not folder.is_dir() and not random) or (folder / "preprocessor_config.json").is_file():
            source = location or {"pretrained_model_name_or_path": str(folder)}
            stored, _ = ImageProcessingMixin.get_image_processor_dict(**source)
        kind = str(
            stored.get("image_processor_type") or stored.get("feature_extractor_type") or "ViTImageProcessor"
        )
        kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
        # By Pillow, wherever that is possible: the pixels then do not depend on what else is installed.
        built = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind, None)
        if built is None:
            raise BackboneError(
                f"{config.name}: transformers has no image processor {kind!r}; upgrade transformers"
            )
        half = [0.5] * channels
        own = {"size": {"height": height, "width": width}, "image_mean": half, "image_std": half}
        return cast("BaseImageProcessor", built(**(stored or own)))


def _described(config: BackboneConfig, location: dict[str, Any]) -> "PretrainedConfig":
    """Reads a model's configuration; one that classifies no images is refused."""
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        ViTConfig,
    )

    name = config.name
    if not location and name in SHAPES:
        return ViTConfig(**SHAPES[name])
    folder = expanded(name)
    if not location and not (folder / "config.json").is_file():
        raise BackboneError(
            f"unknown shape {name!r} of an image classifier with random weights; choose one of "
            f"{', '.join(SHAPES)}, or give a folder with a config.json"
        )
    shape = read_config(name, **(location or {"pretrained_model_name_or_path": str(folder)}))
    if type(shape) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise BackboneError(
            f"{name} is no image classifier: transformers has no AutoModelForImageClassification of "
            f"model_type {shape.model_type!r}; give a model such as a ViT"
        )
    if getattr(shape, "quantization_config", None):
        raise BackboneError(f"{name} is quantised already; give its unquantised original")
    return cast("PretrainedConfig", shape)


def _built(shape: "PretrainedConfig", dtype: torch.dtype, name: str, attention: str = "sdpa") -> Any:
    from transformers import AutoModelForImageClassification

    options = {"dtype": dtype, "trust_remote_code": False}
    with loading(name):
        try:
            return AutoModelForImageClassification.from_config(
                copy.deepcopy(shape), attn_implementation=attention, **options
            )
        except ValueError:  # it has no such attention, or none at all
            return AutoModelForImageClassification.from_config(copy.deepcopy(shape), **options)


def _head_names(shape: "PretrainedConfig", name: str) -> list[str]:
    """Returns the linear layers whose sizes depend on the number of classes."""
    more = copy.deepcopy(shape)
    more.id2label = {**shape.id2label, len(shape.id2label): "one more"}
    with torch.device("meta"):
        first, second = (_built(one, torch.float32, name) for one in (shape, more))
    sizes = {key: tensor.shape for key, tensor in second.named_parameters()}
    changed = [key for key, tensor in first.named_parameters() if tensor.shape != sizes[key]]
    heads = list(dict.fromkeys(key.rpartition(".")[0] for key in changed))
    if not heads or not all(isinstance(first.get_submodule(head), nn.Linear) for head in heads):
        raise BackboneError(
            f"{name} ({type(first).__name__}) has no linear head for its classes; give another one"
        )
    return heads


def _quantise(model: nn.Module, config: BackboneConfig, heads: list[str], dtype: torch.dtype) -> None:
    """Quantises all linear layers but the heads, one by one."""
    for name, layer in list(model.named_modules()):
        if config.quantization != "none" and type(layer) is nn.Linear and name not in heads:
            weight = layer.weight.detach()
            new: Any = quantised_linear(layer, weight, config.quantization, config.double_quantization, dtype)
            new.bias = layer.bias
            model.set_submodule(name, new)


def _random(
    config: BackboneConfig, shape: Any, dtype: torch.dtype, device: torch.device
) -> "PreTrainedModel":
    """Builds a model with transformers' own random weights, the same for a seed on every device."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(config.seed)
        model = _built(shape, torch.float32, config.name, config.attention).to(dtype)
    return cast("PreTrainedModel", model.to(device))


def _pretrained(
    config: BackboneConfig,
    shape: Any,
    heads: list[str],
    dtype: torch.dtype,
    device: torch.device,
    location: dict[str, Any],
) -> tuple["PreTrainedModel", set[str]]:
    """Loads a model; returns it with the names of those tensors of its head that its files do not hold."""
    from transformers import AutoModelForImageClassification

    options: dict[str, Any] = {
        **location,
        "config": shape,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "trust_remote_code": False,
    }
    # It would tell of a head of other classes, and of layers without a plan for tensor parallelism.
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    quiet = silenced(*names, below=logging.ERROR)
    with loading(config.name), progress_bars(show=False), quiet:
        model, info = AutoModelForImageClassification.from_pretrained(**options)
    other = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    lost = {*info["missing_keys"], *other}
    own = {f"{head}.{key}" for head in heads for key in ("weight", "bias")}
    if lost - own:
        raise BackboneError(
            f"{config.name} cannot be loaded: {len(lost - own)} of its weights are missing or of another "
            f"size (first {min(lost - own)}); copy the model again"
        )
    return cast("PreTrainedModel", model.to(device)), lost


def _check_runs(model: "PreTrainedModel", processor: Any, classes: int, name: str) -> None:
    """Runs a grey image through the model, as the data will be."""
    from PIL import Image

    channels = channels_of(processor)
    try:
        pixels = to_pixels(processor, [Image.new("RGB" if channels == 3 else "L", (24, 16), 128)])
        with torch.no_grad():
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits  # (1, C)
    except BackboneError:
        raise
    except Exception as error:  # whatever an architecture raises that needs other inputs
        raise BackboneError(
            f"{name} cannot be run on an image: {one_line(error)}; give another image classifier"
        ) from error
    finite = bool(torch.isfinite(logits).all())
    if tuple(logits.shape) != (1, classes) or not finite:
        raise BackboneError(
            f"{name} maps an image to {'logits' if finite else 'NaN or inf'} of shape {tuple(logits.shape)}, "
            f"not to {classes} logits; give another image classifier"
        )
