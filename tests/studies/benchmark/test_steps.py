import math

import pytest
import torch

from moka_pl._compat import change_count
from moka_pl.studies.benchmark import cases, steps
from moka_pl.studies.benchmark.bench import linear_weights as bench_weights
from moka_pl.studies.benchmark.bench import quartiles
from moka_pl.studies.benchmark.steps import device_of, measure_steps
from moka_pl.studies.common import free_memory, peak_gib, reset_peak


def test_all_rows_and_the_peer_that_crashes(bench, preset) -> None:
    records = list(measure_steps(bench, preset, cases.step_rows("cpu")))
    assert [r.row for r in records] == [row.name for row in cases.step_rows("cpu")]
    failed = {r.row: r.error for r in records if r.error is not None}
    assert set(failed) == {"LoKr r64 q,v"}  # it takes the packed weight's shape for the layer's
    assert "shape" in failed["LoKr r64 q,v"]
    for record in records:
        if record.error is None:
            values = record.values
            assert all(math.isfinite(value) for value in values.values())
            assert 0 < values["forward_ms"] < values["step_ms"]
            assert values["step_q1_ms"] <= values["step_ms"] <= values["step_q3_ms"]
            assert values["ratio"] == pytest.approx(values["step_ms"] / records[0].values["step_ms"])
            assert values["steps"] == 2
            assert values["peak_gib"] > 0
    assert [r.values["trainable"] for r in (records[0], records[-1])] == [0, 0]
    assert records[1].values["trainable"] > 0


def test_without_the_frozen_base_there_are_no_ratios(bench, preset) -> None:
    (record,) = measure_steps(bench, preset, [cases.moka("MoKA r10")])
    assert record.error is None
    assert "ratio" not in record.values


def test_checkpointing_computes_the_layers_again(preset) -> None:
    from moka_pl.studies.benchmark.bench import Bench

    calls = []

    def put(model):
        hook = model.model.layers[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
        return hook.remove

    for checkpointing in (False, True):
        bench = Bench("tiny", "cpu", checkpointing)
        (record,) = measure_steps(bench, preset, [cases.Row("counting", put)])
        assert record.checkpointing is checkpointing
        assert len(calls) == (6 if checkpointing else 3)  # one warm-up and two measured steps
        calls.clear()


def test_steps_leave_nothing_behind(bench) -> None:
    versions = []

    def work(model):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        values = steps.time_steps(model, 1, 4, 1, 2, 9.0)
        after = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert all(p.grad is None for p in model.parameters())
        # Whatever was computed from the parameters counts as outdated after every step.
        versions.extend(p._version for p in after.values())
        return values

    _, error = bench.measure(cases.moka("MoKA r10"), work)
    assert error is None
    assert min(versions) >= 3


def test_the_gradient_of_a_frozen_base_reaches_the_embeddings(bench) -> None:
    reached = []

    def put(model):
        def watch(module, args, out) -> None:
            if out.requires_grad:
                out.register_hook(lambda grad: reached.append(float(grad.abs().sum())))

        return model.model.layers[0].input_layernorm.register_forward_hook(watch).remove

    _, error = bench.measure(cases.Row("frozen", put), lambda m: steps.time_steps(m, 1, 4, 0, 2, 9.0))
    assert error is None
    assert len(reached) == 2
    assert min(reached) > 0


def test_a_slow_row_is_given_fewer_steps_and_one_token_is_a_batch(bench) -> None:
    values, error = bench.measure(cases.frozen(), lambda m: steps.time_steps(m, 1, 1, 0, 50, 0.0))
    assert error is None
    assert values["steps"] == 2


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_peak_memory_begins_anew() -> None:
    device = torch.device("cpu")
    free_memory()  # what other tests left must not go meanwhile
    reset_peak(device)
    low = peak_gib(device)
    block = torch.ones(2**26)  # a quarter GiB
    assert peak_gib(device) > low + 0.2
    del block


def test_decode(bench, preset) -> None:
    records = list(steps.measure_decode(bench, preset, steps.decode_rows()))
    assert [r.row for r in records] == [
        "frozen base",
        "MoKA r10",
        "MoKA servable r16 all linear",
        "LoRA r64 q,v",
        "LoRA r16 all linear",
        "frozen base (again)",
    ]
    for record in records:
        assert record.error is None
        assert all(math.isfinite(value) for value in record.values.values())
        assert record.values["token_q1_ms"] <= record.values["token_ms"] <= record.values["token_q3_ms"]
    assert records[0].values["ratio"] == 1


def test_decoding_uses_the_cache(bench) -> None:
    lengths = []

    def work(model):
        model.get_input_embeddings().register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
        return steps.time_decode(model, 3)

    _, error = bench.measure(cases.frozen(), work)
    assert error is None
    assert lengths == [16, 1, 1, 1] * 2  # once to warm up


def test_launches_are_kernels_graphs_and_copies() -> None:
    calls = [("cudaLaunchKernel", 3), ("cuLaunchKernelEx", 2), ("cudaGraphLaunch", 1), ("cudaMemcpyAsync", 4)]
    assert steps.count_launches([*calls, ("aten::mm", 9), ("cudaDeviceSynchronize", 7)]) == 10


def test_a_profiled_step_is_counted(bench) -> None:
    values, error = bench.measure(
        cases.frozen(), lambda m: steps.time_steps(m, 1, 4, 0, 2, 9.0, profiled=True)
    )
    assert error is None
    assert values["launches"] == values["gpu_ms"] == 0  # a CPU launches nothing


def test_what_ends_a_step_is_not_profiled(bench, monkeypatch) -> None:
    changes = []

    def profile(work):
        before = [change_count(p) for p in trained]
        work()
        assert all(p.grad is not None for p in trained)
        changes.append([change_count(p) for p in trained] == before)
        return {}

    def measure(model):
        trained.extend(p for p in model.parameters() if p.requires_grad)
        return steps.time_steps(model, 1, 4, 0, 2, 9.0, profiled=True)

    trained: list[torch.Tensor] = []
    monkeypatch.setattr(steps, "_profile", profile)
    _, error = bench.measure(cases.moka("MoKA r10"), measure)
    assert error is None
    assert changes == [True]
    assert all(p.grad is None for p in trained)


def test_the_rate_is_that_of_the_products_with_frozen_weights() -> None:
    assert bench_weights("llama2-7b") == 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    # 4096 tokens take 108 TFLOP, forward and backward: in a second, 108 TFLOP/s
    assert steps.teraflops(bench_weights("llama2-7b"), 4096, 1e3) == pytest.approx(108.25, abs=0.01)


def test_steps_in_turns_are_timed(bench, preset) -> None:
    rows = [cases.frozen(), cases.moka("MoKA r10")]
    base, adapted = measure_steps(bench, preset, rows, turns=2)
    assert base.error is adapted.error is None
    assert base.values["steps"] == adapted.values["steps"] == 2 * preset.steps
    assert base.values["ratio"] == 1
    assert adapted.values["trainable"] > 0
    assert "lora_ratio" not in adapted.values


def test_a_model_computes_where_it_lies_without_its_embeddings() -> None:
    class Model(torch.nn.ModuleList):
        device = torch.device("cpu")  # as transformers has it: that of the first parameter

    model = Model([torch.nn.Embedding(3, 2)])
    assert device_of(model) == torch.device("cpu")
    model.append(torch.nn.Linear(2, 2, device="meta"))
    assert device_of(model) == torch.device("meta")
