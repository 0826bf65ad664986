"""The example that is shown when training begins."""

import io
import sys
from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.callbacks import ExamplePrinter
from moka_pl.callbacks.example import example_text, first_example
from moka_pl.data import MixtureData, TextData

IGNORED = -100


def shown(prompt: str, answer: str, size: tuple[int, int] = (80, 40), **options: object) -> str:
    tokenizer = byte_tokenizer()
    before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
    ids = before + after + [0] * 3
    labels = [IGNORED] * len(before) + after + [IGNORED] * 3
    return example_text(ids, labels, tokenizer, **({"colour": False, "size": size} | options))


def test_what_is_trained_is_marked() -> None:
    text = shown("<|im_start|>user\nWhy?<|im_end|>\n", " Because é.\n<|im_end|>")
    assert text == (
        "first training example: 26 tokens, 14 trained, between >>> and <<<\n"
        "<|im_start|>user\nWhy?<|im_end|>\n>>> Because é.\n<|im_end|><<<"
    )
    coloured = shown("a", "b", colour=True)
    assert "a\x1b[32m>>>b<<<\x1b[0m" in coloured


def test_it_fits_on_a_screen() -> None:
    for prompt, answer in [("a b " * 5000, "yes"), ("why?", "because\n" * 5000), ("\n" * 900, "x" * 9000)]:
        text = shown(prompt, answer, size=(60, 24))
        assert sum(max(1, -(-len(line) // 60)) for line in text.split("\n")) <= 24
        assert "lines left out ...]" in text
        assert ">>>" in text
        assert text.endswith("<<<")
    tokenizer = byte_tokenizer()
    turns = [(tokenizer("ab").input_ids, number % 2) for number in range(50)]
    ids = [token for turn, _ in turns for token in turn]
    labels = [token if flag else IGNORED for turn, flag in turns for token in turn]
    text = example_text(ids, labels, tokenizer, colour=False, size=(80, 24))
    assert text.count("\n") < 24
    assert "[... 44 parts left out ...]" in text


def test_a_terminal_obeys_nothing_of_it() -> None:
    assert "\x1b" not in (text := shown("a\x1b[2J\r\u202eb", "\x07c"))
    assert r"a\x1b[2J\r\u202eb" in text


@pytest.mark.parametrize(
    "batch",
    [
        None,
        torch.zeros(2, 3),
        {"input_ids": torch.zeros(2, 3)},
        {"input_ids": [1], "labels": [1]},
        {"input_ids": torch.ones(2, 3, dtype=int), "labels": torch.full((2, 3), IGNORED)},
        {"input_ids": torch.ones(2, 3, dtype=int), "labels": torch.ones(2, 4, dtype=int)},
    ],
)
def test_batches_that_have_none(batch: object) -> None:
    assert first_example(batch) is None


def test_the_first_example_with_a_label() -> None:
    ids = torch.arange(12).reshape(2, 6)
    labels = torch.full((2, 6), IGNORED)
    labels[0, 0], labels[1, 4] = 0, 10  # nothing predicts a first token
    assert first_example({"input_ids": ids, "labels": labels}) == ([*range(6, 12)], labels[1].tolist())
    packed = {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.tensor([[*range(6)], [0, 1, 0, 1, 2, 0]]),
    }
    assert first_example(packed) == ([8, 9, 10], [IGNORED, IGNORED, 10])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", "### Response:\n>>>"),
        ("packed", "### Response:\n>>>"),
        ("streamed", "### Response:\n>>>"),
        ("mixture", ">>>"),
        ("text", ">>>"),
        ("choices", "Answer:>>> "),
        ("a loader", "### Response:\n>>>"),
    ],
)
@pytest.mark.slow
def test_every_kind_of_data(
    kind: str,
    expected: str,
    make_module: Callable,
    make_data: Callable,
    make_commonsense: Callable,
    make_trainer: Callable,
    capsys: pytest.CaptureFixture[str],
    tmp_path,
) -> None:
    (tmp_path / "text.txt").write_text("Some words. " * 40)
    module = make_module()
    data = {
        "plain": make_data,
        "packed": lambda: make_data(packing=True),
        "streamed": lambda: make_data(streaming=True, stream_buffer=8),
        "mixture": lambda: MixtureData([make_data(), make_commonsense()]),
        "text": lambda: TextData(tmp_path / "text.txt", validation_share=0.0, max_length=64),
        "choices": make_commonsense,
        "a loader": make_data,
    }[kind]()
    if kind == "a loader":
        data.connect(module.tokenizer)
        data.setup("fit")
        data = DataLoader([data.train_dataloader().dataset[[0, 1]]], batch_size=None)
    trainer = make_trainer(ExamplePrinter(), max_steps=2)
    trainer.fit(module, data)
    out = capsys.readouterr().out
    assert out.count("first training example: ") == 1
    assert expected in out


class Other(LightningModule):
    """A module that knows nothing of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight.sum() * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("show", [True, False])
def test_nothing_to_show(show: bool, make_trainer: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(ExamplePrinter(show)).fit(Other(), DataLoader(torch.ones(3, 1)))
    assert "example" not in capsys.readouterr().out


@pytest.mark.slow
def test_it_draws_nothing_and_can_be_switched_off(
    make_module: Callable,
    make_data: Callable,
    make_trainer: Callable,
    step_log: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = []
    for show in (True, False):
        output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", output)
        log = step_log()
        make_trainer(ExamplePrinter(show), log, max_steps=2).fit(make_module(), make_data())
        output.flush()
        assert (b"first training example" in output.buffer.getvalue()) == show
        losses.append(log.losses)
    assert losses[0] == losses[1]
