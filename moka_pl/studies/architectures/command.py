"""``scripts/architectures.py``: the table of what works with which family."""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moka_pl.backbone.loading import progress_bars
from moka_pl.errors import ConfigError, MokaError
from moka_pl.studies.architectures.facts import REFUSED, Facts, family_facts
from moka_pl.studies.architectures.families import FAMILIES, Family, write_family
from moka_pl.studies.common import Parser, one_line_errors, replace_section, write_atomically
from moka_pl.utils import silenced

BEGIN, END = "<!-- families -->", "<!-- /families -->"
_PAGE = Path("docs/models.md")
_HEADS = (
    "family",
    "`model_type`",
    "layers by default",
    "`all-linear` adapts",
    "NF4 stores",
    "packing",
    "shared prompts",
    "merged export",
    "LoRA export",
)


def row(family: Family, facts: Facts) -> str:
    """Returns a family's line of the table.

    Args:
        family: The family.
        facts: What works with it.
    """
    layers = ", ".join(f"`{name}`" for name in facts.defaults.split(", "))
    works = [
        REFUSED if fact.startswith(REFUSED) else fact
        for fact in (facts.packing, facts.shared, facts.merged, facts.lora)
    ]
    shares = [f"{share:.0%}" for share in (facts.share, facts.nf4)]
    return f"| {' | '.join([family.name, f'`{family.model_type}`', layers, *shares, *works])} |"


def table(rows: Sequence[str]) -> str:
    """Returns the whole table."""
    return "\n".join([f"| {' | '.join(_HEADS)} |", "|---" * len(_HEADS) + "|", *rows])


def stored_rows(page: Path) -> dict[str, str]:
    """Returns the lines of a page's table by family.

    Raises:
        ConfigError: If the page has no table between its markers.
    """
    _, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page} needs one line {BEGIN} and one line {END} below it")
    lines = inside.strip().splitlines()[2:]
    return {line.split("|")[1].strip(): line for line in lines}


def find_rows() -> list[str]:
    """Finds out all facts of the families, and returns their lines.

    Raises:
        MokaError: Naming the family of which something is computed wrongly.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for number, family in enumerate(FAMILIES):
            try:
                facts = family_facts(write_family(family, Path(folder) / str(number)))
            except MokaError as error:
                raise type(error)(f"{family.name}: {error}") from error
            rows.append(row(family, facts))
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out progress, and what transformers says of missing kernels and of its next version."""
    silent = silenced("transformers", below=logging.ERROR)
    with silent, progress_bars(show=False), warnings.catch_warnings(action="ignore"):
        yield


@one_line_errors("architectures")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, or writes it into the page.

    Args:
        arguments: Arguments, default those of the process.
    """
    parser = Parser("architectures", "Tries what works with a tiny model of every family, in a minute.")
    parser.add_argument("--write", action="store_true", help=f"write the table into {_PAGE}")
    args = parser.parse_args(arguments)
    if args.write:
        stored_rows(_PAGE)  # refuses a page without markers at once
    made = table(find_rows())
    if args.write:
        page = _PAGE.read_text(encoding="utf-8")
        write_atomically(_PAGE, replace_section(page, made, BEGIN, END))
    print(f"{_PAGE} is written" if args.write else made)
