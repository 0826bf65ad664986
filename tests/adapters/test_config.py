"""The options of an adapter and what they refuse."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    names = st.lists(st.text(min_size=1), min_size=1, max_size=3) | st.text(min_size=1)
    return MokaConfig(
        components=components,
        filters=draw(st.sampled_from(["diverse", "square", "prime"]) | listed),
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


def test_scaling_defaults_to_components_and_follows_them() -> None:
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
        ({"backend": "magic"}, r"'magic'.*auto, structured, dense, fused"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
    ],
)
def test_what_cannot_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MokaConfig(**options)
