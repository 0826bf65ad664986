"""Base models are told apart by their weights, not by their storage."""

import itertools
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.adapters import MokaConfig, inject_adapter, merge
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone, weight_samples
from moka_pl.backbone.fingerprint import Comparison, compare_samples
from moka_pl.backbone.quantization import dense_weight, relative_entries
from moka_pl.backbone.random_weights import byte_tokenizer


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


# Samples of the matrices


def compare(first: nn.Module, second: nn.Module) -> Comparison:
    found = compare_samples(weight_samples(first), weight_samples(second))
    assert found is not None
    return found


STORAGES = [
    {"quantization": quantization, "compute_dtype": dtype}
    for quantization in ("nf4", "fp4", "none")
    for dtype in ("float32", "bfloat16", "float16")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model; the same after a merge into all layers, into one, and after a light fine-tuning."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    saved = {}

    def save(name: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        folder, copied = tmp_path_factory.mktemp(name), deepcopy(model)
        with torch.no_grad():
            for key, weight in copied.named_parameters():
                if "_proj" in key:
                    weight.copy_(change(key, weight))
        copied.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        saved[name] = folder

    def merged(weight: torch.Tensor) -> torch.Tensor:
        update = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
        return weight + 0.05 * weight.std() * update / update.std()

    save("base", lambda _, weight: weight)
    save("merge", lambda _, weight: merged(weight))
    save("one layer", lambda key, weight: merged(weight) if "1.mlp.up" in key else weight)
    save("light", lambda _, weight: weight + 1e-3 * weight.std() * torch.randn_like(weight))
    return saved


def loaded(folder: Path, storage: dict[str, str]) -> nn.Module:
    return load_backbone(BackboneConfig(str(folder), **storage)).model


@pytest.fixture(scope="module")
def samples(folders: dict[str, Path]) -> list[str]:
    """Samples of the base in all storages."""
    return [weight_samples(loaded(folders["base"], storage)) for storage in STORAGES]


def test_storing_weights_otherwise_is_no_difference(samples: list[str]) -> None:
    for first in samples:
        for second in samples:
            found = compare_samples(first, second)
            assert found is not None
            assert found.different == 0, (first[:12], second[:12])


@pytest.mark.parametrize("name", ["merge", "one layer", "light"])
@pytest.mark.parametrize("storage", [STORAGES[0], STORAGES[6]], ids=["nf4", "none"])
def test_other_weights_with_the_same_embedding_are_told(
    name: str, storage: dict[str, str], folders: dict[str, Path]
) -> None:
    base, other = (loaded(folders[folder], storage) for folder in ("base", name))
    assert fingerprint(base) == fingerprint(other)
    found = compare(base, other)
    assert found.different > (0 if name == "one layer" else 1)
    assert found.sampled == 3 * 7 + 2


def test_a_merge_is_told_from_a_base_in_another_storage(folders: dict[str, Path], samples: list[str]) -> None:
    other = weight_samples(loaded(folders["merge"], STORAGES[1]))
    for storage, own in zip(STORAGES, samples, strict=True):
        found = compare_samples(own, other)
        assert found is not None
        if storage["quantization"] != "fp4":  # whose levels are too coarse for NF4's
            assert found.different > 0


def test_samples_leave_out_what_is_trained(randomize: Callable) -> None:
    model = build(quantization="nf4")
    before = weight_samples(model)
    inject_adapter(model, MokaConfig(target_modules="all-linear", components=2))
    randomize(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert weight_samples(model, trained) == before
    merge(model)
    assert weight_samples(model, trained) == before


@pytest.mark.parametrize("damaged", ["", "x", "a:b:c", "nf4-float32:abc:AAAA", "::", "nf4:x:" + "A" * 64])
def test_samples_that_cannot_be_compared(damaged: str) -> None:
    assert compare_samples(damaged, weight_samples(build())) is None


def test_the_samples_of_4_bit_weights_are_their_levels() -> None:
    layer = build(quantization="nf4").model.layers[0].self_attn.q_proj
    index = torch.arange(256)
    entries = relative_entries(layer.weight, index)
    dense = dense_weight(layer).flatten()[index].view(4, 64)
    expected = dense / dense.abs().amax(1, keepdim=True)
    torch.testing.assert_close(entries, expected.flatten(), atol=1e-5, rtol=1e-4)
