"""How a rival's learning rate is picked."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from moka_pl.studies.compare.runs import Run, run_of
from moka_pl.studies.compare.store import Outcome
from moka_pl.studies.compare.suite import Rival, Suite


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried.

    Attributes:
        rate: The rate.
        loss: Mean validation loss over the seeds that pick; None if a run is missing, failed or diverged.
    """

    rate: float
    loss: float | None


def sweep(suite: Suite, rival: Rival) -> list[Run]:
    """The runs that a rival's rate is picked by; none where it has only one."""
    if len(rival.learning_rates) == 1:
        return []
    return [run_of(suite, rival, rate, seed) for rate in rival.learning_rates for seed in suite.pick_seeds]


def trials(suite: Suite, rival: Rival, outcome_of: Callable[[Run], Outcome]) -> tuple[Trial, ...]:
    """What every learning rate of a rival gave on the validation data, as far as it is known."""
    found = []
    for rate in rival.learning_rates:
        outcomes = [outcome_of(run_of(suite, rival, rate, seed)) for seed in suite.pick_seeds]
        losses = [outcome.get("trained", {}).get("validation_loss") for outcome in outcomes]
        known = [loss for loss in losses if loss is not None]
        found.append(Trial(rate, statistics.fmean(known) if len(known) == len(losses) else None))
    return tuple(found)


def pick(rival: Rival, tried: tuple[Trial, ...]) -> float | None:
    """The rate with the lowest validation loss; the only one without a look; None if none worked."""
    if len(rival.learning_rates) == 1:
        return rival.learning_rates[0]
    worked = [(trial.loss, trial.rate) for trial in tried if trial.loss is not None]
    return min(worked)[1] if worked else None
