"""What was measured, its file, and the one frozen model that rows are put into one after another."""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark.cases import BASELINE, FROZEN, Row
from moka_pl.studies.common import first_line, free_memory, structure, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FORMAT = 1
OFFLOADED = "checkpointing keeps the layers' inputs in the host's memory (gradient_checkpointing: offload)"

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
        write_json(file, {"format": FORMAT} | asdict(self), 1)


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
            f"{file} has no results of format {FORMAT}; write it with 'scripts/benchmark.py --json {file}'"
        )
    try:
        data["records"] = [Record(**record) for record in data["records"]]
        return Results(**data)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from error


@cache
def linear_weights(shape: str) -> int:
    """Numbers in all linear layers of a shape, the output head included."""
    import torch
    from torch import nn

    from moka_pl.backbone import BackboneConfig
    from moka_pl.planning.shape import empty_model

    model, _ = empty_model(BackboneConfig(shape, weights="random"), torch.bfloat16, [])
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, median and third quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return first, median, third


Work = Callable[["PreTrainedModel"], Values]
RowWork = Callable[["PreTrainedModel", Row], Values]


class Bench:
    """Builds a frozen NF4 model with random weights, and measures rows on it.

    A row that fails leaves no trace: what it left in the model or in memory is cleared away, if need be by
    building the model again.

    Args:
        shape: Shape of the model.
        device: ``cuda`` or ``cpu``.
        checkpointing: Compute activations again in the backward pass.
        offload: With checkpointing, keep the layers' inputs in the host's memory.

    Attributes:
        notes: What loading said of the models that were built, such as the kernels that compute in them.
    """

    def __init__(self, shape: str, device: str, checkpointing: bool = False, offload: bool = False) -> None:
        self.shape, self.device, self.checkpointing, self.offload = shape, device, checkpointing, offload
        self.notes: list[str] = []
        self._model: PreTrainedModel | None = None
        self._backbone: Mapping[str, str] = {}
        self._structure: list[tuple[object, ...]] = []

    def measure(self, row: Row, work: Work) -> tuple[Values, str | None]:
        """Puts a row in, does the work and takes the row out.

        Args:
            row: What to put into the model.
            work: What to do with the model.

        Returns:
            What the work returned, and None; or no values, and what went wrong.
        """
        import torch

        values: Values = {}
        problem = None
        remove = None
        try:
            model = self.built(row.backbone)
            torch.manual_seed(0)
            remove = row.put(model)
            if row.backbone.get("compile") == "layers":
                self._compile(model)
            values = work(model)
        except Exception as error:
            problem = first_line(error)
        model = None
        if remove is not None:
            try:
                remove()
            except Exception as error:
                self._model = None
                print(f"cannot remove {row.name}: {first_line(error)}", file=sys.stderr)
        if row.spoils or (self._model is not None and structure(self._model) != self._structure):
            self._model = None
        if self._model is not None:
            self._model.requires_grad_(False)
        free_memory()
        return values, problem

    def compare(self, measure: str, rows: Sequence[Row], key: str, work: RowWork) -> Iterator[Record]:
        """Does the same work with one row after another.

        Args:
            measure: What the records are of.
            rows: What to put in; ratios are to the row ``frozen base``, if it comes before.
            key: The value that the ratios are of.
            work: What to do with the model and the row in it.

        Yields:
            A record a row.
        """
        base = None
        for row in rows:
            values, error = self.measure(row, lambda model, row=row: work(model, row))  # type: ignore[misc]
            if row.name == FROZEN:
                base = values.get(key)
            if base is not None and values:
                values["ratio"] = values[key] / base
            yield Record(measure, row.name, self.checkpointing, {}, values, error)

    def compare_in_turns(
        self, measure: str, rows: Sequence[Row], key: str, work: RowWork, turns: int
    ) -> Iterator[Record]:
        """Does the work with the rows in turns, forwards and backwards: a machine's drift meets all alike.

        Args:
            measure: What the records are of.
            rows: What to put in.
            key: The value that the ratios are of.
            work: What to do with the model and the row in it.
            turns: How many times.

        Yields:
            A record a row, with medians over the turns, the largest peak and all steps. Its ``ratio`` to the
            row ``frozen base`` and ``lora_ratio`` to ``LoRA r8 q,v`` are medians, with quartiles, of the
            ratios within a turn.
        """
        seen: dict[str, list[Values]] = {row.name: [] for row in rows}
        errors: dict[str, str] = {}
        for turn in range(turns):
            for row in rows[:: -1 if turn % 2 else 1]:
                if row.name not in errors:
                    values, problem = self.measure(row, lambda model, row=row: work(model, row))  # type: ignore[misc]
                    seen[row.name].append(values)
                    errors |= {} if problem is None else {row.name: problem}
        for row in rows:
            values, error = {}, errors.get(row.name)
            if error is None:
                own = seen[row.name]
                values = {name: statistics.median(turn[name] for turn in own) for name in own[0]}
                values["peak_gib"] = max(turn["peak_gib"] for turn in own)
                values["steps"] = sum(turn["steps"] for turn in own)
                for name, other in (("ratio", FROZEN), ("lora_ratio", BASELINE)):
                    if other in seen and other not in errors:
                        ratios = [a[key] / b[key] for a, b in zip(own, seen[other], strict=True)]
                        values[f"{name}_q1"], values[name], values[f"{name}_q3"] = quartiles(ratios)
            yield Record(measure, row.name, self.checkpointing, {}, values, error)

    def _compile(self, model: "PreTrainedModel") -> None:
        """Has the layers compiled with what was put into them, as ``fit`` does."""
        import torch

        from moka_pl.lm.compiled import compile_layers

        if self.checkpointing and self.offload:
            raise ConfigError("compile layers does not go with --offload")
        # All rows' graphs together would be more than the compiler makes of one layer: then it gives up.
        torch.compiler.reset()
        compile_layers(model)

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = None
        free_memory()

    def built(self, options: Mapping[str, str] | None = None) -> "PreTrainedModel":
        """The frozen model, which is built where there is none with these options.

        Args:
            options: Options of ``BackboneConfig``.

        Raises:
            ConfigError: If it is to multiply in 8 bits, and cannot.
        """
        import torch

        from moka_pl.backbone import BackboneConfig, compute_dtype, load_backbone
        from moka_pl.backbone.products.float8 import check_float8
        from moka_pl.lm.checkpointing import checkpoint_layers

        options = options or {}
        if self._model is None or self._backbone != options:
            self.close()
            config = BackboneConfig(self.shape, weights="random", **options)  # type: ignore[arg-type]
            if config.matmul == "fp8":
                device = torch.device(self.device)
                check_float8(device, compute_dtype(config, device), config.quantization)
            loaded = load_backbone(config, self.device)
            model = loaded.model
            if self.checkpointing:
                checkpoint_layers(model, self.offload)
                if self.offload:
                    loaded.notes.append(OFFLOADED)
            self.notes += [note for note in loaded.notes if note not in self.notes]
            self._model, self._backbone, self._structure = model, options, structure(model)
        return self._model
