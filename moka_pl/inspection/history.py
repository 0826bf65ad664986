"""The gates over the steps of the run that an adapter comes from."""

import re
from pathlib import Path

from moka_pl.utils import silenced

#: Step and value of every gate, by component, by layer; layers have the short names of the log.
Curves = dict[str, dict[int, list[tuple[int, float]]]]

#: `α q_proj/layer03/4: 24×24 ⊗ 24×24` of TensorBoard, `gate/layer03.q_proj/alpha_4` of older logs.
_TAGS = (
    re.compile(r"α (?P<projection>[^/]+)/(?P<row>.+)/(?P<component>\d{1,6}): .+"),
    re.compile(r"gate/(?P<row>.+)/alpha_(?P<component>\d{1,6})"),
)
#: Bytes of event files that are read.
_LARGEST = 2**30


def find_log(adapter: Path) -> Path | None:
    """Returns the folder of TensorBoard events that an adapter lies in: its own, or one of two above it."""
    folder = adapter.resolve()
    for run in (folder, *list(folder.parents)[:2]):
        if any(run.glob("events.out.tfevents.*")):
            return run
    return None


def read_curves(run: Path) -> Curves:
    """Reads the gate curves of a run; none where its events are huge, damaged or of something else."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if sum(file.stat().st_size for file in run.glob("events.out.tfevents.*")) > _LARGEST:
        return {}
    sizes = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    with silenced("tensorboard"):
        events = EventAccumulator(str(run), size_guidance=sizes)
        events.Reload()
    curves: Curves = {}
    for tag in events.Tags()["scalars"]:
        if (match := next(filter(None, (form.fullmatch(tag) for form in _TAGS)), None)) is None:
            continue
        row, projection = match["row"], match.groupdict().get("projection")
        layer = row if projection in (None, row) else f"{row}.{projection}"
        curve = {event.step: event.value for event in events.Scalars(tag)}  # of a step logged twice the last
        curves.setdefault(layer, {})[int(match["component"])] = sorted(curve.items())
    return curves
