"""Multiple-choice questions, trained on the right option and evaluated by comparing all options."""

from typing import TYPE_CHECKING, Any

from moka_pl.data.base import SplitDataModule, check_at_least
from moka_pl.data.batching.collate import SharePrefix
from moka_pl.data.catalog import task_name
from moka_pl.data.encoding.choices import ChoiceEncoder
from moka_pl.data.encoding.examples import Encoded, Encoder, SegmentEncoder
from moka_pl.data.formats.choice import CHOICE_FIELDS, choice_features, parse_choice, with_filled_blank
from moka_pl.data.formats.llm_adapters import name_tasks
from moka_pl.data.reading import parse_columns, read_rows
from moka_pl.data.sources import Shard, Sources, as_list, find_choice_shards, hub_tasks, refuse_unknown
from moka_pl.data.splits import subsample
from moka_pl.errors import DataError
from moka_pl.prompts.choice import CHOICE_PROMPTS, ChoicePromptName
from moka_pl.prompts.ends import adds_bos

if TYPE_CHECKING:
    from datasets import Dataset


class CommonsenseData(SplitDataModule):
    """Multiple-choice questions. The columns of a record determine its format.

    - Common format: ``task``, ``question``, ``choices`` (list), ``answer`` (index from 0, or a capital
      letter).
    - LLM-Adapters format: ``instruction`` ("... Answer1: ... Answer2: ... Answer format: answer1/answer2")
      and ``answer``. The folder's name is the task; in a file that mixes the eight tasks (commonsense_170k),
      the prompt identifies it.
    - Hub originals: the columns of BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC and OpenBookQA. They give
      the same items as the LLM-Adapters format (see ``moka_pl.data.catalog``).

    A training row is the question, the right option and an end-of-sequence token; the loss covers the last
    two. An evaluation item holds the question and all options, which are compared by likelihood.

    Args:
        path: A .json, .jsonl, .csv or .parquet file; a folder of one task; a folder with a sub-folder per
            task, each with train and test files (train.json, test.json); a task on the hub (boolq, piqa,
            siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa), "hub" for all eight, or
            commonsense_170k; a hub dataset id; a list of these; or "sample" for the package's own questions.
        validation_path: The same for validation and test. None uses a folder's test files; a hub task's
            validation split and, if its labels are public, its test split; the held-out "sample"; or a share
            of a file or of commonsense_170k.
        validation_limit: Maximum number of validation questions per task, evenly spread; None uses all. Tests
            always use all.
        tasks: Names of the tasks to use; None uses all.
        columns: Mapping of the common format's fields to your columns; ``choices`` may name several columns
            (``{question: q, choices: [a, b, c, d], answer: key}``). Other columns are ignored.
        fill_blank: Put WinoGrande's options into the blank: the question is then the text before the blank,
            and each option continues to the end of the sentence. False keeps the sentence with its blank.
        prompt: "cloze" is "Question: ... Answer:" followed by the option's text; "letters" lists the options
            as A., B., ... and the answer is a letter; "llm_adapters" is the instruction of the LLM-Adapters
            corpora, answered by "the correct answer is answer3". With "llm_adapters", ``validate`` and
            ``test`` also generate answers and report how many name the right option (``generated``). None
            uses the prompt that the model's adapter was trained with, else "cloze".
        share_prefix: "auto" computes the common prompt of an item's options once if that takes fewer tokens
            and the model allows it; "never" scores every option whole. The scores are the same.
        generated_tokens: Maximum number of tokens in a generated answer; 0 generates none.
        **options: validation_share and separate_test (see SplitDataModule); batch_size, max_length,
            num_workers, num_proc, seed, bucket, eval_batch_size, packing, max_tokens (see MokaDataModule).

    Raises:
        DataError: An option is unknown or out of range.
    """

    name = "commonsense"

    def __init__(
        self,
        path: Sources = "sample",
        validation_path: Sources | None = None,
        validation_limit: int | None = None,
        tasks: list[str] | None = None,
        columns: dict[str, str | list[str]] | None = None,
        fill_blank: bool = False,
        prompt: ChoicePromptName | None = None,
        share_prefix: SharePrefix = "auto",
        generated_tokens: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least(0, generated_tokens=generated_tokens)
        check_at_least(1, validation_limit=validation_limit)
        if prompt is not None and prompt not in CHOICE_PROMPTS:
            raise DataError(f"prompt must be one of {', '.join(CHOICE_PROMPTS)}, got {prompt!r}")
        self.path = path
        self.validation_path = validation_path
        self.validation_limit = validation_limit
        self.columns = parse_columns(columns, CHOICE_FIELDS)
        self.fill_blank = fill_blank
        self.share_prefix = share_prefix
        self.generated_tokens = generated_tokens
        self._wanted = None if tasks is None else [task_name(task) for task in tasks]
        self._tasks: list[str] | None = None
        self._prompt = prompt

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """Name of the prompt: the chosen one, else that of the model's adapter, else ``"cloze"``."""
        return self._resolve_prompt(self._prompt, CHOICE_PROMPTS, "cloze")

    @property
    def tasks(self) -> list[str]:
        """Names of the chosen tasks; by default all tasks of the evaluation data, in order of appearance."""
        if self._wanted is not None:
            return list(self._wanted)
        if self._tasks is None:
            source = self.path if self.validation_path is None else self.validation_path
            named = [hub_tasks(one) for one in as_list(source)]
            if all(named):  # known without a download
                self._tasks = list(dict.fromkeys(task.name for tasks in named for task in tasks))
            else:
                rows = self._split_rows("test")
                self._tasks = [] if rows is None else list(rows.unique("task"))
        return list(self._tasks)

    def encode(self, split: str) -> Encoded | None:
        """Encodes ``"train"`` (plain rows), ``"validation"`` or ``"test"`` (items); see the base class."""
        rows = self._split_rows(split)
        if rows is not None and split == "validation" and self.validation_limit is not None:
            rows = subsample(rows, self.validation_limit)
        prompt, bos = CHOICE_PROMPTS[self.prompt], adds_bos(self.tokenizer)
        encoder: Encoder
        if split == "train":
            encoder = SegmentEncoder(self.tokenizer, prompt.segments, self.max_length, bos)
            return self._encode(split, rows, encoder, self.prompt)
        tasks = tuple(self.tasks)
        names = prompt.names if self.generated_tokens > 0 else None
        encoder = ChoiceEncoder(
            self.tokenizer, prompt.before, prompt.options, self.max_length, bos, tasks, names
        )
        return self._encode(split, rows, encoder, f"{self.prompt} {tasks} {names is not None}")

    def _split_rows(self, split: str) -> "Dataset | None":
        """The checked rows of a split, of the wanted tasks only."""
        rows = super()._split_rows(split)
        if rows is None or self._wanted is None:
            return rows
        known = rows["task"][:]
        source = self.path if split == "train" else self.validation_path or self.path
        refuse_unknown(self._wanted, set(known), f"{source} ({split})")
        return rows.select([index for index, task in enumerate(known) if task in self._wanted])

    def _shards(self, split: str) -> list[Shard]:
        """The shards of a split; none unless every source has the split."""
        if split == "train" or self.validation_path is None:
            return find_choice_shards(self.path, split, self._wanted)
        return find_choice_shards(self.validation_path, split, self._wanted) or find_choice_shards(
            self.validation_path, "train", self._wanted
        )

    def _read(self, shard: Shard) -> "Dataset":
        rows = read_rows(
            shard,
            parse_choice,
            choice_features(),
            columns=self.columns,
            gather=name_tasks if shard.mixed else None,
        )
        return rows.map(with_filled_blank, desc="Filling blanks") if self.fill_blank else rows
