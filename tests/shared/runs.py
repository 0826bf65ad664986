"""Configurations of short runs of the command line."""

from pathlib import Path
from typing import Any


def instruction_run(folder: Path, max_length: int) -> dict[str, Any]:
    """Two epochs of the tiny model on the CPU, on ``train.jsonl`` and ``heldout.jsonl`` of a folder."""
    return {
        "seed_everything": 3,
        "model": {
            "backbone": {"name": "tiny", "weights": "random"},
            "adapter": {"components": 3},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
        "data": {
            "class_path": "moka_pl.data.InstructionData",
            "init_args": {
                "path": str(folder / "train.jsonl"),
                "validation_path": str(folder / "heldout.jsonl"),
                "prompt": "alpaca",
                "max_length": max_length,
                "batch_size": 2,
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }
