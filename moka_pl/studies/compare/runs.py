"""Single trainings of a suite: what tells them apart, what is stored of them, and how a rate is picked.

A hash of everything that decides about a run identifies it; JSON in its folder tells what became of it.
"""

import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moka_pl.studies.common import write_json
from moka_pl.studies.compare.suite import FROZEN, Method, Settings, Suite, merged

#: Part of every hash: raised when the same settings come to mean another training.
_FORMAT = 2
#: An adapter that has learnt nothing changes nothing; this one fits any base.
_UNTRAINED: Settings = {"components": 1, "target_modules": "all-linear"}
#: Options of the trainer that a test without training heeds, too.
_EVALUATION = ("accelerator", "precision", "limit_test_batches")


@dataclass(frozen=True)
class Run:
    """One training of one method.

    Attributes:
        method: Name of the method.
        rate: Learning rate; None for the frozen base.
        seed: Seed of the data's order and the adapters' start.
        settings: ``backbone``, ``adapter``, ``data``, ``training`` of the run, and ``learning_rate_ratios``
            where it has some.
        test: The data module whose test data are reported.
        spectra: Whether to keep the effective ranks of its updates; decides about nothing else.
        beside: ``generate`` and ``forgetting`` of the suite, where it has them.
    """

    method: str
    rate: float | None
    seed: int
    settings: Settings
    test: Settings
    spectra: bool = True
    beside: Settings = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Hash of what is trained, 12 hexadecimal digits; names are no part of it."""
        # The frozen base's adapter has learnt nothing, and decides about nothing.
        settings = self.settings if self.rate is not None else self.settings | {"adapter": {}}
        return _hash([_FORMAT, settings, self.rate, self.seed])

    @cached_property
    def test_key(self) -> str:
        """Hash of what is tested, and how it is answered."""
        answers = {name: value for name, value in self.beside.items() if name != "forgetting"}
        return _hash([_FORMAT, self.test, *([answers] if answers else [])])

    @cached_property
    def text_key(self) -> str | None:
        """Hash of the plain text that is scored, too; None without one."""
        return _hash([_FORMAT, self.beside["forgetting"]]) if "forgetting" in self.beside else None

    @property
    def folder(self) -> str:
        """Name of its folder: words to read, and the key that identifies it."""
        words = re.sub(r"[^a-z0-9]+", "-", self.method.lower()).strip("-")
        rate = "" if self.rate is None else f"_lr{self.rate:g}"
        return f"{words}{rate}_seed{self.seed}_{self.key}"

    def __str__(self) -> str:
        if self.rate is None:
            return self.method
        return f"{self.method}, lr {self.rate:g}, seed {self.seed}"


def run_of(suite: Suite, method: Method, rate: float, seed: int) -> Run:
    """The training of a method.

    Args:
        suite: Where base, data and training are from.
        method: What is trained.
        rate: Learning rate.
        seed: Seed of data and start.
    """
    settings: dict[str, Any] = {
        "backbone": merged(suite.backbone, method.backbone),
        "adapter": method.adapter,
        "data": suite.data,
        "training": suite.training,
    }
    if method.learning_rate_ratios:  # not in the hashes of runs without
        settings["learning_rate_ratios"] = method.learning_rate_ratios
    return Run(method.name, rate, seed, settings, suite.test or suite.data, suite.spectra, _beside(suite))


def frozen_run(suite: Suite) -> Run:
    """The test of the base without training."""
    trainer = suite.training.get("trainer", {})
    kept = {option: trainer[option] for option in _EVALUATION if option in trainer}
    training = {"trainer": kept} if kept else {}
    settings = {"backbone": suite.backbone, "adapter": _UNTRAINED, "data": suite.data, "training": training}
    test = suite.test or suite.data
    return Run(FROZEN, None, suite.seeds[0], settings, test, beside=_beside(suite))


def untrained_run(run: Run) -> Run:
    """The base of a run, without training."""
    return replace(run, method=FROZEN, rate=None, settings=run.settings | {"adapter": _UNTRAINED})


def _beside(suite: Suite) -> Settings:
    """What a test does beside the likelihoods."""
    known = {"generate": suite.generate, "forgetting": suite.forgetting}
    return {name: value for name, value in known.items() if value}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


Outcome = dict[str, Any]
ItemColumns = dict[str, list[Any]]
_FILE, _ITEMS = "result.json", "items.json"


def text_columns(before: ItemColumns, after: ItemColumns) -> ItemColumns:
    """Columns of the same windows of a plain text, scored before and after a training."""
    return {"text_tokens": after["tokens"], "text_before": before["nll"], "text_after": after["nll"]}


class Store:
    """The runs of all suites of a folder; a run that two suites have in common is there once.

    An outcome holds ``error`` (of a run that failed), or ``trained`` (``validation_loss``, ``parameters``,
    ``losses``, …) and, once it is tested, ``tested`` (``key`` of the test data, ``tasks``, …).

    Args:
        folder: The folder of the suites.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs"

    def path(self, run: Run) -> Path:
        """The run's folder, under the name that it was made with."""
        made = sorted(self.folder.glob(f"*_{run.key}"))
        return made[0] if made else self.folder / run.folder

    def read(self, run: Run) -> Outcome:
        """What is known of a run; empty if nothing is, or the file is damaged."""
        return _read(self.path(run) / _FILE)

    def read_items(self, run: Run) -> ItemColumns:
        """What every test item of a run scored, in columns; empty if it is not tested."""
        return _read(self.path(run) / _ITEMS)

    def write(self, run: Run, outcome: Outcome, items: ItemColumns | None = None) -> None:
        """Puts an outcome in place at once.

        Args:
            run: The run.
            outcome: All that is known of it.
            items: What its test items scored, where it has just been tested.
        """
        folder = self.path(run)
        if items is not None:  # first: a run counts as tested once its outcome says so
            write_json(folder / _ITEMS, items)
        about = {"method": run.method, "rate": run.rate, "seed": run.seed, "settings": run.settings}
        write_json(folder / _FILE, about | outcome)


def tested_with(outcome: Outcome, run: Run) -> bool:
    """Whether an outcome is that of a run tested on its test data, and on its plain text if it has one."""
    tested = outcome.get("tested", {})
    return tested.get("key") == run.test_key and run.text_key in (None, tested.get("text"))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried.

    Attributes:
        rate: The rate.
        loss: Mean validation loss over the seeds that pick; None if a run is missing, failed or diverged.
    """

    rate: float
    loss: float | None


def sweep(suite: Suite, method: Method) -> list[Run]:
    """The runs that a method's rate is picked by; none where it has only one."""
    if len(method.learning_rates) == 1:
        return []
    return [run_of(suite, method, rate, seed) for rate in method.learning_rates for seed in suite.pick_seeds]


def trials(suite: Suite, method: Method, outcome_of: Callable[[Run], Outcome]) -> tuple[Trial, ...]:
    """What every learning rate of a method gave on the validation data, as far as it is known.

    Args:
        suite: The suite, whose seeds pick the rate.
        method: The method.
        outcome_of: Tells what is known of a run.
    """
    tried = []
    for rate in method.learning_rates:
        outcomes = [outcome_of(run_of(suite, method, rate, seed)) for seed in suite.pick_seeds]
        losses = [outcome.get("trained", {}).get("validation_loss") for outcome in outcomes]
        known = [loss for loss in losses if loss is not None]
        tried.append(Trial(rate, statistics.fmean(known) if len(known) == len(losses) else None))
    return tuple(tried)


def pick(method: Method, tried: tuple[Trial, ...]) -> float | None:
    """The rate with the lowest validation loss; the only one without a look; None if none worked."""
    if len(method.learning_rates) == 1:
        return method.learning_rates[0]
    worked = [(trial.loss, trial.rate) for trial in tried if trial.loss is not None]
    return min(worked)[1] if worked else None


def sweeps(suite: Suite, method: Method, outcome_of: Callable[[Run], Outcome]) -> Iterator[Method]:
    """A method with the rates that its suite gives it, then with one more each time that the best is an edge.

    The next rate lies as far beyond the edge as the edge lies beyond its neighbour. It follows from the
    outcomes alone, so that runs and reports find the same rates. The last method yielded has all of them.

    Args:
        suite: Its ``widen`` says how many rates may be added.
        method: The method as the suite has it.
        outcome_of: Tells what is known of a run; it is asked anew after every yield.
    """
    yield method
    for _ in range(suite.widen):
        ended = all({"trained", "error"} & outcome_of(run).keys() for run in sweep(suite, method))
        beyond = _beyond(method, trials(suite, method, outcome_of)) if ended else None
        if beyond is None:
            return
        method = replace(method, learning_rates=(*method.learning_rates, beyond))
        yield method


def all_rates(suite: Suite, method: Method, outcome_of: Callable[[Run], Outcome]) -> Method:
    """The method with all rates that :func:`sweeps` gives it, as far as outcomes are known.

    Args:
        suite: The suite.
        method: The method as the suite has it.
        outcome_of: Tells what is known of a run.
    """
    *_, last = sweeps(suite, method, outcome_of)
    return last


def at_edge(method: Method, rate: float | None) -> bool:
    """Whether a rate is the lowest or highest of several: a better one may lie beyond."""
    rates = method.learning_rates
    return len(rates) > 1 and rate in (min(rates), max(rates))


def _beyond(method: Method, tried: tuple[Trial, ...]) -> float | None:
    """The next rate beyond the best one; None if that is no edge."""
    best = pick(method, tried)
    if best is None or not at_edge(method, best):
        return None
    rates = sorted(method.learning_rates)
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.6g}")  # as it would be written: suites share such runs


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    print(f"compare: warning: {text}", file=sys.stderr, flush=True)
