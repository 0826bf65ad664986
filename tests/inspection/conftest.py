"""Adapters over a tiny LLaMA."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter


@pytest.fixture
def make_adapter(tmp_path: Path, make_llama: Callable, randomize: Callable) -> Callable:
    """Saves a random adapter below a run's folder; returns its directory and the model with it."""

    def make(name: str = "run", seed: int = 1, base: str = "tiny", **options: object) -> tuple:
        config = MokaConfig(**({"components": 3} | options))
        model = make_llama()
        inject_adapter(model, config)
        randomize(model, seed)
        extra = {
            "metrics": {"val/loss": 1.25, "val/accuracy/easy": 0.5, "val/accuracy/easy_stderr": 0.1},
            "step": 7,
        }
        path = save_adapter(
            tmp_path / name / "adapters" / "best", model, config, BaseModel(base, None, base), extra
        )
        return path, model

    return make
