"""MMLU: multiple-choice questions of 57 subjects, asked few-shot."""

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moka_pl.data.base import MokaDataModule, check_at_least
from moka_pl.data.batching.collate import SharePrefix
from moka_pl.data.encoding.choices import ChoiceEncoder
from moka_pl.data.encoding.examples import Encoded
from moka_pl.data.formats.choice import choice_features
from moka_pl.data.formats.mmlu import mmlu_groups, parse_mmlu
from moka_pl.data.reading import is_local, read_rows
from moka_pl.data.sources import Shard, refuse_unknown
from moka_pl.data.splits import subsample
from moka_pl.errors import DataError
from moka_pl.prompts.choice import MMLU_PROMPTS, FewShot
from moka_pl.prompts.ends import adds_bos
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from datasets import Dataset

Scoring = Literal["letters", "text"]


class MmluData(MokaDataModule):
    """MMLU, for evaluation only: alone, or as a part of a mixture with training data.

    A prompt is "The following are multiple choice questions (with answers) about SUBJECT.", the first
    ``shots`` questions of the subject's dev split with their answers, and the question. Metrics cover each
    subject (task ``mmlu_SUBJECT``), the four categories (``mmlu_stem``, ...) and ``mmlu``; groups are scored
    over all their items and, as ``..._macro``, as the mean over their subjects.

    Args:
        path: A folder with ``dev/SUBJECT_dev.csv`` and ``test/SUBJECT_test.csv`` (header
            question,choice0,choice1,choice2,choice3,answer; the answer counted from 0), or a hub dataset id
            whose configuration "all" has the splits dev and test.
        subjects: Names of the subjects, such as high_school_physics; None uses all.
        shots: Solved questions before each question. If a prompt exceeds max_length, its first shots are
            dropped and counted in the report.
        scoring: "letters" lists the options and compares the likelihoods of their letters; "text" does not
            list them and compares the likelihoods of their texts.
        validation_limit: Maximum number of validation questions per subject, evenly spread over the subject's
            test questions; None uses all. Tests always use all.
        share_prefix: "auto" computes the common prompt of an item's options once if that takes fewer tokens
            and the model allows it; "never" scores every option whole. The scores are the same.
        max_length: Maximum number of tokens in a prompt with its longest option.
        **options: batch_size, num_workers, num_proc, seed, bucket, eval_batch_size (see MokaDataModule).

    Raises:
        DataError: An option is unknown or out of range, or subjects are empty or repeated.
    """

    name = "mmlu"

    def __init__(
        self,
        path: str | Path = "cais/mmlu",
        subjects: list[str] | None = None,
        shots: int = 5,
        scoring: Scoring = "letters",
        validation_limit: int | None = None,
        share_prefix: SharePrefix = "auto",
        max_length: int = 2048,
        **options: Any,
    ) -> None:
        super().__init__(max_length=max_length, **options)
        check_at_least(0, shots=shots)
        check_at_least(1, validation_limit=validation_limit)
        if scoring not in ("letters", "text"):
            raise DataError(f"scoring must be 'letters' or 'text', got {scoring!r}")
        if subjects is not None and (not subjects or len(set(subjects)) < len(subjects)):
            raise DataError(f"subjects must be a list of different names, got {subjects}")
        self.path = path
        self.shots = shots
        self.scoring = scoring
        self.validation_limit = validation_limit
        self.share_prefix = share_prefix
        self._subjects = subjects
        self._read_splits: dict[str, Dataset] = {}

    @property
    def tasks(self) -> list[str]:
        """``mmlu_SUBJECT`` for each chosen subject; all subjects by default."""
        subjects = self._subjects
        if subjects is not None:
            return [f"mmlu_{subject}" for subject in subjects]
        return list(self._rows("test").unique("task"))

    @property
    def task_groups(self) -> dict[str, list[str]]:
        """The four categories, and all subjects together."""
        return mmlu_groups(self.tasks) | {"mmlu": self.tasks}

    def encode(self, split: str) -> Encoded | None:
        """Encodes ``"validation"`` or ``"test"``; there is nothing to train on."""
        if split == "train":
            return None
        rows = self._rows("test")
        if split == "validation" and self.validation_limit is not None:
            rows = subsample(rows, self.validation_limit)
        few_shot = FewShot(self.scoring, self._solved() if self.shots else {})
        tasks = tuple(self.tasks)
        encoder = ChoiceEncoder(
            self.tokenizer,
            few_shot.prompt,
            MMLU_PROMPTS[self.scoring].options,
            self.max_length,
            adds_bos(self.tokenizer),
            tasks,
            shorter=few_shot.shorter if self.shots else None,
        )
        digest = sha256(repr(sorted(few_shot.solved.items())).encode()).hexdigest()
        key = f"mmlu {self.scoring} {tasks} {digest}"
        return self._encode(split, rows, encoder, key)

    def _solved(self) -> dict[str, list[str]]:
        """The first questions of every task's dev split with their answers."""
        solved: dict[str, list[str]] = {task: [] for task in self.tasks}
        for row in self._rows("dev"):
            questions = solved.get(row["task"])
            if questions is not None and len(questions) < self.shots:
                questions.append(MMLU_PROMPTS[self.scoring].solved(row))
        for task, questions in solved.items():
            if len(questions) < self.shots:
                raise DataError(
                    f"{self.path}: the dev split has {len(questions)} questions of "
                    f"{task.removeprefix('mmlu_')}, fewer than shots ({self.shots}). Lower `shots`"
                )
        return solved

    def _rows(self, split: str) -> "Dataset":
        """The checked questions of ``"dev"`` or ``"test"``, of the wanted subjects only."""
        if split not in self._read_splits:
            local = is_local(self.path)
            self._read_splits[split] = self._read_folder(split) if local else self._read_hub(split)
        return self._read_splits[split]

    def _read_folder(self, split: str) -> "Dataset":
        from datasets import concatenate_datasets

        folder = expanded(self.path)
        ending = f"_{split}.csv"
        known = sorted(file.name.removesuffix(ending) for file in (folder / split).glob(f"*{ending}"))
        if not known:
            raise DataError(
                f"{folder} has no files {split}/SUBJECT{ending}. Give a folder with dev/SUBJECT_dev.csv and "
                "test/SUBJECT_test.csv, or a hub dataset id"
            )
        wanted = known
        if self._subjects is not None or split == "dev":
            wanted = [task.removeprefix("mmlu_") for task in self.tasks]
        refuse_unknown(wanted, known, folder / split, "subject")
        files = [(folder / split / f"{subject}{ending}", subject) for subject in wanted]
        features = choice_features()
        return concatenate_datasets(
            [read_rows(Shard(file, context=subject), parse_mmlu, features) for file, subject in files]
        )

    def _read_hub(self, split: str) -> "Dataset":
        rows = read_rows(Shard(self.path, split, {"name": "all"}), parse_mmlu, choice_features())
        if self._subjects is None:
            return rows
        tasks = rows["task"][:]
        known = {task.removeprefix("mmlu_") for task in tasks}
        refuse_unknown(self._subjects, known, f"{self.path} ({split})", "subject")
        wanted = set(self.tasks)
        return rows.select([index for index, task in enumerate(tasks) if task in wanted])
