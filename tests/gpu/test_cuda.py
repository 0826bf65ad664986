"""What only a CUDA device can show; run with ``pytest -m gpu``."""

import bitsandbytes as bnb
import pytest
import torch

from moka_pl.adapters import MokaConfig, MokaLinear, moka_layers
from moka_pl.adapters.filters import filter_shapes
from moka_pl.adapters.forward import plan_forward
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.quantization import dense_weight
from moka_pl.data import CommonsenseData
from moka_pl.ops.kronecker import delta_weight, kronecker_linear
from moka_pl.ops.layout import pack
from moka_pl.ops.triton import FusedUpdates
from moka_pl.training.module import MokaModule

pytestmark = pytest.mark.gpu


def _problem(m: int, n: int, filters: str, tokens: int):
    generator = torch.Generator("cuda").manual_seed(m + n)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.float64, generator=generator)

    shapes = filter_shapes(filters, 10, m, n)
    factors = [(None if s.identity else draw(s.m_a, s.n_a) / 8, draw(s.m_b, s.n_b) / 8) for s in shapes]
    return shapes, factors, draw(10).softmax(0) * 7, draw(tokens, n)


@pytest.mark.parametrize("backend", ["structured", "dense", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "filters"),
    [
        (4096, 4096, "diverse"),
        (1024, 4096, "diverse"),
        (3968, 4112, "diverse"),  # some filters stand out, some meet no squares
        (192, 576, "prime"),
        (197, 83, "diverse"),
    ],
)
def test_backends_agree_with_float64(backend: str, dtype: torch.dtype, m: int, n: int, filters: str) -> None:
    shapes, factors, weights, x = _problem(m, n, filters, 64)
    leaves = [x, weights, *(f for pair in factors for f in pair if f is not None)]
    exact = [leaf.clone().requires_grad_() for leaf in leaves]
    rest = iter(exact[2:])
    wide = [(None if a is None else next(rest), next(rest)) for a, _ in factors]
    target = exact[0] @ delta_weight(exact[1], *pack(wide), shapes, m, n).mT
    upstream = torch.randn_like(target)
    expected = torch.autograd.grad(target, exact, upstream)

    low = [leaf.float().requires_grad_() for leaf in leaves]
    rest = iter(low[2:])
    narrow = [(None if a is None else next(rest), next(rest)) for a, _ in factors]
    out = kronecker_linear(low[0].to(dtype), low[1], *pack(narrow), shapes, m, backend)
    found = torch.autograd.grad(out, low, upstream.to(dtype))

    bound = 2e-2 if dtype is torch.bfloat16 else 2e-3
    assert _error(out, target) < bound
    for gradient, reference in zip(found, expected, strict=True):
        assert _error(gradient, reference) < bound


def _error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def _layer(m: int, n: int, filters: str, dtype: torch.dtype = torch.bfloat16) -> MokaLinear:
    """An adapted NF4 layer with factors of ordinary size."""
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(n, m, compute_dtype=dtype, quant_type="nf4", compress_statistics=True).to("cuda")
    layer = MokaLinear(base.to(dtype).requires_grad_(False), MokaConfig(filters=filters))
    with torch.no_grad():
        layer.moka_gate.normal_()
        layer.moka_B.normal_(std=0.02)
    return layer


LAYERS = [
    (4096, 4096, "diverse"),
    (1024, 4096, "diverse"),
    (3968, 4112, "diverse"),
    (3584, 3584, "diverse"),
    (192, 576, "prime"),
    (576, 576, "diverse"),
]


@pytest.mark.parametrize(("m", "n", "filters"), LAYERS)
def test_without_an_update_the_merged_weight_is_the_frozen_one(m: int, n: int, filters: str) -> None:
    layer = _layer(m, n, filters)
    with torch.no_grad():
        layer.moka_B.zero_()
    x = torch.randn(64, n, device="cuda", dtype=torch.bfloat16)
    plan = plan_forward(layer, x)
    assert isinstance(plan.updates, FusedUpdates)
    assert plan.updates.source is not None  # read by the kernel itself
    found = plan.updates.weight(layer._left(), layer.moka_B, layer.moka_gate, torch.bfloat16)
    assert torch.equal(found, dense_weight(layer.base_layer).bfloat16())


@pytest.mark.parametrize(("m", "n", "filters"), [*LAYERS, (197, 83, "diverse")])
def test_a_merged_forward_agrees_with_float64(m: int, n: int, filters: str) -> None:
    layer = _layer(m, n, filters)
    x = torch.randn(4, 32, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(4, 32, m, device="cuda", dtype=torch.bfloat16)
    out = layer(x)
    wanted = [p for p in (x, layer.moka_gate, layer.moka_A, layer.moka_B) if p is not None]
    found = torch.autograd.grad(out, wanted, upstream)

    exact = [p.detach().double().requires_grad_() for p in wanted]
    left = exact[-1].new_empty(0) if layer.moka_A is None else exact[2]
    weights = exact[1].softmax(0) * layer.scaling
    delta = delta_weight(weights, left, exact[-1], layer.shapes, m, n)
    target = exact[0] @ (dense_weight(layer.base_layer).double() + delta).mT + layer.base_layer.bias.double()
    expected = torch.autograd.grad(target, exact, upstream.double())
    assert _error(out, target) < 6e-3
    for gradient, reference in zip(found, expected, strict=True):
        assert _error(gradient, reference) < 1e-2


@pytest.mark.parametrize(("m", "n", "filters"), [*LAYERS, (197, 83, "diverse")])
@pytest.mark.parametrize("tokens", [1, 5])
def test_decoding_agrees_with_float64(m: int, n: int, filters: str, tokens: int) -> None:
    layer = _layer(m, n, filters)
    x = torch.randn(1, tokens, n, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        found = layer(x) - layer.base_layer(x)
    exact = x.double() @ layer.get_delta_weight().double().mT
    assert _error(found, exact) < 6e-3 * float((layer.base_layer(x).double().norm() / exact.norm()) + 1)


def test_deterministic_mode_gives_the_same_bits_twice() -> None:
    layer = _layer(4096, 4096, "diverse")
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            out = layer(x)
            inputs = [x, layer.moka_gate, layer.moka_A, layer.moka_B]
            runs.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_training_a_4bit_model_lowers_the_loss(tmp_path) -> None:
    import lightning.pytorch as pl

    module = MokaModule(
        BackboneConfig(name="tiny", weights="random", compute_dtype="bfloat16"),
        MokaConfig(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2),
        gradient_checkpointing=True,
    )
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="gpu",
        devices=1,
        num_sanity_val_steps=-1,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    data = CommonsenseData(max_length=512, batch_size=16)
    trainer.fit(module, datamodule=data)
    before = module.eval_values["val/loss"]
    untrained = MokaModule(BackboneConfig(name="tiny", weights="random", compute_dtype="bfloat16"))
    pl.Trainer(accelerator="gpu", devices=1, logger=False).validate(
        untrained, datamodule=CommonsenseData(max_length=512)
    )
    assert before < untrained.eval_values["val/loss"]
    assert all(layer.moka_B.dtype == torch.float32 for layer in moka_layers(module.causal_lm).values())


def test_a_7b_model_is_built_without_holding_it_in_full_precision() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load_backbone(BackboneConfig(name="llama2-7b", weights="random"), "cuda")
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < 5 * 2**30
    assert loaded.model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
