"""What is known of every run, as JSON in its folder; a file is there whole or not at all."""

import json
from pathlib import Path
from typing import Any

from moka_pl.studies.compare.runs import Run

Outcome = dict[str, Any]
ItemColumns = dict[str, list[Any]]
_FILE, _ITEMS = "result.json", "items.json"


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
            write_atomically(folder / _ITEMS, json.dumps(items) + "\n")
        about = {"rival": run.rival, "rate": run.rate, "seed": run.seed, "settings": run.settings}
        write_atomically(folder / _FILE, json.dumps(about | outcome) + "\n")


def tested_with(outcome: Outcome, run: Run) -> bool:
    """Whether an outcome is that of a run tested on the run's test data."""
    return bool(outcome.get("tested", {}).get("key") == run.test_key)


def write_atomically(file: Path, text: str) -> None:
    """Writes a file under another name and renames it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
