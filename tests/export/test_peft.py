"""The PEFT directory, read by PEFT."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from moka_pl.adapters import BaseModel, moka_layers, unload
from moka_pl.cli.main import main
from moka_pl.errors import AdapterError
from moka_pl.export import peft as export_peft
from moka_pl.export.check import measure
from moka_pl.export.lora import lora_form
from moka_pl.export.source import Source, open_source

peft = pytest.importorskip("peft")


def test_peft_computes_what_the_adapter_does(
    make_adapter: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter()
    main(["export", str(adapter), "--to", "lora"])
    out = adapter.with_name("adapter-lora")
    told = capsys.readouterr().out
    assert f"PEFT {peft.__version__}, 8 prompts: largest logit difference" in told
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] <= 64
    assert config["target_modules"] == ["q_proj", "v_proj"]
    source = open_source(adapter)
    base = unload_and_measure(source)
    served = measure(peft.PeftModel.from_pretrained(source.model, str(out)), source.prompts)
    for one, other, without in zip(source.expected.logits, served.logits, base.logits, strict=True):
        torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
        assert (other - without).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layers", [["q_proj", "v_proj"], ["embed_tokens", "q_proj"]], ids=str)
def test_what_rounding_makes_of_the_lora_is_known(
    layers: list[str], dtype: str, make_adapter: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(target_modules=layers)
    main(["export", str(adapter), "--to", "lora", "--dtype", dtype])
    whole, beyond = re.findall(
        rf"difference (\S+); beyond rounding to {dtype} (\S+) ", capsys.readouterr().out
    )[0]
    assert 20 * float(beyond) < float(whole)


def unload_and_measure(source):
    unload(source.model)
    return measure(source.model, source.prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [None, 8])
def test_a_lora_that_computes_something_else_is_not_left(
    rank: int | None, dtype: torch.dtype, make_adapter: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(quantization="none")
    source, out = open_source(adapter), adapter.with_name("out")
    form = lora_form(moka_layers(source.model), rank)
    written = export_peft.write_peft

    def damaged(folder: Path, *arguments: object) -> None:
        written(folder, *arguments)
        file = folder / "adapter_model.safetensors"
        state = load_file(file)
        state[min(state)] *= 1.01
        save_file(state, file)

    monkeypatch.setattr(export_peft, "write_peft", damaged)
    with pytest.raises(AdapterError, match="the export is not what was trained, and nothing was written"):
        export_peft.export_lora(source, out, form, dtype)
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_a_truncated_lora_tells_what_is_lost(
    make_adapter: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(quantization="none")
    main(
        [
            "export",
            str(adapter),
            "--to",
            "lora",
            "--rank",
            "8",
            "--dtype",
            "bfloat16",
            "--out",
            str(adapter) + "8",
        ]
    )
    told = capsys.readouterr().out
    assert "energy lost, by layer:\n  model.layers.0.self_attn.q_proj" in told
    assert "truncated\n" in told
    state = load_file(Path(f"{adapter}8") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert min(min(tensor.shape) for tensor in state.values()) == 8


@pytest.mark.parametrize(("base", "revision"), [("org/base", "abc"), ("./copy", None)])
def test_the_revision_is_that_of_the_stored_base_alone(base: str, revision: str | None) -> None:
    info = SimpleNamespace(base=BaseModel("org/base", "abc"))
    assert Source(info, None, None, [], None, base, base).revision == revision
