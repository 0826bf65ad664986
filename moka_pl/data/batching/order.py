"""What decides which rows are in which training batch, kept in checkpoints.

A run that is resumed in the middle of an epoch leaves out as many batches as were served. With other rows, or
rows in another order, some would come twice and others never.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moka_pl.data.batching.collate import MULTIPLE, padded
from moka_pl.data.batching.samplers import GlobalBatchSampler, PackSampler, TokenSampler, TrainSampler
from moka_pl.errors import DataError

Order = dict[str, Any]
"""Plain values by option."""

_CHANGES = {"batch_size": "batch_size", "max_tokens": "batch_size", "seed": "seed", "ranks": "ranks"}


class BatchOptions(Protocol):
    """The options of a data module that decide how batches are built."""

    batch_size: int
    max_tokens: int | None
    packing: bool
    bucket: bool
    seed: int

    @property
    def row_length(self) -> int:
        """Most tokens of a training row, without padding."""


def train_sampler(data: BatchOptions, lengths: Sequence[int], world: int, rank: int) -> GlobalBatchSampler:
    """Returns the sampler of the training batches.

    Args:
        data: What decides them.
        lengths: Tokens of every row.
        world: Number of ranks.
        rank: This rank.

    Raises:
        DataError: A batch of max_tokens may not have room for a row.
    """
    width = padded(data.row_length)
    if data.max_tokens is not None and data.max_tokens < width:
        raise DataError(
            f"max_tokens is {data.max_tokens}, but an example may have {width} tokens (max_length "
            "rounded up to a multiple of 8). Raise max_tokens or lower max_length"
        )
    if data.packing:
        rows = data.batch_size if data.max_tokens is None else data.max_tokens // width
        return PackSampler(lengths, rows, world, rank, data.seed, capacity=data.row_length)
    if data.max_tokens is not None:
        return TokenSampler(lengths, data.max_tokens, world, rank, data.seed, multiple=MULTIPLE)
    return TrainSampler(lengths, data.batch_size, world, rank, seed=data.seed, bucket=data.bucket)


def order_options(data: BatchOptions) -> Order:
    """Returns the options that count; None for those that others replace."""
    return {
        "batch_size": data.batch_size if data.max_tokens is None else None,
        "max_tokens": data.max_tokens,
        "packing": data.packing,
        "bucket": data.bucket if data.max_tokens is None and not data.packing else None,
        "seed": data.seed,
    }


def change_of(option: str) -> str:
    """Returns the name in ``model.allow_changes`` that lets an option of the order change."""
    return _CHANGES.get(option, "data")


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns (stored, current) values by option where both are known and differ."""
    both = ((name, stored[name], value) for name, value in current.items() if name in stored)
    return {name: (old, new) for name, old, new in both if _plain(old) != _plain(new)}


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Returns in words what differs between a checkpoint and a run."""
    return ", ".join(f"{name} {_short(old)}, now {_short(new)}" for name, (old, new) in changed.items())


def check_order(stored: Mapping[str, Any] | None, current: Mapping[str, Any]) -> None:
    """Refuses to go on within an epoch whose batches would be others.

    Raises:
        DataError: An option differs; the message names it with both values.
    """
    changed = differences(stored or {}, current)
    if changed:
        names = ", ".join(dict.fromkeys(map(change_of, changed)))
        raise DataError(
            f"the checkpoint was saved with other batches: {describe(changed)}. The rest of the epoch would "
            "repeat some rows and omit others. Resume with the options and data of the saved run, or begin "
            f"the epoch anew: --model.allow_changes '[{names}]'"
        )


def check_position(state: Mapping[str, Any], key: str) -> None:
    """Refuses the position of another kind of loader; checkpoints of old tell the kind by nothing else.

    Args:
        state: A loader's state.
        key: What this kind's state has.

    Raises:
        DataError: If it has not.
    """
    if key not in state:
        raise DataError(
            "the checkpoint was saved by another kind of loader (streaming or not, or one of your own); "
            "resume with the data options of the saved run"
        )


def _plain(value: Any) -> Any:
    """Returns lists for tuples, which a saved configuration does not tell apart."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
