"""An adapter over the tiny random model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone


@pytest.fixture
def make_adapter(tmp_path: Path, randomize: Callable) -> Callable[..., Path]:
    """Saves random adapters that remember a prompt and further values; options go to ``MokaConfig``."""

    def make(prompt: str | None = None, more: dict[str, object] | None = None, **options: object) -> Path:
        base, adapter = BackboneConfig("tiny", weights="random"), MokaConfig(**({"components": 3} | options))
        model = load_backbone(base).model
        inject_adapter(model, adapter)
        randomize(model)
        remembered = BaseModel(base.name, None, fingerprint(model), base.options())
        extra = {"metrics": {"val/loss": 1.23456, "val/accuracy": 0.5}, "step": 7, "prompt": prompt}
        return save_adapter(tmp_path / "adapter", model, adapter, remembered, extra | (more or {}))

    return make


@pytest.fixture
def adapter(make_adapter: Callable[..., Path]) -> Path:
    """An adapter of three gated components in q_proj and v_proj."""
    return make_adapter()
