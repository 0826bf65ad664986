"""scikit-learn's handwritten digits: 1,797 grey images of 8 × 8 pixels, which come with the package."""

from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy
from numpy.typing import NDArray

from moka_pl.errors import DataError
from moka_pl.vision.data import ImageData, ImageSet

#: Largest value of a pixel there.
_WHITE = 16


class DigitsData(ImageData):
    """Handwritten digits of 8 × 8 pixels (``sklearn.datasets.load_digits``; no download).

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (CC BY 4.0).

    Args:
        digits: Digits to tell apart, each a class; ``null`` takes all ten.
        **options: batch_size, eval_batch_size, num_workers, seed, validation_share, test_share, flip (see
            ImageData).

    Raises:
        DataError: Fewer than two digits, one twice, or what is no digit.
    """

    name = "digits"

    def __init__(self, digits: list[int] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.digits = list(range(10)) if digits is None else list(digits)
        wrong = [digit for digit in self.digits if digit not in range(10)]
        if wrong or len(set(self.digits)) != len(self.digits) or len(self.digits) < 2:
            raise DataError(f"digits must be at least two different ones from 0 to 9, got {self.digits}")

    @property
    def classes(self) -> list[str]:
        """The digits as text."""
        return [str(digit) for digit in self.digits]

    @property
    def source(self) -> str:
        """What model cards call the data."""
        return f"scikit-learn's digits ({', '.join(self.classes)})"

    def load(self) -> Mapping[str, ImageSet]:
        """Returns all images of the digits, to be split."""
        from PIL import Image

        images, targets = self._stored
        chosen = [i for i, target in enumerate(targets.tolist()) if target in self.digits]
        grey = numpy.round(images[chosen] * (255 / _WHITE)).astype(numpy.uint8)  # (N, 8, 8)
        return {
            "train": ImageSet(
                names=[f"digit {i}" for i in chosen],
                labels=[self.digits.index(int(targets[i])) for i in chosen],
                digest=sha256(grey.tobytes()).hexdigest(),
                sources=list(grey),
                read=Image.fromarray,
            )
        }

    @cached_property
    def _stored(self) -> tuple[NDArray[Any], NDArray[Any]]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("DigitsData needs scikit-learn: pip install 'moka_pl[vision]'") from error
        bunch = load_digits()
        return bunch.images, bunch.target
