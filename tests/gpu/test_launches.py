"""Training steps for which the CPU does not wait; run with ``pytest -m gpu``."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from shared.graph_fit import fit

pytestmark = pytest.mark.gpu

BEGIN, STEPS = 3, 8


class Watch(pl.Callback):
    """Has PyTorch warn of everything that waits for the GPU, within steps."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self._caught: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= BEGIN:
            self._caught = warnings.catch_warnings(record=True)
            self._found = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        if self._caught is not None:
            self._caught.__exit__(None, None, None)
            self._caught = None
            self.waits += [
                f"{found.filename}:{found.lineno} {found.message}"
                for found in self._found
                if "synchroniz" in str(found.message)
            ]


def test_no_step_waits_for_the_gpu() -> None:
    watch = Watch()
    _, trainer, _ = fit(False, max_steps=STEPS, limit_val_batches=0, callbacks=[watch])
    assert trainer.optimizers[0].defaults["fused"] is True
    assert trainer.global_step == STEPS
    assert not watch.waits
