"""Batches of a stream: shuffled and bucketed block by block, shared out to ranks and workers, resumable.

The unit is a block: the next ``buffer`` examples per rank. All ranks read the same blocks and encode their
own share of each, so that every rank has equally many batches without asking the others, and no example is on
two of them. Files (shards) are shared out to the workers of a rank. The order inside a block depends on seed,
pass, worker and block alone; a state is therefore the position of a block in the stream and the number of its
batches that were served, and a resumed run fills the block again.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moka_pl.data.batching.collate import collate_tokens
from moka_pl.data.batching.loader import watched
from moka_pl.data.batching.order import check_order, check_position
from moka_pl.data.encoding.examples import EncodedRow, Row, SegmentEncoder, nothing_trained, token_row
from moka_pl.data.encoding.report import (
    BLANK,
    COUNTED,
    DROPPED,
    EncodingReport,
    count_rows,
    ignored_fields,
    merged,
)
from moka_pl.data.formats.instruction import parse_instruction
from moka_pl.data.formats.trees import is_tree_message
from moka_pl.data.readers import described, located, stream, suffix_of
from moka_pl.data.reading import (
    ARROW,
    Columns,
    is_blank,
    is_local,
    load_hub,
    parse_record,
    rename,
    without_fill,
)
from moka_pl.data.sources import Shard
from moka_pl.data.types import Batch
from moka_pl.errors import DataError
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from datasets import IterableDataset as HFIterableDataset


@dataclass(frozen=True)
class StreamedRecords:
    """A corpus that is read during training.

    Attributes:
        shards: Local files, or one split on the hub.
        columns: Own names of the columns.
        seed: Seed of the order of the files.
    """

    shards: Sequence[Shard]
    columns: Columns
    seed: int

    def __post_init__(self) -> None:
        on_hub = [shard for shard in self.shards if not is_local(shard.source)]
        if on_hub and len(self.shards) > 1:
            names = ", ".join(str(shard.source) for shard in self.shards)
            raise DataError(
                f"streaming: true reads local files or a single hub dataset, not {names}. Give one of them, "
                "or download the data"
            )

    def open(self, epoch: int) -> "HFIterableDataset":
        """The records of a pass as a resumable stream; every pass shuffles the order of the files.

        Files give items with ``record`` and ``location``; every one of them is a shard.
        """
        from datasets import IterableDataset as HFIterableDataset

        if not is_local(self.shards[0].source):
            shard = self.shards[0]
            return load_hub(str(shard.source), shard.split, {**shard.options, "streaming": True})
        files = [str(expanded(shard.source)) for shard in self.shards]
        order = numpy.random.default_rng([self.seed, epoch]).permutation(len(files))
        return HFIterableDataset.from_generator(_items, gen_kwargs={"files": [files[i] for i in order]})

    def parse(self, item: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Parses one item of the stream, the ``number``-th (from 1), to an instruction row.

        Raises:
            DataError: The item is malformed, or a message of a tree.
        """
        shard = self.shards[0]
        if is_local(shard.source):
            location, record = item["location"], item["record"]
        else:
            location, record = f"{shard.source} ({shard.split}), example {number}", without_fill(item)
        if is_blank(record):
            return {"location": location, "ignored": merged({BLANK: 1}), "blank": True}
        with located(location):
            record = rename(record, self.columns)
        if is_tree_message(record):
            raise DataError(
                f"{location}: message trees cannot be streamed: their messages may be far apart. Set "
                "streaming: false"
            )
        return parse_record(parse_instruction, record, location)

    def check_first(self) -> None:
        """Parses the first record, to report a wrong path or format early."""
        first = next(iter(self.open(0)), None)
        if first is None:
            raise DataError(f"{self.shards[0].source} has no records. Give another split")
        self.parse(first, 1)


def _items(files: list[str]) -> Iterator[dict[str, Any]]:
    for path in map(Path, files):
        filled = suffix_of(path) in ARROW
        for location, record in stream(path):
            yield {"location": location, "record": without_fill(record) if filled else record}


State = dict[str, Any]


class Served(NamedTuple):
    """What a worker hands over.

    Attributes:
        kind: "batch"; "turn" only keeps the workers in step after a resume; "done" says, again and again,
            that the worker's share of the pass is read; "error" brings a message.
        worker: Number of the worker.
        batch: The batch, for "batch".
        state: Where the worker stands after it.
        message: What is wrong, for "error".
    """

    kind: Literal["batch", "turn", "done", "error"]
    worker: int
    batch: Batch | None = None
    state: State | None = None
    message: str = ""


@dataclass
class StreamedBatches(IterableDataset[Served]):
    """Batches of one rank over one pass of a stream.

    Attributes:
        records: The corpus.
        encoder: What encodes a row.
        batch_size: Examples per rank and batch.
        buffer: Examples per rank that make a block.
        rank: This rank, from 0.
        world: Number of ranks.
        seed: Seed of the shuffling.
        bucket: Sort the examples of a block by length before they are cut into batches.
        pad_id: Token id of the padding.
        epoch: Number of the pass, from 0.
        start: States of the workers to go on from, by number.
        turn: The worker that comes first.
    """

    records: StreamedRecords
    encoder: SegmentEncoder
    batch_size: int
    buffer: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    bucket: bool = True
    pad_id: int = 0
    epoch: int = 0
    start: dict[int, State] = field(default_factory=dict)
    turn: int = 0

    def __iter__(self) -> Iterator[Served]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self.turn:
            yield Served("turn", worker)
        try:
            yield from self._serve(worker)
        except DataError as error:
            # As an exception it would come out of a worker process with a traceback for a message.
            yield Served("error", worker, message=str(error))
        except Exception as error:
            names = ", ".join(str(shard.source) for shard in self.records.shards)
            yield Served("error", worker, message=f"{names} cannot be streamed ({described(error)})")
        while True:
            yield Served("done", worker)

    def _serve(self, worker: int) -> Iterator[Served]:
        state = self.start.get(worker) or {"rows": None, "block": 0, "read": 0, "served": 0, "report": {}}
        rows = self.records.open(self.epoch)
        if state["rows"] is not None:
            rows.load_state_dict(state["rows"])
        items = iter(rows)
        skip, block, read = state["served"], state["block"], state["read"]
        report = EncodingReport(**state["report"])
        position = state["rows"]
        while raw := list(islice(items, self.buffer * self.world)):
            checked = [self.records.parse(item, read + number) for number, item in enumerate(raw, start=1)]
            batches, counts = self._batches(checked, worker, block)
            if block == 0 and counts.kept == 0:
                reason = nothing_trained(counts, self.encoder.max_length)
                raise DataError(f"all {counts.read} examples of the first buffer were dropped: {reason}")
            # The block's counts come with its first batch, so that they are counted once.
            for number, batch in enumerate(batches[skip:], start=skip + 1):
                after = {"rows": position, "block": block, "read": read, "served": number}
                yield Served(
                    "batch", worker, batch, {**after, "report": asdict(report), "counts": asdict(counts)}
                )
            skip, block, read, report = 0, block + 1, read + len(raw), report + counts
            position = rows.state_dict()

    def _batches(
        self, rows: list[dict[str, Any]], worker: int, block: int
    ) -> tuple[list[Batch], EncodingReport]:
        """This rank's batches of a block, equally many on all ranks."""
        random = numpy.random.default_rng([self.seed, self.epoch, worker, block])
        order = random.permutation(len(rows))
        encoded = [self._encode(rows[index]) for index in order[self.rank :: self.world]]
        kept = [row for row in encoded if row["status"] != DROPPED]
        if self.bucket:
            kept.sort(key=lambda row: row["length"])
        # Only the number of examples is known to all ranks, not how many of them were dropped.
        size = len(kept) if self.world == 1 else math.ceil(len(rows) / self.world)
        count = math.ceil(size / self.batch_size)
        shares = numpy.array_split(numpy.arange(len(kept)), count) if count else []
        # All of a share may be dropped, but the other ranks wait for this one's part of the step.
        nothing = [{"input_ids": [self.pad_id], "labels": [IGNORE_INDEX]}]
        parts = [[kept[index] for index in share] for share in shares]
        batches: list[Batch] = [
            collate_tokens(part or nothing, [not part] * max(1, len(part)), self.pad_id) for part in parts
        ]
        numbers = {name: [row[name] for row in encoded] for name in COUNTED}
        report = count_rows(numbers, [row.get("ignored", "") for row in encoded])
        return [batches[index] for index in random.permutation(count)], report

    def _encode(self, row: Row) -> EncodedRow:
        if "blank" in row:
            return token_row([], [], 0) | {"ignored": row["ignored"]}
        return self.encoder(row)


class StreamLoader(DataLoader[Any]):
    """Loads a stream, pass after pass, and can be saved and resumed after any batch.

    Lightning reads one batch ahead of loaders without a length, which would put their state one batch ahead
    as well; so this one has the length of the whole run.

    Args:
        dataset: The batches of this rank.
        num_workers: Worker processes; more than the corpus has files (shards) are idle.
        length: Batches after which the run ends; None makes an iteration one pass.
        label: What the examples are called in messages.
        pin_memory: As for ``DataLoader``.
        order: What decides the batches, by option; a state of other values is refused.
    """

    def __init__(
        self,
        dataset: StreamedBatches,
        num_workers: int = 0,
        length: int | None = None,
        label: str = "stream",
        pin_memory: bool = False,
        order: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )
        # Every worker has its own shards here, which Lightning cannot know.
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        self.stream = dataset
        self.length = length
        self.label = label
        self.order = dict(order or {})
        self._epoch = 0
        self._turn = 0
        self._workers: dict[int, State] = {}
        self._named: set[str] = set()

    def __len__(self) -> int:
        """Batches of the whole run; raises ``TypeError`` without a trainer, where it is unknown."""
        if self.length is None:
            raise TypeError("the length of a stream is unknown without a trainer")
        return self.length

    @property
    def report(self) -> EncodingReport:
        """Counts over the blocks started in this pass, by all workers of this rank."""
        counts = (state[name] for state in self._workers.values() for name in ("report", "counts"))
        return sum((EncodingReport(**count) for count in counts), EncodingReport())

    def state_dict(self) -> State:
        """The pass, and the position of every worker."""
        return {
            "epoch": self._epoch,
            "turn": self._turn,
            "workers": dict(self._workers),
            "num_workers": self.num_workers,
            "order": self.order,
        }

    def load_state_dict(self, state_dict: State) -> None:
        """Continues from a state of as many workers and of the same batches; else a ``DataError``."""
        check_order(state_dict.get("order"), self.order)
        check_position(state_dict, "num_workers")
        if state_dict["num_workers"] != self.num_workers:
            raise DataError(
                f"the checkpoint was saved with num_workers={state_dict['num_workers']}, but this run has "
                f"{self.num_workers}. Resume the stream with the same number"
            )
        self._epoch, self._turn = state_dict["epoch"], state_dict["turn"]
        self._workers = {int(worker): state for worker, state in state_dict["workers"].items()}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        passed = self._epoch
        while self.length is not None or self._epoch == passed:
            served = bool(self._workers)
            for batch in self._pass():
                served = True
                yield batch
            if not served:
                raise DataError(f"{self.label} has no records")
            report = self.report
            rank_zero_info(f"{self.label}, pass {self._epoch + 1}, first rank: {report}")
            if report.ignored:
                rank_zero_info(f"{self.label}, pass {self._epoch + 1}, {ignored_fields(report.ignored)}")
            self._epoch, self._turn, self._workers = self._epoch + 1, 0, {}

    def _say_ignored(self, counts: Mapping[str, int]) -> None:
        """Names fields that are not used when they are first seen."""
        new = {name: count for name, count in counts.items() if name not in self._named}
        if new:
            self._named.update(new)
            rank_zero_info(f"{self.label}, so far: {ignored_fields(new)}")

    def _pass(self) -> Iterator[Batch]:
        self.stream.epoch, self.stream.start, self.stream.turn = self._epoch, self._workers, self._turn
        workers = max(1, self.num_workers)
        done: set[int] = set()
        for item in watched(super().__iter__()):
            if item.kind == "error":
                raise DataError(item.message)
            if item.kind == "done":
                done.add(item.worker)
                if len(done) == workers:
                    return
            if item.kind == "batch":
                self._workers = {**self._workers, item.worker: item.state}
                self._turn = (item.worker + 1) % workers
                self._say_ignored(item.state["counts"]["ignored"])
                yield item.batch
