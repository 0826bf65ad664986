"""The base classes of the data modules: options, splits, caching, reports and dataloaders."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from moka_pl._compat import rows_fingerprint
from moka_pl.data.batching.collate import BatchRows, SharePrefix
from moka_pl.data.batching.loader import EvalDataLoader, LoadingModule, ResumableDataLoader
from moka_pl.data.batching.order import Order, order_options, train_sampler
from moka_pl.data.batching.report import epoch_report
from moka_pl.data.batching.samplers import EvalSampler, GlobalBatchSampler
from moka_pl.data.encoding.digest import sources_digest
from moka_pl.data.encoding.examples import Encoded, Encoder, encode_rows, tokenizer_digest
from moka_pl.data.encoding.report import EncodingReport, ignored_fields, sum_ignored
from moka_pl.data.sources import Shard
from moka_pl.data.splits import HoldOut, warn_of_overlap
from moka_pl.data.types import DataDefaults, HasTokenizer, ModuleProtocol
from moka_pl.errors import DataError
from moka_pl.prompts.choice import resolve_prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

EvalLoaders = DataLoader[Any] | list[DataLoader[Any]]

ALL_SPLITS = ("train", "validation", "test")
_SPLITS = {
    None: ALL_SPLITS,
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class MokaDataModule(DataDefaults, LoadingModule, ABC):
    """Base class of the data modules. Subclasses encode the splits; this class caches and loads them.

    Args:
        batch_size: Examples per device and micro-batch; with packing, rows of up to max_length tokens.
        max_length: Maximum number of tokens in an example, special tokens included.
        num_workers: Dataloader workers per device; 0 loads in the training process.
        num_proc: Processes for tokenisation; None tokenises in this process.
        seed: Seed for shuffling, 0 or more.
        bucket: Batch examples of similar length (less padding, faster).
        eval_batch_size: Examples (multiple choice: questions) per device and batch in validation, test and
            prediction; None uses batch_size.
        packing: Pack several examples into each training row (almost no padding, fastest). They do not attend
            to each other, the loss equals that of padded batches, and every epoch has the same number of
            batches. bucket is ignored.
        max_tokens: Token budget per device and micro-batch, padding included; at least max_length. It
            replaces batch_size: a training batch holds as many examples (with packing: rows) as fit. Without
            packing, the examples of a batch have similar lengths, chosen from the whole dataset.

    Attributes:
        name: Short name, used in metric names.
        streaming: Whether the training data are read during training.
        separate_test: Whether validation and test data are disjoint.
        prompt: Name of the examples' prompt, if they all share one. Adapters store it, and
            ``moka_pl generate`` uses it by default.
        share_prefix: Whether the options of a multiple-choice item may share the computation of their prompt.
        report: Counts of read, kept and dropped examples by split (``"train"``, ``"validation"``,
            ``"test"``), available after ``setup``.

    Raises:
        DataError: An option is out of range, or max_tokens is combined with neither bucket nor packing.
    """

    name: str = "data"
    streaming: bool = False
    separate_test: bool = False
    share_prefix: SharePrefix = "auto"

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
        check_at_least(1, batch_size=batch_size, num_proc=num_proc, eval_batch_size=eval_batch_size)
        check_at_least(1, max_tokens=max_tokens)
        check_at_least(0, num_workers=num_workers, seed=seed)
        check_at_least(2, max_length=max_length)
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
            raise DataError(
                "max_tokens batches examples of similar length and needs bucket: true or packing: true"
            )
        self.report: dict[str, EncodingReport] = {}
        self._encoded: dict[str, Encoded | None] = {}
        self._prepared: dict[tuple[str, str | None], Encoded | None] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._trained_prompt: str | None = None
        self._encoded_prompt: str | None = None
        self._warned_of: set[str] = set()  # prompts of adapters that are not those of the data

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of the column ``task``; empty for plain text."""
        return []

    @property
    def eval_sets(self) -> list[tuple[str, list[str]]]:
        """(name, tasks) of each validation or test dataloader, in order."""
        # Asked for before the data are loaded, too: only a set known to be missing is left out.
        missing = any(encoded is None for split, encoded in self._encoded.items() if split != "train")
        return [] if missing else [(self.name, self.tasks)]

    @property
    def prompt_key(self) -> str | None:
        """The part of the prompt that the encoded examples depend on."""
        return self.prompt

    @property
    def trained_prompt(self) -> str | None:
        """Name of the prompt that the model's adapter was trained with, if known."""
        module = self._lightning_module()
        if self._trained_prompt is None and isinstance(module, ModuleProtocol):
            return module.adapter_prompt
        return self._trained_prompt

    def _lightning_module(self) -> object:
        return None if self.trainer is None else self.trainer.lightning_module

    def _resolve_prompt(self, chosen: str | None, known: Collection[str], default: str) -> str:
        """The chosen prompt, else that of the model's adapter, else the default."""
        return resolve_prompt(chosen, self.trained_prompt, known, default, warned=self._warned_of)

    @abstractmethod
    def encode(self, split: str) -> Encoded | None:
        """Encodes a split, or reads it from the cache.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.

        Returns:
            The encoded rows and counts; None if there is no such split.

        Raises:
            DataError: The data cannot be used; the message names the file or option.
        """

    def _encode(self, split: str, rows: "Dataset | None", encoder: Encoder, key: str) -> Encoded | None:
        """Encodes checked rows; ``key`` identifies everything but the encoder that affects their tokens."""
        if rows is None:
            return None
        label = f"{self.name} {split}"
        return encode_rows(rows, encoder, key=key, label=label, num_proc=self.num_proc, digest=self.digest)

    def connect(self, tokenizer: "PreTrainedTokenizerBase", trained_prompt: str | None = None) -> None:
        """Sets the tokenizer; needed only without a trainer, whose module has one."""
        if tokenizer is not self._tokenizer:
            self._encoded.clear()
            self._prepared.clear()
            self.report.clear()
            self.__dict__.pop("digest", None)
        self._tokenizer = tokenizer
        self._trained_prompt = trained_prompt

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The connected tokenizer, else that of the trainer's module; without either, a ``DataError``."""
        if self._tokenizer is None:
            module = self._lightning_module()
            if not isinstance(module, HasTokenizer) or module.tokenizer is None:
                raise DataError(
                    f"{type(self).__name__} has no tokenizer, nor has the LightningModule. "
                    "Call `connect(tokenizer)` first"
                )
            self._tokenizer = module.tokenizer
        return self._tokenizer

    @cached_property
    def digest(self) -> str:
        """Hash of the tokenizer's content; cache keys contain it."""
        return tokenizer_digest(self.tokenizer)

    def prepare_data(self) -> None:
        """Encodes what the run needs into the cache (Lightning calls this on one rank)."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for split in _SPLITS[stage]:
            self._prepared[split, self.prompt_key] = self.encode(split)

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits of a stage and reports them once."""
        if self.prompt_key != self._encoded_prompt:  # another adapter, whose own prompt is another
            self._encoded.clear()
            self._encoded_prompt = self.prompt_key
        ignored: dict[str, Mapping[str, int]] = {}
        for split in _SPLITS[stage]:
            if split in self._encoded:
                continue
            prepared = (split, self.prompt_key)
            # What this process has prepared it need not look up again.
            encoded = self._prepared[prepared] if prepared in self._prepared else self.encode(split)
            self._encoded[split] = encoded
            if encoded is not None:
                self.report[split] = encoded.report
                rank_zero_info(f"{self.name} {split}: {encoded.report}")
                ignored[rows_fingerprint(encoded.rows)] = encoded.report.ignored
        self._prepared.clear()
        if counts := sum_ignored(ignored.values()):
            rank_zero_info(f"{self.name}: {ignored_fields(counts)}")
        if "train" in _SPLITS[stage] and self._rank_and_world()[0] == 0:
            train, held = self.compared_rows()
            for rows in held:
                warn_of_overlap(self.name, train, rows)

    def compared_rows(self) -> tuple["Dataset | None", list["Dataset"]]:
        """Training rows, and the evaluation sets to search for items of the training rows."""
        return None, []

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled batches; resumable in the middle of an epoch."""
        encoded = self._get("train")
        sampler = self._train_sampler(encoded.rows["length"][:])
        rank_zero_info(f"{self.name} train: {epoch_report(sampler)}")
        return ResumableDataLoader(
            BatchRows(encoded.rows, self.pad_id),
            sampler=sampler,
            epoch_batches=self._epoch_batches(len(sampler)),
            order=self.batch_order,
            **self._loading(),
        )

    @property
    def batch_order(self) -> Order:
        """What decides the training batches, by option; of the rows only once they are loaded."""
        train = self._encoded.get("train")
        order = order_options(self) | {"max_length": self.row_length, "ranks": self._rank_and_world()[1]}
        if train is not None:
            order |= {"rows": len(train.rows), "data": train.digest, "prompt": self.prompt_key}
        return order

    @property
    def validation_digest(self) -> str | None:
        """A hash of the validation rows; None without any."""
        rows = self._encoded.get("validation")
        return None if rows is None else rows.digest

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lets the module prepare a batch while it is on the CPU."""
        module = self._lightning_module()
        return module.prepare_batch(batch) if isinstance(module, ModuleProtocol) else batch

    @property
    def row_length(self) -> int:
        """Most tokens of a training row, without padding."""
        return self.max_length

    def _train_sampler(self, lengths: list[int]) -> GlobalBatchSampler:
        rank, world = self._rank_and_world()
        return train_sampler(self, lengths, world, rank)

    def epoch_length(self) -> int:
        """Returns the number of batches of an epoch, for every rank; the data must be set up."""
        total = len(self._train_sampler(self._get("train").rows["length"][:]))
        limit = self._epoch_batches(total)
        return total if limit is None else min(total, limit)

    def val_dataloader(self) -> EvalLoaders:
        """Every validation example once; an empty list without validation data."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> EvalLoaders:
        """Every test example once."""
        return self._eval_loader("test")

    predict_dataloader = test_dataloader

    def _get(self, split: str) -> Encoded:
        if split not in self._encoded:
            raise DataError(f"the {split} split is not loaded. Call `setup()` first")
        encoded = self._encoded[split]
        if encoded is None:
            raise DataError(f"{type(self).__name__} has no {split} data")
        return encoded

    def _eval_loader(self, split: str) -> EvalLoaders:
        if split in self._encoded and self._encoded[split] is None:
            return []
        encoded = self._get(split)
        rank, world = self._rank_and_world()
        rows = encoded.rows
        share = self.share_prefix == "auto" and "shared_tokens" in rows.column_names
        length, size = ("shared_tokens", "shared_tokens") if share else ("length", "padded_tokens")
        sampler = EvalSampler(rows[length][:], self.eval_batch_size, world, rank, padded_tokens=rows[size][:])
        batches = BatchRows(rows, self.pad_id, self.share_prefix)
        return EvalDataLoader(batches, sampler=sampler, generator=torch.Generator(), **self._loading())

    @property
    def pad_id(self) -> int:
        """Token id of the padding."""
        pad = self.tokenizer.pad_token_id
        # Any id will do: neither attention nor the loss sees it.
        return 0 if pad is None else int(pad)


class SplitDataModule(MokaDataModule):
    """Base class of data modules with separate evaluation data, or a held-out share of the training data.

    Args:
        validation_share: Share of the examples to hold out if there are no evaluation data; 0 trains without
            validation. The choice depends on the data alone, not on the seed.
        separate_test: Always validate on ``validation_share`` of the training data, and use evaluation data
            for tests only. Without evaluation data, an equal share is held out for tests.
        **options: See MokaDataModule.
    """

    def __init__(self, validation_share: float = 0.05, separate_test: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._hold_out, self._hold_out_test = HoldOut(validation_share), HoldOut(validation_share)
        if separate_test and validation_share == 0:
            raise DataError("separate_test needs validation data: set validation_share above 0")
        self.validation_share = validation_share
        self.separate_test = separate_test

    @abstractmethod
    def _shards(self, split: str) -> list[Shard]:
        """The files or hub splits with training data or with separate evaluation data."""

    @abstractmethod
    def _read(self, shard: Shard) -> "Dataset":
        """The checked rows of a shard."""

    @property
    def batch_order(self) -> Order:
        """What decides the training batches, by option, and the source of the rows; see the base class."""
        source = sources_digest(self._shards("train"))
        return super().batch_order | {"source": source, "streaming": self.streaming}

    def _read_all(self, shards: list[Shard]) -> "Dataset":
        from datasets import concatenate_datasets

        rows = [self._read(shard) for shard in shards]
        return rows[0] if len(rows) == 1 else concatenate_datasets(rows)

    def _split_rows(self, split: str) -> "Dataset | None":
        """The checked rows of a split; None if there are none."""
        train = self._shards("train") if split == "train" else None
        held = self._shards("validation" if split == "validation" and not self.separate_test else "test")
        part = 0 if split == "train" else 1
        # Training data are asked for only where they are needed: a folder of tests can be evaluated on.
        if split != "train" and held and (split == "test" or not self.separate_test):
            return self._read_all(held)
        if split != "train" and not self.separate_test and (self.streaming or self.validation_share == 0):
            return None
        rows = self._read_all(self._shards("train") if train is None else train)
        if self.separate_test:
            rows, tests = (rows, None) if held else self._hold_out_test(rows)
            return tests if split == "test" else self._hold_out(rows)[part]
        if held or self.streaming or self.validation_share == 0:
            return rows
        return self._hold_out(rows)[part]

    def compared_rows(self) -> tuple["Dataset | None", list["Dataset"]]:
        """Training rows and the evaluation sets; see the base class."""
        if self.streaming or not self._shards("test"):
            return None, []
        train, *held = [self._split_rows(split) for split in ALL_SPLITS]
        different = {rows_fingerprint(rows): rows for rows in held if rows is not None}
        return train, list(different.values())


def check_at_least(least: int, **options: int | None) -> None:
    """Raises ``DataError`` for options below a minimum; None passes."""
    for name, value in options.items():
        if value is not None and value < least:
            raise DataError(f"{name} must be at least {least}, got {value}")
