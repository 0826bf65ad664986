"""Reads what a run logged to TensorBoard."""

from pathlib import Path


def scalar_events(run: Path, tag: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a tag, in their order; none where it was not logged.

    Args:
        run: Folder of the event files.
        tag: Such as ``train/loss``.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]
