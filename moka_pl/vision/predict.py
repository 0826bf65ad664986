"""Classifies images of a folder with a trained adapter."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moka_pl.adapters import merge
from moka_pl.errors import ConfigError, DataError
from moka_pl.utils import write_failure
from moka_pl.vision.classifier import load_classifier
from moka_pl.vision.images import ENDINGS, is_hidden, open_image, to_pixels


def predict_images(
    adapter: Path, source: Path, output: Path, batch_size: int, base: str | None = None, merged: bool = False
) -> None:
    """Writes a JSON object for each image, in the order of their paths; the file appears once it is whole.

    Args:
        adapter: An adapter directory of an image classifier.
        source: An image, or a folder with images, in further folders, too.
        output: The file to write.
        batch_size: Images at a time.
        base: Name or folder of the base; None is the stored one.
        merged: Whether to compute with dense W + ΔW.

    Raises:
        DataError: If there are no images, or one cannot be read.
        ConfigError: If ``output`` cannot be written.
    """
    files = find_images(source)
    model, processor = load_classifier(adapter, base=base)
    if merged:
        merge(model)
    part = output.with_name(f".{output.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for start in range(0, len(files), batch_size):
                batch = files[start : start + batch_size]
                for row in _classified(model, processor, batch, source):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        part.replace(output)
    except OSError as error:
        reason = write_failure(error, output.parent)
        raise ConfigError(
            f"cannot write to {output}: {reason}; free some space, or choose another file"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    print(f"{len(files)} images are classified in {output}", file=sys.stderr)


def find_images(source: Path) -> list[Path]:
    """Returns an image, or all images below a folder, in the order of their paths.

    Raises:
        DataError: If there are none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source} does not exist; give an image, or a folder of images")
    files = (file for file in source.rglob("*") if file.is_file() and not is_hidden(file))
    found = sorted(file for file in files if file.suffix.lower() in ENDINGS)
    if not found:
        raise DataError(f"{source} holds no images; add some (files with the endings {', '.join(ENDINGS)})")
    return found


def _classified(model: Any, processor: Any, files: list[Path], source: Path) -> Iterator[dict[str, Any]]:
    pixels = to_pixels(processor, [open_image(file) for file in files])  # (B, C, H, W)
    with torch.no_grad():
        logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits  # (B, C)
    labels = [model.config.id2label[number] for number in range(logits.shape[1])]
    for file, row in zip(files, logits.float().softmax(1).tolist(), strict=True):
        shares = dict(zip(labels, row, strict=True))
        likeliest = max(shares, key=shares.__getitem__)
        name = file.name if file == source else file.relative_to(source).as_posix()
        yield {"image": name, "label": likeliest, "probability": shares[likeliest], "probabilities": shares}
