"""Who quantises a base on a CPU: transformers, unless it is asked for layer by layer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moka_pl.backbone import BackboneConfig, load_backbone, weight_samples
from moka_pl.backbone import load as loading
from moka_pl.errors import BackboneError


def marks(model: PreTrainedModel) -> list[bool]:
    """What tells PEFT, the HF Trainer and others that a model is quantised."""
    names = ("is_loaded_in_4bit", "is_quantized", "hf_quantizer")
    own = [bool(getattr(model, name, None)) for name in names]
    return [*own, hasattr(model.config, "quantization_config")]


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_transformers_quantises_as_ever(quantization, model_folder: Path) -> None:
    model = load_backbone(BackboneConfig(str(model_folder), quantization=quantization)).model
    assert all(marks(model))
    assert model.config.quantization_config.bnb_4bit_quant_type == quantization


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_layer_by_layer_the_codes_are_the_same(
    quantization, double: bool, model_folder: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BackboneConfig(str(model_folder), quantization=quantization, double_quantization=double)
    theirs = load_backbone(config)
    monkeypatch.setattr(loading, "_pretrained", lambda *_: pytest.fail("transformers was asked for weights"))
    ours = load_backbone(config, by_layers=True)
    assert (ours.config, ours.notes) == (theirs.config, theirs.notes)
    one, other = ours.model.state_dict(), theirs.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    assert weight_samples(ours.model) == weight_samples(theirs.model)
    assert torch.equal(ours.model(ids).logits, theirs.model(ids).logits)
    assert not any(marks(ours.model))


def test_unquantised_weights_are_left_to_transformers(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "read_blocks", lambda *_: pytest.fail("weights were read here"))
    load_backbone(BackboneConfig(str(model_folder), quantization="none"), by_layers=True)


def test_files_that_lack_a_weight_are_left_to_transformers(model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=r"1 of its weights are missing \(first model.norm.weight\)"):
        load_backbone(BackboneConfig(str(model_folder)), by_layers=True)
