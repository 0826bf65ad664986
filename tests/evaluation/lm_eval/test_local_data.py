import json
from pathlib import Path

import pytest

from moka_pl.errors import DataError
from moka_pl.evaluation.lm_eval.local_data import local_tasks, write_task_files
from moka_pl.prompts.templates import cloze_prompt


def test_folders_are_tasks(questions: Path) -> None:
    tasks = local_tasks(questions)
    assert sorted(tasks) == ["boolean", "physical", "science_easy"]
    files = tasks["physical"]["dataset_kwargs"]["files"]
    assert files == {"test": str(questions / "physical" / "test.json")}
    assert "fewshot_split" not in tasks["physical"]


def test_subjects_are_tasks_and_categories_are_groups(mmlu: Path) -> None:
    tasks = local_tasks(mmlu)
    groups = {name: content["task"] for name, content in tasks.items() if "group" in content}
    assert list(tasks) == ["mmlu_astronomy", "mmlu_world_religions", *groups]
    assert groups == {
        "mmlu_stem": ["mmlu_astronomy"],
        "mmlu_humanities": ["mmlu_world_religions"],
        "mmlu": ["mmlu_stem", "mmlu_humanities"],
    }


def test_a_subject_without_a_category_is_still_there(mmlu: Path) -> None:
    for part in ("dev", "test"):
        file = mmlu / part / f"astronomy_{part}.csv"
        file.rename(file.with_name(f"astrology_{part}.csv"))
    tasks = local_tasks(mmlu)
    assert tasks["mmlu"]["task"] == ["mmlu_humanities", "mmlu_astrology"]


def test_a_subject_says_what_it_is_about(mmlu: Path) -> None:
    tasks = local_tasks(mmlu)
    files = tasks["mmlu_world_religions"]["dataset_kwargs"]["files"]
    assert files["dev"] == str(mmlu / "dev" / "world_religions_dev.csv")
    assert tasks["mmlu_world_religions"]["description"].endswith("about world religions.\n\n")


def test_worked_examples_need_a_file_to_come_from(questions: Path, mmlu: Path) -> None:
    with pytest.raises(DataError, match=r"boolean has no train.json to take 2 worked examples from"):
        local_tasks(questions, num_fewshot=2)
    (mmlu / "dev" / "astronomy_dev.csv").unlink()
    with pytest.raises(DataError, match=r"astronomy_dev.csv is missing.*set num_fewshot to 0"):
        local_tasks(mmlu)
    assert "dev" not in local_tasks(mmlu, num_fewshot=0)["mmlu_astronomy"]["dataset_kwargs"]["files"]


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is no folder"):
        local_tasks(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no tasks: neither sub-folders with a test.json each"):
        local_tasks(tmp_path / "empty")


def test_written_files_include_ours(questions: Path, tmp_path: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    (tmp_path / "written").mkdir()
    tasks = local_tasks(questions)
    write_task_files(tasks, tmp_path / "written")
    read = [load_yaml(file) for file in sorted((tmp_path / "written").iterdir())]
    assert [content["task"] for content in read] == list(tasks)
    for content in read:
        assert callable(content["custom_dataset"])
        rows = content["custom_dataset"](**content["metadata"], **content["dataset_kwargs"])["test"]
        assert rows.column_names == ["question", "choices", "answer"]
        assert len(rows) == 12


def test_prompts_are_those_of_the_harness_and_of_our_own_evaluation(mmlu: Path) -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    from moka_pl.evaluation.lm_eval import local_data

    theirs = Path(lm_eval.tasks.__file__).parent
    cloze = load_yaml(local_data._TEMPLATES / "cloze.yaml")
    assert cloze["doc_to_text"] == load_yaml(theirs / "arc" / "arc_easy.yaml")["doc_to_text"]
    assert apply_template(cloze["doc_to_text"], {"question": "Why {{x}}?"}) == cloze_prompt("Why {{x}}?")
    for subject in ("astronomy", "world_religions"):
        own = load_yaml(local_data._TEMPLATES / "mmlu.yaml") | local_tasks(mmlu)[f"mmlu_{subject}"]
        original = load_yaml(theirs / "mmlu" / "default" / f"mmlu_{subject}.yaml")
        names = ("doc_to_text", "doc_to_choice", "doc_to_target", "description", "output_type")
        names += ("fewshot_split", "fewshot_config", "test_split")
        assert {name: own[name] for name in names} == {name: original[name] for name in names}
        assert json.dumps(own["metric_list"]) == json.dumps(original["metric_list"])
