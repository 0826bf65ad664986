"""Images as pixels: read by Pillow, resized and normalised as the model's image processor says."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from moka_pl.errors import DataError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

#: Endings of the files that count as images, in small letters.
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

#: Formats whose 16 bits Pillow reads as 32; those of PGM files fill them, whatever their largest value is.
_WIDENED = ("PNG", "PPM")


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is left out by its name, as what file managers leave behind."""
    return path.name.startswith(".")


def open_image(file: Path) -> "Image":
    """Reads an image; the first of several in a file.

    Raises:
        DataError: Naming the file, if it is none, is cut off, or larger than Pillow's limit.
    """
    from PIL import Image, ImageOps

    with _reading(file), Image.open(io.BytesIO(file.read_bytes())) as image:
        bits = _bits(image)
        upright: Image.Image = ImageOps.exif_transpose(image)
        upright.load()
        return upright if bits == 8 else _halved(upright)


def channels_of(processor: Any) -> int:
    """Returns the channels of the images that a processor makes: as many as it has means."""
    mean = getattr(processor, "image_mean", None)
    return len(mean) if isinstance(mean, list | tuple) else 3


def to_pixels(processor: Any, images: Sequence["Image"]) -> Tensor:
    """Makes a batch of images, (B, C, H, W), float32.

    Args:
        processor: The model's image processor.
        images: Images of any sizes and modes, which are converted to grey or RGB as the processor needs.
    """
    mode = "L" if channels_of(processor) == 1 else "RGB"
    arrays = [numpy.atleast_3d(numpy.asarray(image.convert(mode))).transpose(2, 0, 1) for image in images]
    made = processor(images=arrays, return_tensors="np", input_data_format="channels_first")["pixel_values"]
    return torch.from_numpy(numpy.asarray(made, dtype=numpy.float32))  # (B, C, H, W)


def check_header(file: Path) -> int:
    """Returns the size of an image file in bytes, whose beginning is looked at.

    Raises:
        DataError: Naming the file, if it is no image, or one whose pixels have no known range.
    """
    from PIL import Image

    with _reading(file), Image.open(file) as image:
        _bits(image)
        return file.stat().st_size


def _bits(image: "Image") -> int:
    """Returns the bits of a pixel's channel, 8 or 16.

    Raises:
        ValueError: If they are numbers of no known range, of which Pillow would cut off all above 255.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _WIDENED):
        return 16
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, of which no range is known; use 8 or 16 bits")
    return 8


def _halved(image: "Image") -> "Image":
    """Makes 8 bits of 16, which Pillow's ``convert`` does not: it makes all above 255 white."""
    from PIL import Image

    return Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:  # which names what was read: bytes, not the file
        raise DataError(f"{file} is no image of a format that Pillow knows; repair or remove it") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{file} cannot be read as an image ({one_line(error)}); repair or remove it"
        ) from error
