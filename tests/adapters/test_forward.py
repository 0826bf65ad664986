"""When a frozen layer and its update are computed as one product, and that it changes nothing else."""

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.adapters.forward import count_merged, plan_forward
from moka_pl.backbone.quantization import dense_weight
from moka_pl.ops import merged_forward
from moka_pl.ops.gating import gates_of
from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.merged_forward import DenseUpdates, StructuredUpdates
from moka_pl.ops.thin import ThinUpdates

M, N, TOKENS = 24, 64, 40  # bitsandbytes misreads rows of 32 on some CPUs

OPTIONS = {
    "gated": {"components": 3, "scaling": 1.7},
    "sigmoid": {"components": 3, "gating": "sigmoid", "scaling": 1.7},
    "ungated": {"components": 3, "gating": "none", "scaling": 1.7},
    "prime": {"components": 2, "filters": "prime"},
}
#: Two components of rank 2; the second stands out of the layer.
THIN = {"components": 2, "filters": [[2, 64, 12, 1], [1, 22, 24, 3]], "scaling": 1.7}


def adapted(
    backend: str, four_bit: bool = False, dtype: torch.dtype = torch.float32, **options
) -> MokaLinear:
    """A layer with random factors and gates."""
    torch.manual_seed(0)
    base: nn.Linear = nn.Linear(N, M).to(dtype)
    if four_bit:
        quantised = bnb.nn.Linear4bit(N, M, compute_dtype=dtype, quant_type="nf4")
        quantised.load_state_dict(base.state_dict())
        base = quantised.to("cpu")
    base.requires_grad_(False)
    factors = torch.float64 if dtype is torch.float64 else torch.float32
    layer = MokaLinear(base, MokaConfig(backend=backend, **options), factors)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("moka_"):
                parameter.normal_(std=0.5)
    return layer


def tokens(count: int = TOKENS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, count // 2, N, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(
    ("backend", "options"),
    [(b, o) for b in ("structured", "dense", "fused") for o in [*OPTIONS, "thin"]]
    + [("thin", "thin"), ("auto", "thin")],
)
def test_one_product_gives_the_outputs_and_gradients_of_float64(backend, options, four_bit) -> None:
    layer = adapted(backend, four_bit, **{**OPTIONS, "thin": THIN}[options])
    x = tokens().requires_grad_()
    assert (type(plan_forward(layer, x).updates) is ThinUpdates) == (backend in ("thin", "auto"))
    wanted = {"x": x} | {name: p for name, p in layer.named_parameters() if name.startswith("moka_")}
    upstream = torch.randn(2, TOKENS // 2, M, generator=torch.Generator().manual_seed(2))
    out = layer(x)
    found = torch.autograd.grad(out, list(wanted.values()), upstream)

    exact = {name: p.detach().double().requires_grad_() for name, p in wanted.items()}
    r = layer.components
    gated = "moka_gate" in exact
    alpha = gates_of(exact["moka_gate"], layer.gating) if gated else torch.full((r,), 1 / r).double()
    left = exact.get("moka_A", exact["moka_B"].new_empty(0))
    delta = delta_weight(alpha * layer.scaling, left, exact["moka_B"], layer.shapes, M, N)
    base = layer.base_layer
    target = exact["x"] @ (dense_weight(base).double() + delta).mT + base.bias.double()
    torch.testing.assert_close(out.double(), target, atol=1e-4, rtol=1e-4)
    expected = torch.autograd.grad(target, list(exact.values()), upstream.double())
    for name, ours, theirs in zip(wanted, found, expected, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 1e-4, name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dtype", "four_bit"),  # bitsandbytes does not compute in float64
    [(torch.float32, False), (torch.float32, True), (torch.float64, False), (torch.bfloat16, True)],
)
def test_thin_products_start_as_the_frozen_layer_bit_for_bit(dtype, autocast, four_bit) -> None:
    layer = adapted("thin", four_bit, dtype, **THIN)
    x = tokens(8, dtype).requires_grad_()
    update = x.double() @ layer.get_delta_weight().double().mT
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        changed, frozen = layer(x), layer.base_layer(x)
        nn.init.zeros_(layer.moka_B)
        started = layer(x)
    assert torch.equal(started, frozen)
    assert started.dtype == frozen.dtype
    error = (changed.double() - frozen.double() - update).norm() / update.norm()
    assert error < {torch.float32: 1e-5, torch.float64: 1e-12}.get(started.dtype, 1e-2)
    assert type(plan_forward(layer, x).updates) is ThinUpdates
    started.float().square().sum().backward()
    assert layer.moka_A.grad.abs().max() == 0  # as B is
    assert layer.moka_B.grad.isfinite().all()
    assert layer.moka_B.grad.abs().max() > 0


@pytest.mark.parametrize("four_bit", [False, True])
def test_fused_thin_products_are_made_again_where_a_layer_has_changed(four_bit, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("moka_pl.adapters.forward.can_fuse_thin", lambda *_: True)
    layer, x = adapted("thin", four_bit, **THIN), tokens()
    first = plan_forward(layer, x).updates
    assert type(first).__name__ == "FusedThinUpdates"
    assert plan_forward(layer, x).updates is first
    for scaling in (1.7, -0.4):
        layer.scaling = scaling
        with torch.no_grad():
            found = layer(x)
            exact = layer.base_layer(x) + x @ layer.get_delta_weight().mT
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)
    assert plan_forward(layer, x).updates is not first


def test_the_scaling_of_a_layer_may_be_set_to_a_whole_number() -> None:
    layer, x = adapted("thin", components=1, filters=[[2, 64, 12, 1]]), tokens()
    for scaling in (2, 0, 1.5):
        layer.scaling = scaling
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ layer.get_delta_weight().mT)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_trace_leaves_nothing_behind(four_bit) -> None:
    layer, x = adapted("thin", four_bit, **THIN), tokens()
    adapted("thin", four_bit, **THIN)(x)  # what is kept by sizes is there, what is kept by layers is not
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert layer(mode.from_tensor(x)).shape == (*x.shape[:-1], M)
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, layer.base_layer(x) + x @ layer.get_delta_weight().mT)


def test_thin_products_save_little_beside_the_input() -> None:
    layer = adapted("thin", **THIN)
    x = tokens().requires_grad_()
    saved = layer(x).grad_fn.next_functions[0][0].saved_tensors
    entries = sum(t.numel() for t in (x, layer.moka_gate, layer.moka_A, layer.moka_B))
    assert sum(t.numel() for t in saved) == entries + 5 * TOKENS


def saved_beside_its_inputs(layer: MokaLinear, x: Tensor) -> int:
    """Numbers that a layer saves for the backward pass, without its input, gates and factors."""
    saved = layer(x.requires_grad_()).grad_fn.next_functions[0][0].saved_tensors
    inputs = {t.data_ptr() for t in (x, layer.moka_gate, layer.moka_A, layer.moka_B)}
    assert inputs <= {t.data_ptr() for t in saved}
    return sum(t.numel() for t in saved if t.data_ptr() not in inputs)


@pytest.mark.parametrize("backend", ["dense", "fused"])
def test_a_cpu_saves_the_sum_only_where_it_is_small_beside_input_and_output(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = adapted(backend, components=3)
    assert saved_beside_its_inputs(layer, tokens(2)) == M * N
    monkeypatch.setattr(merged_forward, "_SMALL", 0)
    few = M * N // (M + N) // 2 * 2
    assert saved_beside_its_inputs(layer, tokens(few)) == 0
    assert saved_beside_its_inputs(layer, tokens(few + 2)) == M * N


def test_structured_products_save_the_factors_in_their_order() -> None:
    layer = adapted("structured", components=3)
    assert saved_beside_its_inputs(layer, tokens()) == layer.moka_A.numel() + layer.moka_B.numel()


@pytest.mark.parametrize("backend", ["structured", "dense"])
def test_what_a_cpu_saves_changes_no_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted(backend, components=3), tokens().requires_grad_()
    inputs = [x, layer.moka_gate, layer.moka_A, layer.moka_B]

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(layer(x).square().sum(), inputs))

    found = gradients()
    monkeypatch.setattr(DenseUpdates, "_keeps", lambda self, x: False)
    assert saved_beside_its_inputs(layer, x) == 0
    assert all(map(torch.equal, found, gradients()))


def test_auto_builds_the_update_for_many_tokens_and_not_for_a_few() -> None:
    layer = MokaLinear(nn.Linear(576, 576).requires_grad_(False), MokaConfig())
    assert type(plan_forward(layer, torch.randn(2, 256, 576)).updates) is DenseUpdates
    assert type(plan_forward(layer, torch.randn(2, 32, 576)).updates) is StructuredUpdates


@pytest.mark.parametrize("backend", ["structured", "dense"])
def test_an_input_that_needs_no_gradient_gets_none_and_the_factors_theirs(backend) -> None:
    layer = adapted(backend, components=3)
    x = tokens()
    layer(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer(x.requires_grad_()).square().sum().backward()
    assert x.grad.abs().max() > 0
    expected = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected)


def test_structured_products_leave_the_frozen_weight_as_it_is() -> None:
    layer = adapted("structured", components=3)
    before = layer.base_layer.weight.clone()
    layer(tokens().requires_grad_()).sum().backward()
    assert torch.equal(layer.base_layer.weight, before)


def test_half_precision_is_merged_only_by_the_kernels() -> None:
    x = tokens(512, torch.bfloat16)
    layer = adapted("dense", dtype=torch.bfloat16, components=3)
    assert plan_forward(layer, x) is None
    layer.backend = "fused"
    assert plan_forward(layer, x).compute is torch.bfloat16


def test_a_trained_bias_keeps_its_gradient() -> None:
    layer = adapted("dense", components=3)
    layer.base_layer.bias.requires_grad_()
    layer(tokens()).sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((M,), float(TOKENS)))


def test_who_listens_to_the_frozen_layer_is_still_called() -> None:
    layer = adapted("dense", components=3)
    x = tokens()
    expected = layer(x)
    heard = []
    layer.base_layer.register_forward_hook(lambda module, args, out: heard.append(out))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(heard[0], layer.base_layer(x))


def test_another_shape_of_linear_layer_runs_itself() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    base = Doubled(N, M).requires_grad_(False)
    layer = MokaLinear(base, MokaConfig(backend="dense", components=3))
    x = tokens()
    torch.testing.assert_close(layer(x), base(x))  # ΔW = 0


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_without_gradients_go_through_their_own_kernels(options, four_bit, monkeypatch) -> None:
    import moka_pl.ops.triton

    layer = adapted("fused", four_bit, **options)
    x = tokens(6)
    calls = []
    original = moka_pl.ops.triton.add_decode_update_
    monkeypatch.setattr(
        moka_pl.ops.triton, "add_decode_update_", lambda *args: calls.append(1) or original(*args)
    )
    layer(x)
    assert not calls  # gradients are wanted
    with torch.no_grad():
        found = layer(x)
    assert calls
    expected = layer.base_layer(x).double() + x.double() @ layer.get_delta_weight().double().mT
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-4, rtol=1e-4)


def test_layers_are_counted_that_merge_the_update_with_the_weight() -> None:
    thin = {"filters": "servable", "rank": 4, "components": 1}
    counted = [adapted("auto"), adapted("fused"), adapted("dense"), adapted("auto", dropout=0.1)]
    uncounted = [adapted("auto", **thin)]
    assert count_merged(nn.Sequential(*counted, *uncounted)) == 2
