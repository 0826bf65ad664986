r"""The longest row of tokens that a training step fits into a card's memory.

A smaller card is this one with the rest of its memory taken, so that libraries which ask for the free memory
see the smaller card's. A step is forward, backward and AdamW on one row, with checkpointing.

Steps of so long rows take minutes. With checkpointing that keeps the layers' inputs in the host's memory, a
GPU holds those of a few layers at a time, however many there are. So a search may run the first few layers
only, with all layers' weights, adapters and optimizer state on the card, and run all for what it found on
the smallest card.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark.bench import Bench, Record, Values
from moka_pl.studies.benchmark.cases import ALL, choose, moka
from moka_pl.studies.benchmark.steps import device_of, plain_loss, random_batch, synchronise
from moka_pl.studies.common import free_memory, peak_gib, reset_peak

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moka_pl.studies.benchmark.steps import MakeLoss

ROWS = (moka("MoKA r10"), moka("MoKA r2 all linear", components=2, target_modules=ALL))
MEASURE = "context"

GIB = 2**30
#: Lengths are multiples of this many tokens, and tried up to the other.
STEP, MOST = 256, 2**20
#: The length that is tried first, and the share of a length to which the longest one is found.
_PROBE, _TOLERANCE = 8192, 0.03
#: A step's time grows with this power of its tokens: products linearly, attention with the square.
_GROWTH = 1.6
#: Where there is no time for a length, a shorter one tells more of the memory if it is so many times longer.
_WORTH = 1.5
#: Share of a card's memory that may be missing in what it reports: an 80 GB card has 79.2 GiB.
_REPORTED = 0.95


@dataclass(frozen=True)
class Search:
    """What to search.

    Attributes:
        cards: Sizes of cards in GiB.
        seconds: How long to search for each row of the table.
        layers: How many of the model's layers to run; None for all.
    """

    cards: tuple[int, ...]
    seconds: float
    layers: int | None = None


@dataclass(frozen=True)
class Attempt:
    """One step.

    Attributes:
        tokens: Length of its row.
        fits: Whether it did not run out of memory.
        seconds: How long it took.
        used: GiB of its peak beyond what lies on the card anyway.
    """

    tokens: int
    fits: bool
    seconds: float
    used: float


@dataclass(frozen=True)
class Longest:
    """The result of a search.

    Attributes:
        fits: The longest attempt that fits; None if not even the shortest length does.
        too_long: The shortest length that does not; None if time or lengths ended before one was tried.
        predicted: The longest length: what fits, if one little longer does not, else by the memory that a
            token of the last attempt took.
        trials: How many steps were tried.
    """

    fits: Attempt | None
    too_long: int | None
    predicted: int
    trials: int


def is_close(tokens: float, too_long: float) -> bool:
    """Whether a length that fits and one that does not are so close that the first is the longest."""
    return too_long - tokens <= max(STEP, _TOLERANCE * tokens)


def search(
    attempt: Callable[[int], Attempt], free: float, seconds: float, known: Attempt | None = None
) -> Longest:
    """Searches the longest length that fits, in few attempts.

    Each length is predicted from what a token of the longest attempt so far took, as long as no attempt
    failed; then the search closes in from above.

    Args:
        attempt: Tries a length.
        free: GiB that a step may use.
        seconds: How long to search; an attempt that would take longer than what is left is not made.
        known: An attempt with the same model on a smaller card.
    """
    fits, too_long, trials, left = known, None, 0, seconds
    guess, shrink = _PROBE, _TOLERANCE
    if known is not None:
        guess = _affordable(known, min(_predict(known, free), MOST), left)
    while guess > 0:
        last = attempt(guess)
        trials, left = trials + 1, left - last.seconds
        if last.fits:
            fits = known = last
        else:
            too_long = guess
        lowest = fits.tokens if fits is not None else 0
        if too_long is None:
            expected = _predict(last, free)
            # Some losses use what memory there is: then a token seems to need less from attempt to attempt.
            trend = expected / last.tokens if trials > 1 else 1.0
            guess = max(_whole(expected * trend), _whole(lowest * (1 + _TOLERANCE)), lowest + STEP)
        elif is_close(lowest, too_long):
            break
        else:
            guess = max(_whole((lowest + too_long) / 2), _whole(too_long * (1 - shrink)) if lowest else 0)
            shrink *= 2
        if lowest >= MOST:
            break
        guess = guess if known is None else _affordable(known, min(guess, MOST), left)
    return Longest(fits, too_long, _longest(fits, too_long, free) if fits else 0, trials)


def _longest(fits: Attempt, too_long: int | None, free: float) -> int:
    """The longest length, as far as it is known."""
    if too_long is None:
        return max(_predict(fits, free), fits.tokens)
    if is_close(fits.tokens, too_long):
        return fits.tokens
    return min(max(_predict(fits, free), fits.tokens), too_long - STEP)


def _affordable(known: Attempt, wanted: int, seconds: float) -> int:
    """The wanted length, or a shorter one that there is time for; 0 if neither is worth it."""
    most = _whole(known.tokens * (max(seconds, 0) / known.seconds) ** (1 / _GROWTH))
    if wanted <= most:
        return wanted
    return most if most > _WORTH * known.tokens else 0


def _whole(tokens: float) -> int:
    """The next lower multiple, one at least."""
    return max(STEP, int(tokens / STEP) * STEP)


def _predict(attempt: Attempt, free: float) -> int:
    return _whole(0.98 * free * attempt.tokens / attempt.used)


def find_limits(
    model: "PreTrainedModel", make_loss: "MakeLoss", wanted: Search
) -> Iterator[tuple[int, Values]]:
    """Searches the longest row of tokens on cards of several sizes, small to large.

    Args:
        model: The model with its adapters and checkpointing, on a GPU.
        make_loss: Makes the loss of a batch.
        wanted: What to search.

    Yields:
        A card and ``tokens`` (the longest row that fits), ``too_long`` (the shortest that does not, if one
        was tried), ``predicted`` (the longest, by the memory that a token takes if need be), ``step_ms`` and
        ``peak_gib`` at ``tokens``, ``trials`` and ``trainable``; of the smallest card, where not all layers
        were run, ``peak_gib_all_layers`` at ``tokens``, or ``too_long_all_layers`` if that does not fit.
    """
    import torch

    model.train()
    device = device_of(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    known: Attempt | None = None
    seconds = wanted.seconds
    _try_step(model, make_loss, optimizer, STEP)  # compiles kernels, and makes the optimizer's state
    for card in sorted(wanted.cards):
        begun = time.perf_counter()
        with smaller_card(card, device) as free:
            with first_layers(model, wanted.layers):
                found = search(lambda n: _try_step(model, make_loss, optimizer, n), free, seconds, known)
            if found.fits is None:
                raise ConfigError(f"not even {STEP} tokens fit into {card} GiB")
            whole: Values = {}
            if wanted.layers is not None and card == min(wanted.cards):
                all_layers = _try_step(model, make_loss, optimizer, found.fits.tokens)
                peak = {"peak_gib_all_layers": card - free + all_layers.used}
                whole = peak if all_layers.fits else {"too_long_all_layers": found.fits.tokens}
        seconds -= time.perf_counter() - begun
        known = found.fits
        bound: Values = {} if found.too_long is None else {"too_long": found.too_long}
        yield (
            card,
            bound
            | {
                "tokens": known.tokens,
                "predicted": found.predicted,
                "step_ms": 1e3 * known.seconds,
                "peak_gib": card - free + known.used,
                "trials": found.trials,
                "trainable": sum(p.numel() for p in trainable),
            }
            | whole,
        )


@contextmanager
def first_layers(model: "PreTrainedModel", count: int | None) -> Iterator[None]:
    """Leaves the rest of a model's layers out, which stay where they are in memory; None leaves none out."""
    from torch import nn

    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    left_out = list(blocks[count:]) if count is not None else []
    if left_out:
        del blocks[count:]
    try:
        yield
    finally:
        blocks.extend(left_out)


@contextmanager
def smaller_card(gib: int, device: "torch.device") -> Iterator[float]:
    """Takes so much of the GPU's memory that a smaller card is left, and yields its free memory in GiB.

    Raises:
        ConfigError: If the GPU is the smaller one.
    """
    import torch

    free_memory()
    free, total = torch.cuda.mem_get_info(device)
    if total < _REPORTED * gib * GIB:
        raise ConfigError(f"the card has {total / GIB:.1f} GiB; --context {gib} needs a larger one")
    taken = max(0, total - gib * GIB)
    # What lies on the card already is this process's context, the model and the optimizer.
    if taken > free:
        raise ConfigError(f"the model alone needs more than {gib} GiB; give a larger --context")
    ballast = [torch.empty(taken, dtype=torch.uint8, device=device)]
    try:
        yield (free - taken) / GIB
    finally:
        ballast.clear()
        free_memory()


def _try_step(
    model: "PreTrainedModel", make_loss: "MakeLoss", optimizer: "torch.optim.Optimizer", tokens: int
) -> Attempt:
    import torch

    device = device_of(model)
    free_memory()
    reset_peak(device)
    before = peak_gib(device)
    fits = True
    begun = time.perf_counter()
    try:
        data = random_batch(model.config.vocab_size, 1, tokens, device)
        torch.autograd.backward(make_loss(model, data)())
        optimizer.step()
        synchronise(device)
    except RuntimeError as error:  # some libraries raise others than torch.OutOfMemoryError
        if "out of memory" not in str(error).lower():
            raise
        fits = False
    seconds = time.perf_counter() - begun
    optimizer.zero_grad()
    return Attempt(tokens, fits, seconds, max(peak_gib(device) - before, 1e-6))


def measure_context(bench: Bench, wanted: Search, names: Sequence[str]) -> Iterator[Record]:
    """Searches the longest rows of tokens of this package's adapters.

    Args:
        bench: The model, with checkpointing.
        wanted: What to search.
        names: Only these rows, or all for none.

    Yields:
        A record a row and card.
    """
    for row in choose(ROWS, names):
        found: dict[int, Values] = {}

        def work(model: "PreTrainedModel", found: dict[int, Values] = found) -> Values:
            found |= find_limits(model, plain_loss, wanted)
            return {}

        _, error = bench.measure(row, work)
        for card in sorted(wanted.cards):
            values = found.get(card, {})
            problem = None if values else error or "not measured"
            yield Record(MEASURE, row.name, bench.checkpointing, {"gib": card}, values, problem)
