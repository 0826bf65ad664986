"""The rows of a step, in words: computed once more, on all ranks, without a trace in the run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moka_pl.data.types import Batch
from moka_pl.errors import listed
from moka_pl.lm.scoring import IGNORE_INDEX

if TYPE_CHECKING:
    from moka_pl.training.steps import TrainedModule

#: Rows that a message shows, and the tokens of each: where it begins, and where its trained part does.
_ROWS, _BEGIN, _BEFORE, _AFTER = 3, 12, 12, 12


@contextmanager
def diagnosing(module: "TrainedModule") -> Iterator[None]:
    """Leaves the random generators as they are, and computes in the trainer's precision."""
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), module.trainer.precision_plugin.train_step_context():
        yield


def gathered(module: "TrainedModule", found: str) -> str:
    """Joins what the ranks have found."""
    if module.trainer.world_size == 1:
        return found
    module.trainer.strategy.barrier()  # a sharded base is gathered until all have found theirs
    everything: list[Any] = [None] * module.trainer.world_size
    torch.distributed.all_gather_object(everything, found)
    return "".join(f"{text} (rank {rank})" for rank, text in enumerate(everything) if text)


def row_texts(module: "TrainedModule", batch: Batch, tokens: Sequence[int]) -> list[str]:
    """Returns the rows of scored tokens, each once, in words: its beginning, and what stands there.

    Args:
        module: The module that is trained.
        batch: The batch, of plain or packed rows.
        tokens: Indices among the scored tokens of the batch.
    """
    places = (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero().tolist()
    texts: dict[int, str] = {}
    for row, column in (places[token] for token in tokens):
        if row not in texts:
            ids, at = batch["input_ids"][row], column + 1
            begin, near = max(0, at - _BEFORE), ids[max(0, at - _BEFORE) : at + _AFTER]
            parts = [ids[: min(_BEGIN, begin)], near]
            decoded = [" ".join(module.tokenizer.decode(part).split()) for part in parts if len(part)]
            texts[row] = repr(" … ".join(decoded))
    return list(texts.values())


def rows_clause(rows: Sequence[str]) -> str:
    """Returns the first rows as the end of a sentence."""
    return f"; rows: {listed(rows, _ROWS)}" if rows else ""
