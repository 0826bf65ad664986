"""The base class of image data: splits, batches that a resumed run goes on with, and loaders."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moka_pl.data.base import check_at_least
from moka_pl.data.batching.loader import EvalDataLoader, LoadingModule, ResumableDataLoader
from moka_pl.data.batching.order import Order
from moka_pl.data.batching.samplers import EvalSampler, TrainSampler, filler
from moka_pl.data.types import DataDefaults
from moka_pl.errors import DataError
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.vision.images import to_pixels

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BaseImageProcessor


class ImageBatch(TypedDict):
    """A batch of images.

    Attributes:
        pixel_values: Normalised pixels, shape (B, C, H, W), float32.
        labels: Number of each image's class, ``IGNORE_INDEX`` for fillers, shape (B,), int64.
        num_examples: Images without fillers.
        names: What each image is called, for messages and predictions.
    """

    pixel_values: Tensor
    labels: Tensor
    num_examples: int
    names: NotRequired[list[str]]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images that are read when they are needed.

    Attributes:
        names: What tells the images apart, in their order.
        labels: Number of each image's class.
        digest: A hash of both, and of what else tells their contents.
        sources: What ``read`` makes each image of, such as its file.
        read: Reads an image.
    """

    names: list[str]
    labels: list[int]
    digest: str
    sources: Sequence[Any]
    read: Callable[[Any], "Image"]

    def select(self, indices: Sequence[int]) -> "ImageSet":
        """Returns some of the images."""
        names, labels = [self.names[i] for i in indices], [self.labels[i] for i in indices]
        digest = sha256("\n".join([self.digest, *names]).encode()).hexdigest()
        return ImageSet(names, labels, digest, [self.sources[i] for i in indices], self.read)


@runtime_checkable
class HasImageProcessor(Protocol):
    """What image data need of a LightningModule."""

    @property
    def image_processor(self) -> "BaseImageProcessor":
        """Resizes and normalises images."""


class ImageData(DataDefaults, LoadingModule, ABC):
    """Base class of image data. Subclasses tell classes and images; this class splits and loads them.

    Images are resized and normalised by the model's image processor; nothing is random but ``flip``.

    Args:
        batch_size: Images per device and batch.
        eval_batch_size: The same in validation and test; None uses batch_size.
        num_workers: Dataloader workers per device; 0 loads in the training process.
        seed: Seed for shuffling and flips, 0 or more.
        validation_share: Share of each class's training images to hold out for validation, where there are
            no validation images; 0 trains without validation. It depends on their names, not on the seed.
        test_share: The same for tests; 0 tests on the validation images.
        flip: Mirror each training image with a probability of one half, anew in every epoch.

    Attributes:
        name: Short name, used in metric names.

    Raises:
        DataError: An option is out of range.
    """

    name: str = "images"
    streaming: bool = False

    def __init__(
        self,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        validation_share: float = 0.1,
        test_share: float = 0.1,
        flip: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        check_at_least(0, num_workers=num_workers, seed=seed)
        shares = {"validation_share": validation_share, "test_share": test_share}
        for option, share in shares.items():
            if not 0 <= share < 1:
                raise DataError(f"{option} must be at least 0 and below 1, got {share}")
        if validation_share + test_share >= 1:
            raise DataError(
                f"validation_share {validation_share} and test_share {test_share} leave no images to train on"
            )
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed, self.flip = num_workers, seed, flip
        self.validation_share, self.test_share = validation_share, test_share
        self._sets: dict[str, ImageSet] = {}
        self._processor: BaseImageProcessor | None = None

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """Names of the classes in the order of their numbers; a ``DataError`` if there are too few."""

    @abstractmethod
    def load(self) -> Mapping[str, ImageSet]:
        """Returns ``train`` and, where there are such images, ``validation`` and ``test``.

        Raises:
            DataError: The images cannot be used; the message names the folder or file.
        """

    def connect(self, processor: "BaseImageProcessor") -> None:
        """Sets the image processor; needed only without a trainer, whose module has one."""
        self._processor = processor

    @property
    def processor(self) -> "BaseImageProcessor":
        """The connected image processor, else that of the trainer's module."""
        module = None if self.trainer is None else self.trainer.lightning_module
        if self._processor is None and not isinstance(module, HasImageProcessor):
            raise DataError(
                f"{type(self).__name__} is for image classifiers, but the model is no VisionModule; add "
                "--model moka_pl.VisionModule, or call `connect(processor)` first"
            )
        return self._processor or module.image_processor  # type: ignore[union-attr]

    def setup(self, stage: str | None = None) -> None:
        """Finds the images of all splits, and says how many there are."""
        if self._sets:
            return
        given = dict(self.load())
        shares = {"test": self.test_share, "validation": self.validation_share}
        given |= hold_out(given["train"], {s: share for s, share in shares.items() if s not in given})
        if "validation" in given:
            given.setdefault("test", given["validation"])
        self._sets = {split: images for split, images in given.items() if images.labels}
        if "train" not in self._sets:
            raise DataError(
                f"{self.name}: no image is left to train on; lower validation_share and test_share"
            )
        counts = ", ".join(f"{len(images.labels):,} {split}" for split, images in self._sets.items())
        rank_zero_info(f"{self.name}: {len(self.classes)} classes; images: {counts}")

    @property
    def eval_sets(self) -> list[tuple[str, list[str]]]:
        """(name, tasks) of the validation or test dataloader: the classification is its only task."""
        return [(self.name, [self.name])]

    @property
    def batch_order(self) -> Order:
        """What decides the training batches, by option."""
        order: Order = {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "ranks": self._rank_and_world()[1],
            "flip": self.flip,
            "classes": self.classes,
        }
        if (train := self._sets.get("train")) is not None:
            order |= {"rows": len(train.labels), "data": train.digest}
        return order

    @property
    def validation_digest(self) -> str | None:
        """A hash of the validation images; None without any."""
        images = self._sets.get("validation")
        return None if images is None else images.digest

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled batches; resumable in the middle of an epoch."""
        sampler = self._train_sampler()
        return ResumableDataLoader(
            ImageRows(self._get("train"), self.processor, sampler if self.flip else None),
            sampler=sampler,
            epoch_batches=self._epoch_batches(len(sampler)),
            order=self.batch_order,
            **self._loading(),
        )

    def val_dataloader(self) -> "DataLoader[Any] | list[DataLoader[Any]]":
        """Every validation image once; an empty list without any."""
        return self._eval_loader("validation") if "validation" in self._sets else []

    def test_dataloader(self) -> "DataLoader[Any]":
        """Every test image once."""
        return self._eval_loader("test")

    predict_dataloader = test_dataloader

    def epoch_length(self) -> int:
        """Returns the number of batches of an epoch, for every rank; the data must be set up."""
        total = len(self._train_sampler())
        limit = self._epoch_batches(total)
        return total if limit is None else min(total, limit)

    def _train_sampler(self) -> TrainSampler:
        rank, world = self._rank_and_world()
        lengths = [1] * len(self._get("train").labels)
        return TrainSampler(lengths, self.batch_size, world, rank, seed=self.seed, bucket=False)

    def _eval_loader(self, split: str) -> EvalDataLoader:
        images = self._get(split)
        rank, world = self._rank_and_world()
        sampler = EvalSampler([1] * len(images.labels), self.eval_batch_size, world, rank)
        rows = ImageRows(images, self.processor)
        return EvalDataLoader(rows, sampler=sampler, generator=torch.Generator(), **self._loading())

    def _get(self, split: str) -> ImageSet:
        if split not in self._sets:
            why = f"it has no {split} images" if self._sets else "call `setup()` first"
            raise DataError(f"{type(self).__name__}: the {split} split is not there; {why}")
        return self._sets[split]


class ImageRows(Dataset[ImageBatch]):
    """Makes the batch of a list of numbers of images.

    Args:
        images: The images.
        processor: The model's image processor.
        flipped: The sampler that tells the epoch, if images are mirrored at random.
    """

    def __init__(
        self, images: ImageSet, processor: "BaseImageProcessor", flipped: TrainSampler | None = None
    ) -> None:
        self.images, self.processor, self.flipped = images, processor, flipped

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, indices: list[int]) -> ImageBatch:
        """Reads the images of a batch; those of ``filler`` numbers have no label."""
        real = [index if index >= 0 else filler(index) for index in indices]
        labels = [self.images.labels[index] if index >= 0 else IGNORE_INDEX for index in indices]
        images = [self.images.read(self.images.sources[index]) for index in real]
        pixels = to_pixels(self.processor, images)  # (B, C, H, W)
        if (sampler := self.flipped) is not None:
            seeds = [[sampler.seed, sampler.epoch, index] for index in real]
            mirrored = torch.tensor([numpy.random.default_rng(seed).random() < 0.5 for seed in seeds])
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)  # (B, C, H, W)
        return {
            "pixel_values": pixels,
            "labels": torch.tensor(labels),
            "num_examples": sum(index >= 0 for index in indices),
            "names": [self.images.names[index] for index in real],
        }


def hold_out(images: ImageSet, shares: Mapping[str, float]) -> dict[str, ImageSet]:
    """Splits images by their names alone: of every class its shares, and the rest to ``train``.

    Args:
        images: The images.
        shares: Shares of all images by split; splits that would be empty are left out.
    """
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(images.labels):
        by_class[label].append(index)
    parts: dict[str, list[int]] = {"train": [], **{split: [] for split in shares}}
    for members in by_class.values():
        members.sort(key=lambda index: sha256(images.names[index].encode()).digest())
        start = 0
        for split, share in shares.items():
            end = start + round(share * len(members))
            parts[split] += members[start:end]
            start = end
        parts["train"] += members[start:]
    return {split: images.select(sorted(chosen)) for split, chosen in parts.items() if chosen}
