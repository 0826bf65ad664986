"""A fit with or without CUDA graphs, and what became of it."""

from typing import Any

import lightning.pytorch as pl
import torch

from moka_pl.adapters import MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.data import CommonsenseData, MokaDataModule
from moka_pl.training.module import MokaModule

#: Examples of an optimizer step's batches, over all GPUs.
BATCH = 8


class Losses(pl.Callback):
    """The loss of every optimizer step, and the most graphs that there were."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.graphs = 0

    def on_train_batch_end(self, trainer: pl.Trainer, module: MokaModule, *args: Any) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if module._capture is not None:
            self.graphs = max(self.graphs, module._capture.graphs)


def fit(
    graphs: bool, devices: int = 1, data: MokaDataModule | None = None, dtype: str = "float32", **options: Any
) -> tuple[MokaModule, pl.Trainer, Losses]:
    """Trains a model of SmolLM2's shape, on the package's questions by default; options go to the trainer."""
    pl.seed_everything(0, verbose=False)
    module = MokaModule(
        BackboneConfig("smollm2-135m", weights="random", compute_dtype=dtype),
        MokaConfig(components=4),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.0),
        cuda_graphs=graphs,
    )
    keep = Losses()
    defaults: dict[str, Any] = {
        "accelerator": "gpu",
        "devices": devices,
        "max_epochs": -1,
        "callbacks": [keep],
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = pl.Trainer(**defaults | options)
    if data is None:
        data = CommonsenseData("sample", batch_size=BATCH // devices, prompt="cloze")
    trainer.fit(module, datamodule=data)
    return module, trainer, keep
