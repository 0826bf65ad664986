"""An adapter over the tiny random model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moka_pl.adapters import BaseModel, MokaConfig, adapter_state, inject_adapter, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.inference import Preview, load_model


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


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of three components over the tiny model in float32, trained with the chat prompt."""
    base, adapter = BackboneConfig("tiny", weights="random", quantization="none"), MokaConfig(components=3)
    model = load_backbone(base).model
    inject_adapter(model, adapter)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_state(model).values():
        tensor.normal_(std=0.3, generator=generator)
    remembered = BaseModel(base.name, None, fingerprint(model), base.options())
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    return save_adapter(folder, model, adapter, remembered, {"prompt": "chat"})


@pytest.fixture
def loaded(saved: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same loaded once, for this test's commands as well."""
    model, tokenizer = load_model(saved, device="cpu")

    def load(*args: object, before: Callable[[Preview], None], **options: object) -> tuple[object, object]:
        before(Preview(model, tokenizer))
        return model, tokenizer

    monkeypatch.setattr("moka_pl.inference.load_model", load)
    return SimpleNamespace(path=saved, model=model, tokenizer=tokenizer)
