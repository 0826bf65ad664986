"""Options of the base model, and where converted models are kept."""

from pathlib import Path

import pytest
import torch

from moka_pl.backbone import BackboneConfig, compute_dtype
from moka_pl.backbone.loading import cache_root, writable
from moka_pl.errors import BackboneError, ConfigError


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("weights", "mine", "pretrained, random"),
        ("quantization", "int3", "nf4, fp4, int8, int4, float8, hqq, gptq, awq, none"),
        ("compute_dtype", "float64", "auto, float32, bfloat16, float16"),
        ("attention", "flash", "sdpa, eager, flash_attention_2"),
    ],
)
def test_a_wrong_choice_names_the_option_and_what_it_may_be(option: str, value: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BackboneConfig(**{option: value})
    assert str(caught.value) == f"backbone.{option} is {value!r}; choose one of {remedy}"


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.name is empty; give a hub id"):
        BackboneConfig(name="")


def test_options_build_the_same_base_again() -> None:
    config = BackboneConfig("a/b", "v1", "random", "fp4", False, "bfloat16", "eager", "/somewhere", 7)
    again = BackboneConfig(config.name, config.revision, cache_dir=config.cache_dir, **config.options())
    assert again == config
    assert not config.options().keys() & {"name", "revision", "cache_dir"}


def test_the_cache_folder_follows_its_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("MOKA_PL_CACHE", "~/models")
    assert cache_root("~/chosen") == Path("/home/someone/chosen")
    assert cache_root() == Path("/home/someone/models")
    monkeypatch.delenv("MOKA_PL_CACHE")
    assert cache_root() == Path("/xdg/moka_pl")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_root() == Path("/home/someone/.cache/moka_pl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/home/someone/.cache/moka_pl")


def test_a_cache_folder_that_cannot_be_written_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = "cannot write to the cache folder .*set MOKA_PL_CACHE"
    with pytest.raises(BackboneError, match=message), writable(tmp_path / "file" / "cache"):
        pass


def test_the_compute_dtype_suits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    auto = BackboneConfig()
    assert compute_dtype(auto, cpu) == torch.float32
    assert compute_dtype(BackboneConfig(compute_dtype="bfloat16"), cpu) == torch.bfloat16
    # An older GPU emulates bfloat16: it has it only if that counts.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert compute_dtype(auto, cuda) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert compute_dtype(auto, cuda) == torch.bfloat16
