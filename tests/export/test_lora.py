"""Adapters as LoRA: exact, truncated, padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.errors import ConfigError
from moka_pl.export.lora import check_rank, lora_form, needed_rank, stored_rank, truncated
from moka_pl.export.peft import target_modules


def make_layer(m: int = 24, n: int = 32, seed: int = 0, **options: object) -> MokaLinear:
    torch.manual_seed(seed)
    layer = MokaLinear(nn.Linear(n, m, bias=False), MokaConfig(**({"components": 2} | options)))
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return layer


def delta(form, name: str = "layer"):
    lora_a, lora_b = form.factors[name]
    return lora_b @ lora_a


@pytest.mark.parametrize(
    "options", [{}, {"filters": "square"}, {"filters": "prime"}, {"filters": "servable", "rank": 4}]
)
def test_a_lora_without_truncation_is_the_update(options: dict) -> None:
    layer = make_layer(**options)
    form = lora_form({"layer": layer})
    assert form.rank == form.needed == needed_rank(layer)
    assert not form.lost
    torch.testing.assert_close(delta(form), layer.get_delta_weight().detach(), atol=1e-5, rtol=1e-5)


def test_factors_of_low_rank_need_less() -> None:
    layer = make_layer(filters="square")
    full = needed_rank(layer)
    with torch.no_grad():
        for left, _ in layer.factors():
            left.copy_(left[:, :1] @ left[:1])
    assert needed_rank(layer) < full == layer.exact_lora_rank()
    assert stored_rank({f"layer.{k}": v for k, v in layer.tensors().items()}, full) == needed_rank(layer)
    form = lora_form({"layer": layer})
    assert form.rank == needed_rank(layer)
    torch.testing.assert_close(delta(form), layer.get_delta_weight().detach(), atol=1e-5, rtol=1e-4)


def test_layers_of_lower_rank_are_padded() -> None:
    layers = {"layer": make_layer(filters="servable", rank=4), "wide": make_layer(filters="servable", rank=8)}
    form = lora_form(layers)
    assert form.rank == 16
    assert {(a.shape, b.shape) for a, b in form.factors.values()} == {((16, 32), (24, 16))}
    assert not form.factors["layer"][0][8:].any()
    torch.testing.assert_close(delta(form), layers["layer"].get_delta_weight().detach(), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 12), st.integers(2, 40), st.integers(2, 40), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_truncation_is_the_best_of_its_rank(inner: int, m: int, n: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(inner * 10_000 + m * 100 + n)
    lora_a, lora_b = (torch.randn(size, generator=generator) for size in ((inner, n), (m, inner)))
    cut_a, cut_b, values = truncated(lora_a, lora_b, rank)
    exact = torch.linalg.svdvals((lora_b @ lora_a).double())  # of the matrix itself, whichever way was taken
    torch.testing.assert_close(values[: len(exact)].double(), exact[: len(values)], atol=1e-4, rtol=1e-4)
    error = torch.linalg.matrix_norm((lora_b @ lora_a - cut_b @ cut_a).double())
    torch.testing.assert_close(error, exact[rank:].square().sum().sqrt(), atol=1e-3, rtol=1e-4)
    assert len(cut_a) == cut_b.shape[1] <= rank


def test_energy_takes_the_lowest_rank_that_keeps_it_in_every_layer() -> None:
    layers = {"layer": make_layer(), "other": make_layer(seed=1)}
    form = lora_form(layers, energy=0.9)
    assert 1 < form.rank < form.needed
    spectra = [torch.linalg.svdvals(layer.get_delta_weight().detach()).square() for layer in layers.values()]
    kept = [[float(s[:k].sum() / s.sum()) for s in spectra] for k in (form.rank - 1, form.rank)]
    assert min(kept[0]) < 0.9 <= min(kept[1])
    assert list(form.lost.values()) == pytest.approx([1 - share for share in kept[1]], abs=1e-5)


def test_truncation_to_a_rank_tells_what_is_lost() -> None:
    layer = make_layer()
    form = lora_form({"layer": layer}, rank=3)
    assert form.rank == 3
    change = layer.get_delta_weight().detach()
    lost = (change - delta(form)).square().sum() / change.square().sum()
    assert form.lost["layer"] == pytest.approx(float(lost), abs=1e-5)
    assert 0.01 < form.lost["layer"] < 1


@pytest.mark.parametrize(
    ("rank", "energy", "most", "message"),
    [
        (None, None, 16, "rank 24, above --max_rank 16; truncate it by --rank 16 or --energy 0.99"),
        (25, None, 512, "--rank must be from 1 to 24, the rank that this adapter needs, not 25"),
        (0, None, 512, "--rank must be from 1 to 24"),
        (20, None, 16, "rank 20, above --max_rank 16"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(rank, energy, most, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_rank(24, rank, energy, most)


def test_an_energy_above_the_largest_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--energy 0.999 needs rank \d+, above --max_rank 4"):
        lora_form({"layer": make_layer()}, energy=0.999, max_rank=4)


def test_only_a_base_tells_the_rank_of_identities() -> None:
    layer = make_layer(filters="prime")
    state = {f"layer.{k}": v for k, v in layer.tensors().items()}
    assert stored_rank(state, None) is None
    assert stored_rank(state, 24) == 24


def test_whole_names_are_targets_where_others_end_alike() -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"q": nn.Linear(2, 2)}), "b": nn.ModuleDict({"q": nn.Linear(2, 2)})}
    )
    assert target_modules(model, ["a.q", "b.q"]) == ["q"]
    assert target_modules(model, ["a.q"]) == ["a.q"]
