"""Multiple-choice questions: trained on the right option, evaluated by comparing all options."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moka_pl._compat import rows_fingerprint
from moka_pl.data.base import MokaDataModule
from moka_pl.data.batching.collate import SharePrefix
from moka_pl.data.catalog import task_name
from moka_pl.data.encoding.examples import ChoiceEncoder, Encoded, SegmentEncoder, adds_bos, encode_rows
from moka_pl.data.formats.choice import CHOICE_FIELDS, choice_features, parse_choice, with_filled_blank
from moka_pl.data.formats.llm_adapters import name_tasks
from moka_pl.data.reading import parse_columns, read_rows
from moka_pl.data.sources import ChoiceShard, Sources, as_list, find_choice_shards, hub_tasks, refuse_unknown
from moka_pl.data.splits import HoldOut, ThreeParts, spread
from moka_pl.errors import DataError
from moka_pl.prompts.choice import CHOICE_PROMPTS, resolve_prompt
from moka_pl.prompts.templates import ChoicePromptName

if TYPE_CHECKING:
    from datasets import Dataset


class CommonsenseData(MokaDataModule):
    """Commonsense questions with options; which form a record has is told by its columns.

    Common form: `task`, `question`, `choices` (list), `answer` (index from 0, or a capital letter).
    LLM-Adapters form: `instruction` ("... Answer1: ... Answer2: ... Answer format: answer1/answer2") and
    `answer`; its task is the name of the folder, and in a file that mixes the eight tasks (commonsense_170k)
    it is told from the prompt. Hub originals: the columns of BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC
    and OpenBookQA; they give the same items as the LLM-Adapters form (`moka_pl.data.catalog` says how).
    Training rows are question, right option and end-of-sequence token, trained on the last two; evaluation
    items hold the question and all options, which are compared by their likelihood.

    Args:
        path: A file of any form (.json, .jsonl, .csv, .parquet); a folder of one task, or one whose
            sub-folders are the tasks, each with train and test files (train.json, test.json); the name of
            a task (boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa), "hub" for
            all eight of them, or commonsense_170k, to be had from the hub; a hub data set id; several of
            these; or "sample" for the questions that come with the package.
        validation_path: The same for validation and test. None takes, for a folder, its test files; for a
            task on the hub, its validation split and, if its labels are public, its test split; for "sample",
            the held-out sample; for a file and for commonsense_170k, a share of it.
        validation_limit: Most validation questions per task, evenly spread over the task's file; None takes
            all. Tests always take all.
        tasks: Names of the tasks to use; None uses all.
        validation_share: Share of the questions to hold out where `path` has no evaluation data and there is
            no validation_path; 0 trains without validation.
        columns: Own names of the columns of the common form, as field: column; `choices` may name several
            columns (`{question: q, choices: [a, b, c, d], answer: key}`). Then only these columns are read.
        fill_blank: Put WinoGrande's options into the blank of the sentence: the question is then what stands
            before it, and the options go on to its end. False keeps the sentence with its blank.
        prompt: How questions are asked. "cloze" is "Question: ... Answer:" and the option's text; "letters"
            lists the options as A., B., ... and the answer is a letter; "llm_adapters" is the instruction of
            the LLM-Adapters corpora, answered by "the correct answer is answer3", whose `validate` and `test`
            also generate answers and report how many name the right option (`generated`). None takes the
            prompt that the model's adapter was trained with, else "cloze".
        share_prefix: "auto" computes what an item's options have in common once, where that takes fewer
            slots and the model allows it; "never" scores every option whole. The scores are the same.
        generated_tokens: Most tokens of a generated answer; 0 generates none.
        separate_test: Validate on `validation_share` of the training data in any case; evaluation data then
            serve tests only, and where there are none, as large a share again is held out for them.
        **options: batch_size, max_length, num_workers, num_proc, seed, bucket, eval_batch_size, packing,
            max_tokens (see MokaDataModule).
    """

    name = "commonsense"

    def __init__(
        self,
        path: Sources = "sample",
        validation_path: Sources | None = None,
        validation_limit: int | None = None,
        tasks: list[str] | None = None,
        validation_share: float = 0.05,
        columns: dict[str, str | list[str]] | None = None,
        fill_blank: bool = False,
        prompt: ChoicePromptName | None = None,
        share_prefix: SharePrefix = "auto",
        generated_tokens: int = 16,
        separate_test: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if separate_test and not validation_share > 0:
            raise DataError("separate_test validates on a share: set validation_share above 0.")
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
        self.columns = parse_columns(columns, CHOICE_FIELDS)
        self.fill_blank = fill_blank
        self._hold_out = HoldOut(validation_share)
        self.separate_test = separate_test
        self._three_parts = ThreeParts(validation_share) if separate_test else None
        self._wanted = None if tasks is None else [task_name(task) for task in tasks]
        self._tasks: list[str] | None = None
        self._prompt = prompt
        self._warned: set[str] = set()
        self.share_prefix = share_prefix
        self.generated_tokens = generated_tokens

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """Name of the prompt: the chosen one, else that of the model's adapter, else `"cloze"`."""
        return resolve_prompt(self._prompt, self.trained_prompt, CHOICE_PROMPTS, "cloze", warned=self._warned)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks: those asked for, else all of the evaluation data in order of appearance."""
        if self._wanted is not None:
            return list(self._wanted)
        if self._tasks is None:
            source = self.path if self.validation_path is None else self.validation_path
            on_hub = [hub_tasks(one) for one in as_list(source)]
            if all(on_hub):  # known without a download
                self._tasks = list(dict.fromkeys(task.name for tasks in on_hub for task in tasks))
            else:
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
        train = self._shards(self.path, "train")
        if self._three_parts is not None:
            source = self.path if self.validation_path is None else self.validation_path
            tests = self._shards(source, "test")
            if not tests and self.validation_path is not None:
                tests = self._shards(source, "train")
            return self._three_parts(split, self._read(train), self._read(tests) if tests else None)
        if self.validation_path is not None:
            if split == "train":
                return self._read(train)
            shards = self._shards(self.validation_path, split)
            return self._read(shards or self._shards(self.validation_path, "train"))
        own = self._shards(self.path, "test" if split == "train" else split)
        if own:
            return self._read(train if split == "train" else own)
        if self.validation_share == 0:
            return self._read(train) if split == "train" else None
        return self._hold_out(self._read(train))[0 if split == "train" else 1]

    def compared_rows(self) -> tuple["Dataset | None", list["Dataset"]]:
        """Training rows and the evaluation sets that are not a share of them; see the base class."""
        if self.validation_path is None and not self._shards(self.path, "test"):
            return None, []
        splits = ("train", "validation", "test")
        train, *held = [self._select(self._all_rows(split), split) for split in splits]
        different = {rows_fingerprint(rows): rows for rows in held if rows is not None}
        return train, list(different.values())

    def _shards(self, sources: Sources, split: str) -> list[ChoiceShard]:
        return find_choice_shards(sources, split, self._wanted)

    def _read(self, shards: list[ChoiceShard]) -> "Dataset":
        from datasets import concatenate_datasets

        features = choice_features()
        rows = concatenate_datasets(
            [
                read_rows(
                    shard.source,
                    parse_choice,
                    features,
                    context=shard.context,
                    split=shard.split,
                    options=shard.options,
                    columns=self.columns,
                    gather=name_tasks if shard.mixed else None,
                )
                for shard in shards
            ]
        )
        return rows.map(with_filled_blank, desc="Filling blanks") if self.fill_blank else rows

    def _select(self, rows: "Dataset | None", split: str) -> "Dataset | None":
        if rows is None or self._wanted is None:
            return rows
        found = rows["task"][:]
        source = self.path if split == "train" else self.validation_path or self.path
        refuse_unknown(self._wanted, set(found), f"{source} ({split})")
        return rows.select([index for index, task in enumerate(found) if task in self._wanted])
