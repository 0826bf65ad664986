"""Options of generating."""

import pytest

from moka_pl.cli.answering.sampling import Sampling
from moka_pl.errors import ConfigError

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, GREEDY),
        ({"temperature": 0.0}, GREEDY),
        ({"do_sample": False}, GREEDY),
        ({"num_beams": 4}, GREEDY | {"num_beams": 4}),
        ({"repetition_penalty": 2}, GREEDY | {"repetition_penalty": 2.0}),
        ({"do_sample": True}, {"do_sample": True, "num_beams": 1}),
        ({"temperature": 0.7}, {"do_sample": True, "num_beams": 1, "temperature": 0.7}),
        ({"top_p": 0.9, "top_k": 40}, {"do_sample": True, "num_beams": 1, "top_p": 0.9, "top_k": 40}),
        ({"do_sample": True, "top_k": 0}, {"do_sample": True, "num_beams": 1, "top_k": 0}),
    ],
)
def test_what_generate_is_given(given, options):
    assert Sampling(**given).options() == options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, not -1.0"),
        ({"temperature": float("inf")}, "temperature must be at least 0 and finite, not inf"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
        ({"top_p": float("nan")}, "top_p must be above 0 and at most 1, not nan"),
        ({"top_k": -1}, "top_k must be at least 0, not -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite, not 0.0"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"do_sample": False, "top_p": 0.5}, "top_p has no effect with do_sample false"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample has no effect with temperature 0"),
        ({"top_k": 5, "temperature": 0.0}, "top_k has no effect with temperature 0"),
    ],
)
def test_what_cannot_work(given, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**given)
