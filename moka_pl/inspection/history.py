"""The gates over the steps of a run, as its TensorBoard log holds them."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moka_pl.utils import silenced

#: `α q_proj/layer03/4: 24×24 ⊗ 24×24`, and `gate/layer03.q_proj/alpha_4` of older logs.
_TAGS = (
    re.compile(r"α (?P<projection>[^/]+)/(?P<row>.+)/(?P<component>\d{1,6}): (?P<shape>.+)"),
    re.compile(r"gate/(?P<row>.+)/alpha_(?P<component>\d{1,6})"),
)
#: Bytes of event files that are read.
_LARGEST = 2**30


class GateCurves(NamedTuple):
    """Gates over a run.

    Attributes:
        steps: The S optimizer steps, ascending.
        layers: Labels of the L layers, in the model's order.
        shapes: Sizes of each layer's r components, ``24×24 ⊗ 24×24``; empty where an older log lacks them.
        alpha: α, shape (S, L, r).
    """

    steps: list[int]
    layers: list[str]
    shapes: list[list[str]]
    alpha: Tensor

    def by_layer(self) -> dict[str, list[list[tuple[int, float]]]]:
        """Returns step and value of each of the r gates, by the layer's label."""
        curves = zip(self.layers, self.alpha.permute(1, 2, 0).tolist(), strict=True)  # L of (r, S)
        return {layer: [list(zip(self.steps, of, strict=True)) for of in gates] for layer, gates in curves}


def find_log(adapter: Path) -> Path | None:
    """Returns the folder of TensorBoard events that an adapter lies in: its own, or one of two above it."""
    folder = adapter.resolve()
    for run in (folder, *list(folder.parents)[:2]):
        if any(run.glob("events.out.tfevents.*")):
            return run
    return None


def read_gate_curves(run: Path) -> GateCurves | None:
    """Reads all gates that a run logged to TensorBoard; None where there are none.

    In a resumed run the later value of a step counts. Steps of which some gates are missing are left out, and
    so is a log that is huge or has layers with different numbers of gates.

    Args:
        run: The run's log folder.
    """
    by_step: dict[int, dict[tuple[str, int], float]] = defaultdict(dict)
    shapes: dict[str, dict[int, str]] = defaultdict(dict)
    for step, tag, value in read_scalars(run):
        if (match := next(filter(None, (form.fullmatch(tag) for form in _TAGS)), None)) is None:
            continue
        found, component = match.groupdict(), int(match["component"])
        row, projection = found["row"], found.get("projection")
        layer = row if projection in (None, row) else f"{row}.{projection}"
        shapes[layer][component] = found.get("shape", "")
        by_step[step][layer, component] = value
    keys = [(layer, i) for layer, of in shapes.items() for i in sorted(of)]
    steps = [step for step in sorted(by_step) if by_step[step].keys() == set(keys)]
    if not steps or len(set(map(len, shapes.values()))) > 1:
        return None
    alpha = torch.tensor([[by_step[step][key] for key in keys] for step in steps])  # (S, L * r)
    names = [[of[i] for i in sorted(of)] for of in shapes.values()]
    return GateCurves(steps, list(shapes), names, alpha.view(len(steps), len(shapes), -1))  # (S, L, r)


def read_scalars(run: Path) -> Iterator[tuple[int, str, float]]:
    """Yields step, tag and value of every scalar that a run logged, in their order; none of a huge log.

    Args:
        run: The run's log folder.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    files = sorted(run.glob("events.out.tfevents.*"))  # their names begin with the time of their beginning
    if sum(file.stat().st_size for file in files) > _LARGEST:
        return
    with silenced("tensorboard"):
        for file in files:
            for event in LegacyEventFileLoader(str(file)).Load():
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        yield event.step, value.tag, value.simple_value
