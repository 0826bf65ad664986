import json
from pathlib import Path

import pytest

from moka_pl.errors import ConfigError, DataError
from moka_pl.evaluation.lm_eval.tasks import select_tasks


def leaves(tasks: list) -> list[str]:
    return [task.task_name for task in tasks]


def test_names_and_patterns(questions: Path) -> None:
    found = select_tasks(["physical", "s*", "physical"], questions)
    assert found.names == leaves(found.tasks) == ["physical", "science_easy"]
    assert len(found.tasks[0].eval_docs) == 12


def test_a_group_holds_its_subjects(mmlu: Path) -> None:
    (group,) = select_tasks(["mmlu"], mmlu).tasks
    assert leaves(group.get_all_tasks()) == ["mmlu_astronomy", "mmlu_world_religions"]
    with pytest.raises(
        ConfigError, match=r"the task mmlu_astronomy is selected twice, by mmlu_a.* and by mmlu"
    ):
        select_tasks(["mmlu_astronomy", "mmlu"], mmlu)


def test_unknown_names_are_told_with_near_ones(questions: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown task 'physics'; did you mean physical\? \(the local data"
    ):
        select_tasks(["boolean", "physics"], questions)
    with pytest.raises(ConfigError, match=r"unknown task 'arc_eazy'; did you mean arc_easy\b"):
        select_tasks(["arc_eazy"])


def test_no_names(questions: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tasks given; .*has boolean, physical, science_easy"):
        select_tasks([], questions)


def test_local_data_go_before_tasks_of_the_same_name(questions: Path) -> None:
    (questions / "physical").rename(questions / "piqa")
    # The other name makes it look through lm_eval's own tasks, which have a piqa, too.
    with pytest.raises(ConfigError, match="unknown task 'nothing of that name'"):
        select_tasks(["piqa", "nothing of that name"], questions)
    (task,) = select_tasks(["piqa"], questions).tasks
    assert task.config.dataset_kwargs["files"] == {"test": str(questions / "piqa" / "test.json")}


def test_data_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(**options: object) -> None:
        raise RuntimeError("no\nsuch split")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match=r"lm_eval cannot load the task arc_easy: no such split; connect"):
        select_tasks(["arc_easy"])


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_out_of_reach_is_told_at_once(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    why = "HF_HUB_OFFLINE is set; unset it" if offline else r".* reached \(.*no network\); connect"
    with pytest.raises(ConfigError, match=f"arc_easy: its data are not in the cache .*, and {why}"):
        select_tasks(["arc_easy"])


@pytest.mark.usefixtures("no_network")
def test_local_data_ask_no_hub(questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moka_pl.hub.ask_hub", lambda: pytest.fail("the hub was asked"))
    assert select_tasks(["physical"], questions).names == ["physical"]


def test_local_data_of_no_use(questions: Path) -> None:
    (questions / "physical" / "test.json").write_text(json.dumps([{"question": "?", "choices": ["a", "b"]}]))
    with pytest.raises(DataError, match=r"physical/test.json, item 1: field 'answer' is missing"):
        select_tasks(["physical"], questions)
