"""What is known of every run, as JSON in its folder; a file is there whole or not at all."""

import json
from pathlib import Path
from typing import Any

from moka_pl.compare.runs import Run

Outcome = dict[str, Any]
_FILE = "result.json"


class Store:
    """The runs of a suite's folder.

    An outcome holds ``error`` (of a run that failed), or ``trained`` (``validation_loss``, ``parameters``,
    ``losses``, …) and, once it is tested, ``tested`` (``key`` of the test data, ``tasks``, ``items``, …).

    Args:
        folder: The suite's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs"

    def path(self, run: Run) -> Path:
        """The run's folder, under the name that it was made with."""
        made = sorted(self.folder.glob(f"*_{run.key}"))
        return made[0] if made else self.folder / run.folder

    def read(self, run: Run) -> Outcome:
        """What is known of a run; empty if nothing is, or the file is damaged."""
        try:
            outcome = json.loads((self.path(run) / _FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return outcome if isinstance(outcome, dict) else {}

    def write(self, run: Run, outcome: Outcome) -> None:
        """Puts an outcome in place at once."""
        about = {"rival": run.rival, "rate": run.rate, "seed": run.seed, "settings": run.settings}
        write_atomically(self.path(run) / _FILE, json.dumps(about | outcome) + "\n")

    def is_trained(self, run: Run) -> bool:
        """Whether the run's training has ended well."""
        return "trained" in self.read(run)

    def is_tested(self, run: Run) -> bool:
        """Whether the run is tested on the data that are asked for."""
        return bool(self.read(run).get("tested", {}).get("key") == run.test_key)


def write_atomically(file: Path, text: str) -> None:
    """Writes a file under another name and renames it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
