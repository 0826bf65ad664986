"""What training changes on held-out tasks: the runs behind the README's tables, and the tables.

Every run is a command of the package's own command line; its `test.json` holds the scores.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moka_pl.errors import ConfigError
from moka_pl.events import scalar_events
from moka_pl.results import Share, over_seeds


@dataclass(frozen=True)
class Study:
    """A training and the tests before and after it.

    Attributes:
        name: Name of the study, of its folder and its files.
        config: The configuration that trains.
        train: Options of the training.
        test: Options of the tests.
    """

    name: str
    config: str
    train: Mapping[str, str]
    test: Mapping[str, str]

    def command(self, what: str, run: str, folder: Path, **options: str) -> list[str]:
        """The command line of one run, which logs to ``folder/name/run``."""
        chosen = {
            **(self.train if what == "fit" else self.test),
            "trainer.logger.init_args.save_dir": str(folder / self.name),
            "trainer.logger.init_args.name": run,
            **options,
        }
        given = [f"--{key}={value}" for key, value in chosen.items()]
        return [sys.executable, "-m", "moka_pl", what, "--config", self.config, *given]


def run_study(study: Study, folder: Path, seeds: Sequence[int], jobs: int) -> dict[str, Any]:
    """Tests the frozen base, trains with every seed and tests every adapter; what is done is not done again.

    Args:
        study: What to run.
        folder: Where runs and results go.
        seeds: Seeds of the trainings.
        jobs: Runs at a time.

    Returns:
        ``before``: the content of `test.json` of the frozen base; ``after``: those of the adapters;
        ``losses``: held-out losses of each training, in their order.

    Raises:
        ConfigError: If a run fails.
    """

    def tested(run: str, **options: str) -> dict[str, Any]:
        file = folder / study.name / run / "version_0" / "test.json"
        if not file.is_file():
            _run(study.command("test", run, folder, **options), folder / f"{study.name}_{run}.log")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def trained(seed: int) -> tuple[dict[str, Any], list[float]]:
        run = folder / study.name / f"seed_{seed}" / "version_0"
        adapter = run / "adapters" / "last"
        if not adapter.is_dir():
            command = study.command("fit", f"seed_{seed}", folder, seed_everything=str(seed))
            _run(command, folder / f"{study.name}_seed_{seed}.log")
        losses = held_out_losses(run)
        return tested(f"seed_{seed}_test", **{"model.adapter_path": str(adapter)}), losses

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        base = pool.submit(tested, "frozen")
        runs = list(pool.map(trained, seeds))
        before = base.result()
    return {
        "before": before,
        "after": [found for found, _ in runs],
        "losses": [losses for _, losses in runs],
    }


def _run(command: list[str], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise ConfigError(f"a run ended with status {status}; see {log}")


def held_out_losses(run: Path) -> list[float]:
    """The logged `val/loss` of a training, from before the first step to its end."""
    return [value for _, value in scalar_events(run, "val/loss")]


@dataclass(frozen=True)
class Change:
    """A score before and after training.

    Attributes:
        name: What was scored.
        before: Share of the frozen base.
        before_error: Its standard error.
        after: Mean share over the seeds.
        after_error: Its standard error, of items and seeds together.
    """

    name: str
    before: float
    before_error: float
    after: float
    after_error: float

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def error(self) -> float:
        """Standard error of the difference, rather too large: as if the tests were of different items."""
        return math.hypot(self.before_error, self.after_error)


def changes(results: Mapping[str, Any], score: str, where: str = "tasks") -> list[Change]:
    """The changes of all tasks, then that of their mean.

    Args:
        results: What `run_study` returned.
        score: ``accuracy`` or ``acc_norm``.
        where: ``tasks`` or ``groups``.

    Returns:
        A change a task or group; the last one is of the mean over tasks.
    """
    names = [*results["before"][where], None]
    found = []
    for name in names:

        def of(part: Mapping[str, Any], name: str | None = name) -> tuple[float, float]:
            scores = part["mean"] if name is None else part[where][name]
            return scores[score], scores[f"{score}_stderr"] or 0.0

        before, before_error = of(results["before"])
        after = [of(part) for part in results["after"]]
        mean = over_seeds([Share(value, error) for value, error in after])
        name = name or "mean of the tasks"
        found.append(Change(name, before, before_error, mean.value, mean.stderr or 0.0))
    return found


def markdown(found: Sequence[Change], seeds: int) -> str:
    """The changes as a Markdown table, in per cent; differences of more than twice their error in bold."""
    lines = [
        f"| | before | after (mean of {seeds} seeds) | difference |",
        "|---|---|---|---|",
    ]
    for change in found:
        difference = f"{100 * change.difference:+.1f} ± {100 * change.error:.1f}"
        if abs(change.difference) > 2 * change.error:
            difference = f"**{difference}**"
        lines.append(
            f"| {change.name} | {100 * change.before:.1f} ± {100 * change.before_error:.1f} "
            f"| {100 * change.after:.1f} ± {100 * change.after_error:.1f} | {difference} |"
        )
    return "\n".join(lines)
