"""What all data modules have in common: options, caching, reports and loaders."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from moka_pl.data.batching.collate import MULTIPLE, BatchRows, SharePrefix, padded
from moka_pl.data.batching.loader import ResumableDataLoader
from moka_pl.data.batching.report import epoch_report
from moka_pl.data.batching.samplers import (
    EvalSampler,
    GlobalBatchSampler,
    PackSampler,
    TokenSampler,
    TrainSampler,
)
from moka_pl.data.encoding.examples import Encoded, tokenizer_digest
from moka_pl.data.encoding.report import EncodingReport
from moka_pl.data.splits import warn_of_overlap
from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

EvalLoaders = DataLoader[Any] | list[DataLoader[Any]]

_SPLITS = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}
_ALL_SPLITS = ("train", "validation", "test")


class MokaDataModule(LightningDataModule):
    """Base of the data modules: subclasses encode splits, this class caches, reports and loads them.

    Args:
        batch_size: Examples per device and micro-batch; with packing, rows of up to max_length tokens.
        max_length: Most tokens of an example, special tokens included.
        num_workers: Processes per device that load batches; 0 loads in the training process.
        num_proc: Processes for tokenisation; None tokenises in this process.
        seed: Seed of the shuffling, 0 or above.
        bucket: Batches of examples of similar length (less padding, more speed).
        eval_batch_size: Examples (for multiple choice: questions) per device and batch in validation, test
            and prediction; None takes batch_size.
        packing: Train on several examples in one row (hardly any padding, most speed). They do not attend to
            each other, and the loss is the same as that of padded batches. The number of batches is the same
            in every epoch. Bucket then has no effect.
        max_tokens: Tokens per device and micro-batch, padding included, at least max_length; training batches
            then hold as many examples (with packing: rows) as fit, instead of batch_size. Without packing
            they hold examples of similar length of the whole data set.

    Attributes:
        name: Short name, part of metric names.
        streaming: Whether the training data are read while they are trained on.
        prompt: Name of the prompt that the examples are written in, if there is one for all of them; trained
            adapters keep it, so that `moka_pl generate` can ask in the same words.
        share_prefix: Whether options of multiple-choice items may share their prompt's computation.
        generated_tokens: Most tokens of a generated answer, for prompts that are evaluated so.
        report: What became of the examples, by split (`"train"`, `"validation"`, `"test"`), once set up.
    """

    name: str = "data"
    streaming: bool = False
    prompt: str | None = None
    share_prefix: SharePrefix = "auto"
    generated_tokens: int = 0

    def __init__(
        self,
        batch_size: int = 8,
        max_length: int = 512,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
        bucket: bool = True,
        eval_batch_size: int | None = None,
        packing: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        _at_least(1, batch_size=batch_size, num_proc=num_proc, eval_batch_size=eval_batch_size)
        _at_least(1, max_tokens=max_tokens)
        _at_least(0, num_workers=num_workers, seed=seed)
        _at_least(2, max_length=max_length)
        self.batch_size = batch_size
        self.max_length = max_length
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.seed = seed
        self.bucket = bucket
        self.eval_batch_size = eval_batch_size or batch_size
        self.packing = packing
        self.max_tokens = max_tokens
        if max_tokens is not None and not packing and not bucket:
            raise DataError("max_tokens makes batches of similar lengths; it cannot go with bucket: false.")
        self.report: dict[str, EncodingReport] = {}
        self._encoded: dict[str, Encoded | None] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._trained_prompt: str | None = None
        self._encoded_prompt: str | None = None
        self._digest: tuple[PreTrainedTokenizerBase, str] | None = None

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that the column `task` counts; empty for plain text."""
        return []

    @property
    def eval_sets(self) -> list[tuple[str, list[str]]]:
        """(name, tasks) of every validation or test dataloader, in their order."""
        # Asked for before the data are loaded, too: only a set known to be missing is left out.
        missing = any(encoded is None for split, encoded in self._encoded.items() if split != "train")
        return [] if missing else [(self.name, self.tasks)]

    @property
    def task_groups(self) -> dict[str, list[str]]:
        """Tasks that are reported together, too, by the name of the group."""
        return {}

    @property
    def prompt_key(self) -> str | None:
        """What of the prompt decides about the encoded examples."""
        return self.prompt

    @property
    def trained_prompt(self) -> str | None:
        """Name of the prompt that the model's adapter was trained with, as far as it is known."""
        if self._trained_prompt is not None:
            return self._trained_prompt
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, "adapter_prompt", None)

    @abstractmethod
    def encode(self, split: str) -> Encoded | None:
        """Encode a split, or take it from the cache.

        Args:
            split: `"train"`, `"validation"` or `"test"`.

        Returns:
            The encoded rows and counts; None where there is no such split.

        Raises:
            DataError: The data cannot be used.
        """

    def connect(self, tokenizer: "PreTrainedTokenizerBase", trained_prompt: str | None = None) -> None:
        """Use this tokenizer; needed only without a trainer, whose module brings its own.

        Args:
            tokenizer: A fast tokenizer.
            trained_prompt: The prompt that the model's adapter was trained with.
        """
        if tokenizer is not self._tokenizer:
            self._encoded.clear()
            self.report.clear()
        self._tokenizer = tokenizer
        self._trained_prompt = trained_prompt

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The connected tokenizer, else the one of the trainer's LightningModule.

        Raises:
            DataError: There is neither.
        """
        if self._tokenizer is None:
            module = self.trainer.lightning_module if self.trainer is not None else None
            tokenizer = getattr(module, "tokenizer", None)
            if tokenizer is None:
                raise DataError(
                    f"{type(self).__name__} has no tokenizer: the LightningModule has no `tokenizer`. "
                    "Without a trainer call `connect(tokenizer)` first."
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def digest(self) -> str:
        """Hash of the tokenizer's content; cache keys contain it."""
        if self._digest is None or self._digest[0] is not self.tokenizer:
            self._digest = (self.tokenizer, tokenizer_digest(self.tokenizer))
        return self._digest[1]

    def prepare_data(self) -> None:
        """Encode what the run needs once (Lightning calls this on one rank), which fills the cache."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for split in self._splits(stage):
            self.encode(split)

    def setup(self, stage: str | None = None) -> None:
        """Load the splits of a stage and report them once.

        Args:
            stage: `"fit"`, `"validate"`, `"test"`, `"predict"`, or None for all.
        """
        if self.prompt_key != self._encoded_prompt:  # another adapter, whose own prompt is another
            self._encoded.clear()
            self._encoded_prompt = self.prompt_key
        for split in self._splits(stage):
            if split in self._encoded:
                continue
            encoded = self._encoded[split] = self.encode(split)
            if encoded is not None:
                self.report[split] = encoded.report
                rank_zero_info(f"{self.name} {split}: {encoded.report}")
        if "train" in self._splits(stage) and self._place()[0] == 0:
            train, held = self.compared_rows()
            for rows in held:
                warn_of_overlap(self.name, train, rows)

    def compared_rows(self) -> tuple["Dataset | None", list["Dataset"]]:
        """Training rows, and the evaluation sets that are looked through for items out of them."""
        return None, []

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled batches; resumable in the middle of an epoch."""
        encoded = self._get("train")
        sampler = self._train_sampler(encoded.rows["length"][:])
        rank_zero_info(f"{self.name} train: {epoch_report(sampler)}")
        return ResumableDataLoader(
            BatchRows(encoded.rows, self._pad_id()),
            sampler=sampler,
            epoch_batches=self._epoch_batches(len(sampler)),
            **self._loading(),
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lets the module prepare a batch while it is on the CPU."""
        module = None if self.trainer is None else self.trainer.lightning_module
        prepare = getattr(module, "prepare_batch", None)
        return batch if prepare is None else prepare(batch)

    @property
    def row_length(self) -> int:
        """Most tokens of a training row, without padding."""
        return self.max_length

    def _train_sampler(self, lengths: list[int]) -> GlobalBatchSampler:
        rank, world = self._place()
        width = padded(self.row_length)
        if self.max_tokens is not None and self.max_tokens < width:
            raise DataError(
                f"max_tokens is {self.max_tokens}, but an example may take {width} tokens (max_length, "
                "rounded up to a multiple of 8). Raise max_tokens or lower max_length."
            )
        if self.packing:
            rows = self.batch_size if self.max_tokens is None else self.max_tokens // width
            return PackSampler(lengths, rows, world, rank, self.seed, capacity=self.row_length)
        if self.max_tokens is not None:
            return TokenSampler(lengths, self.max_tokens, world, rank, self.seed, multiple=MULTIPLE)
        return TrainSampler(lengths, self.batch_size, world, rank, seed=self.seed, bucket=self.bucket)

    def val_dataloader(self) -> EvalLoaders:
        """Every validation example once; an empty list where there is no validation data."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> EvalLoaders:
        """Every test example once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoaders:
        """The test examples."""
        return self._eval_loader("test")

    def _splits(self, stage: Any) -> tuple[str, ...]:
        # `setup` is given the stage as text, the trainer's state holds it as an enum.
        return _ALL_SPLITS if stage is None else _SPLITS[getattr(stage, "value", stage)]

    def _get(self, split: str) -> Encoded:
        if split not in self._encoded:
            raise DataError(f"The {split} split is not loaded. Call `setup()` first.")
        encoded = self._encoded[split]
        if encoded is None:
            raise DataError(f"{type(self).__name__} has no {split} data.")
        return encoded

    def _eval_loader(self, split: str) -> EvalLoaders:
        if split in self._encoded and self._encoded[split] is None:
            return []
        encoded = self._get(split)
        rank, world = self._place()
        rows = encoded.rows
        share = self.share_prefix == "auto" and "shared" in rows.column_names
        length, slots = ("shared", "shared") if share else ("length", "slots")
        sampler = EvalSampler(rows[length][:], self.eval_batch_size, world, rank, slots=rows[slots][:])
        batches = BatchRows(rows, self._pad_id(), self.share_prefix)
        return DataLoader(batches, sampler=sampler, generator=torch.Generator(), **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {"batch_size": None, "num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}

    def _place(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        # Any id will do: neither attention nor the loss sees it.
        return 0 if pad is None else int(pad)

    def _epoch_batches(self, total: int) -> int | None:
        if self.trainer is None:
            return None
        limit = self.trainer.limit_train_batches
        return limit if isinstance(limit, int) else int(total * limit) if limit < 1.0 else None


def _at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise DataError(f"{name} must be at least {least}, got {value}.")
