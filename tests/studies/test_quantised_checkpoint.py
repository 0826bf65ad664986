"""The script that has GPTQModel write checkpoints shows it what the model would be shown."""

import runpy
from pathlib import Path

import pytest

from moka_pl.backbone.random_weights import byte_tokenizer

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "quantised_checkpoint.py"))
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
    shown = SCRIPT["calibration"](ROWS, tokenizer, 100)
    texts = [tokenizer.decode(one["input_ids"], skip_special_tokens=True) for one in shown]
    assert texts == told
    assert all(len(one["attention_mask"]) == len(one["input_ids"]) for one in shown)
    assert [len(one["input_ids"]) for one in SCRIPT["calibration"](ROWS, tokenizer, 5)] == [5, 5]


def test_windows_have_one_length_and_no_token_twice() -> None:
    examples = [{"input_ids": list(range(5))}, {"input_ids": list(range(5, 14))}]
    windows = SCRIPT["windows"](examples, 4)
    assert [window["input_ids"] for window in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all(window["attention_mask"] == [1] * 4 for window in windows)


def test_awq_has_zero_points_and_gptq_perhaps_an_order() -> None:
    assert SCRIPT["options"]("awq", 64, False)["sym"] is False
    assert SCRIPT["options"]("gptq", 32, True) == {
        "bits": 4,
        "group_size": 32,
        "device": "cpu",
        "offload_to_disk": False,
        "desc_act": True,
    }
