"""Filters chosen from gradients."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moka_pl.adapters import (
    BaseModel,
    MokaConfig,
    find_targets,
    inject_adapter,
    load_adapter,
    moka_layers,
    read_adapter,
    save_adapter,
)
from moka_pl.adapters.filter_search.nearest import captured_share
from moka_pl.adapters.filter_search.search import (
    candidate_shapes,
    choose_filters,
    choose_shapes,
    choose_within,
    initial_left_factors,
)
from moka_pl.adapters.filters import filter_shapes, listed
from moka_pl.errors import ConfigError
from moka_pl.lm.scoring import score_tokens
from moka_pl.ops.layout import Shape


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PLANTED = [Shape(4, 3, 3, 4), Shape(2, 6, 6, 2), Shape(3, 3, 4, 4, identity=True), Shape(12, 1, 1, 12)]


def planted(shape: Shape) -> torch.Tensor:
    left = torch.eye(shape.m_a, dtype=torch.float64) if shape.identity else draw(shape.m_a, shape.n_a)
    return torch.kron(left, draw(shape.m_b, shape.n_b, seed=1))


@pytest.mark.parametrize("shape", PLANTED, ids=str)
def test_a_planted_shape_is_ranked_and_chosen_first(shape: Shape) -> None:
    gradient = planted(shape) + 0.05 * draw(12, 12, seed=2)
    offered = candidate_shapes(12, 12)
    assert shape in offered
    assert max(offered, key=lambda s: captured_share(gradient, s) / s.num_parameters) == shape
    assert captured_share(gradient, shape) > 0.9
    assert choose_shapes(gradient, 3, 90)[0] == shape


@settings(max_examples=30, deadline=None)
@given(
    components=st.integers(1, 5),
    per_component=st.integers(24, 60),
    m=st.sampled_from([8, 12, 16]),
    n=st.sampled_from([8, 12, 24]),
    seed=st.integers(0, 9),
)
def test_the_budget_holds_and_each_shape_fits(
    components: int, per_component: int, m: int, n: int, seed: int
) -> None:
    budget = components * per_component * 2
    chosen = choose_shapes(draw(m, n, seed=seed), components, budget)
    assert len(chosen) == components
    assert sum(shape.num_parameters for shape in chosen) <= budget
    assert all((shape.rows, shape.cols) == (m, n) for shape in chosen)
    # What a configuration lists gives the same shapes again.
    assert filter_shapes([listed(s) for s in chosen], components, m, n) == tuple(chosen)


def test_noise_spends_most_of_the_budget() -> None:
    chosen = choose_shapes(draw(24, 24), 6, 6 * 60)
    assert sum(shape.num_parameters for shape in chosen) > 0.8 * 6 * 60


@pytest.mark.parametrize(("m", "n"), [(67, 131), (64, 64), (192, 576)])
def test_the_budget_of_diverse_is_always_enough(m: int, n: int) -> None:
    usual = filter_shapes("diverse", 4, m, n)
    budget = sum(shape.num_parameters for shape in usual)
    chosen = choose_within(draw(m, n).float(), 4, budget)
    assert len(chosen) == 4
    assert sum(shape.num_parameters for shape in chosen) <= budget


def test_candidates_are_limited_and_need_no_identities() -> None:
    assert not any(shape.identity for shape in candidate_shapes(12, 8, identities=False))
    assert all(shape.num_parameters <= 24 for shape in candidate_shapes(12, 8, 24))
    assert Shape(12, 8, 1, 1) not in candidate_shapes(12, 8, 10**6)
    with pytest.raises(ConfigError, match="12 × 8 layer has more than 3"):
        candidate_shapes(12, 8, 3)
    with pytest.raises(ConfigError, match="5 parameters is too small for 2 components"):
        choose_shapes(draw(12, 12), 2, 5)


def test_left_factors_take_the_directions_of_the_gradient() -> None:
    shape = Shape(4, 3, 3, 4)
    a, b = draw(4, 3), draw(3, 4, seed=1)
    noise = 1e-3 * draw(12, 12, seed=2)
    identity = Shape(3, 3, 4, 4, identity=True)
    other = Shape(2, 6, 6, 2)
    first, none, lone, second = initial_left_factors(
        torch.kron(a, b) + noise, [shape, identity, other, shape]
    )
    assert none is None
    assert lone.shape == (2, 6)
    assert float(first.norm()) == pytest.approx((4 / 3) ** 0.5)
    cosine = (first * a).sum() / first.norm() / a.norm()
    assert float(cosine.abs()) == pytest.approx(1, abs=1e-3)
    assert abs(float((first * second).sum())) < 0.1  # what is left has other directions
    assert initial_left_factors(torch.zeros(12, 12), [shape]) == [None]


@pytest.fixture
def chosen(tiny_llama, token_ids) -> dict[str, list[list[int]]]:
    names = find_targets(tiny_llama, MokaConfig())
    loss = lambda ids: score_tokens(tiny_llama, ids, ids).nll.mean()  # noqa: E731
    found = choose_filters(tiny_llama, names, [token_ids], loss, components=4, identities=True)
    return {name: filters for name, filters, _ in found}


def test_layers_get_filters_of_their_own_within_the_budget_of_diverse(tiny_llama, chosen) -> None:
    config = MokaConfig(components=4, filters=chosen)
    names = inject_adapter(tiny_llama, config)
    assert names == list(chosen)
    layers = moka_layers(tiny_llama)
    for name, layer in layers.items():
        assert [listed(shape) for shape in layer.shapes] == chosen[name]
        usual = filter_shapes("diverse", 4, layer.out_features, layer.in_features)
        assert sum(s.num_parameters for s in layer.shapes) <= sum(s.num_parameters for s in usual)
        assert not layer.get_delta_weight().any()
    assert len({json.dumps(filters) for filters in chosen.values()}) > 1


def test_an_adapter_directory_gives_back_each_layers_filters(
    make_llama, tiny_llama, token_ids, chosen, randomize, tmp_path
) -> None:
    file = tmp_path / "filters.json"
    file.write_text(json.dumps(chosen))
    config = MokaConfig(components=4, filters=str(file))
    assert config.filters == chosen
    inject_adapter(tiny_llama, config)
    randomize(tiny_llama)
    save_adapter(tmp_path / "adapter", tiny_llama, config, BaseModel("tiny"))
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["format_version"] == 2
    file.unlink()  # the directory needs nothing else
    assert read_adapter(tmp_path / "adapter").config == config
    other = make_llama()
    load_adapter(other, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(other(token_ids).logits, tiny_llama(token_ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("filters", "version"), [("diverse", 1), ([[4, 4]], 1), ([[4, 4, 8, 8]], 1), ([[4, 8, 8]], 2)]
)
def test_adapters_that_older_versions_read_keep_their_format(
    make_llama, filters, version: int, tmp_path
) -> None:
    model = make_llama()
    config = MokaConfig(components=2, filters=filters, target_modules=["q_proj"])
    inject_adapter(model, config)
    save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny"))
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["format_version"] == version


def test_a_layer_that_is_not_listed_is_named(tiny_llama, chosen) -> None:
    del chosen["model.layers.1.self_attn.v_proj"]
    with pytest.raises(ConfigError, match=r"lists 3 layers.*not model\.layers\.1\.self_attn\.v_proj"):
        inject_adapter(tiny_llama, MokaConfig(components=4, filters=chosen))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "not a mapping of layer names"),
        ('{"a.q_proj": [[2, 2]], "a.v_proj": [[2, 0]]}', r"layer a\.v_proj: filter \[2, 0\]"),
        (None, r"cannot read the filters file .*filters\.json"),
    ],
)
def test_a_filters_file_that_cannot_serve_is_refused(text: str | None, message: str, tmp_path) -> None:
    file = tmp_path / "filters.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        MokaConfig(components=2, filters=str(file))


def test_the_command_line_takes_a_filters_file_and_lists(build_cli, chosen, tmp_path) -> None:
    file = tmp_path / "filters.json"
    file.write_text(json.dumps(chosen))
    common = ("fit", "--config", "configs/smollm2.yaml", "--model.adapter.components", 4)
    built = build_cli(*common, "--model.adapter.filters", file)
    assert built.model.adapter.filters == chosen
    built = build_cli(*common, "--model.adapter.filters", "[[8, 8, 8]]")
    assert built.model.adapter.filters == [[8, 8, 8]]
