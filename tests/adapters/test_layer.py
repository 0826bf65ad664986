"""One adapted layer, on dense and on 4-bit bases."""

from collections import OrderedDict

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.backbone.quantization import dense_weight
from moka_pl.errors import AdapterError
from moka_pl.ops.layout import unpack

N, M = 48, 40


def linear(bias: bool = True, dtype: torch.dtype = torch.float64, n: int = N, m: int = M) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n, m, bias=bias, dtype=dtype).requires_grad_(False)


def linear4bit(kind: str = "nf4", bias: bool = True, dtype: torch.dtype = torch.float32) -> bnb.nn.Linear4bit:
    """A double-quantised layer of 64-entry blocks, on the CPU."""
    dense = linear(bias, dtype, n=64)
    layer = bnb.nn.Linear4bit(
        64, M, bias=bias, compute_dtype=torch.float32, quant_type=kind, compress_statistics=True
    )
    layer.weight = bnb.nn.Params4bit(
        dense.weight.data, requires_grad=False, quant_type=kind, compress_statistics=True
    )
    layer.bias = dense.bias
    return layer.to("cpu").requires_grad_(False)


def four_bit_bytes(layer: bnb.nn.Linear4bit) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_bytes(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(expected) > 2  # packed weight and the quantisation's statistics
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def adapt(base: nn.Linear, dtype: torch.dtype = torch.float32, **options: object) -> MokaLinear:
    torch.manual_seed(1)
    return MokaLinear(base, MokaConfig(**({"components": 3, "scaling": 1.7} | options)), dtype)


def inputs(*leading: int, n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*leading, n, generator=torch.Generator().manual_seed(2), dtype=dtype)


BASES = {
    "float64": (lambda: linear(), torch.float64, {"rtol": 1e-10, "atol": 1e-10}),
    "float32 without bias": (
        lambda: linear(False, torch.float32),
        torch.float32,
        {"rtol": 1e-4, "atol": 1e-5},
    ),
    "nf4": (lambda: linear4bit("nf4"), torch.float32, {"rtol": 1e-4, "atol": 1e-5}),
    "fp4": (lambda: linear4bit("fp4"), torch.float32, {"rtol": 1e-4, "atol": 1e-5}),
    "nf4 without bias": (lambda: linear4bit("nf4", bias=False), torch.float32, {"rtol": 1e-4, "atol": 1e-5}),
}
VARIANTS = {
    "diverse": {"filters": "diverse"},
    "prime": {"filters": "prime"},
    "padding and cutting": {"filters": [[3, 5, 4, 7], [7, 7, 7, 8], [9, 2]]},
    "servable": {"filters": "servable", "rank": 6},
    "zero left factors": {"start": "zero_left"},
    "ungated": {"gating": "none"},
    "sigmoid": {"gating": "sigmoid"},
    "structured": {"backend": "structured"},
    "dense": {"backend": "dense"},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_step_0_is_the_frozen_layer_bit_for_bit(base: str, options: dict) -> None:
    make, dtype, _ = BASES[base]
    layer = adapt(make(), dtype, **options)
    x = inputs(2, 5, n=layer.in_features, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.get_delta_weight().any()
    # ΔW = 0, but not stuck there: the factors that start at zero have a gradient.
    layer(x).square().sum().backward()
    lefts = None if layer.moka_A is None else layer.moka_A.grad
    zero = 0 if options.get("start") == "zero_left" else 1
    assert all(pair[zero].abs().max() > 0 for pair in unpack(lefts, layer.moka_B.grad, layer.shapes))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_delta_weight_merged_and_unmerged_forward_agree(
    base: str, options: dict, training: bool, randomize
) -> None:
    make, dtype, tolerance = BASES[base]
    layer = adapt(make(), dtype, **options).train(training)
    randomize(layer)
    x = inputs(2, 5, n=layer.in_features, dtype=dtype)
    with torch.no_grad():
        unmerged, frozen = layer(x), layer.base_layer(x)
        update = x @ layer.get_delta_weight().mT
        assert update.abs().mean() > 0.1
        torch.testing.assert_close(unmerged, frozen + update, **tolerance)
        bias = layer.base_layer.bias
        by_hand = F.linear(x, dense_weight(layer.base_layer) + layer.get_delta_weight(), bias)
        torch.testing.assert_close(unmerged, by_hand, **tolerance)
        layer.merge()
        assert layer.merged_layer is not None
        torch.testing.assert_close(layer(x), unmerged, **tolerance)
        layer.merge()  # a second time changes nothing
        torch.testing.assert_close(layer(x), unmerged, **tolerance)


@pytest.mark.parametrize("base", BASES)
def test_unmerge_restores_outputs_and_base_weight_bit_for_bit(base: str, randomize) -> None:
    make, dtype, _ = BASES[base]
    layer = adapt(make(), dtype)
    randomize(layer)
    x = inputs(4, n=layer.in_features, dtype=dtype)
    weight = {name: t.clone() for name, t in layer.base_layer.state_dict().items()}
    with torch.no_grad():
        before = layer(x)
        layer.merge()
        layer(x)
        layer.unmerge()
        assert layer.merged_layer is None
        assert torch.equal(layer(x), before)
    for name, tensor in layer.base_layer.state_dict().items():
        assert torch.equal(tensor, weight[name]), name


def test_merged_weight_is_frozen_and_shares_nothing_with_the_base(randomize) -> None:
    layer = adapt(linear())
    randomize(layer)
    layer.merge()
    base, merged = layer.base_layer, layer.merged_layer
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    assert merged.weight.data_ptr() != base.weight.data_ptr()
    assert merged.bias.data_ptr() != base.bias.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_4bit_layer_takes_every_dtype_that_the_4bit_layer_takes(bias: bool, randomize) -> None:
    layer = adapt(linear4bit(bias=bias, dtype=torch.bfloat16))
    randomize(layer, std=0.1)
    x = inputs(3, n=64, dtype=torch.float32)
    with torch.no_grad():
        unmerged = layer(x)  # bitsandbytes casts the bias to the input's dtype here
        layer.merge()
        merged = layer(x)
    assert unmerged.dtype == merged.dtype == torch.float32
    assert (merged - unmerged).norm() < 0.02 * unmerged.norm()


def test_a_4bit_layer_that_is_not_quantised_yet_cannot_be_merged() -> None:
    layer = adapt(bnb.nn.Linear4bit(64, M))
    with pytest.raises(AdapterError, match="not quantised yet"):
        layer.merge()


def test_an_integer_weight_of_another_kind_cannot_be_merged() -> None:
    base = linear()
    base.weight = nn.Parameter(torch.ones(M, N, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"cannot merge into a Linear with torch\.int8 weights"):
        adapt(base).merge()


def test_a_disabled_layer_is_the_frozen_one_merged_or_not(randomize) -> None:
    layer = adapt(linear())
    randomize(layer)
    x = inputs(4)
    frozen, adapted = layer.base_layer(x), layer(x)
    assert not torch.allclose(frozen, adapted)
    layer.enabled = False
    assert torch.equal(layer(x), frozen)
    layer.merge()
    assert torch.equal(layer(x), frozen)
    layer.enabled = True
    torch.testing.assert_close(layer(x), adapted)


@pytest.mark.parametrize("filters", ["diverse", "prime"])
def test_dropout_acts_in_training_only_and_keeps_the_mean(filters: str, randomize) -> None:
    layer = adapt(linear(), torch.float64, filters=filters, dropout=0.4)
    randomize(layer)
    token = inputs()
    copies = token.expand(20_000, N)
    with torch.no_grad():
        frozen = layer.base_layer(token)
        layer.eval()
        update = layer(token) - frozen
        assert torch.equal(layer(token) - frozen, update)
        layer.train()
        torch.manual_seed(4)
        drawn = layer(copies) - frozen
        delta = layer.get_delta_weight()
    spread = (delta.square() @ token.square() * 0.4 / 0.6).sqrt()  # of inverted dropout, feature by feature
    torch.testing.assert_close(drawn.std(0), spread, rtol=0.05, atol=1e-3)
    assert ((drawn.mean(0) - update).abs() < 6 * spread / len(copies) ** 0.5 + 1e-9).all()


@pytest.mark.parametrize("training", [True, False])
def test_a_new_layer_trains_or_evaluates_as_its_base_does(training: bool, randomize) -> None:
    layer = adapt(linear().train(training), torch.float64, dropout=0.5)
    randomize(layer)
    x = inputs(6)
    assert layer.training is training
    assert torch.equal(layer(x), layer(x)) is not training


def test_without_gating_every_component_counts_one_rth(randomize) -> None:
    layer = adapt(linear(), torch.float64, gating="none", components=4, filters="square", scaling=1.3)
    randomize(layer)
    assert layer.moka_gate is None
    torch.testing.assert_close(layer.gates(), torch.full((4,), 0.25, dtype=torch.float64))
    expected = 1.3 / 4 * sum(torch.kron(a, b)[:M, :N] for a, b in layer.factors())
    torch.testing.assert_close(layer.get_delta_weight(), expected)


def test_gates_are_the_softmax_of_their_logits(randomize) -> None:
    layer = adapt(linear(), torch.float64, filters="square", scaling=1.3)
    assert layer.gates().tolist() == pytest.approx([1 / 3] * 3)
    randomize(layer)
    alpha = layer.moka_gate.exp() / layer.moka_gate.exp().sum()
    assert alpha.max() > 1.5 * alpha.min()
    pairs = zip(alpha, layer.factors(), strict=True)
    expected = 1.3 * sum(w * torch.kron(a, b)[:M, :N] for w, (a, b) in pairs)
    torch.testing.assert_close(layer.get_delta_weight(), expected)


def test_scaling_defaults_to_components_and_multiplies_the_update(randomize) -> None:
    deltas = {}
    for scaling in (None, 5.0, 1.0):
        layer = adapt(linear(), torch.float64, components=5, scaling=scaling)
        randomize(layer)
        deltas[scaling] = layer.get_delta_weight()
    assert torch.equal(deltas[None], deltas[5.0])
    torch.testing.assert_close(deltas[None], 5 * deltas[1.0])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("filters", ["diverse", "prime"])
def test_adamw_learns_a_regression_on_a_4bit_base(kind: str, filters: str, randomize) -> None:
    teacher = adapt(linear4bit(kind), components=4, filters=filters)
    randomize(teacher)
    student = adapt(linear4bit(kind), components=4, filters=filters, scaling=None)
    student.base_layer.requires_grad_(False)
    before = four_bit_bytes(student.base_layer)
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-2)
    x = inputs(128, n=64, dtype=torch.float32)
    target = teacher(x).detach()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(student(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert student.moka_gate.detach().std() > 1e-3
    assert_same_bytes(four_bit_bytes(student.base_layer), before)


@pytest.mark.parametrize("backend", ["structured", "dense"])
def test_a_bf16_base_with_float32_factors(backend: str, randomize) -> None:
    layer = adapt(linear(dtype=torch.bfloat16), backend=backend)
    exact = adapt(linear(dtype=torch.bfloat16).double(), torch.float64, backend=backend)
    randomize(layer)
    randomize(exact)
    x = inputs(7, dtype=torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    expected = exact(x.double())
    assert (out.double() - expected).norm() < 0.01 * expected.norm()
    out.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        if name.startswith("moka_"):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().max() > 0
    layer.merge()
    assert layer.merged_layer.weight.dtype == torch.bfloat16
    assert (layer(x).double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("backend", ["structured", "dense"])
@pytest.mark.parametrize("base", ["float32 without bias", "nf4"])
def test_autocast_computes_the_update_in_bf16_from_exact_factors(base: str, backend: str, randomize) -> None:
    layer = adapt(BASES[base][0](), backend=backend)
    randomize(layer)
    x = inputs(16, n=layer.in_features, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        frozen, out = layer.base_layer(x), layer(x)
    assert out.dtype == frozen.dtype
    exact = x @ layer.get_delta_weight().mT
    error = (out.float() - frozen.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.015  # bf16, not more and not less
    out.float().square().sum().backward()
    assert layer.moka_B.grad.dtype == torch.float32


def test_gradients_reach_the_input_and_only_the_trainable_tensors(randomize) -> None:
    layer = adapt(linear(), torch.float64)
    randomize(layer)
    x = inputs(3).requires_grad_()
    out = layer(x)
    (out * out.detach()).sum().backward()
    weight = layer.base_layer.weight + layer.get_delta_weight()
    torch.testing.assert_close(x.grad, (out @ weight).detach())
    assert layer.base_layer.weight.grad is None
    assert layer.moka_gate.grad.abs().max() > 0
    assert layer.moka_gate.grad.sum().abs() < 1e-9 * layer.moka_gate.grad.abs().max()  # softmax is shift-free


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (2, 3, 4)])
def test_any_leading_dimensions(leading: tuple[int, ...], randomize) -> None:
    layer = adapt(linear(), torch.float64)
    randomize(layer)
    x = inputs(*leading)
    expected = F.linear(x, layer.base_layer.weight + layer.get_delta_weight(), layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_printing_tells_sizes_components_and_gating() -> None:
    text = adapt(linear(), gating="none").extra_repr()
    assert text == "in_features=48, out_features=40, components=3, gating=none, scaling=1.7"


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"filters": "servable", "components": 1, "rank": 16}, 16),
        ({"filters": "servable", "components": 3, "rank": 6, "gating": "sigmoid"}, 18),
        ({"filters": [[2, 6, 20, 8]]}, 40),  # the ranks add up to more
        ({"filters": [[5, 2, 4, 3]]}, 18),  # covers half of the rows and an eighth of the columns
        ({"filters": "prime"}, 40),
    ],
)
def test_pefts_lora_of_the_exact_rank_gives_the_same_outputs(options: dict, rank: int) -> None:
    layer = adapt(linear(dtype=torch.float32), **options)
    with torch.no_grad():
        for parameter in (layer.moka_A, layer.moka_B, layer.moka_gate):
            if parameter is not None:
                parameter.normal_(std=0.3)
    lora_a, lora_b = layer.lora_factors()
    assert len(lora_a) == layer.exact_lora_rank() == rank
    wrapped = nn.Sequential(OrderedDict(proj=linear(dtype=torch.float32)))
    served = peft.get_peft_model(
        wrapped, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["proj"], init_lora_weights=False)
    )
    proj = served.base_model.model.proj
    with torch.no_grad():
        proj.lora_A["default"].weight.copy_(lora_a)
        proj.lora_B["default"].weight.copy_(lora_b)
    x = inputs(4, 7, dtype=torch.float32)
    torch.testing.assert_close(served(x), layer(x), rtol=1e-5, atol=1e-5)
