"""Writing many scalars at once."""

from collections.abc import Mapping

from lightning.pytorch.loggers import Logger, TensorBoardLogger


def log_scalars(logger: Logger, values: Mapping[str, float], step: int) -> None:
    """Logs all values of a step; for TensorBoard as a single event, which is many times faster than one each.

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
    writer = logger.experiment._get_file_writer()
    writer.add_summary(Summary(value=rows), global_step=step)
