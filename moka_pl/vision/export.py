"""Writes an adapter of an image classifier for other tools, read back and compared on a few images."""

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.adapters import MokaConfig, moka_layers, read_adapter, unload
from moka_pl.adapters.trained import trained_layers
from moka_pl.backbone.loading import loading, progress_bars
from moka_pl.errors import ConfigError
from moka_pl.export.check import Measured, check
from moka_pl.export.folder import check_space, mebibytes, written_folder
from moka_pl.export.lora import lora_applied, lora_form
from moka_pl.export.merged import merged_parts, plain_config, say_size, weights_size, write_weights
from moka_pl.export.peft import import_peft, read_peft, write_peft
from moka_pl.export.rounding import round_weights, rounds_alone, to_dtype
from moka_pl.export.run import Request
from moka_pl.export.source import say
from moka_pl.vision.classifier import load_classifier
from moka_pl.vision.images import channels_of, to_pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

_IMAGES = 8


def export_images(request: Request, to: str) -> None:
    """Exports a transformers folder or a PEFT directory.

    Args:
        request: What is asked for.
        to: ``merged`` or ``lora``; other formats hold language models only.

    Raises:
        ConfigError: If the format or an option is for language models.
    """
    if to not in ("merged", "lora"):
        raise ConfigError(
            f"--to {to} is for language models, and {request.adapter} classifies images; give --to merged "
            "or lora"
        )
    if request.original or request.prompts is not None:
        option = "--onto original" if request.original else "--prompts"
        raise ConfigError(f"{option} is for language models, and {request.adapter} classifies images")
    if to == "lora":
        import_peft()
        if not isinstance(read_adapter(request.adapter).config, MokaConfig):
            raise ConfigError(
                "only MoKA adapters are written as a LoRA; any method can be exported --to merged"
            )
    model, processor = load_classifier(request.adapter, base=request.base)
    pixels = to_pixels(processor, _samples(channels_of(processor)))  # (8, C, H, W)
    (_merged if to == "merged" else _lora)(request, model, processor, pixels)


def _merged(request: Request, model: "PreTrainedModel", processor: Any, pixels: Tensor) -> None:
    import transformers
    from transformers import AutoModelForImageClassification

    dtype, parts = request.torch_dtype(torch.float32), merged_parts(model)
    check_space(request.out, weights_size(parts, dtype))
    expected = _measure(model, pixels)
    with written_folder(request.out) as new:
        write_weights(new, parts, dtype)
        plain_config(model, dtype).save_pretrained(new)
        processor.save_pretrained(new)
        with progress_bars(show=False), loading(str(new)):
            read = AutoModelForImageClassification.from_pretrained(new, dtype=model.dtype).to(model.device)
        found, rounded = _measure(read.eval(), pixels, expected), None
        reader, compute = f"transformers {transformers.__version__}", model.dtype
        if rounds_alone(dtype, compute):
            round_weights(model, to_dtype(dtype))
            rounded = _measure(model, pixels, expected)
        say(check(expected, found, reader, dtype, compute, rounded=rounded, what="images"))
    say_size(request.out, sum(part.entries for part in parts))


def _lora(request: Request, model: "PreTrainedModel", processor: Any, pixels: Tensor) -> None:
    stored = read_adapter(request.adapter).base
    dtype, expected = request.torch_dtype(torch.float32), _measure(model, pixels)
    form = lora_form(moka_layers(model), request.rank, request.energy, request.max_rank)
    heads = {name: layer.trained for name, layer in trained_layers(model).items()}
    entries = sum(tensor.numel() for head in heads.values() for tensor in head.parameters())
    check_space(request.out, form.size(dtype) + dtype.itemsize * entries)
    unload(model)
    if form.lost:
        expected = _truncated(model, form, heads, pixels)
    with written_folder(request.out) as new:
        base, revision = (request.base, None) if request.base else (stored.name, stored.revision)
        write_peft(new, form, model, base, revision, dtype, heads)
        processor.save_pretrained(new)
        found = _measure(read_peft(model, new), pixels, expected)
        say(check(expected, found, import_peft(), dtype, model.dtype, what="images"))
    say(
        f"{request.out}: rank {form.rank}, {mebibytes(request.out):.1f} MiB; PEFT reads it onto a base with "
        f"num_labels={model.config.num_labels}"
    )


def _truncated(model: nn.Module, form: Any, heads: dict[str, nn.Linear], pixels: Tensor) -> Measured:
    """Measures the base with a truncated LoRA and the trained head."""
    frozen = {name: model.get_submodule(name) for name in heads}
    for name, head in heads.items():
        model.set_submodule(name, head)
    with lora_applied(model, form):
        measured = _measure(model, pixels)
    for name, layer in frozen.items():
        model.set_submodule(name, layer)
    lost = max(form.lost.values())
    say(f"rank {form.rank} of {form.needed}; largest share of a layer's energy lost: {lost:.3%}")
    return measured


def _measure(model: Any, pixels: Tensor, as_by: Measured | None = None) -> Measured:
    """Returns the logits of each image, and the mean -log p of its likeliest class, perhaps by another."""
    with torch.no_grad():
        logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits.float().cpu()  # (8, C)
    likeliest = (logits if as_by is None else torch.cat(as_by.logits)).argmax(1)  # (8,)
    loss = F.cross_entropy(logits, likeliest)
    return Measured(list(logits.split(1)), float(loss))


def _samples(channels: int) -> "list[Image]":
    """Makes some images with edges and noise, the same everywhere."""
    from PIL import Image

    random = numpy.random.default_rng(0)
    shape = (32, 32) if channels == 1 else (32, 32, 3)
    made = random.integers(0, 256, (_IMAGES, *shape))
    made[: _IMAGES // 2, :16] //= 8  # dark above
    return [Image.fromarray(one.astype(numpy.uint8)) for one in made]
