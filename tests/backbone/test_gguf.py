"""GGUF files: converted once, whole or not at all."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from moka_pl.backbone import BackboneConfig, gguf, load_backbone
from moka_pl.backbone.gguf import convert_gguf
from moka_pl.errors import BackboneError


def converted(cache: Path) -> list[Path]:
    """What lies in the cache but for the locks of attempts."""
    return [path for path in (cache / "converted").glob("*") if path.suffix != ".lock"]


def test_a_gguf_file_loads_with_its_own_weights_and_tokenizer(
    gguf_file: Path, dense: LlamaForCausalLM, ids: Tensor
) -> None:
    loaded = load_backbone(BackboneConfig(str(gguf_file), quantization="none"))
    assert loaded.model.state_dict().keys() == dense.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)
    assert loaded.tokenizer.decode(loaded.tokenizer("Zürich, abc").input_ids) == "Zürich, abc"
    assert loaded.tokenizer.pad_token_id == 0


def test_a_second_call_uses_the_cache(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = convert_gguf(gguf_file, cache)
    assert converted(cache) == [first]
    monkeypatch.setattr(gguf, "_convert", lambda file, target: pytest.fail("converted again"))
    assert convert_gguf(gguf_file, cache) == first
    load_backbone(BackboneConfig(str(gguf_file), quantization="nf4"))


def test_another_file_of_the_same_name_is_converted_anew(gguf_file: Path, cache: Path) -> None:
    first = convert_gguf(gguf_file, cache)
    gguf_file.write_bytes(gguf_file.read_bytes() + b"\0" * 32)
    assert convert_gguf(gguf_file, cache) != first


def test_simultaneous_calls_convert_once(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, others, results = [], [], []

    def convert(file: Path, target: Path) -> None:
        calls.append(target)
        for _ in range(3):  # these arrive in the middle of the conversion
            others.append(threading.Thread(target=lambda: results.append(convert_gguf(gguf_file, cache))))
            others[-1].start()
        target.mkdir()

    monkeypatch.setattr(gguf, "_convert", convert)
    target = convert_gguf(gguf_file, cache)
    for other in others:
        other.join()
    assert calls == [target]
    assert results == [target] * 3


def test_a_missing_file(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"nothing\.gguf: no such GGUF file"):
        load_backbone(BackboneConfig(str(tmp_path / "nothing.gguf")))
    assert not cache.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.9999])
def test_a_truncated_file_leaves_nothing_half_written(share: float, gguf_file: Path, cache: Path) -> None:
    whole = gguf_file.read_bytes()
    gguf_file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(BackboneError, match=r"tiny\.gguf cannot be loaded: .") as caught:
        load_backbone(BackboneConfig(str(gguf_file)))
    assert "\n" not in str(caught.value)
    assert not converted(cache)
    gguf_file.write_bytes(whole)
    load_backbone(BackboneConfig(str(gguf_file)))


def test_a_text_file_named_gguf(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "notes.gguf").write_text("These are notes, not a model.\n" * 100)
    with pytest.raises(BackboneError, match=r"notes\.gguf cannot be loaded: .") as caught:
        load_backbone(BackboneConfig(str(tmp_path / "notes.gguf")))
    assert "\n" not in str(caught.value)
    assert not converted(cache)


def test_without_the_gguf_package(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackboneError, match=r"needs the gguf package: pip install 'moka_pl\[demo\]'"):
        load_backbone(BackboneConfig(str(gguf_file)))
    assert not converted(cache)


def test_an_interrupted_conversion_leaves_nothing(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, folder: Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(gguf_file, cache)
    assert not converted(cache)
