"""Tasks of reasoning-gym, whose answers a rule checks; ``scripts/reasoning_tasks.py`` writes them.

The rule is here, too, so that where the tasks are trained and scored that package is not needed.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from moka_pl.errors import ConfigError
from moka_pl.studies.common import Parser, one_line_errors, positive_int, write_atomically
from moka_pl.studies.outputs import check_file, json_lines_output
from moka_pl.utils import make_folder

DESCRIPTION = """\
Writes tasks of reasoning-gym as FOLDER/<task>/train.jsonl and test.jsonl, instructions in the Alpaca form.

    python scripts/reasoning_tasks.py --out FOLDER/reasoning
    python scripts/compare.py --suite servable-reasoning --data FOLDER

This needs the package reasoning-gym (extra `reasoning`), training on the files does not. No question is in
both files, or twice in one.
"""

#: The tasks, and the options of their generators: hard for SmolLM2-135M, and within its reach.
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 2},
    "family_relationships": {},
    "spell_backward": {"min_word_len": 3, "max_word_len": 6},
}
#: Some generators repeat themselves: at most so many questions are drawn for each that is kept.
_DRAWS = 20


def is_right(answer: str, right: str) -> bool:
    """Whether an answer is the right one: the same text, or the same number.

    White space around it and case do not count, nor do a number's sign +, leading zeros and commas. That is
    where ``score_answer`` of the tasks of ``TASKS`` in reasoning-gym 0.1 gives 1.

    Args:
        answer: What the model wrote.
        right: The right answer.
    """
    told, known = (text.strip().lower() for text in (answer, right))
    number = _number(known)
    return told == known or (number is not None and _number(told) == number)


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def rows_of(task: str, options: Mapping[str, Any], count: int, seed: int) -> list[dict[str, str]]:
    """Different questions of a task, with their answers.

    Args:
        task: Name of the task in reasoning-gym.
        options: Options of its generator.
        count: Number of questions.
        seed: Seed of the generator.

    Returns:
        Rows with ``instruction`` and ``output``.

    Raises:
        ConfigError: If the package is missing, or the task has fewer questions.
    """
    rows: dict[str, str] = {}
    for question, answer in _drawn(task, options, _DRAWS * count, seed):
        rows.setdefault(question, answer)
        if len(rows) == count:
            return [{"instruction": question, "output": answer} for question, answer in rows.items()]
    raise ConfigError(f"{task} has {len(rows)} different questions, not {count}; ask for fewer")


def _drawn(task: str, options: Mapping[str, Any], size: int, seed: int) -> Iterator[tuple[str, str]]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(
            "the package reasoning-gym, which makes the tasks, is missing: pip install 'moka_pl[reasoning]'"
        ) from error
    for item in reasoning_gym.create_dataset(task, size=size, seed=seed, **options):
        yield str(item["question"]).strip(), str(item["answer"]).strip()


def write_task(folder: Path, task: str, sizes: tuple[int, int], seed: int) -> list[Path]:
    """Writes a task's training and test questions, which have none in common.

    Args:
        folder: The files are ``<task>/train.jsonl`` and ``<task>/test.jsonl`` below.
        task: One of ``TASKS``.
        sizes: Numbers of training and of test questions.
        seed: Seed of the generator.

    Returns:
        The files.

    Raises:
        ConfigError: If the package is missing, or the task has fewer questions.
    """
    rows = rows_of(task, TASKS[task], sum(sizes), seed)
    files = _files_of(folder, task)
    for file, part in zip(files, (rows[sizes[1] :], rows[: sizes[1]]), strict=True):
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    return files


def _files_of(folder: Path, task: str) -> list[Path]:
    return [folder / task / f"{split}.jsonl" for split in ("train", "test")]


def _is_row(content: Any) -> bool:
    """Whether a JSON value is a row that :func:`write_task` writes."""
    return isinstance(content, dict) and content.keys() == {"instruction", "output"}


@one_line_errors("reasoning_tasks")
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the tasks.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("reasoning_tasks", DESCRIPTION)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS), metavar="TASK", help=" ".join(TASKS)
    )
    parser.add_argument(
        "--train", type=positive_int, default=8000, help="training questions of a task (default: 8000)"
    )
    parser.add_argument(
        "--test", type=positive_int, default=500, help="test questions of a task (default: 500)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the generators (default: 0)")
    args = parser.parse_args(arguments)
    make_folder(args.out, "--out")
    for file in (file for task in args.tasks for file in _files_of(args.out, task)):
        check_file("--out", file, json_lines_output(_is_row))
    for task in args.tasks:
        files = write_task(args.out, task, (args.train, args.test), args.seed)
        print("written: " + " ".join(str(file) for file in files))
