"""Adapters of mlx-lm's: its names and orders, and its own computation where it is installed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers, unload
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.cli.main import main
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.export.check import Measured, measure
from moka_pl.export.lora import lora_form
from moka_pl.export.merged import merged_parts, write_description, write_weights
from moka_pl.export.mlx import check_layers, export_mlx, measure_mlx, write_mlx
from moka_pl.export.source import Source
from moka_pl.studies.architectures.families import FAMILIES, tiny_model

IDS = torch.tensor([5, 60, 7, 9, 33, 21, 90, 2])


def test_factors_are_transposed(make_llama: Callable, randomize: Callable, tmp_path: Path) -> None:
    model = make_llama()
    inject_adapter(model, MokaConfig(components=2, filters="square"))
    randomize(model)
    layers = moka_layers(model)
    form = lora_form(layers)
    write_mlx(tmp_path, form, 2, torch.float32)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["num_layers"] == 2
    parameters = config["lora_parameters"]
    assert parameters["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert (parameters["rank"], parameters["scale"]) == (form.rank, 1.0)
    stored = load_file(tmp_path / "adapters.safetensors")
    assert len(stored) == 2 * len(layers)
    for name, layer in layers.items():
        delta = (stored[f"{name}.lora_a"] @ stored[f"{name}.lora_b"]).T  # as mlx-lm computes it: x a b
        torch.testing.assert_close(delta, layer.get_delta_weight().detach(), atol=1e-5, rtol=1e-5)


def test_a_head_is_refused() -> None:
    check_layers(["model.layers.3.mlp.up_proj"])
    with pytest.raises(ConfigError, match="--to mlx writes layers of the model's blocks, not lm_head"):
        check_layers(["lm_head"])


def test_without_its_reader_nothing_is_loaded(
    make_adapter: Callable,
    no_weights: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = make_adapter()
    no_weights()
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(SystemExit):
        main(["export", str(adapter), "--to", "mlx"])
    assert "mlx-lm, which is not installed; pip install 'moka_pl[mlx]'" in capsys.readouterr().err
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("compute", "others", "passes"),
    [(torch.float16, 2, True), (torch.float16, 4, False), (torch.float32, 2, False)],
)
def test_where_mlx_computes_in_half_precision_a_few_tokens_may_choose_other_experts(
    compute: torch.dtype,
    others: int,
    passes: bool,
    randomize: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model(next(family for family in FAMILIES if family.name == "Mixtral"))
    inject_adapter(model, MokaConfig(components=2, filters="square"))
    randomize(model)
    prompts, info = [torch.arange(4, 64)], SimpleNamespace(base=None, extra={})
    expected = measure(model, prompts)
    source = Source(info, model, byte_tokenizer(), prompts, expected, "base", "base")
    form = lora_form(moka_layers(model))

    def rounded(*_: object) -> Measured:
        logits = expected.logits[0].clone()
        logits[-others:, 0] += 100.0  # as a token has them that other experts computed
        return Measured([logits], expected.loss)

    monkeypatch.setattr("moka_pl.export.mlx.base_dtype", lambda parts: compute)
    monkeypatch.setattr("moka_pl.export.mlx.import_mlx", lambda: "mlx-lm 0")
    monkeypatch.setattr("moka_pl.export.mlx.measure_mlx", rounded)
    if passes:
        export_mlx(source, tmp_path / "out", form, torch.float16)
        assert "largest logit difference of 95% of the tokens 0 (" in capsys.readouterr().out
    else:
        with pytest.raises(AdapterError, match="the export is not what was trained"):
            export_mlx(source, tmp_path / "out", form, torch.float16)
    assert (tmp_path / "out").exists() == passes


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
def test_mlx_computes_the_same(
    theta: float, make_llama: Callable, randomize: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("mlx.core")
    rope = {"rope_type": "default", "rope_theta": theta}
    model = make_llama(rope_parameters=rope)
    inject_adapter(model, MokaConfig(components=2, filters="square", target_modules="all-linear"))
    randomize(model)
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    form = lora_form(moka_layers(model))
    unload(model)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    write_weights(base, merged_parts(model), torch.float32)
    write_description(base, model, byte_tokenizer(), torch.float32)
    write_mlx(adapter, form, 2, torch.float32)
    [logits] = measure_mlx(base, adapter, [IDS]).logits
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        assert (model(IDS[None]).logits[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mlx_computes_in_float32_with_factors_in_half_precision(
    dtype: torch.dtype,
    make_llama: Callable,
    randomize: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mlx.core")
    model = make_llama(max_position_embeddings=128)
    inject_adapter(model, MokaConfig(components=2, filters="square"))
    randomize(model)
    prompts, info = [IDS], SimpleNamespace(base=None, extra={})
    source = Source(info, model, byte_tokenizer(), prompts, measure(model, prompts), "base", "base")
    export_mlx(source, tmp_path / "out", lora_form(moka_layers(model)), dtype)
    assert f"beyond rounding to {str(dtype).removeprefix('torch.')}" in capsys.readouterr().out


def test_what_mlx_does_not_know_is_said(make_llama: Callable, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(AdapterError, match="mlx-lm cannot read the adapter"):
        measure_mlx(tmp_path, tmp_path, [IDS])
