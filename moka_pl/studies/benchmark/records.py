"""What was measured, and its file."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moka_pl.errors import ConfigError

FORMAT = 1

Values = dict[str, float]
Setting = dict[str, int | str]


@dataclass
class Record:
    """One measured row.

    Attributes:
        measure: ``steps``, ``components``, ``tokens``, ``sizes``, ``fit`` or ``decode``.
        row: What was in the model.
        checkpointing: Whether activations were computed again in the backward pass.
        setting: What a growth measurement varied.
        values: Times in ms, memory in GiB, numbers of parameters, ratios.
        error: The first line of what went wrong; then there are no values.
    """

    measure: str
    row: str
    checkpointing: bool = False
    setting: Setting = field(default_factory=dict)
    values: Values = field(default_factory=dict)
    error: str | None = None


@dataclass
class Results:
    """All records of a run of the benchmark, and where they come from.

    Attributes:
        preset: All options of the preset, as run.
        command: The command that measures this again.
        device: Name of the GPU or processor.
        dtype: Compute dtype.
        versions: Versions of the packages that matter.
        records: What was measured.
        notes: What was left out, and why.
    """

    preset: dict[str, Any]
    command: str
    device: str
    dtype: str
    versions: dict[str, str]
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, measure: str) -> list[Record]:
        """The records of one measure."""
        return [record for record in self.records if record.measure == measure]

    def save(self, file: Path) -> None:
        """Writes a JSON file; one that is there is replaced only by a whole one."""
        text = json.dumps({"format": FORMAT} | asdict(self), indent=1, ensure_ascii=False) + "\n"
        part = file.with_name(f"{file.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(file)


def load_results(file: Path) -> Results:
    """Reads a file that :meth:`Results.save` has written.

    Raises:
        ConfigError: If it is not there, or is something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise ConfigError(
            f"{file} holds no results of format {FORMAT}; write it with 'scripts/benchmark.py --json {file}'"
        )
    try:
        data["records"] = [Record(**record) for record in data["records"]]
        return Results(**data)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from error
