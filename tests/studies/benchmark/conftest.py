"""A preset that measures in milliseconds."""

import gc
from collections.abc import Iterator

import pytest

from moka_pl.studies.benchmark.bench import Bench, Record, Results
from moka_pl.studies.benchmark.cases import PRESETS, Preset

TINY = Preset(
    "tiny-cpu",
    "tiny",
    "cpu",
    batch=2,
    length=8,
    warmup=1,
    steps=2,
    fit_steps=4,
    new_tokens=3,
    workers=0,
    components=(1, 3),
    tokens=(1, 16),
    shapes=("tiny",),
)


@pytest.fixture(autouse=True)
def _quick(one_thread, monkeypatch) -> None:
    monkeypatch.setitem(PRESETS, TINY.name, TINY)


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Garbage is collected after every row: what the libraries hold need not be looked through again."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def preset() -> Preset:
    """The tiny random LLaMA with 2 x 8 tokens on the CPU."""
    return TINY


@pytest.fixture
def bench() -> Bench:
    """The tiny model, ready for rows."""
    return Bench("tiny", "cpu")


def _step(row: str, ms: float, checkpointing: bool = False, **setting: int | str) -> Record:
    values = {"step_ms": ms, "forward_ms": ms / 3, "tokens_per_s": 1e6 / ms, "peak_gib": 2.0, "trainable": 5}
    measure = "steps"
    for measured, key in (("components", "components"), ("tokens", "tokens"), ("sizes", "shape")):
        measure = measured if key in setting else measure
    if measure == "steps":
        values["ratio"] = ms / 100
    return Record(measure, row, checkpointing, setting, values)


@pytest.fixture
def results() -> Results:
    """Made-up results with a record of every kind and failures."""
    times = {"fit_ms": 40.0, "fit_mean_ms": 42.0, "bare_ms": 39.0, "bare_mean_ms": 39.5}
    tokens = {"token_ms": 3.5, "tokens_per_s": 285.7, "prompt_ms": 8.0, "peak_gib": 1.0, "trainable": 0}
    oom = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    return Results(
        preset={"name": "llama2-7b-h100", "shape": "llama2-7b", "batch": 8, "length": 512},
        command="python scripts/benchmark.py --preset llama2-7b-h100 --measure all --checkpointing both",
        device="NVIDIA H100",
        dtype="bfloat16",
        versions={"python": "3.12.3", "torch": "2.11.0", "transformers": "5.17.0", "peft": "0.21.0"},
        records=[
            _step("frozen base", 100.0),
            _step("MoKA r10", 123.0),
            Record("steps", "LoKr r64 q,v", error="RuntimeError: a | b"),
            _step("frozen base", 150.0, checkpointing=True),
            _step("MoKA r10", 180.0, checkpointing=True),
            _step("frozen base", 100.0, components=0),
            _step("MoKA", 101.0, components=1),
            _step("MoKA", 130.0, components=40),
            _step("MoKA", 210.0, checkpointing=True, components=40),
            _step("frozen base", 9.0, tokens=1),
            _step("frozen base", 100.0, tokens=4096),
            _step("MoKA r10", 12.0, tokens=1),
            Record("tokens", "MoKA r10", setting={"tokens": 4096}, error=oom),
            _step("frozen base", 20.0, shape="llama3-1b"),
            _step("frozen base", 100.0, shape="llama2-7b"),
            Record(
                "fit",
                "MoKA r10 fit",
                values=times | {"ratio": 1.026, "mean_ratio": 1.063, "peak_gib": 3.0, "trainable": 7},
            ),
            Record("decode", "frozen base", values=tokens | {"ratio": 1.0}),
        ],
        notes=["rows with Liger are left out: liger_kernel is not installed"],
    )
