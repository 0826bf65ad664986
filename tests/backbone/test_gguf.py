"""GGUF files: converted once, whole or not at all."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from moka_pl.backbone import BackboneConfig, gguf, gguf_tokenizer, load_backbone
from moka_pl.backbone.gguf import convert_gguf
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import BackboneError
from moka_pl.utils import LFS_POINTER


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


def test_what_does_not_fit_into_the_cache_is_not_converted(
    gguf_file: Path, dense: LlamaForCausalLM, cache: Path, free_space: Callable[[int], None]
) -> None:
    size = 4 * dense.num_parameters()
    free_space(size - 1)
    with pytest.raises(BackboneError, match=r"cannot write to the cache folder .* needed, .* free\. Free"):
        convert_gguf(gguf_file, cache)
    assert not converted(cache)
    free_space(size)
    assert convert_gguf(gguf_file, cache)


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


def test_a_pointer_of_git_lfs(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(LFS_POINTER + b".github.com/spec/v1\n")
    with pytest.raises(
        BackboneError, match=r"model\.gguf is only Git LFS's pointer to the file; run git lfs"
    ):
        load_backbone(BackboneConfig(str(tmp_path / "model.gguf")))


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


def reads_as(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has transformers read tokenizers of GGUF files otherwise."""
    original = AutoTokenizer.from_pretrained

    def read(*args: object, **options: object) -> object:
        tokenizer = original(*args, **options)
        return change(tokenizer) if "gguf_file" in options else tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)


def test_special_tokens_are_those_of_the_file(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def confused(tokenizer: Any) -> Any:
        tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", None
        return tokenizer

    reads_as(confused, monkeypatch)
    loaded = load_backbone(BackboneConfig(str(gguf_file), quantization="none"))
    tokenizer, generation = loaded.tokenizer, loaded.model.generation_config
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 0)
    assert (loaded.model.config.eos_token_id, generation.eos_token_id) == (1, 1)


def _swapped(tokenizer: Any) -> Any:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def _with_bos(tokenizer: Any) -> Any:
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swapped, r"2 tokens differ \(token \d+ is '[ab]', in the file '[ab]'\)"),
        (_with_bos, "it adds a beginning-of-sequence token, unlike the file"),
        (lambda tokenizer: byte_tokenizer(), "it has 260 tokens, the file 261"),
    ],
)
def test_a_tokenizer_that_comes_out_as_another_is_refused(
    change: Callable[[Any], Any], reason: str, gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = gguf_tokenizer.read_metadata(gguf_file) | {"add_bos_token": False}
    monkeypatch.setattr(gguf, "read_metadata", lambda file: metadata)
    reads_as(change, monkeypatch)
    with pytest.raises(
        BackboneError, match=rf"tiny\.gguf cannot be used: transformers .* wrongly: {reason}\. Install"
    ):
        convert_gguf(gguf_file, cache)
    assert not converted(cache)


@pytest.mark.parametrize("package", ["transformers", "gguf", "tokenizers"])
def test_another_version_of_a_converter_converts_anew(
    package: str, gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "_convert", lambda file, target: target.mkdir())
    first = convert_gguf(gguf_file, cache)
    assert convert_gguf(gguf_file, cache) == first
    known = gguf._version
    monkeypatch.setattr(gguf, "_version", lambda name: "0.0.1" if name == package else known(name))
    assert convert_gguf(gguf_file, cache) != first
