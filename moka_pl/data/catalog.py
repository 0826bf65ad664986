"""Instruction corpora by name: where each lies on the hub, its splits, and the prompt that fits it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moka_pl.prompts.segments import PromptName

PARQUET = "refs/convert/parquet"
"""The hub's own Parquet copy of data sets whose main branch holds a script, which `datasets` runs no more."""


@dataclass(frozen=True)
class Corpus:
    """A corpus on the hub.

    Attributes:
        hub: Its id.
        prompt: The prompt that fits its records where the user names none.
        splits: Names of its train, validation and test splits; a part that is not in it does not exist.
        options: What `datasets.load_dataset` needs beside id and split (`name`, `revision`, `data_files`).
    """

    hub: str
    prompt: "PromptName" = "alpaca"
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train"})
    options: dict[str, Any] = field(default_factory=dict)


CORPORA = {
    "alpaca": Corpus("tatsu-lab/alpaca"),
    "alpaca_cleaned": Corpus("yahma/alpaca-cleaned"),
    "dolly": Corpus("databricks/databricks-dolly-15k"),
    "flan": Corpus("Muennighoff/flan", splits={"train": "train", "validation": "validation", "test": "test"}),
    "guanaco": Corpus(
        "timdettmers/openassistant-guanaco", "chat", {"train": "train", "validation": "test", "test": "test"}
    ),
    "oasst1": Corpus(
        "OpenAssistant/oasst1",
        "chat",
        {"train": "train", "validation": "validation", "test": "validation"},
    ),
    "sharegpt": Corpus(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        "chat",
        options={"data_files": "ShareGPT_V3_unfiltered_cleaned_split.json"},
    ),
    "ultrachat": Corpus(
        "HuggingFaceH4/ultrachat_200k",
        "chat",
        {"train": "train_sft", "validation": "test_sft", "test": "test_sft"},
    ),
}
"""Corpora by short name. Their columns are those of the forms that records are told apart by."""

_BY_HUB = {corpus.hub: corpus for corpus in CORPORA.values()}


def find_corpus(source: str | Path) -> Corpus | None:
    """The corpus of a short name (`alpaca`) or hub id (`tatsu-lab/alpaca`); None for anything else.

    A local file or folder of that name comes first: write `./alpaca` or nothing at all, both work.
    """
    if isinstance(source, Path) or Path(source).expanduser().exists():
        return None
    return CORPORA.get(source.lower().replace("-", "_")) or _BY_HUB.get(source)
