"""``moka-pl export``: what is refused before anything is loaded."""

from pathlib import Path

import pytest

from moka_pl.cli.main import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a format: --to merged, lora, gguf"),
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


def test_an_older_export_is_replaced_on_request_only(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = adapter.with_name("adapter-lora")
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["export", str(adapter), "--to", "lora"])
    assert "is not empty; choose another folder, or add --overwrite" in capsys.readouterr().err
    assert (out / "adapter_config.json").read_text() == "{}"
    main(["export", str(adapter), "--to", "lora", "--overwrite"])
    assert len(list(out.iterdir())) == 2
