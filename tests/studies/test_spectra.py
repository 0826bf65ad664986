"""Singular values and effective ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.errors import AdapterError
from moka_pl.studies.spectra import model_spectra, spectrum


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.floats(0.01, 100), min_size=1, max_size=8),
    extra=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_known_singular_values_and_the_order_of_ranks(sizes: list[float], extra: int, seed: int) -> None:
    k = len(sizes)
    u = torch.linalg.qr(draw(k + extra, k, seed=seed)).Q
    v = torch.linalg.qr(draw(k + 3, k, seed=seed + 1)).Q
    found = spectrum(u @ torch.diag(torch.tensor(sizes, dtype=torch.float64)) @ v.mT)
    ordered = torch.tensor(sorted(sizes, reverse=True), dtype=torch.float64)
    torch.testing.assert_close(found.sizes[:k], ordered, rtol=1e-9, atol=1e-9)
    shares = ordered.square() / ordered.square().sum()
    assert found.rank == k
    assert found.norm == pytest.approx(float(ordered.norm()))
    assert found.stable_rank == pytest.approx(1 / float(shares[0]))
    assert found.entropy_rank == pytest.approx(math.exp(-sum(float(p) * math.log(p) for p in shares)))
    assert 1 - 1e-9 <= found.stable_rank <= found.entropy_rank + 1e-9 <= found.rank + 2e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
def test_ranks_know_no_scale_and_multiply_over_kronecker_products(seed: int, scale: float) -> None:
    a, b = draw(3, 4, seed=seed), draw(5, 2, seed=seed + 1)
    whole, left, right = spectrum(scale * torch.kron(a, b)), spectrum(a), spectrum(b)
    assert whole.rank == left.rank * right.rank
    assert whole.stable_rank == pytest.approx(left.stable_rank * right.stable_rank)
    assert whole.entropy_rank == pytest.approx(left.entropy_rank * right.entropy_rank)


def test_zero_has_no_rank_and_what_diverged_is_refused() -> None:
    assert spectrum(torch.zeros(3, 4))[1:] == (0, 0.0, 0.0, 0.0)
    with pytest.raises(AdapterError, match="diverged"):
        spectrum(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("filters", ["diverse", "prime"])
def test_every_adapted_layer_has_one(make_llama, randomize, filters: str) -> None:
    model = make_llama()
    names = inject_adapter(model, MokaConfig(components=3, filters=filters))
    randomize(model)
    found = dict(model_spectra(model))
    assert list(found) == names
    for name in names:
        delta = model.get_submodule(name).get_delta_weight().detach()
        assert found[name].norm == pytest.approx(float(delta.norm()), rel=1e-5)


def test_peft_layers_have_one_too(make_llama) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    found = dict(model_spectra(model))
    assert len(found) == 2
    assert {spec.rank for spec in found.values()} == {2}
