"""The estimated peak against every measured one of the repository that the estimate speaks of."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers
from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.description import build_empty, describe
from moka_pl.backbone.quantization import dequantising_bytes, weight_bytes
from moka_pl.planning.adapters import gated_products
from moka_pl.planning.memory import GIB, Setup, Sizes, estimate, merged_inputs, sizes_of
from moka_pl.studies.benchmark.bench import Record, Results, load_results

RESULTS = sorted((Path(__file__).parents[2] / "scripts" / "results").glob("*-h100.json"))

#: Rows of the benchmark: MoKA's options, or None for the frozen base.
ROWS = {
    "frozen base": None,
    "MoKA r10": {},
    "MoKA r10 fit": {},
    "MoKA r1": {"components": 1},
    "MoKA r20": {"components": 20},
    "MoKA_s r10": {"filters": "prime"},
    "MoKA r2 all linear": {"components": 2, "target_modules": "all-linear"},
    "MoKA servable r16 all linear": {
        "filters": "servable",
        "rank": 16,
        "components": 1,
        "target_modules": "all-linear",
    },
}

#: Peak resident memory in GiB of SmolLM2-135M's first steps on a CPU, a process each:
#: ``fit --config configs/smollm2.yaml --trainer.max_steps 4 --trainer.limit_val_batches 0``;
#: T and N of the largest micro-batch.
CPU = [
    (2.263, 768, 285, "MoKA r10", False),
    (1.829, 768, 285, "MoKA r10", True),
    (2.779, 768, 285, "MoKA r2 all linear", False),
    (1.898, 320, 180, "MoKA r10", False),
    (2.317, 512, 504, "MoKA r10", False),  # rows of 64 tokens
    (1.821, 512, 504, "MoKA r10", True),
    (4.528, 1920, 998, "MoKA r10", False),  # the whole epoch
    (2.90, 1920, 998, "MoKA r10", True),
]


@cache
def adapted(shape: str, row: str, dtype: torch.dtype) -> tuple[Sizes, int, float, float]:
    """Sizes, trained numbers, Σx and its products of a row."""
    config = BackboneConfig(shape, weights="random")
    model, _ = build_empty(describe(config, {}).shape, config, dtype, [])
    sizes, options = sizes_of(model), ROWS[row]
    if options is None:
        return sizes, 0, 0, 0
    inject_adapter(model, MokaConfig(**options))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = merged_inputs({name: x.in_features for name, x in moka_layers(model).items()})
    return sizes, trained, kept, gated_products(model)


def stored_as(quantization: Any) -> dict[str, float | None]:
    """How a quantiser stores a weight, in bytes, and dequantises it."""
    stored = weight_bytes(quantization, True, torch.bfloat16) if quantization != "none" else None
    return {"linear": stored, "dequantised": dequantising_bytes(quantization, torch.bfloat16)}


def is_of_today(results: Results) -> bool:
    """Whether the rows have a base as it is by default, and not as it was before it had fused kernels."""
    return any(note.startswith("fused kernels") for note in results.notes)


def measured() -> Iterator[tuple[str, str, int, Record]]:
    """File, shape, tokens and record of each measured peak of before."""
    for file in RESULTS:
        results = load_results(file)
        if is_of_today(results):
            continue
        full = results.preset["batch"] * results.preset["length"]
        for record in results.records:
            kind = record.row in ROWS and record.measure in ("steps", "sizes", "tokens", "fit")
            if kind and "peak_gib" in record.values:
                shape = str(record.setting.get("shape", results.preset["shape"]))
                yield file.name, shape, int(record.setting.get("tokens", full)), record


@pytest.mark.parametrize("rows", [("MoKA r10",), pytest.param(tuple(ROWS), marks=pytest.mark.slow)], ids=len)
def test_the_h100_s_peaks_are_met(rows: tuple[str, ...]) -> None:
    seen = set()
    for file, shape, tokens, record in measured():
        if record.row not in rows:
            continue
        sizes, trained, kept, _ = adapted(shape, record.row, torch.bfloat16)
        state = 8 if record.measure == "fit" else 0
        setup = Setup(tokens, tokens, checkpointing=record.checkpointing, state=state)
        estimated = estimate(sizes, setup, trained, 2 * kept).peak / GIB
        told = f"{file} {record.row} {record.setting} checkpointing {record.checkpointing}"
        assert estimated == pytest.approx(record.values["peak_gib"], rel=0.03), told
        seen.add((shape, record.row, record.checkpointing))
    for shape in ("llama2-7b", "llama3-8b"):
        assert {(shape, "MoKA r10", False), (shape, "MoKA r10", True)} <= seen
    assert len(seen) > 7 * len(rows) ** 0.5


def test_the_h100_s_peaks_with_liger_s_kernels_are_met() -> None:
    seen = 0
    for file in RESULTS:
        results = load_results(file)
        tokens = results.preset["batch"] * results.preset["length"]
        for record in results.records:
            if record.measure == "steps" and record.row.endswith(" + Liger") and "peak_gib" in record.values:
                row = record.row.removesuffix(" + Liger")
                sizes, trained, kept, _ = adapted(results.preset["shape"], row, torch.bfloat16)
                setup = Setup(tokens, tokens, checkpointing=record.checkpointing, state=0, fused=True)
                estimated = estimate(sizes, setup, trained, 2 * kept).peak / GIB
                assert estimated == pytest.approx(record.values["peak_gib"], rel=0.03), (file.name, record)
                seen += 1
    assert seen >= 4


def test_the_h100_s_peaks_with_today_s_defaults_are_met() -> None:
    seen, quantisers = set(), set()
    for results in filter(is_of_today, map(load_results, RESULTS)):
        tokens = results.preset["batch"] * results.preset["length"]
        for record in results.records:
            row = record.row.partition(", ")[0].removesuffix(" fit")
            if record.measure == "context" or row not in ROWS or "peak_gib" not in record.values:
                continue
            sizes, trained, kept, products = adapted(results.preset["shape"], row, torch.bfloat16)
            on, fit = record.checkpointing, record.measure == "fit"
            defaults = {"fused": True, "by_parts": True, "offloaded": on, "checkpointing": on}
            quantisation = record.row.partition(", quantization ")[2]
            if quantisation:
                defaults |= stored_as(quantisation)
            setup = Setup(tokens, tokens, state=8 if fit else 0, **defaults)
            estimated = estimate(sizes, setup, trained, 2 * kept, 2 * products).peak / GIB
            if "CUDA graph" in record.row:
                estimated += 2**25 / GIB  # a recorded step's stream has a workspace of its own
            assert estimated == pytest.approx(record.values["peak_gib"], rel=0.03), (record, estimated)
            seen.add((row, on, fit))
            quantisers.add(quantisation)
    assert {"", "fp4", "int8", "int4", "float8", "hqq", "none"} <= quantisers
    assert {
        (row, on, False) for row in ("frozen base", "MoKA r10", "MoKA r2 all linear") for on in (0, 1)
    } <= seen
    assert ("MoKA r10", False, True) in seen


def test_the_h100_s_peaks_of_the_longest_rows_are_met() -> None:
    seen = set()
    for results in filter(is_of_today, map(load_results, RESULTS)):
        for record in results.records:
            if record.measure != "context" or record.row not in ROWS:
                continue
            sizes, trained, kept, products = adapted(results.preset["shape"], record.row, torch.bfloat16)
            options = {"fused": True, "by_parts": True, "offloaded": True, "checkpointing": True}
            tokens = record.values["tokens"]
            setup = Setup(tokens, tokens, state=8, **options)
            estimated = estimate(sizes, setup, trained, 2 * kept, 2 * products).peak / GIB
            assert estimated == pytest.approx(record.values["peak_gib"], rel=0.02), (record, estimated)
            seen.add(tokens)
    assert {96768, 393216} <= seen


def test_a_loss_by_parts_takes_less_of_a_wide_vocabulary() -> None:
    sizes, trained, kept, _ = adapted("llama3-8b", "MoKA r10", torch.bfloat16)
    whole, parts = (
        estimate(sizes, Setup(4096, 4096, by_parts=by_parts), trained, kept) for by_parts in (False, True)
    )
    norms = 4 * 4096 * 4096
    assert whole.logits == norms + 2 * 4096 * 4096 + 12 * 128256 * 4096
    assert parts.logits == norms + 2 * 2 * 4096 * 4096 + 2 * 128256 * 512


def test_a_cpu_s_heap_grows_under_checkpointing_until_tensors_are_mapped() -> None:
    sizes, parameters, kept, _ = adapted("smollm2-135m", "MoKA r10", torch.float32)
    tokens = [n for n in range(4096, 8192) if 4 * n * sizes.inner < 2**25]

    def activations(count: int, stored: int | None = 0) -> float:
        return estimate(sizes, Setup(count, 64, 4, True, stored=stored), parameters, 4 * kept).activations

    heap = sizes.blocks * 4 * (3 * sizes.inner * tokens[-1] - 2 * sizes.largest)
    gradients = 4 * (sizes.hidden + sizes.inner)  # bytes a token, which a GPU's estimate counts
    more = activations(tokens[-1]) - activations(tokens[-1], None)
    assert more == pytest.approx(heap - gradients * tokens[-1])
    more = activations(tokens[-1] + 1) - activations(tokens[-1] + 1, None)
    assert more == pytest.approx(-gradients * (tokens[-1] + 1))


@pytest.mark.parametrize(("peak", "tokens", "trained", "row", "checkpointing"), CPU)
def test_the_cpu_s_peaks_are_met(
    peak: float, tokens: int, trained: int, row: str, checkpointing: bool
) -> None:
    sizes, parameters, kept, _ = adapted("smollm2-135m", row, torch.float32)
    stored = 4 * (sizes.linear + sizes.other)  # the converted GGUF file's float32
    setup = Setup(tokens, trained, 4, checkpointing, stored=stored)
    estimated = estimate(sizes, setup, parameters, 4 * kept).peak / GIB
    assert estimated == pytest.approx(peak, rel=0.15)


def test_layers_that_read_the_same_tensor_keep_it_once() -> None:
    attention = {f"block.self_attn.{name}": 8 for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert merged_inputs(attention) == 8
    mlp = {"block.mlp.gate_proj": 8, "block.mlp.up_proj": 8, "block.mlp.down_proj": 20}
    assert merged_inputs(attention | mlp) == 8 + 8 + 20
    assert merged_inputs({"a.q_proj": 8, "b.q_proj": 8}) == 16


def test_a_second_rank_s_gradient_and_the_optimizer_are_counted() -> None:
    sizes, trained, kept, _ = adapted("tiny", "MoKA r10", torch.bfloat16)
    one, two = (
        estimate(sizes, Setup(64, 64, gradients=size, state=8), trained, kept).peak for size in (4, 8)
    )
    assert two - one == 4 * trained
    none = estimate(sizes, Setup(64, 64, gradients=4, state=0), trained, kept).peak
    assert one - none == 8 * trained


def test_offloaded_inputs_are_not_counted_but_for_three() -> None:
    sizes, trained, kept, _ = adapted("llama3-8b", "MoKA r10", torch.bfloat16)
    plain, offloaded = (
        estimate(sizes, Setup(4096, 4096, checkpointing=True, offloaded=offloaded), trained, kept).peak
        for offloaded in (False, True)
    )
    assert plain - offloaded == (32 - 3) * 2 * 4096 * 4096


@pytest.mark.parametrize("shape", ["llama3-8b", "llama3-1b"])  # the second one's head is tied
def test_a_spread_base_is_held_in_part_but_for_two_blocks_or_the_head(shape: str) -> None:
    sizes, trained, kept, _ = adapted(shape, "MoKA r10", torch.bfloat16)
    head = 2 * sizes.vocabulary * sizes.hidden
    assert 2 * sizes.ends == head * (1 if shape == "llama3-1b" else 2)
    for checkpointing in (False, True):
        whole, both, one = (
            estimate(
                sizes,
                Setup(512, 512, checkpointing=checkpointing, spread=ranks, base_offloaded=off),
                trained,
                kept,
            )
            for ranks, off in ((None, False), (4, False), (1, True))
        )
        spread = one.host
        # The logits of 512 tokens, and the head, take more than two blocks and what one of them computes.
        if shape == "llama3-8b":
            assert whole.peak - both.peak == pytest.approx((spread - head) * (1 - 1 / 4))
        else:  # whole on several ranks
            gathered = both.peak - (whole.peak - (spread - head) * (1 - 1 / 4))
            assert 0 <= gathered <= (spread - head) * 2 / sizes.blocks
        assert whole.peak - one.peak == pytest.approx(spread - head)
        assert 0.49 * sizes.linear < spread - 2 * sizes.ends < 0.54 * sizes.linear  # 4 bits and the scales
        assert (both.host, both.activations, both.logits) == (0, whole.activations, whole.logits)


def test_two_blocks_are_whole_beside_what_one_computes() -> None:
    sizes, trained, kept, _ = adapted("llama2-70b", "MoKA r10", torch.bfloat16)
    setup = Setup(4096, 1, checkpointing=True)  # one token is predicted: no logits to speak of
    whole, spread = (estimate(sizes, replace(setup, spread=ranks), trained, kept) for ranks in (None, 2))
    blocks = sizes.linear * setup.linear
    held = (blocks + 2 * sizes.ends) / 2
    assert whole.peak - spread.peak == pytest.approx(held - blocks * 2 / sizes.blocks)


def test_what_is_larger_while_it_is_dequantised_is_counted() -> None:
    sizes, trained, kept, _ = adapted("tiny", "MoKA r10", torch.bfloat16)
    plain, eight = (
        estimate(sizes, Setup(64, 64, linear=1.0, dequantised=held), trained, kept).weights
        for held in (None, 8.0)
    )
    assert eight - plain == 6 * sizes.largest  # beside two bytes of the compute dtype
