"""The short table of the benchmarks is that of its measurement."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: What the short table calls the rows of the run.
ROWS = {
    "frozen base": "frozen base, CUDA graph",
    "MoKA r10, q and v": "MoKA r10, CUDA graph",
    "MoKA r2, all linear layers": "MoKA r2 all linear, CUDA graph",
    "MoKA servable r16, all linear layers": "MoKA servable r16 all linear, CUDA graph",
    "unsloth, LoRA r8, q and v": "unsloth LoRA r8 q,v",
    "unsloth, LoRA r16, all linear layers": "unsloth LoRA r16 all linear",
    "PEFT, LoRA r16, all linear layers": "LoRA r16 all linear",
}


def test_the_short_table_is_that_of_the_run_beside_unsloth() -> None:
    text = (ROOT / "scripts/results/llama2-7b-unsloth-h100.json").read_text(encoding="utf-8")
    records = [record for record in json.loads(text)["records"] if record["measure"] == "steps"]
    measured: dict[Any, Any] = {(r["row"], r["checkpointing"]): r["values"] for r in records}
    lines = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8").splitlines()
    for name, row in ROWS.items():
        parts = [measured[row, on] for on in (False, True)]
        numbers = [f"{part['step_ms']:.0f} | {part['peak_gib']:.1f}" for part in parts]
        assert f"| {name} | {parts[0]['trainable']:,} | {' | '.join(numbers)} |" in lines
