"""Tables of docs/results.md and docs/benchmarks.md are those of the files that measurements wrote."""

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from moka_pl.studies.long_run.watch import SAVED

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts/results"
SMOLLM, GEMMA, QWEN = "modules-smollm2", "gemma3-270m", "qwen2.5-coder-1.5b"
MODELS = {SMOLLM: "SmolLM2-135M", GEMMA: "Gemma 3 270M", QWEN: "Qwen2.5-Coder-1.5B"}
FROZEN = "frozen base"
#: What the page calls methods whose names differ between the suites.
NAMES = {
    "MoKA r10": "MoKA r10, q and v",
    "LoRA r64": "LoRA r64, q and v",
    "LoRA r2, r1 in gate and up, all linear": "LoRA r2, all linear",
}
MOKA, MOKA_QV, LORA, LORA_QV = (
    "MoKA r2, all linear",
    "MoKA r10, q and v",
    "LoRA r2, all linear",
    "LoRA r64, q and v",
)
PAIRS = [(MOKA, MOKA_QV), (LORA, LORA_QV), (MOKA_QV, LORA_QV), (MOKA, LORA_QV), (MOKA, LORA)]


def lines(page: str) -> list[str]:
    return (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()


def report(suite: str) -> Any:
    return json.loads((RESULTS / "compare" / suite / "report.json").read_text(encoding="utf-8"))


def rows(suite: str) -> dict[str, Any]:
    found = report(suite)["rows"]
    if suite == SMOLLM:
        found = [report("commonsense-smollm2")["rows"][0], *found]
    return {NAMES.get(row["name"], row["name"]): row for row in found}


def line(*cells: str) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def share(of: dict[str, float], digits: int, factor: float = 1.0, sign: str = "") -> str:
    return f"{factor * of['value']:{sign}.{digits}f} ± {factor * of['stderr']:.{digits}f}"


def rate(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def three_models() -> list[str]:
    """A row a method, a column a model."""
    found = {suite: rows(suite) for suite in MODELS}
    return [
        line(
            name,
            *(
                f"{100 * of[name]['mean']['value']:.1f}, {of[name]['nll']['value']:.3f}"
                for of in found.values()
            ),
        )
        for name in (FROZEN, MOKA_QV, LORA_QV, MOKA, LORA)
    ]


def one_model(suite: str) -> list[str]:
    """A row a method: scores, rate, what was forgotten, and memory."""
    found = []
    for row in report(suite)["rows"]:
        cells = [row["name"], f"{row['parameters']:,}"]
        trained = row["name"] != FROZEN
        tried = sorted(trial["rate"] for trial in row["trials"])
        assert not row["at_edge"]
        cells.append(rate(row["learning_rate"]) if trained else "")
        cells.append(f"{rate(tried[0])}, {rate(tried[-1])}" if trained else "")
        cells += [share(row["mean"], 1, 100), share(row["nll"], 3)]
        cells.append(share(row["forgotten"]["difference"], 3, sign="+") if trained else "")
        cells.append(f"{median(row['peak_gib']):.1f}" if trained else "")
        found.append(line(*cells))
    return found


def cells_of(
    difference: dict[str, float], digits: int, factor: float, turned: bool, bound: float
) -> list[str]:
    low, high, value = (factor * difference[name] for name in ("low", "high", "value"))
    if turned:
        low, high, value = -high, -low, -value
    text = f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    p = difference["p"]
    return [f"**{text}**" if p < bound else text, "<0.001" if p < 0.001 else f"{p:.3f}"]


def pairs() -> list[str]:
    """A row a pair of methods and model; bold is what stays significant beside all pairs of its suite."""
    found: dict[tuple[str, str, str], str] = {}
    for suite, model in MODELS.items():
        differences = report(suite)["differences"]
        for difference in differences:
            one, other = (NAMES.get(difference[end], difference[end]) for end in ("one", "other"))
            turned = (other, one) in PAIRS
            key = (other, one) if turned else (one, other)
            how = (turned, 0.05 / len(differences))
            cells = cells_of(difference["acc_norm"], 1, 100, *how) + cells_of(difference["nll"], 3, 1, *how)
            found[*key, suite] = line(f"{key[0]} − {key[1]}", model, *cells)
    return [found[*pair, suite] for pair in PAIRS for suite in MODELS]


def in_8_bits() -> list[str]:
    """A row a method in bfloat16 beside it in 8 bits."""
    found = []
    for suite, model in {"float8-smollm2": MODELS[SMOLLM], f"float8-{QWEN}": MODELS[QWEN]}.items():
        of = report(suite)
        losses = {row["name"]: row["validation_loss"] for row in of["rows"]}
        for difference in of["differences"]:
            name = difference["one"].removesuffix(", bf16")
            if difference["other"] != f"{name}, fp8":
                continue
            layers = "q and v" if name.startswith("MoKA") else "all linear"
            how = (False, 0.05 / len(of["differences"]))
            cells = cells_of(difference["acc_norm"], 2, 100, *how) + cells_of(difference["nll"], 3, 1, *how)
            both = zip(losses[difference["one"]], losses[difference["other"]], strict=True)
            cells.append(", ".join(f"{bf16:.3f} → {fp8:.3f}" for bf16, fp8 in both))
            found.append(line(f"{name}, {layers}", model, *cells))
    return found


def minutes() -> list[dict[str, Any]]:
    text = (RESULTS / "long_run/llama2-7b-h200.jsonl").read_text(encoding="utf-8")
    return [found for found in map(json.loads, text.splitlines()) if "minutes" in found]


def long_run() -> list[str]:
    """A row each five minutes or so."""
    return [
        line(
            f"{of['minutes']:.1f}",
            f"{of['step']:,}",
            f"{of['ms']:.1f}",
            f"{of['allocated_mib']:,.0f}",
            f"{of['reserved_mib']:,.0f}",
            f"{of['rss_mib']:,.0f}",
            f"{of['descriptors']}",
            f"{of['threads']}",
            f"{of['events_mb']:.2f}",
            f"{of['saving_seconds']:.2f}" if of["saving_seconds"] else "",
        )
        for i, of in enumerate(minutes())
        if i in {0, 1, 4, 9, 14, 19, 20}
    ]


def time_of_the_run() -> list[str]:
    """What the time between the first line and the last one went into."""
    found = minutes()
    whole = 60 * (found[-1]["minutes"] - found[0]["minutes"])
    steps = [(of["step"] - before["step"], of["ms"]) for before, of in pairwise(found)]
    saved = [of["saving_seconds"] for of in found if of["saving_seconds"] is not None]
    assert len(saved) == found[-1]["step"] // SAVED - found[0]["step"] // SAVED  # each line has one of them
    usual = sum(n * ms for n, ms in steps) / 1e3
    parts = {
        f"{sum(n for n, _ in steps):,} steps, at the median of their minute": usual,
        f"{len(saved)} checkpoints": sum(saved),
        "all else": whole - usual - sum(saved),
    }
    return [line(name, f"{of:,.1f}", f"{100 * of / whole:.1f}%") for name, of in parts.items()]


def quantisers() -> list[str]:
    """Scores of the run that has more seeds, memory of the second one, which has all rows."""
    runs = ["quantisers-smollm2", "quantisers-smollm2-checkpoints"]
    first, second = ({of["name"]: of for of in report(name)["rows"]} for name in runs)
    found = []
    for name, of in second.items():
        best = max((of, first.get(name, of)), key=lambda one: len(one["seeds"]))
        shown = f"`{name}`" + ("" if best is of else ", first run")
        scores = share(best["mean"], 1, 100), share(best["nll"], 3)
        memory = f"{median(of['base_mib']):.1f}", f"{median(of['peak_gib']):.2f}"
        found.append(line(shown, f"{len(best['seeds'])}", *scores, *memory))
    return found


def on_a_cpu() -> list[str]:
    """Two of these on a CPU, after fewer steps."""
    rows = report("quantisers-smollm2-cpu")["rows"]
    return [
        line(
            f"`{of['name']}`",
            share(of["mean"], 1, 100),
            share(of["nll"], 3),
            f"{median(of['validation_loss']):.4f}",
        )
        for of in rows
    ]


TABLES = {
    "on a CPU": ("results.md", on_a_cpu),
    "quantisers": ("results.md", quantisers),
    "three models": ("results.md", three_models),
    GEMMA: ("results.md", lambda: one_model(GEMMA)),
    QWEN: ("results.md", lambda: one_model(QWEN)),
    "pairs": ("results.md", pairs),
    "8 bits": ("results.md", in_8_bits),
    "twenty minutes": ("benchmarks.md", long_run),
    "their time": ("benchmarks.md", time_of_the_run),
}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_that_of_its_measurement(table: str) -> None:
    page, made = TABLES[table]
    told = lines(page)
    for row in made():
        assert row in told
