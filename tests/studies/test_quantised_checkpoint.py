"""The script that has GPTQModel write checkpoints shows it what the model would be shown."""

import json
from pathlib import Path

import pytest

from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.studies import quantised_checkpoint
from moka_pl.studies.quantised_checkpoint import calibration, main, options, windows

ROWS = [{"instruction": "Add.", "input": "1 + 2", "output": "3"}, {"instruction": "Hi", "output": "Ho"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (None, ["Add.\n1 + 2\n3", "Hi\nHo"]),
        (TEMPLATE, ["<user>Add.\n1 + 2<assistant>3", "<user>Hi<assistant>Ho"]),
    ],
)
def test_a_row_is_shown_as_the_model_would_be(template: str | None, told: list[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    shown = calibration(ROWS, tokenizer, 100)
    texts = [tokenizer.decode(one["input_ids"], skip_special_tokens=True) for one in shown]
    assert texts == told
    assert all(len(one["attention_mask"]) == len(one["input_ids"]) for one in shown)
    assert [len(one["input_ids"]) for one in calibration(ROWS, tokenizer, 5)] == [5, 5]


def test_windows_have_one_length_and_no_token_twice() -> None:
    examples = [{"input_ids": list(range(5))}, {"input_ids": list(range(5, 14))}]
    found = windows(examples, 4)
    assert [window["input_ids"] for window in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all(window["attention_mask"] == [1] * 4 for window in found)


def test_awq_has_zero_points_and_gptq_perhaps_an_order() -> None:
    assert options("awq", 64, False)["sym"] is False
    assert options("gptq", 32, True) == {
        "bits": 4,
        "group_size": 32,
        "device": "cpu",
        "offload_to_disk": False,
        "desc_act": True,
    }


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (None, [], "cannot be read as JSON"),
        ("{", [], "cannot be read as JSON"),
        ('{"instruction": "Hi"}', [], "must be a list of objects"),
        ('[{"instruction": "Hi"}]', [], "must be a list of objects"),
        (json.dumps(ROWS), ["--samples", "3"], "--samples must be 1 to 2"),
        (json.dumps(ROWS), ["--samples", "2"], "GPTQModel is not installed"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(
    content: str | None,
    options: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(quantised_checkpoint, "find_spec", lambda name: None)
    texts, out = tmp_path / "texts.json", tmp_path / "out"
    if content is not None:
        texts.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["gptq", "--texts", str(texts), "--out", str(out), *options])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1
    assert not out.exists()
