"""One frozen model that rows are put into one after another."""

import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from moka_pl.studies.benchmark.cases import FROZEN, Row
from moka_pl.studies.benchmark.records import Record, Values
from moka_pl.studies.memory import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """

    def __init__(self, shape: str, device: str, checkpointing: bool = False) -> None:
        self.shape, self.device, self.checkpointing = shape, device, checkpointing
        self._model: PreTrainedModel | None = None
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
            model = self._built()
            torch.manual_seed(0)
            remove = row.put(model)
            values = work(model)
        except Exception as error:
            problem = first_line(error)
        model = None
        if remove is not None:
            try:
                remove()
            except Exception as error:
                self._model = None
                print(f"{row.name} could not be taken out: {first_line(error)}", file=sys.stderr)
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

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = None
        free_memory()

    def _built(self) -> "PreTrainedModel":
        from moka_pl.backbone import BackboneConfig, load_backbone

        if self._model is None:
            free_memory()
            model = load_backbone(BackboneConfig(self.shape, weights="random"), self.device).model
            if self.checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self._model, self._structure = model, structure(model)
        return self._model


def structure(model: "PreTrainedModel") -> list[tuple[object, ...]]:
    """Names, types and numbers of hooks of all modules: what an adapter could have changed."""
    return [
        (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return textwrap.shorten(text, 160, placeholder=" …")
