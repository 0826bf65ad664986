"""The benchmark's command line."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from moka_pl.errors import end_interrupted
from moka_pl.studies.benchmark import cases, context, fit, growth, steps, unsloth
from moka_pl.studies.benchmark.arguments import Plan, make_parser, make_plan, step_rows
from moka_pl.studies.benchmark.bench import Bench, Record, Results, linear_weights
from moka_pl.studies.benchmark.steps import measure_steps
from moka_pl.studies.benchmark.tables import longest, markdown, milliseconds, write_figures
from moka_pl.studies.benchmark.unsloth import measure_unsloth
from moka_pl.studies.common import device_name, one_line_errors, versions


@one_line_errors("benchmark")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints Markdown tables, and writes what was asked for.

    Args:
        arguments: Arguments, default those of the process.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        plan = make_plan(args)
        results = run(plan, args.json)
        print(markdown(results))
        if args.figures:
            for file in write_figures(results, args.figures):
                print(f"written: {file}", file=sys.stderr)
    except KeyboardInterrupt:
        end_interrupted(
            f"results so far are saved in {args.json}" if args.json and args.json.is_file() else ""
        )


def run(plan: Plan, file: Path | None = None) -> Results:
    """Measures everything of a plan.

    Args:
        plan: What to do.
        file: Where to write the results, again after every row: a run that is cut off leaves what it has.

    Returns:
        The results.
    """
    import torch

    from moka_pl.backbone import BackboneConfig, compute_dtype

    preset = plan.preset
    dtype = compute_dtype(BackboneConfig(), torch.device(preset.device))
    results = Results(
        preset=asdict(preset),
        command=plan.command,
        device=device_name(preset.device),
        dtype=str(dtype).removeprefix("torch."),
        versions=versions(),
    )
    with warnings.catch_warnings():
        # What PEFT and Lightning use that transformers and torch will rename one day.
        warnings.simplefilter("ignore", FutureWarning)
        for record in records(plan):
            if isinstance(record, str):
                if record not in results.notes:
                    results.notes.append(record)
                    print(f"Note: {record}", file=sys.stderr, flush=True)
                continue
            complete(record, results)
            results.records.append(record)
            print(progress(record), file=sys.stderr, flush=True)
            if file is not None:
                results.save(file)
    if file is not None:
        results.save(file)
    return results


def records(plan: Plan) -> Iterator[Record | str]:
    """Measures row by row; a text among the records is a note."""
    preset, names = plan.preset, plan.names
    for checkpointing in plan.checkpointing:
        bench = Bench(preset.shape, preset.device, checkpointing, plan.offload)
        if "steps" in plan.measures:
            rows = cases.choose(step_rows(preset.device, plan.liger, named=bool(names)), names)
            yield from measure_steps(bench, preset, rows, plan.profiled, plan.turns)
        if "components" in plan.measures:
            yield from growth.grow_components(bench, preset, names)
        if "tokens" in plan.measures:
            yield from growth.grow_tokens(bench, preset, names)
        if "steps" in plan.measures and plan.unsloth is not None and checkpointing == plan.checkpointing[-1]:
            yield from measure_unsloth(bench, preset, plan.checkpointing, names, plan.unsloth, plan.profiled)
        bench.close()
        yield from bench.notes
        if "sizes" in plan.measures:
            yield from growth.grow_sizes(preset, checkpointing, names, plan.offload)
        if "fit" in plan.measures:
            yield from fit.measure_fit(
                preset, "offload" if checkpointing and plan.offload else checkpointing, names
            )
    if "decode" in plan.measures:
        bench = Bench(preset.shape, preset.device)
        yield from steps.measure_decode(bench, preset, cases.choose(steps.decode_rows(), names))
        bench.close()
        yield from bench.notes
    if plan.search is not None:
        bench = Bench(preset.shape, preset.device, checkpointing=True, offload=True)
        yield from context.measure_context(bench, plan.search, names)
        if plan.unsloth is not None:
            yield from unsloth.measure_unsloth_context(bench, plan.search, names, plan.unsloth)
        bench.close()
        yield from bench.notes


def complete(record: Record, results: Results) -> None:
    """Adds what follows from a step's time: its rate, and its ratio to the frozen base of another process."""
    if record.measure != "steps" or not record.values:
        return
    preset, time = results.preset, record.values["step_ms"]
    tokens = preset["batch"] * preset["length"]
    record.values["tflops"] = steps.teraflops(linear_weights(preset["shape"]), tokens, time)
    if "ratio" in record.values:
        return
    for base in results.of("steps"):
        if base.row == cases.FROZEN and base.checkpointing == record.checkpointing and base.values:
            record.values["ratio"] = time / base.values["step_ms"]


def progress(record: Record) -> str:
    """One line about a record, for those who wait."""
    setting = "".join(f", {name} {value}" for name, value in record.setting.items())
    kind = ", checkpointing" if record.checkpointing else ""
    what = f"{record.measure}: {record.row}{setting}{kind}"
    if record.error is not None:
        return f"{what}: failed: {record.error}"
    if record.measure == context.MEASURE:
        return f"{what}: {longest(record)} tokens"
    key = next(key for key in ("step_ms", "fit_ms", "token_ms") if key in record.values)
    return f"{what}: {milliseconds(record.values[key])} ms, {record.values['peak_gib']:.2f} GiB"
