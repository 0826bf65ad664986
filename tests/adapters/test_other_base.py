"""An adapter goes with its own base only, though another may have the same embedding."""

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from moka_pl.adapters import BaseModel, FullFineTuning, MokaConfig, inject_adapter, load_adapter, save_adapter
from moka_pl.backbone import check_samples, fingerprint, weight_samples
from moka_pl.errors import AdapterError, MokaWarning

ANOTHER = r"was trained on another base model: 1 of 16 weight matrices are not those of 'base'"


@pytest.fixture
def merged(tiny_llama: nn.Module) -> nn.Module:
    """The model with an update merged into one layer, which the adapter leaves alone."""
    other = deepcopy(tiny_llama)
    with torch.no_grad():
        weight = other.model.layers[1].mlp.down_proj.weight
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    assert fingerprint(other) == fingerprint(tiny_llama)
    return other


@pytest.fixture(params=[True, False], ids=["with samples", "sampled when saved"])
def adapter(
    request: pytest.FixtureRequest, tiny_llama: nn.Module, randomize: Callable, tmp_path: Path
) -> Path:
    """An adapter of q_proj and v_proj on a copy of the model."""
    model, config = deepcopy(tiny_llama), MokaConfig(components=2)
    base = BaseModel("base", None, fingerprint(model), samples=weight_samples(model) if request.param else "")
    inject_adapter(model, config)
    randomize(model)
    return save_adapter(tmp_path / "adapter", model, config, base)


def test_its_own_base_is_taken(adapter: Path, tiny_llama: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(tiny_llama, adapter, fingerprint(tiny_llama))


def test_a_merge_is_refused_and_left_as_it_was(adapter: Path, merged: nn.Module) -> None:
    with pytest.raises(AdapterError, match=ANOTHER) as caught:
        load_adapter(merged, adapter, fingerprint(merged))
    assert str(caught.value).startswith(str(adapter))
    assert not any("moka" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("samples", [None, "", "damaged"])
def test_an_older_adapter_goes_on_loading_with_a_note(
    samples: str | None, adapter: Path, merged: nn.Module
) -> None:
    file = adapter / "adapter_config.json"
    stored = json.loads(file.read_text())
    del stored["base_samples"]
    file.write_text(json.dumps(stored if samples is None else stored | {"base_samples": samples}))
    with pytest.warns(MokaWarning, match="only the embeddings were compared"):
        load_adapter(merged, adapter, fingerprint(merged))


def test_a_base_that_was_trained_has_no_samples_when_saved(tiny_llama: nn.Module, tmp_path: Path) -> None:
    inject_adapter(tiny_llama, FullFineTuning())
    path = save_adapter(tmp_path / "full", tiny_llama, FullFineTuning(), BaseModel("base"))
    assert json.loads((path / "adapter_config.json").read_text())["base_samples"] == ""


def test_checkpoints_are_checked_alike(tiny_llama: nn.Module, merged: nn.Module) -> None:
    own, other = weight_samples(tiny_llama), weight_samples(merged)
    check_samples(own, own, "the checkpoint", "base")
    with pytest.raises(AdapterError, match=f"the checkpoint {ANOTHER}"):
        check_samples(own, other, "the checkpoint", "base")
    with pytest.warns(MokaWarning, match="the checkpoint has no comparable samples"):
        check_samples("", other, "the checkpoint", "base")
