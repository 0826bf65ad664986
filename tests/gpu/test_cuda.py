"""What only a CUDA device can show; run with ``pytest -m gpu``."""

import pytest
import torch

from moka_pl.adapters import MokaConfig, moka_layers
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data import CommonsenseData
from moka_pl.filters import filter_shapes
from moka_pl.kronecker import delta_weight, kronecker_linear
from moka_pl.module import MokaModule

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
    [(4096, 4096, "diverse"), (1024, 4096, "diverse"), (192, 576, "prime"), (197, 83, "diverse")],
)
def test_backends_agree_with_float64(backend: str, dtype: torch.dtype, m: int, n: int, filters: str) -> None:
    shapes, factors, weights, x = _problem(m, n, filters, 64)
    leaves = [x, weights, *(f for pair in factors for f in pair if f is not None)]
    exact = [leaf.clone().requires_grad_() for leaf in leaves]
    rest = iter(exact[2:])
    wide = [(None if a is None else next(rest), next(rest)) for a, _ in factors]
    target = exact[0] @ delta_weight(exact[1], wide, shapes, m, n).mT
    upstream = torch.randn_like(target)
    expected = torch.autograd.grad(target, exact, upstream)

    low = [leaf.float().requires_grad_() for leaf in leaves]
    rest = iter(low[2:])
    narrow = [(None if a is None else next(rest), next(rest)) for a, _ in factors]
    out = kronecker_linear(low[0].to(dtype), low[1], narrow, shapes, m, backend)
    found = torch.autograd.grad(out, low, upstream.to(dtype))

    bound = 2e-2 if dtype is torch.bfloat16 else 2e-3
    assert _error(out, target) < bound
    for gradient, reference in zip(found, expected, strict=True):
        assert _error(gradient, reference) < bound


def _error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


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
