"""TensorBoard's logger: losses first, no curves that say nothing, and many values as one event."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from moka_pl._compat import event_writer
from moka_pl.evaluation.results import SCORES

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

#: Metrics that ``val/`` holds of all tasks together, and ``val/…/<task>`` of one.
_BY_TASK = {*SCORES, "nll"}


class BoardLogger(TensorBoardLogger):
    """Lightning's logger, with the tags in an order that is read from the top.

    TensorBoard sorts charts by their tags. ``val/`` and ``test/`` keep the scores of all data together; those
    of a task or a group stand behind them, as ``val_tasks/accuracy/boolq`` for ``val/accuracy/boolq``. The
    epoch and standard errors (``…_stderr``) are no charts; they stay among the metrics of other loggers, and
    in ``validate.json`` and ``test.json``.

    Its arguments are those of ``lightning.pytorch.loggers.TensorBoardLogger``.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs the metrics that are charts.

        Args:
            metrics: Values by name.
            step: The optimizer step.
        """
        charts = {name: v for name, v in metrics.items() if name != "epoch" and not name.endswith("_stderr")}
        super().log_metrics({board_tag(name): value for name, value in charts.items()}, step)


def board_tag(name: str) -> str:
    """Returns the tag of a metric; of a single task behind those of all."""
    prefix, *parts = name.split("/")
    by_task = prefix in ("val", "test") and len(parts) > 1 and parts[0] in _BY_TASK
    return "/".join([f"{prefix}_tasks", *parts]) if by_task else name


def log_scalars(logger: Logger, values: Mapping[str, float], step: int) -> None:
    """Logs all values of a step; for TensorBoard as a single event, many times faster than one for each.

    Args:
        logger: Any of Lightning's loggers.
        values: Values by tag.
        step: The optimizer step.
    """
    if not isinstance(logger, TensorBoardLogger):
        logger.log_metrics(dict(values), step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    rows = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    write_summary(logger, Summary(value=rows), step)


def write_summary(logger: TensorBoardLogger, summary: "Summary", step: int = 0) -> None:
    """Writes a summary as one event; unlike ``SummaryWriter`` it leaves the tags as they are.

    Args:
        logger: A logger on the first rank.
        summary: What to write.
        step: The optimizer step.
    """
    writer: Any = event_writer(logger.experiment)
    writer.add_summary(summary, global_step=step)
