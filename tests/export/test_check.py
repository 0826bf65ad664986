"""The comparison of an export with its adapter."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.export.check import (
    check,
    largest_difference,
    measure,
    measured,
    prompt_set,
)

IDS = [torch.tensor([1, 2, 3])]


def model_of(logits: torch.Tensor):
    return measured([logits], IDS)


def test_the_loss_is_that_of_the_tokens_after_the_first() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    chosen = logits.log_softmax(-1)
    assert model_of(logits).loss == pytest.approx(-float(chosen[0, 2] + chosen[1, 3]) / 2)


@pytest.mark.parametrize(("factor", "passes"), [(0.9, True), (1.5, False)])
def test_logits_may_differ_up_to_the_bound(factor: float, passes: bool) -> None:
    logits = torch.zeros(3, 5)
    logits[:, 0] = 8.0
    other = logits.clone()
    other[2, 4] += 8e-4 * factor  # the last row decides on no token
    if passes:
        assert "(bound 0.0008, largest logit 8.0)" in check(
            model_of(logits), model_of(other), "X 1", torch.float32
        )
    else:
        with pytest.raises(
            AdapterError, match=r"X 1, 1 prompts: largest logit difference 0\.0012 \(bound 0\.0008"
        ):
            check(model_of(logits), model_of(other), "X 1", torch.float32)


def test_the_coarsest_dtype_decides() -> None:
    logits = torch.full((3, 5), 8.0)
    check(model_of(logits), model_of(logits + 0.1), "X 1", torch.float32, torch.bfloat16)
    with pytest.raises(AdapterError):
        check(model_of(logits), model_of(logits + 0.1), "X 1", torch.float32)


def test_where_rounding_is_known_float32_s_bound_holds_beyond_it() -> None:
    logits = torch.full((3, 5), 8.0)
    other = logits + torch.tensor([[0.0], [0.0], [1.0]])  # the last row decides on no token
    pair = model_of(logits), model_of(other)
    told = check(*pair, "X 1", torch.bfloat16, rounded=model_of(other + 7e-4))
    assert "largest logit difference 1; beyond rounding to bfloat16 0.0007 (bound 0.0008, largest" in told
    for rounded, dtype in ((other + 9e-4, torch.bfloat16), (logits, torch.float16)):
        with pytest.raises(AdapterError, match=r"after\. Report it$"):
            check(*pair, "X 1", dtype, rounded=model_of(rounded))


def test_rounding_that_costs_too_much_of_the_loss_is_refused() -> None:
    logits = torch.zeros(3, 5)
    for shift, passes in ((0.01, True), (0.1, False)):
        other = logits.clone()
        other[:2, 4] += shift
        pair = model_of(logits), model_of(other)
        if passes:
            check(*pair, "X 1", torch.bfloat16, rounded=pair[1])
        else:
            with pytest.raises(AdapterError, match=r"Export in float16 or float32, or report it$"):
                check(*pair, "X 1", torch.bfloat16, rounded=pair[1])


def test_in_half_precision_a_few_tokens_may_choose_other_experts() -> None:
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    ids = [torch.arange(40) % 5]
    other = logits.clone()
    other[-1] += torch.tensor([3.0, 0, 0, 0, 0])  # of which the loss knows nothing
    pair = measured([logits], ids), measured([other], ids)
    told = check(*pair, "X 1", torch.bfloat16, routed=True)
    assert "largest logit difference of 95% of the tokens 0 (" in told
    for dtype, routed in ((torch.bfloat16, False), (torch.float32, True)):
        with pytest.raises(AdapterError, match="largest logit difference 3 "):
            check(*pair, "X 1", dtype, routed=routed)
    for rows, value in ((3, 9.0), (1, torch.nan)):
        other[-rows:] = value
        with pytest.raises(AdapterError, match=r"of 95% of the tokens (\d|inf)"):
            check(pair[0], measured([other], ids), "X 1", torch.bfloat16, routed=True)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.int8, "Export in float16 or float32, or report it"),
        (torch.bfloat16, "Export in float16 or float32, or report it"),
        (torch.float16, "Export in float32, or report it"),
        (torch.float32, "Report it"),
    ],
)
def test_a_refusal_names_what_rounds_less(dtype: torch.dtype, remedy: str) -> None:
    with pytest.raises(AdapterError) as refused:
        check(model_of(torch.ones(3, 5)), model_of(torch.full((3, 5), 9.0)), "X 1", dtype)
    assert str(refused.value).endswith(f". {remedy}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_no_match(value: float) -> None:
    logits = torch.zeros(3, 5)
    with pytest.raises(AdapterError):
        check(model_of(logits), model_of(torch.full((3, 5), value)), "X 1", torch.bfloat16)


def test_another_vocabulary_is_no_match() -> None:
    assert largest_difference(model_of(torch.zeros(3, 5)), model_of(torch.zeros(3, 6))) == float("inf")


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("One question?\n\nAnother\n")
    assert len(prompt_set(byte_tokenizer(), "raw", file)) == 2
    file.write_text("\n")
    with pytest.raises(ConfigError, match="has no prompt of at least two tokens"):
        prompt_set(byte_tokenizer(), "alpaca", file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        prompt_set(byte_tokenizer(), None, tmp_path / "none")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "large", "latin", "many"])
def test_a_file_that_holds_no_prompts_is_refused_before_it_is_read(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "large":
        with file.open("wb") as sparse:
            sparse.truncate(1 << 40)
    elif kind == "latin":
        file.write_bytes(b"\xe9t\xe9 is no UTF-8\n")
    else:
        file.write_text("a prompt\n" * 65)
    with pytest.raises(
        ConfigError, match="at most 64" if kind == "many" else "cannot be read.*small text file"
    ):
        prompt_set(byte_tokenizer(), "raw", file)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    file, plain = tmp_path / "prompts.txt", tmp_path / "plain.txt"
    file.write_bytes(b"\xef\xbb\xbfOne\r\nTwo\r\n")
    plain.write_bytes(b"One\nTwo\n")
    found, expected = (prompt_set(byte_tokenizer(), "raw", one) for one in (file, plain))
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def test_prompts_of_unlike_lengths_have_the_logits_that_each_has_alone(make_llama: Callable) -> None:
    model = make_llama().eval()
    prompts = [torch.tensor([5, 60, 7, 9, 33]), torch.tensor([21, 90]), torch.tensor([3, 3, 3])]
    together = measure(model, prompts)
    with torch.no_grad():
        alone = measured([model(input_ids=ids[None]).logits[0] for ids in prompts], prompts)
    assert largest_difference(alone, together) < 1e-5
    assert together.loss == pytest.approx(alone.loss, abs=1e-5)
