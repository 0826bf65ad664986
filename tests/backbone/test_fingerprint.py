"""Base models are told apart by their weights, not by their storage."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from moka_pl.adapters import MokaConfig, inject_adapter, merge
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone


def build(**options: object) -> nn.Module:
    return load_backbone(BackboneConfig("tiny", weights="random", **options)).model


@pytest.fixture(scope="module")
def expected() -> str:
    return fingerprint(build(quantization="none", compute_dtype="float32"))


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    itertools.product(["nf4", "fp4", "none"], ["float32", "bfloat16", "float16"]),
)
def test_storage_does_not_matter(quantization: str, dtype: str, expected: str) -> None:
    assert fingerprint(build(quantization=quantization, compute_dtype=dtype)) == expected


def test_rounding_from_one_dtype_to_another_does_not_matter(make_llama: Callable) -> None:
    # Small values lose their last bits, or all of them, in float16.
    model = make_llama(initializer_range=1e-7)
    expected = fingerprint(model)
    assert fingerprint(model.to(torch.bfloat16)) == expected
    assert fingerprint(model.to(torch.float16)) == expected
    assert (model.get_input_embeddings().weight == 0).any()
    assert fingerprint(model.to(torch.float32)) == expected


def test_it_is_short_and_stable(expected: str) -> None:
    assert len(expected) == 16
    assert int(expected, 16)
    assert fingerprint(build()) == expected


def test_other_weights_give_another(expected: str) -> None:
    assert fingerprint(build(seed=1)) != expected
    model = build()
    row = model.get_input_embeddings().weight[0]
    row[5] = -row[5]
    assert fingerprint(model) != expected


@pytest.mark.parametrize(
    "sizes",
    [
        {"intermediate_size": 64},
        {"num_hidden_layers": 3},
        {"vocab_size": 97},
        {"hidden_size": 64},
    ],
    ids=str,
)
def test_another_shape_gives_another(sizes: dict[str, int], make_llama: Callable) -> None:
    # The same seed: the embedding of the first two is the same.
    assert fingerprint(make_llama(**sizes)) != fingerprint(make_llama())


def test_adapters_do_not_matter(expected: str, randomize: Callable) -> None:
    model = build()
    inject_adapter(model, MokaConfig(target_modules="all-linear", components=2))
    randomize(model)
    assert fingerprint(model) == expected
    merge(model)
    assert fingerprint(model) == expected


def test_a_vocabulary_smaller_than_the_sample(make_llama: Callable) -> None:
    assert fingerprint(make_llama(vocab_size=3, pad_token_id=None, bos_token_id=0, eos_token_id=1))
