"""Writes the tables of ``docs/benchmarks.md`` from results of the benchmark."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark.bench import Record, Results, load_results
from moka_pl.studies.benchmark.cases import CAPTURED, peer
from moka_pl.studies.benchmark.tables import (
    GROWTH,
    LAUNCHES,
    OF_PEAK,
    OF_TIME,
    RATE,
    Column,
    beside_unsloth,
    context_table,
    duration,
    failure,
    growth_table,
    measured,
    milliseconds,
    number,
    render,
)
from moka_pl.studies.common import Parser, one_line_errors, replace_section, write_atomically

BEGIN, END = "<!-- performance -->", "<!-- /performance -->"

_PAGE = Path("docs/benchmarks.md")
_WIDTH = 115
_STEP_COLUMNS = (
    Column("step ms", duration("step_ms")),
    Column("ratio", number("ratio", ".2f")),
    OF_TIME,
    Column("peak GiB", number("peak_gib", ".1f")),
    OF_PEAK,
    RATE,
    LAUNCHES,
)
_CAPTIONS = {
    "components": "Step in ms and peak GiB over the number of components r (r = 0 is the frozen base):",
    "tokens": "Step in ms and peak GiB over the tokens of a batch:",
    "sizes": "Step in ms and peak GiB over shapes of models:",
}


def section(runs: Sequence[Results]) -> str:
    """The text between the markers.

    Args:
        runs: Results, in the order in which they appear.

    Returns:
        Markdown that begins and ends with an empty line.
    """
    return "\n" + "\n".join(_about(results) for results in runs) + "\n"


@one_line_errors("benchmark_page")
def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrites the section, or checks it.

    Args:
        arguments: Arguments, default those of the process. Ends the process with status 1 where a checked
            page differs, and with status 2 on an error.
    """
    parser = Parser(
        "benchmark_page",
        f"Rewrites the section between {BEGIN} and {END} from results of scripts/benchmark.py.",
    )
    parser.add_argument("results", nargs="+", type=Path, help="files written by benchmark.py --json")
    parser.add_argument("--page", type=Path, default=_PAGE, help=f"default {_PAGE}")
    parser.add_argument(
        "--check", action="store_true", help="only check; exit with status 1 if the section differs"
    )
    args = parser.parse_args(arguments)
    new = section([load_results(file) for file in args.results])
    changed = _change(args.page, new, args.check)
    if changed and args.check:
        given = " ".join(map(str, args.results))
        parser.exit(1, f"{args.page} differs from the results; run scripts/benchmark_page.py {given}\n")
    state = "is up to date" if not changed else "is rewritten"
    print(f"{args.page} {state}")


def _change(file: Path, new: str, check: bool) -> bool:
    """Whether the section is another one; it is written unless this is a check."""
    try:
        text = file.read_text(encoding="utf-8")
        wanted = replace_section(text, new, BEGIN, END)
        if wanted != text and not check:
            write_atomically(file, wanted)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except ConfigError as error:
        raise ConfigError(f"{file} {error}") from None
    return wanted != text


def _about(results: Results) -> str:
    preset = results.preset
    named = {"torch": "torch", "transformers": "transformers", "peft": "PEFT", "lightning": "Lightning"}
    packages = ", ".join(
        f"{label} {results.versions[key]}" for key, label in named.items() if key in results.versions
    )
    intro = (
        f"**{preset['shape']} on one {results.device}.** The model's shape with random weights, NF4 "
        f"double-quantised, {results.dtype}, {preset['batch']} × {preset['length']} tokens where not said "
        f"otherwise; medians ({packages})."
    )
    parts = [textwrap.fill(intro, _WIDTH), f"```bash\n{results.command}\n```"]
    if steps := beside_unsloth(results, "steps"):
        caption = "One training step (forward and backward), ratios to the frozen base"
        if any("unsloth_ratio" in record.values for record in steps):
            caption += " and to the row of unsloth's that each competes with"
        parts += [f"{caption}:", _steps(steps)]
    for measure, caption in _CAPTIONS.items():
        if records := results.of(measure):
            parts += [caption, growth_table(records, GROWTH[measure])]
    parts += [textwrap.fill(_fit(record), _WIDTH) for record in beside_unsloth(results, "fit")]
    if searched := results.of("context"):
        parts += [
            textwrap.fill(
                "Longest row of tokens that a step of forward, backward and AdamW with checkpointing fits "
                "into a card of so many GiB (ratio to unsloth's; ≈ is predicted by the memory that a token "
                "takes):",
                _WIDTH,
            ),
            context_table(searched),
            *_by_all_layers(searched),
        ]
    if generated := results.of("decode"):
        parts += ["Greedy generation at batch 1 with a key-value cache, nothing merged:", _decode(generated)]
    parts += [textwrap.fill(f"Note: {note}.", _WIDTH) for note in results.notes]
    return "\n\n".join(parts) + "\n"


def _steps(records: Sequence[Record]) -> str:
    """A line a row; both kinds of checkpointing stand side by side."""
    kinds = sorted({record.checkpointing for record in records})
    columns = measured(_STEP_COLUMNS, records)
    heads = ["adapter", "trainable"]
    for kind in kinds:
        heads += [f"{column.title}{', checkpointing' if kind else ''}" for column in columns]
    lines = []
    for name in dict.fromkeys(record.row for record in records):
        by_kind = {record.checkpointing: record for record in records if record.row == name}
        sizes = [record.values["trainable"] for record in by_kind.values() if record.error is None]
        line = [name, f"{sizes[0]:,}" if sizes else ""]
        for kind in kinds:
            line += _step_cells(by_kind.get(kind), columns)
        lines.append(line)
    return render(heads, lines)


def _step_cells(record: Record | None, columns: Sequence[Column]) -> list[str]:
    if record is None:
        return [""] * len(columns)
    if record.error is not None:
        return [failure(record), *[""] * (len(columns) - 1)]
    return [column.cell(record) for column in columns]


def _by_all_layers(searched: Sequence[Record]) -> list[str]:
    """A sentence on searches that ran the first layers only."""
    told = [
        f"{record.row} {record.values['peak_gib_all_layers']:.1f} in place of {record.values['peak_gib']:.1f}"
        if "peak_gib_all_layers" in record.values
        else f"{record.row} more than there is"
        for record in searched
        if {"peak_gib_all_layers", "too_long_all_layers"} & set(record.values)
    ]
    text = (
        "The first layers alone were run, with the weights, adapters and optimizer state of all on the card. "
        f"Run by all layers, the longest row of the smallest card takes so many GiB: {'; '.join(told)}."
    )
    return [textwrap.fill(text, _WIDTH)] if told else []


def _fit(record: Record) -> str:
    kind = "with" if record.checkpointing else "without"
    if record.error is not None:
        return f"A whole `fit` {kind} checkpointing {failure(record)}"
    values = record.values
    captured = record.row.endswith(CAPTURED)
    recording = "the recording of a graph and " if captured else ""
    loop = "a bare loop, whose steps are not replayed," if captured else "a bare loop"
    ratio = values.get("unsloth_ratio")
    compared = "" if ratio is None else f" That is {ratio:.2f} times {peer(record.row)}."
    return (
        f"A whole `fit` {kind} checkpointing ({record.row}), with its callbacks and logs, takes "
        f"{milliseconds(values['fit_ms'])} ms an optimizer step, {values['ratio']:.3f} times {loop} on "
        f"the same model and batches (medians), or {values['mean_ratio']:.3f} times by the means, which "
        f"include {recording}the periodic logging.{compared}"
    )


def _decode(records: Sequence[Record]) -> str:
    lines = []
    for record in records:
        if record.error is not None:
            lines.append([record.row, failure(record), ""])
            continue
        ratio = f"{record.values['ratio']:.2f}" if "ratio" in record.values else ""
        lines.append([record.row, milliseconds(record.values["token_ms"]), ratio])
    return render(["adapter", "ms a token", "ratio"], lines)
