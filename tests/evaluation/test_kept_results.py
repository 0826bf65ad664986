"""Results that are kept on disk, and what decides them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers
from moka_pl.errors import MokaWarning
from moka_pl.evaluation import kept_results
from moka_pl.evaluation.kept_results import KeptResults, batch_settings, machine_settings, model_hash
from moka_pl.evaluation.results import Counts, Results, SetCounts

RESULTS = Results(
    [
        SetCounts("words", {"odd": Counts(3, 2, 1, 0, 0, 0.1 + 0.2, 7)}, 1 / 3, 7),
        SetCounts("text", {}, 9.1, 4, 2, 8),
    ],
    {"all": ["odd"]},
)


def test_results_come_back_bit_for_bit(tmp_path: Path) -> None:
    kept = KeptResults(tmp_path / "new", {"base": ("a", 1)})
    assert kept.read() is None
    kept.write(RESULTS)
    assert KeptResults(tmp_path / "new", {"base": ["a", 1]}).read() == RESULTS
    assert KeptResults(tmp_path / "new", {"base": ["b", 1]}).read() is None
    assert [file.name for file in (tmp_path / "new").iterdir()] == [kept.file.name]


@pytest.mark.parametrize("damage", ["0.5", "{}", "", "[]"])
def test_a_damaged_file_is_removed(damage: str, tmp_path: Path) -> None:
    kept = KeptResults(tmp_path, {})
    kept.write(RESULTS)
    text = kept.file.read_text()
    kept.file.write_text(text.replace("9.1", damage) if damage == "0.5" else damage)
    with pytest.warns(MokaWarning, match="is damaged .*; it is computed anew"):
        assert kept.read() is None
    assert not kept.file.exists()


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    KeptResults(tmp_path, {}).write(Results([SetCounts("text", {}, float("nan"), 1)]))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    KeptResults(tmp_path / "file", {}).write(RESULTS)  # cannot be written, which is no error


def test_every_weight_decides_and_factors_of_a_zero_update_do_not(
    make_llama: Callable, randomize: Callable
) -> None:
    def adapted(seed: int) -> nn.Module:
        model = make_llama()
        torch.manual_seed(seed)
        inject_adapter(model, MokaConfig(components=2))
        return model

    model = adapted(0)
    first = model_hash(model)
    assert model_hash(adapted(1)) == first
    with torch.no_grad():
        next(iter(moka_layers(model).values())).moka_B[0] = 1e-30
    assert model_hash(model) != first
    model = adapted(0)
    model.config.rms_norm_eps *= 2
    assert model_hash(model) != first
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        model = adapted(0)
        weight = model.get_parameter(name).data.flatten()
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(2.0))
        assert model_hash(model) != first, name


@given(st.binary(min_size=1, max_size=80), st.data())
@settings(max_examples=30, deadline=None)
def test_another_byte_gives_another_checksum(content: bytes, data: st.DataObject) -> None:
    index, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    other = bytearray(content)
    other[index] ^= 1 << bit
    keys = kept_results._keys(torch.device("cpu"))[: data.draw(st.integers(1, 24))]
    sums = []
    for one in (content, other):
        tensor = torch.frombuffer(bytearray(b"x" + one), dtype=torch.uint8)[1:]  # not aligned
        padded = one + bytes(-len(one) % 4)
        words = [
            int.from_bytes(padded[at : at + 4], "little", signed=True) for at in range(0, len(padded), 4)
        ]
        expected = 0
        for start in range(0, len(words), len(keys)):
            products = zip(keys.tolist(), words[start : start + len(keys)], strict=False)
            expected = expected * kept_results._BASE + sum(key * word for key, word in products)
        sums.append(int(kept_results._checksum(tensor, keys)))
        assert (sums[-1] - expected) % 2**64 == 0
    assert sums[0] != sums[1]


@pytest.mark.parametrize("changed", ["doubled", "two_signs", "swapped"])
def test_changes_with_a_pattern_give_another_checksum(changed: str) -> None:
    weight = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0)) + 0.5
    other = weight.clone()
    if changed == "doubled":
        other *= 2
    elif changed == "two_signs":
        other[0, [1, 3]] *= -1
    else:
        other[[0, -1]] = other[[-1, 0]]
    keys = kept_results._keys(torch.device("cpu"))
    assert kept_results._checksum(weight, keys) != kept_results._checksum(other, keys)


def test_batches_decide(make_commonsense: Callable, make_module: Callable) -> None:
    def described(**options: object) -> list:
        data = make_commonsense(**options)
        data.connect(make_module().tokenizer)
        data.setup("validate")
        found = batch_settings([data.val_dataloader()])
        assert json.dumps(found)
        return found

    first = described()
    assert described(num_workers=1) == described(seed=3) == first
    assert described(eval_batch_size=3) != first
    assert described(share_prefix="never") != first
    assert described(max_length=40) != first
    assert batch_settings([torch.utils.data.DataLoader([1])]) is None


def test_threads_decide(one_thread: None) -> None:
    first = machine_settings(torch.device("cpu"))
    assert machine_settings(torch.device("cpu")) == first
    torch.set_num_threads(2)
    assert machine_settings(torch.device("cpu")) != first
