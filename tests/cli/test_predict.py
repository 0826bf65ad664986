"""``moka-pl predict``."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moka_pl.cli.answering.predictions import Predictions
from moka_pl.cli.main import main
from moka_pl.cli.predict import predict
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.inference import complete

ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
RECORDS = [
    {"prompt": "What is the capital of France?"},
    {"messages": [*ASKED, {"role": "user", "content": "Bye"}]},
    {"instruction": "Add", "input": "2 and 3", "output": "5"},
    {"prompt": "Hi"},
    {"prompt": "a" * 90},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


@pytest.fixture
def answered(loaded: SimpleNamespace, prompts: Path) -> Callable[..., list[dict]]:
    """Runs the command; returns what it has written."""

    def run(*options: str) -> list[dict]:
        output = prompts.with_name("answers.jsonl")
        command = ["predict", str(loaded.path), "--file", str(prompts), "--output", str(output)]
        main([*command, "--max_new_tokens=12", "--overwrite", *options])
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


def test_a_line_for_each_prompt_in_the_order_of_the_file(
    answered: Callable, loaded: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    records = answered("--batch_size=2")
    assert "5 answers saved in" in capsys.readouterr().err
    wrap = loaded.tokenizer.apply_chat_template
    for record, given in zip(records, RECORDS, strict=True):
        shown = given.get("prompt") or given.get("messages") or "Add\n\n2 and 3"
        turns = shown if isinstance(shown, list) else [{"role": "user", "content": shown}]
        ids = wrap(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        [alone] = complete(loaded.model, loaded.tokenizer, [ids], 12, do_sample=False)
        assert record == {
            "prompt": shown,
            "completion": alone.text,
            "prompt_tokens": len(ids),
            "completion_tokens": alone.tokens,
            "stop_reason": alone.stop_reason,
        }
    assert len({record["completion"] for record in records}) == len(RECORDS)


def test_merged_it_writes_the_same(answered: Callable) -> None:
    assert answered() == answered("--merge")


def test_an_end_of_turn_is_told(answered: Callable, loaded: SimpleNamespace) -> None:
    assert {record["stop_reason"] for record in answered()} == {"length"}
    turns = [{"role": "user", "content": "Hi"}]
    ids = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        loaded.model.generation_config.eos_token_id = int(loaded.model(**ids).logits[0, -1].argmax())
    record = answered()[3]
    assert (record["completion_tokens"], record["stop_reason"]) == (1, "end_of_turn")


def test_an_interrupted_run_goes_on(
    answered: Callable,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--batch_size=2", "--temperature=2", "--seed=3"]
    whole = answered(*options)
    older = prompts.with_name("answers.jsonl").read_bytes()
    batches: list[int] = []

    def stopping(model: object, tokenizer: object, prompts: list, *args: object, **more: object) -> list:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(prompts))
        return complete(model, tokenizer, prompts, *args, **more)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("moka_pl.inference.complete", stopping)
        with pytest.raises(SystemExit) as end:
            answered(*options)
    assert end.value.code == 130
    assert "interrupted; 4 of 5 answers are kept; the same command goes on" in capsys.readouterr().err
    assert prompts.with_name("answers.jsonl").read_bytes() == older
    batches.clear()
    with monkeypatch.context() as patch:
        patch.setattr("moka_pl.inference.complete", stopping)
        assert answered(*options) == whole
    assert batches == [1]
    assert answered(*options[:2], "--seed=4") != whole


def test_fewer_at_a_time_where_memory_ends(answered: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answered()

    def limited(model: object, tokenizer: object, prompts: list, *args: object, **more: object) -> list:
        if len(prompts) > 2:
            raise MemoryError
        return complete(model, tokenizer, prompts, *args, **more)

    monkeypatch.setattr("moka_pl.inference.complete", limited)
    with pytest.warns(UserWarning, match="out of memory with 5 prompts at a time"):
        assert answered() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file": None}, "give --file PROMPTS and --output"),
        ({"output": None}, "give --file PROMPTS and --output"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"prompt_format": "x"}, "prompt_format must be one of chat, alpaca"),
        ({"top_p": 2.0}, "top_p must be above 0"),
        ({"system": "x", "prompt_format": "raw"}, "the prompt format raw has no system message"),
    ],
)
def test_options_that_cannot_work(
    options: dict, message: str, saved: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moka_pl.inference.load_model", lambda *args, **more: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        predict(saved, **({"file": prompts, "output": prompts.with_name("out.jsonl")} | options))
    assert [file.name for file in prompts.parent.iterdir()] == [prompts.name]


def test_what_is_there_stays(saved: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moka_pl.inference.load_model", lambda *args, **more: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="is there already; choose another file, or set --overwrite"):
        predict(saved, prompts, prompts)
    with pytest.raises(AdapterError, match="no such folder"):
        predict(prompts.parent / "nothing", prompts, prompts.with_name("out.jsonl"))
    assert len(prompts.read_text().splitlines()) == len(RECORDS)


def test_a_prompt_beyond_the_context_is_refused_before_weights_are_loaded(
    saved: Path, prompts: Path, no_weights: Callable[[], None]
) -> None:
    no_weights()
    prompts.write_text(json.dumps({"prompt": "Hi"}) + "\n" + json.dumps({"prompt": "x" * 600}) + "\n")
    with pytest.raises(ConfigError, match=r"prompts\.jsonl, .*2 has 6\d\d tokens, which leave no room"):
        predict(saved, prompts, prompts.with_name("out.jsonl"))
    assert [file.name for file in prompts.parent.iterdir()] == [prompts.name]


def test_what_another_process_writes_is_refused_before_weights_are_loaded(
    saved: Path, prompts: Path, no_weights: Callable[[], None]
) -> None:
    output = prompts.with_name("out.jsonl")
    no_weights()
    with Predictions(output, "another run").opened(), pytest.raises(ConfigError, match="another process is"):
        predict(saved, prompts, output)
