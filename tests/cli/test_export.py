"""``moka-pl export``: what is refused before anything is loaded."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save
from transformers import GemmaConfig, LlamaConfig, PretrainedConfig

from moka_pl.backbone.random_weights import shape_config
from moka_pl.cli.export import _beside, export
from moka_pl.cli.main import main
from moka_pl.errors import ConfigError
from moka_pl.export.folder import marked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a format: --to merged, lora, gguf, mlx"),
        (["--to", "merged", "--rank", "4"], "rank and energy truncate a LoRA, and a merged model has none"),
        (["--to", "lora", "--onto", "original"], "--onto original is for merged models"),
        (["--to", "lora", "--rank", "0"], "rank must be at least 1, not 0"),
        (["--to", "lora", "--max_rank", "0"], "max_rank must be at least 1, not 0"),
        (["--to", "lora", "--energy", "1"], "energy must be between 0 and 1, not 1.0"),
        (["--to", "lora", "--energy", "0.9", "--rank", "4"], "rank and energy exclude each other"),
        (["--to", "lora", "--max_rank", "16"], "is exactly a LoRA of rank 64"),
        (["--to", "lora", "--rank", "65"], "--rank must be from 1 to 64"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_loading(
    adapter: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("moka_pl.export.source.load_model", lambda *_: pytest.fail("something was loaded"))
    before = sorted(adapter.parent.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["export", str(adapter), *options])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
    assert printed.err.count("\n") == 1
    assert sorted(adapter.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, "--to lora --energy 0.999 --max_rank 4", "--energy 0.999 needs rank"),
        ({"filters": "prime"}, "--to lora --rank 999", "--rank must be from 1 to"),
        ({"filters": "prime"}, "--to gguf --max_rank 1", "above --max_rank 1; truncate it"),
        ({}, "--to gguf --gguf_type q8_0", "it is no byte-pair encoding; export --to merged"),
        ({}, "--to merged --prompts none.txt", "--prompts none.txt cannot be read"),
        ({}, "--to lora --base other", "does not fit this model"),
        ({}, "--to gguf --base gemma", "not of model_type 'gemma'"),
        ({}, "--to merged --out adapter/adapter_config.json/out", "cannot write there"),
    ],
)
def test_what_the_adapter_and_sizes_tell_is_refused_before_weights_are_loaded(
    settings: dict,
    options: str,
    message: str,
    make_adapter: Callable[..., Path],
    no_weights: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = make_adapter(**settings)
    monkeypatch.chdir(adapter.parent)
    for name, config in bases().items():
        config.save_pretrained(name)
    before = sorted(adapter.parent.rglob("*"))
    no_weights()
    with pytest.raises(SystemExit) as ended:
        main(["export", "adapter", *options.split()])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(adapter.parent.rglob("*")) == before


@pytest.mark.parametrize("options", ["lora", "merged", "gguf", "gguf --gguf_type f16", "mlx"])
def test_what_does_not_fit_on_the_disk_is_refused_before_weights_are_loaded(
    options: str,
    saved: Path,
    no_weights: Callable[[], None],
    free_space: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Without their packages, and with a tokenizer that GGUF cannot hold.
    monkeypatch.setattr("moka_pl.export.run.import_mlx", lambda: None)
    monkeypatch.setattr("moka_pl.export.run.check_model", lambda *_: None)
    monkeypatch.chdir(saved.parent)
    before = sorted(saved.parent.rglob("*"))
    no_weights()
    free_space(5000)
    with pytest.raises(SystemExit) as ended:
        main(["export", str(saved), "--out", "new/out", "--to", *options.split()])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert re.search(r"--out new/out: about [\d.]+ MiB needed, 5,000 bytes free; free some space", told)
    assert told.count("\n") == 1
    assert sorted(saved.parent.rglob("*")) == before


def bases() -> dict[str, PretrainedConfig]:
    """Other bases: of other sizes, and of another architecture."""
    sizes = shape_config("tiny").to_dict()
    gemma = {name: sizes[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    return {
        "other": LlamaConfig(**(sizes | {"num_attention_heads": 1, "num_key_value_heads": 1})),
        "gemma": GemmaConfig(**gemma, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    }


def test_a_base_without_original_weights_is_refused_before_weights_are_loaded(
    saved: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, no_weights: Callable[[], None]
) -> None:
    no_weights()
    out = adapter.with_name("out")
    with pytest.raises(ConfigError, match="the base was not quantised in training; leave the option out"):
        export(saved, "merged", out, onto="original")
    monkeypatch.setattr("moka_pl.backbone.description.Description.quantization", {"load_in_4bit": True})
    monkeypatch.setattr("moka_pl.backbone.description.stored_quantization", lambda *_: ("nf4", True))
    with pytest.raises(ConfigError, match="--onto original: tiny is stored quantised; give its unquantised"):
        export(adapter, "merged", out, onto="original")


def test_an_export_lies_beside_its_adapter(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _beside(adapter, "gguf") == adapter.with_name("adapter-gguf")
    monkeypatch.chdir(adapter)
    assert _beside(Path(), "lora") == adapter.with_name("adapter-lora")
    # A folder "me" would hide all of the owner's adapters on the hub.
    assert _beside(Path("me/on-the-hub"), "lora") == Path("on-the-hub-lora")


def test_an_older_export_is_replaced_on_request_only(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = adapter.with_name("adapter-lora")
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    (out / "adapter_model.safetensors").write_bytes(save({}, metadata=marked("pt")))
    with pytest.raises(SystemExit):
        main(["export", str(adapter), "--to", "lora"])
    assert "is not empty; choose another folder, or add --overwrite" in capsys.readouterr().err
    assert (out / "adapter_config.json").read_text() == "{}"
    main(["export", str(adapter), "--to", "lora", "--overwrite"])
    assert len(list(out.iterdir())) == 2
