"""Runs whose frozen layers are to multiply in 8 bits."""

import pytest
from lightning.pytorch import Trainer

from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.errors import ConfigError
from moka_pl.training.course import course_of, main_settings


def _backbone(**options: object) -> BackboneConfig:
    return BackboneConfig(name="tiny", weights="random", matmul="fp8", **options)


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        (
            {},
            {},
            r"^backbone.matmul is fp8, which needs an NVIDIA GPU of .*; set --model.backbone.matmul",
        ),
        ({}, {"precision": "bf16-mixed"}, r"^trainer.precision bf16-mixed does not go with .* 32-true$"),
        ({"quantization": "none"}, {}, r"needs backbone.quantization nf4 or fp4, not none"),
        ({"compile": "layers"}, {}, r"^backbone.compile layers does not go with backbone.matmul fp8"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(
    options, trainer, message, make_module, make_data, make_trainer, no_weights
) -> None:
    no_weights()
    module = make_module(backbone=_backbone(**options))
    with pytest.raises(ConfigError, match=message):
        make_trainer(max_steps=1, **trainer).fit(module, make_data())


def test_checkpoints_and_adapters_tell_of_it(make_module, make_data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bf16 adapters tell nothing: what was written before stays the same."""
    trainer = Trainer(accelerator="cpu", logger=False)
    monkeypatch.setattr("moka_pl.training.course.data_of", lambda _: make_data())
    plain, told = (
        course_of(make_module(backbone=BackboneConfig(name="tiny", weights="random", **options)), trainer)
        for options in ({}, {"matmul": "fp8"})
    )
    assert told["precision"] == plain["precision"] | {"matmul": "fp8"}
    for course in (plain, told):
        course |= {name: {} for name in ("data", "optimizer", "learning_rate", "scheduler", "seed")}
    assert main_settings(told) == main_settings(plain) | {"frozen products": "fp8"}


def test_where_none_can_be_the_base_loads_and_computes_as_before() -> None:
    loaded = load_backbone(_backbone())
    assert not any(hasattr(layer, "float8_scales") for layer in loaded.model.modules())
    assert any(note.startswith("no 8-bit products: they need an NVIDIA GPU") for note in loaded.notes)
