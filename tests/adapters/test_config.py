"""The options of an adapter and what they refuse."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.expressions import expressions

from moka_pl.adapters import MokaConfig
from moka_pl.errors import ConfigError


@st.composite
def configs(draw: st.DrawFn) -> MokaConfig:
    components = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(1, 300), min_size=4, max_size=4) | st.lists(
        st.integers(1, 300), min_size=2, max_size=2
    )
    listed = st.lists(sizes, min_size=1, max_size=1) | st.lists(
        sizes, min_size=components, max_size=components
    )
    names = st.lists(st.text(min_size=1), min_size=1, max_size=3) | expressions(st.text(min_size=1))
    return MokaConfig(
        components=components,
        filters=draw(st.sampled_from(["diverse", "square", "prime", "servable"]) | listed),
        gating=draw(st.sampled_from(["softmax", "sigmoid", "none"])),
        scaling=draw(st.none() | st.floats(0, 1e9, exclude_min=True)),
        dropout=draw(st.floats(0, 1, exclude_max=True)),
        target_modules=draw(names),
        exclude_modules=draw(st.none() | names),
        backend=draw(st.sampled_from(["auto", "structured", "dense", "fused"])),
    )


@settings(max_examples=200, deadline=None)
@given(config=configs())
def test_any_config_survives_json(config: MokaConfig) -> None:
    assert MokaConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_servable_has_rank_16_unless_another_is_set() -> None:
    assert MokaConfig(filters="servable").rank == 16
    config = MokaConfig(filters="servable", components=2, rank=4)
    assert config.exact_lora_rank("layer", 64, 48) == 8
    assert MokaConfig(components=10).exact_lora_rank("layer", 64, 48) == 48


def test_scaling_defaults_to_components_or_their_root_and_follows_them() -> None:
    assert MokaConfig(components=4, filters="servable").effective_scaling == 2.0
    assert MokaConfig(components=4, filters="servable", scaling=1.0).effective_scaling == 1.0
    assert MokaConfig(components=7).effective_scaling == 7.0
    assert replace(MokaConfig(components=7), components=3).effective_scaling == 3.0
    assert MokaConfig(components=7, scaling=0.5).effective_scaling == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "at least 1, not 0"),
        ({"filters": "cubic"}, r"'cubic'.*diverse, square, prime"),
        ({"filters": [[2, 2]] * 3, "components": 2}, "3 shapes for 2 components"),
        ({"filters": [[2, 2.5]]}, r"\[2, 2\.5\]"),
        ({"filters": [64]}, "64 is not"),
        ({"gating": "tanh"}, r"'tanh'.*softmax, sigmoid, none"),
        ({"dropout": 1.0}, r"dropout.*below 1, not 1\.0"),
        ({"dropout": -0.1}, r"dropout.*not -0\.1"),
        ({"dropout": float("nan")}, "dropout.*not nan"),
        ({"scaling": 0.0}, r"scaling.*not 0\.0"),
        ({"scaling": -2.0}, r"scaling.*not -2\.0"),
        ({"scaling": float("nan")}, "scaling.*not nan"),
        ({"scaling": float("inf")}, "scaling.*not inf"),
        ({"backend": "magic"}, r"'magic'.*auto, structured, dense, thin, fused"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
        ({"filters": "servable", "rank": 0}, "rank must be at least 1, not 0"),
        ({"filters": "servable", "rank": -4}, "rank must be at least 1, not -4"),
        ({"filters": "servable", "rank": 2.5}, r"rank must be a whole number or null, not 2\.5"),
        ({"filters": "servable", "rank": True}, "rank must be a whole number or null, not True"),
        ({"filters": "servable", "rank": 513}, "rank must be at most 512.*vLLM.*not 513"),
        (
            {"filters": "servable", "rank": 64},
            "at most 512.*not 10 × 64; set components to at most 8, or rank to at most 51",
        ),
        ({"filters": "servable", "budget": 5}, "budget .5. works only with filters: auto"),
        ({"filters": "servable", "rank": 1, "components": 600}, "600 × 1; set components to at most 512$"),
        (
            {"rank": 16},
            r"rank \(16\) works only with filters: servable; set them instead of 'diverse', or rem",
        ),
        ({"rank": 16, "filters": {"layer": [[2, 2]]}}, r"rank \(16\) works only with"),
        ({"start": "zero_left", "filters": "prime"}, "start: zero_left.*prime are identities"),
        ({"start": "zero_left", "filters": [[2, 3, 4]]}, "start: zero_left.*identities; set start: zero"),
        ({"start": "gradient", "filters": "prime"}, "start: gradient.*prime are identities"),
    ],
)
def test_what_cannot_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MokaConfig(**options)
