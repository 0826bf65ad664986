"""The short table of the benchmarks is that of its measurement."""

import json
from pathlib import Path
from typing import Any

from moka_pl.studies.benchmark.cases import peer

ROOT = Path(__file__).parents[2]
#: What the short table calls the rows of the run.
ROWS = {
    "frozen base": "frozen base, CUDA graph",
    "MoKA r10, q and v": "MoKA r10, CUDA graph",
    "MoKA r2, all linear layers": "MoKA r2 all linear, CUDA graph",
    "MoKA servable r16, all linear layers": "MoKA servable r16 all linear, CUDA graph",
    "unsloth, LoRA r8, q and v": "unsloth LoRA r8 q,v",
    "unsloth, LoRA r16, all linear layers": "unsloth LoRA r16 all linear",
}


def test_the_short_table_is_that_of_the_run_beside_unsloth() -> None:
    text = (ROOT / "scripts/results/llama2-7b-unsloth-graphs-h100.json").read_text(encoding="utf-8")
    records = [record for record in json.loads(text)["records"] if record["measure"] == "steps"]
    measured: dict[Any, Any] = {(r["row"], r["checkpointing"]): r["values"] for r in records}
    lines = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").splitlines()
    for name, row in ROWS.items():
        cells = [name, f"{measured[row, False]['trainable']:,}"]
        for on in (False, True):
            values = measured[row, on]
            other = peer(row)
            cells.append(f"{values['step_ms']:.0f} ({values['peak_gib']:.1f})")
            ratio = None if other is None else values["step_ms"] / measured[other, on]["step_ms"]
            cells.append("" if ratio is None else f"{ratio:.2f}")
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in lines, name
