"""Training steps, logged and shown, between which the host waits for no work of the GPU."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from moka_pl.adapters import MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import (
    BatchStatistics,
    BoardLogger,
    GateMonitor,
    GracefulInterrupt,
    ProgressBar,
    Throughput,
)
from moka_pl.data import CommonsenseData
from moka_pl.studies.ranks.profile import Waits
from moka_pl.training.module import MokaModule

pytestmark = pytest.mark.gpu

#: Steps after which sizes have been recorded, and all steps.
SETTLED, STEPS = 10, 24


class Watch(pl.Callback):
    """Counts the waits of later steps."""

    def __init__(self) -> None:
        self.waits = Waits()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == SETTLED:
            self.waits.begin()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == STEPS - 1:
            self.waits.end()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_no_step_waits_for_the_gpu(tmp_path: Path, graphs: bool, packing: bool) -> None:
    pl.seed_everything(0, verbose=False)
    module = MokaModule(
        BackboneConfig("smollm2-135m", weights="random", compute_dtype="bfloat16"),
        MokaConfig(components=4),
        cuda_graphs=graphs,
    )
    watch = Watch()
    callbacks = [GateMonitor(), Throughput(), BatchStatistics(), GracefulInterrupt(), ProgressBar(), watch]
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=STEPS,
        callbacks=callbacks,
        logger=BoardLogger(tmp_path, default_hp_metric=False),
        log_every_n_steps=2,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, CommonsenseData("sample", batch_size=4, prompt="cloze", packing=packing))
    recording = ("_record", "_warm_up", "_forward_backward")  # of a size that has come often enough
    found = [where for where in watch.waits.counts if not any(name in where for name in recording)]
    assert found == [], watch.waits.table(STEPS - SETTLED)
