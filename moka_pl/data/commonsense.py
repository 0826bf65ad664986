"""Multiple-choice questions: trained on the right option, evaluated by comparing all options."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.data.base import MokaDataModule
from moka_pl.data.choice_prompts import CHOICE_PROMPTS
from moka_pl.data.choice_rows import check_choice, choice_features
from moka_pl.data.encode import ChoiceEncoder, Encoded, SegmentEncoder, adds_bos, encode_rows
from moka_pl.data.errors import DataError
from moka_pl.data.holdout import HoldOut
from moka_pl.data.reading import read_rows
from moka_pl.data.samples import sample_path
from moka_pl.data.shared_prefix import SharePrefix
from moka_pl.data.spread import spread
from moka_pl.data.trained_prompt import settle_prompt
from moka_pl.prompts import ChoicePromptName

if TYPE_CHECKING:
    from datasets import Dataset


class CommonsenseData(MokaDataModule):
    """Commonsense questions with options, in the common form or the LLM-Adapters form.

    Common form: `task`, `question`, `choices` (list), `answer` (index from 0). LLM-Adapters form:
    `instruction` ("... Answer1: ... Answer2: ... Answer format: answer1/answer2") and `answer`; its task is
    the name of the folder. Training rows are question, right option and end-of-sequence token, trained on the
    last two; evaluation items hold the question and all options, which are compared by their likelihood.

    Args:
        path: A file of either form (.json, .jsonl, .parquet), or a folder whose sub-folders are the tasks,
            each with train.json and test.json, or "sample" for the questions that come with the package.
        validation_path: The same for validation and test (of a folder: its test.json files). None takes, for
            a folder, the test.json files of `path`; for "sample", the held-out sample; for a file, a share of
            it.
        validation_limit: Most validation questions per task, evenly spread over the task's file; None takes
            all. Tests always take all.
        tasks: Names of the tasks to use; None uses all.
        validation_share: Share of the questions to hold out where `path` is a single file and there is no
            validation_path; 0 trains without validation.
        prompt: How questions are asked. "cloze" is "Question: ... Answer:" and the option's text; "letters"
            lists the options as A., B., ... and the answer is a letter; "llm_adapters" is the instruction of
            the LLM-Adapters corpora, answered by "the correct answer is answer3", whose `validate` and `test`
            also generate answers and report how many name the right option (`generated`). None takes the
            prompt that the model's adapter was trained with, else "cloze".
        share_prefix: "auto" computes what an item's options have in common once, where that takes fewer
            slots and the model allows it; "never" scores every option whole. The scores are the same.
        generated_tokens: Most tokens of a generated answer; 0 generates none.
        **options: batch_size, max_length, num_workers, num_proc, seed, bucket, eval_batch_size (see
            MokaDataModule).
    """

    name = "commonsense"

    def __init__(
        self,
        path: str | Path = "sample",
        validation_path: str | Path | None = None,
        validation_limit: int | None = None,
        tasks: list[str] | None = None,
        validation_share: float = 0.05,
        prompt: ChoicePromptName | None = None,
        share_prefix: SharePrefix = "auto",
        generated_tokens: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if prompt is not None and prompt not in CHOICE_PROMPTS:
            raise DataError(f"prompt must be one of {', '.join(CHOICE_PROMPTS)}, got {prompt!r}.")
        if generated_tokens < 0:
            raise DataError(f"generated_tokens must be at least 0, got {generated_tokens}.")
        if validation_limit is not None and validation_limit < 1:
            raise DataError(f"validation_limit must be at least 1, got {validation_limit}.")
        self.path = path
        self.validation_path = validation_path
        self.validation_limit = validation_limit
        self.validation_share = validation_share
        self._hold_out = HoldOut(validation_share)
        self._wanted = tasks
        self._tasks: list[str] | None = None
        self._prompt = prompt
        self._warned: set[str] = set()
        self.share_prefix = share_prefix
        self.generated_tokens = generated_tokens

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """Name of the prompt: the chosen one, else that of the model's adapter, else `"cloze"`."""
        return settle_prompt(self._prompt, self.trained_prompt, CHOICE_PROMPTS, "cloze", warned=self._warned)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks: those asked for, else all of the evaluation data in order of appearance."""
        if self._wanted is not None:
            return list(self._wanted)
        if self._tasks is None:
            rows = self._rows("test")
            self._tasks = [] if rows is None else list(rows.unique("task"))
        return list(self._tasks)

    def encode(self, split: str) -> Encoded | None:
        """Encode `"train"` (plain rows), `"validation"` or `"test"` (items); see the base class."""
        rows = self._rows(split)
        if rows is None:
            return None
        bos = adds_bos(self.tokenizer)
        label, key = f"{self.name} {split}", self.prompt
        form = CHOICE_PROMPTS[key]
        encoder: SegmentEncoder | ChoiceEncoder
        if split == "train":
            encoder = SegmentEncoder(self.tokenizer, form.segments, self.max_length, bos)
        else:
            tasks = tuple(self.tasks)
            generating = form.names is not None and self.generated_tokens > 0
            key = f"{key} {tasks} {generating}"
            encoder = ChoiceEncoder(self.tokenizer, form.before, form.options, self.max_length, bos, tasks)
            if generating:
                encoder = replace(encoder, names=form.names)
        return encode_rows(rows, encoder, key=key, label=label, num_proc=self.num_proc, digest=self.digest)

    def _rows(self, split: str) -> "Dataset | None":
        """The checked rows of a split, of the wanted tasks only."""
        rows = self._select(self._all_rows(split), split)
        if rows is None or split != "validation" or self.validation_limit is None:
            return rows
        return spread(rows, self.validation_limit)

    def _all_rows(self, split: str) -> "Dataset | None":
        train = split == "train"
        if train and self._own_validation:
            return self._read(self.path, "train")
        if self.validation_path is not None:
            return self._read(self.validation_path, "test")
        if self._own_validation:
            return self._read(self.path, "test")
        rows = self._read(self.path, "train")
        if self.validation_share == 0:
            return rows if train else None
        return self._hold_out(rows)[0 if train else 1]

    @property
    def _own_validation(self) -> bool:
        """Whether the validation data are not a share of the training data."""
        return (
            self.validation_path is not None or self.path == "sample" or Path(self.path).expanduser().is_dir()
        )

    def _read(self, source: str | Path, part: str) -> "Dataset":
        """Read a file, a folder of tasks (`part` names the file in each), or the sample."""
        from datasets import concatenate_datasets

        if source == "sample":
            source = sample_path("commonsense_train" if part == "train" else "commonsense_heldout")
        path = Path(source).expanduser()
        features = choice_features()
        if not path.is_dir():
            return read_rows(source, check_choice, features, context=path.absolute().parent.name)
        files = [
            file
            for file in _task_files(path, part)
            if self._wanted is None or file.parent.name in self._wanted
        ]
        if not files:
            self._refuse_unknown({folder.name for folder in path.iterdir() if folder.is_dir()}, path)
        return concatenate_datasets(
            [read_rows(file, check_choice, features, context=file.parent.name) for file in files]
        )

    def _select(self, rows: "Dataset | None", split: str) -> "Dataset | None":
        if rows is None or self._wanted is None:
            return rows
        found = rows["task"][:]
        source = self.path if split == "train" else self.validation_path or self.path
        self._refuse_unknown(set(found), f"{source} ({split})")
        return rows.select([index for index, task in enumerate(found) if task in self._wanted])

    def _refuse_unknown(self, known: set[str], source: object) -> None:
        unknown = [task for task in self._wanted or [] if task not in known]
        if unknown or not known:
            raise DataError(
                f"{source} has no task {', '.join(map(repr, unknown)) or 'at all'}; it has: "
                f"{', '.join(sorted(known)) or 'no sub-folders'}. Correct `tasks`."
            )


def _task_files(folder: Path, part: str) -> list[Path]:
    """`part`.json of every sub-folder, sorted by name.

    Raises:
        DataError: There are no sub-folders, or one of them has no such file.
    """
    tasks = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not tasks:
        raise DataError(
            f"{folder} has no sub-folders. Give a folder with one sub-folder per task ({part}.json in each), "
            "or a file."
        )
    missing = [task.name for task in tasks if not (task / f"{part}.json").is_file()]
    if missing:
        raise DataError(
            f"{folder}: no {part}.json in {', '.join(missing)}. Add it, or give a validation_path or a "
            "single file."
        )
    return [task / f"{part}.json" for task in tasks]
