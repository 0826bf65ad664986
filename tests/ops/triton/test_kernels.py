"""The Triton kernels, under Triton's interpreter where there is no GPU (see shared/fixtures)."""

import pytest
import torch
from torch import Tensor, nn

from moka_pl.adapters.filters import filter_shapes
from moka_pl.backbone.quantization import dense_weight, kernel_weight, quantised_linear
from moka_pl.ops.dense import project
from moka_pl.ops.gating import Gating, gates_of
from moka_pl.ops.kronecker import delta_weight, kronecker_linear
from moka_pl.ops.layout import Pairs, Shape, pack
from moka_pl.ops.triton.reference import round_by_thresholds

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")

DEVICE = torch.device("cpu")

CASES = {
    "words": ((Shape(2, 4, 16, 32), Shape(1, 8, 32, 16)), 32, 128),
    "words of several periods": ((Shape(4, 4, 8, 16), Shape(2, 8, 16, 8)), 32, 64),
    "words, repeated": ((Shape(4, 2, 16, 32), Shape(8, 8, 8, 8)), 64, 64),
    "gathered": (filter_shapes("diverse", 5, 30, 42), 30, 42),
    "padded and cut": ((Shape(3, 5, 4, 7), Shape(2, 9, 9, 3), Shape(2, 2, 2, 2)), 11, 26),
    "identity": (filter_shapes("prime", 3, 40, 200), 40, 200),
    "identity, m != n": (filter_shapes("prime", 3, 12, 45), 12, 45),
    "wide loads": ((Shape(16, 8, 16, 16),) * 2, 256, 128),
    "words that stand out": ((Shape(3, 7, 16, 16), Shape(6, 5, 8, 32)), 48, 112),
    "words and gathers": ((Shape(4, 9, 16, 8), Shape(5, 4, 16, 18), Shape(8, 3, 8, 24)), 64, 72),
    "more than share a program": ((Shape(2, 3, 5, 2),) * 11, 10, 6),
    "one component": (filter_shapes("diverse", 1, 7, 13), 7, 13),
}


@pytest.fixture(params=CASES, ids=str)
def problem(request: pytest.FixtureRequest) -> tuple[Pairs, Tensor, tuple[Shape, ...], int, int]:
    torch.manual_seed(len(request.param))
    shapes, m, n = CASES[request.param]
    factors: Pairs = [
        (None if s.identity else torch.randn(s.m_a, s.n_a), torch.randn(s.m_b, s.n_b)) for s in shapes
    ]
    return factors, torch.randn(len(shapes)) * 3, tuple(shapes), m, n


@pytest.mark.parametrize("frozen", [False, True])
def test_the_weights_of_several_adapters_are_those_of_each(problem, frozen: bool) -> None:
    factors, weights, shapes, m, n = problem
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    left, right = pack(factors)
    source = kernels.WeightSource(torch.randn(m, n).bfloat16()) if frozen else None
    dtype = torch.bfloat16 if frozen else torch.float32
    scales = torch.tensor([[1.0], [-2.0], [0.0]])
    found = kernels.fused_weights(plan, left * scales, right + scales, weights * scales, dtype, source)
    assert found.shape == (3, m, n)
    for k, scale in enumerate(scales[:, 0].tolist()):
        gates = kernels.Gates(weights * scale)
        expected = kernels.fused_weight(plan, left * scale, right + scale, gates, dtype, source)
        assert torch.equal(found[k], expected)


def _double(factors: Pairs) -> Pairs:
    return [(None if a is None else a.double(), b.double()) for a, b in factors]


def test_the_cases_take_every_path() -> None:
    plans = [kernels.make_plan(tuple(shapes), m, n, DEVICE) for shapes, m, n in CASES.values()]
    assert {plan.words and plan.words[1] for plan in plans} == {None, 1, 4}
    assert {all(plan.aligned) for plan in plans if plan.words} == {True, False}
    assert {plan.exact for plan in plans} == {True, False}


def test_an_identity_touches_a_band_only() -> None:
    shapes = filter_shapes("prime", 3, 400, 400)
    plan = kernels.make_plan(shapes, 400, 400, DEVICE)
    assert 0 < plan.cells[:, 2].sum() < 0.5 * len(plan.cells)


def test_delta_weight_in_one_launch(problem) -> None:
    factors, weights, shapes, m, n = problem
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    found = kernels.fused_weight(plan, *pack(factors), kernels.Gates(weights), torch.float32)
    expected = delta_weight(weights.double(), *pack(_double(factors)), shapes, m, n)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [33, 35, 41, 50])  # of the last four periods one, two or three begin
def test_nothing_is_written_below_the_last_row(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (Shape(7, 4, 8, 8),)
    plan = kernels.make_plan(shapes, rows, 32, DEVICE)
    assert plan.words is not None
    assert plan.words[:2] == (8, 4)
    memory = torch.full((64, 32), 7.0)
    left, right = torch.randn(28), torch.randn(64)
    gates = kernels.Gates(torch.ones(1))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *size, **options: memory[:rows])
        found = kernels.fused_weight(plan, left, right, gates, torch.float32)
    torch.testing.assert_close(found, delta_weight(torch.ones(1), left, right, shapes, rows, 32))
    assert bool((memory[rows:] == 7.0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_of_the_gradient(problem, dtype: torch.dtype) -> None:
    factors, weights, shapes, m, n = problem
    grad = torch.randn(m, n).to(dtype)
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    left, right, found = kernels.fused_projection(plan, grad, *pack(factors), kernels.Gates(weights))
    expected = project(grad.double(), *pack(_double(factors)), weights.double(), shapes)
    for ours, exact in zip((left, right, found), expected, strict=True):
        scale = exact.abs().max() if exact.numel() else 1
        # The factors go in as two bfloat16 numbers: about 16 bits.
        torch.testing.assert_close(ours.double() / scale, exact / scale, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_to_a_dense_weight(problem, dtype: torch.dtype) -> None:
    factors, weights, shapes, m, n = problem
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    base = torch.randn(m, n).to(dtype)
    source = kernels.WeightSource(base.clone())
    found = kernels.fused_weight(plan, *pack(factors), kernels.Gates(weights), dtype, source)
    assert torch.equal(source.data, base)
    expected = base.double() + delta_weight(weights.double(), *pack(_double(factors)), shapes, m, n)
    bound = 2**-7 if dtype is torch.bfloat16 else 1e-5  # dithering may round to either neighbour
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=bound)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("case", ["words", "words, repeated", "words and gathers", "gathered", "identity"])
def test_a_4bit_weight_is_read_as_bitsandbytes_reads_it(case: str, nested: bool) -> None:
    # In float32: Triton's interpreter cuts bfloat16 off where a GPU rounds it (tests/gpu has that case).
    torch.manual_seed(0)
    shapes, m, n = CASES[case]
    layer = quantised_linear(nn.Linear(n, m), torch.randn(m, n) / 50, "nf4", nested, torch.float32)
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    zeros = pack(
        [(None if s.identity else torch.randn(s.m_a, s.n_a), torch.zeros(s.m_b, s.n_b)) for s in shapes]
    )
    source = kernel_weight(layer, torch.float32, even=True)
    found = kernels.fused_weight(plan, *zeros, kernels.Gates(torch.ones(len(shapes))), torch.float32, source)
    assert torch.equal(found, dense_weight(layer))  # bit for bit


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("case", ["words, repeated", "gathered"])
def test_gates_are_taken_from_their_logits(case: str, gating: Gating) -> None:
    torch.manual_seed(0)
    shapes, m, n = CASES[case]
    plan = kernels.make_plan(tuple(shapes), m, n, DEVICE)
    factors: Pairs = [(torch.randn(s.m_a, s.n_a), torch.randn(s.m_b, s.n_b)) for s in shapes]
    logits, grad = torch.randn(len(shapes)), torch.randn(m, n)
    gates = kernels.layer_gates(plan, logits, 1.7, gating)
    exact = logits.double().requires_grad_()
    delta = delta_weight(gates_of(exact, gating) * 1.7, *pack(_double(factors)), shapes, m, n)
    found = kernels.fused_weight(plan, *pack(factors), gates, torch.float32)
    torch.testing.assert_close(found.double(), delta.detach(), atol=1e-4, rtol=1e-5)
    (expected,) = torch.autograd.grad(delta, exact, grad.double())
    _, right, found = kernels.fused_projection(plan, grad, *pack(factors), gates)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-4)
    weights = gates_of(exact.detach(), gating) * 1.7
    _, expected, _ = project(grad.double(), *pack(_double(factors)), weights, shapes)
    torch.testing.assert_close(right.double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding(problem, dtype: torch.dtype) -> None:
    factors, weights, shapes, m, n = problem
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    x, base = torch.randn(2, n).to(dtype), torch.randn(2, m).to(dtype)
    out = base.clone()
    kernels.add_decode_update_(plan, out, x, *pack(factors), kernels.Gates(weights))
    exact = (
        base.double() + x.double() @ delta_weight(weights.double(), *pack(_double(factors)), shapes, m, n).mT
    )
    bound = 2**-7 if dtype is torch.bfloat16 else 1e-5  # the interpreter cuts bfloat16 off
    torch.testing.assert_close(
        out.double() / exact.abs().max(), exact / exact.abs().max(), atol=bound, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_tokens_with_adapters_of_their_own(problem, dtype: torch.dtype) -> None:
    factors, weights, shapes, m, n = problem
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    left, right = pack(factors)
    scales, adapter = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([2, 0, 2, 1])
    lefts, rights, every = left * scales, right + scales, weights * scales
    x, base = torch.randn(4, n).to(dtype), torch.randn(4, m).to(dtype)
    found = kernels.add_decode_update_(plan, base.clone(), x, lefts, rights, kernels.Gates(every), adapter)
    for token, k in enumerate(adapter.tolist()):
        alone = base[token : token + 1].clone()
        kernels.add_decode_update_(
            plan, alone, x[token : token + 1], lefts[k], rights[k], kernels.Gates(every[k])
        )
        assert torch.equal(found[token], alone[0])


def test_rounding_is_that_of_its_reference(problem) -> None:
    factors, weights, shapes, m, n = problem
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    base = torch.randn(m, n).bfloat16()
    source, gates = kernels.WeightSource(base), kernels.Gates(weights / 100)
    found = kernels.fused_weight(plan, *pack(factors), gates, torch.bfloat16, source)
    total = base.float() + kernels.fused_weight(plan, *pack(factors), gates, torch.float32)
    assert torch.equal(found, round_by_thresholds(total))


def test_updates_below_half_a_step_are_kept_on_average() -> None:
    shapes, m, n = CASES["wide loads"]
    plan = kernels.make_plan(shapes, m, n, DEVICE)
    base = torch.full((m, n), 1.0, dtype=torch.bfloat16)
    step = 2**-7  # from 1.0 to the next bfloat16
    left, right = pack([(torch.ones(s.m_a, s.n_a), torch.ones(s.m_b, s.n_b)) for s in shapes])
    for share in (0.01, 0.1, 0.4):
        weights = torch.full((2,), share * step / 2)
        source = kernels.WeightSource(base)
        total = kernels.fused_weight(plan, left, right, kernels.Gates(weights), base.dtype, source).double()
        assert set(total.unique().tolist()) == {1.0, 1.0 + step}
        expected, spread = share * step, step * (share * (1 - share) / (m * n)) ** 0.5
        assert abs((total - 1).mean() - expected) < 5 * spread
        # Nor are whole rows or columns rounded to one side.
        assert ((total - 1).mean(0) / step).std() < 2 * (share * (1 - share) / m) ** 0.5
        assert ((total - 1).mean(1) / step).std() < 2 * (share * (1 - share) / n) ** 0.5


def test_the_whole_product_with_all_gradients() -> None:
    torch.manual_seed(0)
    shapes = filter_shapes("diverse", 3, 12, 20)
    leaves = [torch.randn(2, 5, 20), torch.randn(3)]
    leaves += [torch.randn(s.m_a, s.n_a) for s in shapes] + [torch.randn(s.m_b, s.n_b) for s in shapes]
    upstream = torch.randn(2, 5, 12)

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        pairs = list(zip(own[2:5], own[5:8], strict=True))
        out = kronecker_linear(own[0], own[1], *pack(pairs), shapes, 12, backend)
        return out, torch.autograd.grad(out, own, upstream.to(dtype))

    out, gradients = run("fused", torch.float32)
    expected, references = run("structured", torch.float64)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-4)
    for found, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(found.double(), reference, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("nan")])
def test_non_finite_values_show(bad: float, dtype: torch.dtype) -> None:
    shapes = filter_shapes("square", 2, 8, 8)
    plan = kernels.make_plan(shapes, 8, 8, DEVICE)
    factors: Pairs = [(torch.ones(s.m_a, s.n_a), torch.ones(s.m_b, s.n_b)) for s in shapes]
    weights = torch.ones(2)
    grad = torch.ones(8, 8, dtype=dtype)
    grad[1, 2] = bad
    for found in kernels.fused_projection(plan, grad, *pack(factors), kernels.Gates(weights)):
        assert not found.isfinite().all()
    factors[1][1][0, 0] = bad
    assert not kernels.fused_weight(plan, *pack(factors), kernels.Gates(weights), dtype).isfinite().all()
    source = kernels.WeightSource(torch.ones(8, 8, dtype=dtype))
    total = kernels.fused_weight(plan, *pack(factors), kernels.Gates(weights), dtype, source)
    assert not total.isfinite().all()


def test_fused_falls_back_where_its_kernels_cannot_run() -> None:
    from moka_pl.ops import dispatch

    dispatch._warn_unfused.cache_clear()
    shapes = filter_shapes("square", 2, 6, 6)
    factors: Pairs = [
        (torch.randn(s.m_a, s.n_a).double(), torch.randn(s.m_b, s.n_b).double()) for s in shapes
    ]
    x, weights = torch.randn(4, 6).double(), torch.randn(2).double()
    with pytest.warns(UserWarning, match="backend: dense"):  # float64 factors
        found = kronecker_linear(x, weights, *pack(factors), shapes, 6, "fused")
    torch.testing.assert_close(found, x @ delta_weight(weights, *pack(factors), shapes, 6, 6).mT)
