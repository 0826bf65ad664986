"""The package's scores and the harness' of the same questions, on a tiny random model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moka_pl.data import CommonsenseData, MmluData
from moka_pl.errors import DataError
from moka_pl.evaluation.lm_eval.tasks import select_tasks
from moka_pl.studies.agreement.agreement import compare
from moka_pl.studies.agreement.command import build_module
from moka_pl.studies.agreement.sides import harness_items, package_items, reported
from moka_pl.training.module import MokaModule

LENGTH = 2048


def data_of(questions: Path, task: str, **options: object) -> CommonsenseData:
    file = questions / task / "test.json"
    defaults = {"path": file, "validation_path": file, "max_length": LENGTH, "eval_batch_size": 5}
    return CommonsenseData(**(defaults | options))


@pytest.fixture
def module(adapter: Path, one_thread: None) -> MokaModule:
    return build_module("", random=False, adapter=adapter)


def test_every_question_agrees(questions: Path, module: MokaModule) -> None:
    tasks = ["science_easy", "boolean"]
    harness = harness_items(module, select_tasks(tasks, questions), LENGTH)
    for task in tasks:
        data = data_of(questions, task)
        package = package_items(module, data, batch_size=5)
        values = reported(module, data)
        of_task = {kind: values[f"{kind}/{task}"] for kind in ("accuracy", "acc_norm")}
        found = compare(task, package, harness[task], of_task)
        assert found.agrees, found
        assert found.items == 12
        assert found.largest < 1e-4
        # Questions of all lengths, in an order that is not that of their lengths.
        lengths = [len(item.tokens[0]) for item in package]
        assert lengths != sorted(lengths, reverse=True)
        assert len({item.answer for item in package}) > 1


def test_it_is_the_adapted_model_that_is_scored(questions: Path, module: MokaModule) -> None:
    from moka_pl.adapters import adapters_disabled

    data = data_of(questions, "physical")
    adapted = package_items(module, data)
    with adapters_disabled(module.causal_lm):
        harness = harness_items(module, select_tasks(["physical"], questions), LENGTH)["physical"]
    found = compare("physical", adapted, harness)
    assert not found.agrees
    assert found.largest > 1e-2


def test_a_wrong_border_shows(questions: Path, module: MokaModule, monkeypatch: pytest.MonkeyPatch) -> None:
    from moka_pl.data.encoding.choices import ChoiceEncoder

    split = ChoiceEncoder._split

    def late(self: ChoiceEncoder, *texts: object) -> tuple[list[int], list[list[int]]]:
        prompt, options = split(self, *texts)
        return [*prompt, options[0][0]], [option[1:] for option in options]

    monkeypatch.setattr(ChoiceEncoder, "_split", late)
    # Another length: the cache of encoded questions must not hide the change.
    package = package_items(module, data_of(questions, "boolean", max_length=LENGTH - 1))
    harness = harness_items(module, select_tasks(["boolean"], questions), LENGTH)["boolean"]
    found = compare("boolean", package, harness)
    assert {difference.what for difference in found.differences} == {"tokens"}
    assert len(found.differences) == 12


def test_questions_that_would_be_cut_are_refused(questions: Path, module: MokaModule) -> None:
    with pytest.raises(DataError, match=r"longer than max_length \(150 tokens; .*\); raise max_length"):
        package_items(module, data_of(questions, "physical", max_length=150))


def test_every_question_of_mmlu_agrees(mmlu: Path, module: MokaModule) -> None:
    harness = harness_items(module, select_tasks(["mmlu"], mmlu), LENGTH)
    for subject in ("astronomy", "world_religions"):
        data = MmluData(mmlu, subjects=[subject], max_length=LENGTH, eval_batch_size=3)
        values = reported(module, data)
        name = f"mmlu_{subject}"
        of_task = {kind: values[f"{kind}/{name}"] for kind in ("accuracy", "acc_norm")}
        package = package_items(module, data, batch_size=3)
        found = compare(name, package, harness[name], of_task)
        assert found.agrees, found
        assert found.items == 4
        assert len(package[0].tokens[0]) > 300  # five worked examples stand before it
    with pytest.raises(DataError, match=r"longer than max_length \(300 tokens; the longest has"):
        package_items(module, MmluData(mmlu, subjects=["astronomy"], max_length=300))


def test_a_token_at_the_beginning_is_put_there_once(
    questions: Path, make_llama: Callable, beginning_tokenizer: object
) -> None:
    module = MokaModule()
    module.model = make_llama(vocab_size=400, max_position_embeddings=512)
    module.tokenizer = beginning_tokenizer
    package = package_items(module, data_of(questions, "physical"))
    harness = harness_items(module, select_tasks(["physical"], questions), LENGTH)["physical"]
    found = compare("physical", package, harness)
    assert found.agrees, found
    first = beginning_tokenizer.bos_token_id
    assert all(tokens.count(first) == 1 and tokens[0] == first for item in package for tokens in item.tokens)
    assert torch.tensor([item.borders[0] for item in package]).min() > 5
