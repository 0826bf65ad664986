import json
from pathlib import Path

import pytest

from moka_pl.data import CommonsenseData, MmluData
from moka_pl.data.encoding.choices import ChoiceEncoder
from moka_pl.errors import DataError
from moka_pl.evaluation.lm_eval import local_data
from moka_pl.evaluation.lm_eval.local_data import local_tasks, write_task_files
from moka_pl.evaluation.lm_eval.tasks import select_tasks
from moka_pl.prompts.choice import CHOICE_PROMPTS


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
    with pytest.raises(DataError, match=r"boolean has no train.json for the 2 few-shot examples"):
        local_tasks(questions, num_fewshot=2)
    (mmlu / "dev" / "astronomy_dev.csv").unlink()
    with pytest.raises(DataError, match=r"astronomy_dev.csv is missing.*set --num_fewshot 0"):
        local_tasks(mmlu)
    assert "dev" not in local_tasks(mmlu, num_fewshot=0)["mmlu_astronomy"]["dataset_kwargs"]["files"]


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        local_tasks(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no tasks: it needs sub-folders with a test.json each"):
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


ROW = {"question": "Why {{x}}?", "choices": ["So.", "Not so.", "{3}", "Who knows?"], "answer": 1}


def test_prompts_are_those_of_the_harness(questions: Path, mmlu: Path) -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    theirs = Path(lm_eval.tasks.__file__).parent
    cloze = load_yaml(local_data.TASK_FILES / "cloze.yaml") | local_tasks(questions)["physical"]
    assert cloze["doc_to_text"] == load_yaml(theirs / "arc" / "arc_easy.yaml")["doc_to_text"]
    assert apply_template(cloze["doc_to_text"], ROW) == CHOICE_PROMPTS["cloze"].before(ROW)
    assert cloze["doc_to_choice"](ROW) == ROW["choices"]
    for subject in ("astronomy", "world_religions"):
        task = load_yaml(local_data.TASK_FILES / "mmlu.yaml") | local_tasks(mmlu)[f"mmlu_{subject}"]
        original = load_yaml(theirs / "mmlu" / "default" / f"mmlu_{subject}.yaml")
        names = (
            "doc_to_text",
            "doc_to_choice",
            "doc_to_target",
            "description",
            "output_type",
            "fewshot_split",
            "fewshot_config",
            "test_split",
        )
        assert {name: task[name] for name in names} == {name: original[name] for name in names}
        assert json.dumps(task["metric_list"]) == json.dumps(original["metric_list"])


def requests(name: str, data: Path, **options: int) -> list[list[tuple[str, str]]]:
    """Every question's prompts and options as lm_eval gives them to the model."""
    (task,) = select_tasks([name], data, **options).tasks
    task.set_config(key="num_fewshot", value=options["num_fewshot"])
    task.build_all_requests(limit=None, rank=0, world_size=1)
    arguments = [request.args for request in task.instances]
    count = len(task.eval_docs[0]["choices"])
    return [arguments[start : start + count] for start in range(0, len(arguments), count)]


def test_both_evaluations_show_the_same_texts(
    questions: Path, mmlu: Path, beginning_tokenizer: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    encode = ChoiceEncoder.__call__

    def remember(encoder: ChoiceEncoder, row: dict) -> dict:
        asked.append([(encoder.prompt(row), option) for option in encoder.options(row)])
        return encode(encoder, row)

    monkeypatch.setattr(ChoiceEncoder, "__call__", remember)
    for data, name, shots in (
        (CommonsenseData(questions, prompt="cloze", tasks=["physical"]), "physical", 0),
        (MmluData(mmlu, ["astronomy"], shots=2), "mmlu_astronomy", 2),
        (MmluData(mmlu, ["world_religions"], shots=0), "mmlu_world_religions", 0),
    ):
        asked.clear()
        data.connect(beginning_tokenizer)
        data.encode("test")
        assert len(asked) > 3
        assert requests(name, Path(data.path), num_fewshot=shots) == asked
