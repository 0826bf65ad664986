"""DataLoaders, one of them resumable in the middle of an epoch, and how data modules make them."""

from collections.abc import Iterator, Mapping
from itertools import islice
from multiprocessing import resource_sharer
from traceback import walk_tb
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from moka_pl.data.batching.order import check_order, check_position
from moka_pl.data.batching.samplers import GlobalBatchSampler
from moka_pl.errors import DataError, MokaError, one_line

Batch = TypeVar("Batch")


def killed_worker(error: BaseException) -> DataError | None:
    """Returns what a loader's error says if it is that a worker process was killed, else None.

    PyTorch may notice it, or only the missing answer of a worker whose last batch is fetched.
    """
    noticed = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    if not noticed and not (isinstance(error, ConnectionError | EOFError) and _asked_worker(error)):
        return None
    return DataError(
        f"a worker that loads data was killed ({one_line(error)}): probably memory ran out. Lower "
        "num_workers, or set num_workers: 0"
    )


def _asked_worker(error: BaseException) -> bool:
    """Whether an error arose where a worker was asked for the memory of a batch, not where data are read."""
    frames = (frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__))
    return resource_sharer.__name__ in frames


def watched(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields what a loader's iterator does; a killed worker is a ``DataError``.

    Errors of ours in a worker are as if raised here: PyTorch puts the worker's whole traceback into their
    messages, with the error's own at its end.
    """
    try:
        yield from batches
    except MokaError as error:
        if not str(error).startswith("Caught "):
            raise
        raise type(error)(str(error).rsplit(f".{type(error).__qualname__}: ", 1)[-1].strip()) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        if (killed := killed_worker(error)) is not None:
            raise killed from error
        raise


class EvalDataLoader(DataLoader[Any]):
    """A loader that says in one line that a worker was killed."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return watched(super().__iter__())


class ResumableDataLoader(DataLoader[Any]):
    """Counts the batches it served and can start after as many.

    Lightning saves ``state_dict()`` with the fit loop and restores it before the first ``iter()`` of a
    resumed run. That ``iter()`` comes before Lightning tells the sampler the epoch, so nothing is drawn from
    the sampler (and no worker is started) before the first batch is asked for.

    Args:
        *args: As for ``DataLoader``.
        epoch_batches: Batches that make an epoch where that is fewer than all (``limit_train_batches``).
        order: What decides the batches, by option; a state of other values is refused.
        **kwargs: As for ``DataLoader``.
    """

    def __init__(
        self,
        *args: Any,
        epoch_batches: int | None = None,
        order: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Its own generator: the seeds of the workers then take nothing from the global one, which a resumed
        # run would otherwise find in another state than the uninterrupted run.
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator()
        super().__init__(*args, **kwargs)
        self.epoch_batches = epoch_batches
        self.order = dict(order or {})
        self._served = 0
        self._start = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of batches served in the current epoch, and of which order."""
        return {"served": self._served} | ({"order": self.order} if self.order else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Starts the next iteration after the served batches; a finished epoch restarts.

        Raises:
            DataError: The state is of other batches than this loader's.
        """
        check_order(state_dict.get("order"), self.order)
        check_position(state_dict, "served")
        served = int(state_dict["served"])
        total = len(self)
        if served > total:
            raise DataError(
                f"the checkpoint was saved after {served} batches of an epoch, but this run's epochs have "
                f"{total}. Resume with the data, batch size, packing and number of devices of the saved run"
            )
        finished = served >= (total if self.epoch_batches is None else min(total, self.epoch_batches))
        self._start = 0 if finished else served
        self._served = self._start

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start, self._start = self._start, 0
        return self._batches(start)

    def _batches(self, start: int) -> Iterator[Any]:
        self._served = start
        if isinstance(self.sampler, GlobalBatchSampler):
            self.sampler.skip = start
            batches: Iterator[Any] = super().__iter__()
        else:
            # Lightning put in a sampler of its own: the batches have to be loaded to be left out.
            batches = islice(super().__iter__(), start, None)
        for batch in watched(batches):
            self._served += 1
            yield batch


class LoadingModule(LightningDataModule):
    """A data module whose loaders are made for this rank of a run, if there is one.

    Attributes:
        num_workers: Dataloader workers per device; 0 loads in the training process.
    """

    num_workers: int

    def _loading(self) -> dict[str, Any]:
        return {"batch_size": None, "num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}

    def _rank_and_world(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _epoch_batches(self, total: int) -> int | None:
        """The number of batches that an epoch of ``total`` is limited to, or None."""
        if self.trainer is None:
            return None
        limit = self.trainer.limit_train_batches
        return limit if isinstance(limit, int) else int(total * limit) if limit < 1.0 else None
