"""Image classifiers as frozen bases: heads, processors, and what is no image classifier."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, ViTConfig, ViTForImageClassification

from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers
from moka_pl.backbone import BackboneConfig, fingerprint, weight_samples
from moka_pl.backbone.quantization import is_quantised
from moka_pl.errors import BackboneError
from moka_pl.vision.backbone import load_image_backbone, load_processor

from .conftest import SIZES

PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
OWN = ["LABEL_0", "LABEL_1", "LABEL_2"]


def load(name, labels=("a", "b"), **options):
    return load_image_backbone(BackboneConfig(str(name), **({"quantization": "none"} | options)), labels)


def test_keeps_the_head_of_its_own_classes(vit):
    loaded = load(vit, OWN)
    assert loaded.heads == ["classifier"]
    assert not loaded.new_head
    expected = ViTForImageClassification.from_pretrained(vit).eval()(PIXELS).logits
    assert torch.equal(loaded.model(PIXELS).logits, expected)
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_a_new_head_starts_at_zero(vit, classes):
    labels = [f"class {number}" for number in range(classes)]
    loaded = load(vit, labels)
    assert loaded.model(PIXELS).logits.abs().max() == 0
    assert list(loaded.model.config.id2label.values()) == labels
    assert loaded.new_head
    # The frozen part tells the base, whatever its head is.
    assert fingerprint(loaded.model) == fingerprint(load(vit, OWN).model)
    assert weight_samples(load(vit, labels).model) == weight_samples(loaded.model)


def test_takes_a_base_without_head_and_refuses_one_without_weights(vit, tmp_path):
    shutil.copytree(vit, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    frozen = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    save_file(frozen, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path, OWN)
    assert loaded.new_head
    assert loaded.model(PIXELS).logits.abs().max() == 0
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    with pytest.raises(BackboneError, match=r"weights are missing or of another size .*copy the model again"):
        load(tmp_path)


def test_damaged_weights_show_before_any_image_is_read(vit, tmp_path):
    shutil.copytree(vit, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BackboneError, match=r"model\.safetensors is damaged"):
        load_processor(BackboneConfig(str(tmp_path)))
    weights.unlink()
    with pytest.raises(BackboneError, match="it has no weights"):
        load_processor(BackboneConfig(str(tmp_path)))


def test_quantises_linear_layers_and_leaves_convolutions_and_head(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64}  # bitsandbytes misreads smaller rows on some CPUs
    ViTForImageClassification(ViTConfig(**(SIZES | sizes))).save_pretrained(tmp_path)
    model = load(tmp_path, quantization="nf4").model
    kinds = {
        name: is_quantised(module) for name, module in model.named_modules() if hasattr(module, "weight")
    }
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, stored in kinds.items() if stored} == linear - {"classifier"}
    assert len(linear) > 4
    inject_adapter(
        model, MokaConfig(components=2, target_modules="all-linear", modules_to_save=["classifier"])
    )
    assert set(moka_layers(model)) == linear - {"classifier"}


def test_random_weights_are_the_same_for_a_seed(vit):
    first, again, other = (
        load(vit, weights="random", seed=seed).model.vit.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_processor_is_the_models_own(vit, tmp_path):
    shutil.copytree(vit, tmp_path / "own")
    stored = {
        "image_processor_type": "ViTImageProcessorFast",
        "size": {"height": 4, "width": 6},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 1.0, 1.0],
    }
    (tmp_path / "own/preprocessor_config.json").write_text(json.dumps(stored))
    config = BackboneConfig(str(tmp_path / "own"))
    processor = load_processor(config)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert processor.size["width"] == 6
    default = load_processor(BackboneConfig(str(vit)))
    assert (default.size["height"], list(default.image_mean)) == (8, [0.5] * 3)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda path: LlamaConfig().save_pretrained(path),
            "is no image classifier: .* 'llama'; give a model",
        ),
        (lambda path: None, "is not a model folder: it has no config.json"),
    ],
)
def test_refuses_what_classifies_no_images(make, error, vit, tmp_path):
    shutil.copy(vit / "model.safetensors", tmp_path)
    make(tmp_path)
    with pytest.raises(BackboneError, match=error):
        load(tmp_path)


def test_refuses_an_unknown_shape_and_what_is_for_language_models(vit):
    with pytest.raises(
        BackboneError, match=r"unknown shape 'vit' .* choose one of vit-digits, or give a folder"
    ):
        load("vit", weights="random")
    with pytest.raises(BackboneError, match="'vit-digits' is a shape without weights; set weights: random"):
        load("vit-digits")
    with pytest.raises(BackboneError, match="compile layers is for language models; set compile: none"):
        load(vit, compile="layers")
    with pytest.raises(BackboneError, match="matmul fp8 is for language models; set matmul: bf16"):
        load(vit, matmul="fp8")
