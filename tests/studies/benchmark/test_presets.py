import pytest

from moka_pl.adapters.filters import filter_shapes
from moka_pl.backbone.random_weights import SHAPES, shape_config
from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark.cases import PRESETS, find_preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_shape_is_known(name: str) -> None:
    assert {PRESETS[name].shape, *PRESETS[name].shapes} <= set(SHAPES)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=str)
def test_gpus_are_warmed_up_by_three_steps_or_more(preset) -> None:
    assert preset.device == "cpu" or preset.warmup >= 3


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'llama-7b'; choose one of smollm2-cpu, .*llama2-7b-odd-h100"):
        find_preset("llama-7b")


def test_a_preset_of_a_gpu_needs_one(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"llama2-7b-h100 needs a CUDA device.* choose smollm2-cpu"):
        find_preset("llama2-7b-h100")


@pytest.mark.parametrize("filters", ["diverse", "prime"])
def test_the_odd_shape_pads(filters: str) -> None:
    config = shape_config("llama2-7b-odd")
    m, n = config.num_attention_heads * config.head_dim, config.hidden_size
    odd = [shape for shape in filter_shapes(filters, 10, m, n) if (shape.rows, shape.cols) != (m, n)]
    assert len(odd) >= 6
