"""Random adapters over the tiny random model, to be exported."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone


@pytest.fixture
def make_adapter(tmp_path: Path, randomize: Callable, one_thread: None) -> Callable[..., Path]:
    """Saves a random adapter; options go to ``MokaConfig``."""

    def make(quantization: str = "nf4", **options: object) -> Path:
        base = BackboneConfig("tiny", weights="random", quantization=quantization)
        adapter = MokaConfig(**({"components": 3, "filters": "square"} | options))
        model = load_backbone(base).model
        inject_adapter(model, adapter)
        randomize(model)
        remembered = BaseModel(base.name, None, fingerprint(model), base.options())
        return save_adapter(tmp_path / "adapter", model, adapter, remembered, {"prompt": "alpaca"})

    return make
