from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.callbacks.gates import log_scalars

VALUES = {"gate/layer00.q_proj/alpha_0": 0.25, "gate_entropy/mean": 1.0}


def test_one_event_holds_all_values(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    log_scalars(logger, VALUES, 3)
    log_scalars(logger, {tag: 2 * value for tag, value in VALUES.items()}, 5)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for tag, value in VALUES.items():
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(3, value), (5, 2 * value)]


def test_other_loggers_are_given_the_values(tmp_path):
    logger = CSVLogger(tmp_path)
    log_scalars(logger, VALUES, 3)
    logger.save()
    assert "0.25" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
