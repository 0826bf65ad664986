"""Where an export may be written."""

import errno
from pathlib import Path

import pytest
from safetensors.torch import save

from moka_pl.errors import ConfigError
from moka_pl.export.folder import check_output, marked, written_folder


def test_a_folder_with_something_in_it_is_kept(tmp_path: Path) -> None:
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    check_output(out, adapter, overwrite=False)
    out.mkdir()
    check_output(out, adapter, overwrite=False)
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").write_bytes(save({}, metadata=marked("pt")))
    with pytest.raises(ConfigError, match=r"is not empty; choose another folder, or add --overwrite"):
        check_output(out, adapter, overwrite=False)
    check_output(out, adapter, overwrite=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, which no export writes, and is not replaced"):
        check_output(out, adapter, overwrite=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", save({}, metadata={"format": "pt"})),  # a base, downloaded or trained
        ("adapter_model.safetensors", b"damaged"),
        ("Modelfile", b"FROM llama3"),
        ("config.json", b"{}"),
    ],
)
def test_what_no_export_wrote_is_kept_whatever_it_is_called(
    name: str, content: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "chat_template.jinja").write_text("")
    (out / "adapter.gguf" if name == "Modelfile" else out / "tokenizer.json").write_text("")
    (out / name).write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"does not say that an export of moka_pl wrote it, and is not replaced"
    ):
        check_output(out, tmp_path / "adapter", overwrite=True)
    if name == "Modelfile":
        (out / name).write_text("FROM llama3\n# moka_pl_version 1\n")
        check_output(out, tmp_path / "adapter", overwrite=True)


@pytest.mark.parametrize("base", ["", "../out", "model-f16.gguf"])
def test_the_base_is_never_replaced_even_if_it_was_exported(base: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-f16.gguf").write_text("")
    (out / "model.safetensors").write_bytes(save({}, metadata=marked("pt")))
    check_output(out, tmp_path / "adapter", overwrite=True, base="tiny")
    with pytest.raises(
        ConfigError, match=r"holds the base .*, which is never replaced; choose another folder"
    ):
        check_output(out, tmp_path / "adapter", overwrite=True, base=str(out / base))


def test_a_folder_in_it_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "model.gguf").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds model\.gguf, which no export writes"):
        check_output(tmp_path / "out", tmp_path / "adapter", overwrite=True)


def test_a_trained_adapter_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"moka_pl_version": "1"}')
    for adapter in (tmp_path, tmp_path / "other"):
        with pytest.raises(ConfigError, match="holds a trained adapter, which is never replaced"):
            check_output(tmp_path, adapter, overwrite=True)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        check_output(tmp_path / "out", tmp_path, overwrite=True)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with written_folder(tmp_path / "out") as new:
            (new / "config.json").write_text("{}")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match=r"cannot write to --out .*out: No space left .*; nothing was left"):
        fill()
    assert not list(tmp_path.iterdir())
