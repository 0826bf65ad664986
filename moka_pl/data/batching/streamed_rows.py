"""Records of corpora larger than memory, one after another, from files or the hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from moka_pl.data.columns import Columns, rename
from moka_pl.data.formats.instruction import check_instruction
from moka_pl.data.formats.trees import is_tree_message
from moka_pl.data.readers import stream
from moka_pl.data.reading import is_local, load_hub
from moka_pl.data.sources import Piece
from moka_pl.errors_part import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class StreamedRecords:
    """A corpus that is read while it is trained on.

    Attributes:
        pieces: Local files, or one split on the hub.
        columns: Own names of the columns.
        seed: Seed of the order of the files.
    """

    pieces: Sequence[Piece]
    columns: Columns = ()
    seed: int = 0

    def __post_init__(self) -> None:
        on_hub = [piece for piece in self.pieces if not is_local(piece.source)]
        if on_hub and len(self.pieces) > 1:
            names = ", ".join(str(piece.source) for piece in self.pieces)
            raise DataError(
                f"streaming: true reads local files or one data set of the hub at a time, not {names}. Give "
                "one of them, or download the data."
            )

    def open(self, epoch: int) -> "IterableDataset":
        """The records as a resumable stream; files come in an order of their own in every pass.

        Args:
            epoch: Number of the pass over the data, from 0.

        Returns:
            Items with `record` and, from files, `where`; every file (or shard of the hub) is a shard.

        Raises:
            DataError: The hub data set cannot be had.
        """
        from datasets import IterableDataset

        if not is_local(self.pieces[0].source):
            piece = self.pieces[0]
            return load_hub(str(piece.source), piece.split, {**piece.options, "streaming": True})
        files = [str(Path(piece.source).expanduser()) for piece in self.pieces]
        order = numpy.random.default_rng([self.seed, epoch]).permutation(len(files))
        return IterableDataset.from_generator(_items, gen_kwargs={"files": [files[i] for i in order]})

    def check(self, item: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Check one item of the stream.

        Args:
            item: What the stream gave.
            number: How manieth it is, from 1, where the item does not say where it stands.

        Returns:
            A row with the columns of `instruction_features`.

        Raises:
            DataError: The record is wrong, or a message of a tree, which a stream cannot put together.
        """
        if is_local(self.pieces[0].source):
            where, record = item["where"], item["record"]
        else:
            where, record = f"{self.pieces[0].source} ({self.pieces[0].split}), example {number}", dict(item)
        record = rename(record, self.columns, where)
        if is_tree_message(record):
            raise DataError(
                f"{where}: message trees cannot be streamed, their messages may stand far apart. Use "
                "streaming: false."
            )
        return check_instruction(record, where, "")

    def check_first(self) -> None:
        """Read and check the first record, so that a wrong path or form shows at once.

        Raises:
            DataError: It is wrong, or there is none.
        """
        first = next(iter(self.open(0)), None)
        if first is None:
            raise DataError(f"{self.pieces[0].source} holds no records. Give another split.")
        self.check(first, 1)


def _items(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in files:
        for where, record in stream(Path(file)):
            yield {"where": where, "record": record}
