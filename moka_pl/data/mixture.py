"""Combines several data modules into one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import count
from operator import add
from typing import TYPE_CHECKING, Any

import numpy
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from moka_pl.data.base import EvalLoaders, MokaDataModule
from moka_pl.data.encoding.examples import Encoded
from moka_pl.data.encoding.report import EncodingReport
from moka_pl.errors import DataError
from moka_pl.prompts.choice import CHOICE_PROMPTS

if TYPE_CHECKING:
    from datasets import Dataset


def epoch_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Examples of each part in an epoch: in the ratio of the weights, with every example at least once."""
    # In the part that is largest for its weight, every example appears exactly once.
    length = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [max(size, round(weight * length)) for size, weight in zip(sizes, weights, strict=True)]


def repeated(size: int, count: int, seed: Sequence[int]) -> NDArray[numpy.int64]:
    """Indices of ``count`` examples out of ``size``, each as often as the others or once more.

    Args:
        size: Number of examples.
        count: Number of indices.
        seed: Decides which examples appear once more.
    """
    times, rest = divmod(count, size)
    whole = numpy.tile(numpy.arange(size, dtype=numpy.int64), times)  # (times * size,)
    return numpy.concatenate([whole, numpy.random.default_rng(list(seed)).permutation(size)[:rest]])


def distinct(name: str, taken: set[str]) -> str:
    """Returns a name, with a number (``_2``, ...) if it is taken, and takes it."""
    numbered = (name if n == 1 else f"{name}_{n}" for n in count(1))
    chosen = next(one for one in numbered if one not in taken)
    taken.add(chosen)
    return chosen


class MixtureData(MokaDataModule):
    """Trains on the shuffled examples of all parts, and evaluates each part separately.

    Each part encodes its examples with its own options (paths, prompt, max_length, num_proc). The mixture's
    own options set how batches are built and loaded, for training and evaluation.

    With weights, an epoch holds the parts' examples in the ratio of the weights and uses every example at
    least once: the part that is largest for its weight appears once, the others are repeated. Every epoch
    holds the same examples in another order; ``trainer.limit_train_batches`` makes shorter epochs, each with
    other examples.

    Args:
        parts: The data modules, in the order of their validation dataloaders.
        weights: Relative share of each part in the training examples (``[3, 1]``: three of the first for one
            of the second); None uses every example once. The weight of a part without training data, such as
            MMLU, is not used.
        **options: batch_size, num_workers, seed, bucket, eval_batch_size, packing, max_tokens (see
            MokaDataModule). max_length and num_proc have no effect here; set them in the parts.

    Raises:
        DataError: There are no parts, one of them streams, or the weights do not match them.
    """

    name = "mixture"

    def __init__(
        self, parts: list[MokaDataModule], weights: list[float] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if not parts:
            raise DataError("parts is empty; a mixture needs at least one part")
        if weights is not None and len(weights) != len(parts):
            raise DataError(f"weights has {len(weights)} values for {len(parts)} parts. Give one per part")
        if weights is not None and not all(0 < weight < float("inf") for weight in weights):
            raise DataError(f"weights must be above 0, got {weights}. Remove parts that you do not want")
        if any(part.streaming for part in parts):
            raise DataError("a mixture cannot stream. Set streaming: false, or train on one corpus")
        self.weights = weights
        self.parts = parts

    @property
    def source(self) -> str:
        """The parts' own, one after another."""
        return f"{type(self).__name__} of {'; '.join(part.source for part in self.parts)}"

    @property
    def prompt(self) -> str | None:  # type: ignore[override]
        """The parts' prompt, if they share one; prompts of questions count only without others."""
        prompts = {part.prompt for part in self.parts if part.prompt is not None}
        prompts = prompts - CHOICE_PROMPTS.keys() or prompts
        return prompts.pop() if len(prompts) == 1 else None

    @property
    def prompt_key(self) -> str | None:
        """The prompts of all parts."""
        return " ".join(str(part.prompt) for part in self.parts)

    @property
    def generated_tokens(self) -> int:  # type: ignore[override]
        """The parts' largest number of generated tokens."""
        return max(part.generated_tokens for part in self.parts)

    @property
    def separate_test(self) -> bool:  # type: ignore[override]
        """Whether validation and test data are disjoint in all parts."""
        return all(part.separate_test for part in self.parts)

    @property
    def task_groups(self) -> Mapping[str, Sequence[str]]:
        """The groups of all parts."""
        return {name: tasks for part in self.parts for name, tasks in part.task_groups.items()}

    @property
    def reports(self) -> list[tuple[str, str, EncodingReport]]:
        """The reports of all parts; the names of a split are those of :attr:`eval_sets`."""
        reports = [report for part in self.parts for report in part.reports]
        taken: dict[str, set[str]] = {}
        return [
            (distinct(name, taken.setdefault(split, set())), split, report) for name, split, report in reports
        ]

    @property
    def eval_sets(self) -> list[tuple[str, list[str]]]:
        """(name, tasks) of each part with evaluation data; repeated names get a number (``_2``, ...)."""
        taken: set[str] = set()
        return [(distinct(name, taken), tasks) for part in self.parts for name, tasks in part.eval_sets]

    @property
    def row_length(self) -> int:
        """Most tokens of a training row, without padding: the parts' largest max_length."""
        return max(part.row_length for part in self.parts)

    @property
    def validation_digest(self) -> str | None:
        """The hashes of all parts' validation rows."""
        digests = [digest for part in self.parts if (digest := part.validation_digest) is not None]
        return " ".join(digests) or None

    def encode(self, split: str) -> Encoded | None:
        """The parts' encoded training rows, concatenated; None for evaluation, where parts stay separate."""
        from datasets import concatenate_datasets

        parts = [part.encode(split) for part in self._connected()]
        trained = {number: encoded for number, encoded in enumerate(parts) if encoded is not None}
        if split != "train" or not trained:
            return None
        return Encoded(
            concatenate_datasets(self._weighted({number: part.rows for number, part in trained.items()})),
            # What they ignore is said by the parts themselves.
            replace(reduce(add, [part.report for part in trained.values()]), ignored={}),
        )

    def _weighted(self, rows: Mapping[int, "Dataset"]) -> list["Dataset"]:
        """The training rows of the parts that have some, by part, repeated according to the weights."""
        if self.weights is None:
            return list(rows.values())
        sizes = [len(one) for one in rows.values()]
        counts = dict(zip(rows, epoch_counts(sizes, [self.weights[part] for part in rows]), strict=True))
        shares = [
            f"{self.parts[part].name} {counts[part]:,} (each {counts[part] / len(one):.2f} times)"
            for part, one in rows.items()
        ]
        rank_zero_info(f"{self.name}: an epoch has {sum(counts.values()):,} examples: {', '.join(shares)}")
        return [one.select(repeated(len(one), counts[part], (self.seed, part))) for part, one in rows.items()]

    def setup(self, stage: str | None = None) -> None:
        """Sets the parts up, then the mixture of their training rows."""
        for part in self._connected():
            part.setup(stage)
        super().setup(stage)

    def _connected(self) -> list[MokaDataModule]:
        for part in self.parts:
            part.connect(self.tokenizer, self.trained_prompt)
        return self.parts

    def _eval_loader(self, split: str) -> EvalLoaders:
        loaders: list[DataLoader[Any]] = []
        for part in self.parts:
            part.trainer = self.trainer
            part.num_workers, part.eval_batch_size = self.num_workers, self.eval_batch_size
            loader = part._eval_loader(split)
            loaders += loader if isinstance(loader, list) else [loader]
        return loaders
