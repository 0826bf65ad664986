"""A trained adapter with its base model, loaded again from disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, moka_layers, save_adapter
from moka_pl.adapters.reading import CONFIG_NAME
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import AdapterError, BackboneError
from moka_pl.inference import load_model

IDS = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(4))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def change_config(adapter: Path, **changes: object) -> None:
    file = adapter / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def train(tmp_path: Path, randomize: Callable) -> Callable[..., tuple[nn.Module, Path]]:
    """Puts random adapters over a base and saves them; returns the model and the adapter's folder."""

    def build(config: BackboneConfig) -> tuple[nn.Module, Path]:
        model = load_backbone(config).model
        adapter = MokaConfig(components=3, dropout=0.2)
        inject_adapter(model, adapter)
        randomize(model)
        base = BaseModel(config.name, config.revision, fingerprint(model), config.options())
        return model.eval(), save_adapter(tmp_path / "adapter", model, adapter, base)

    return build


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_it_computes_what_was_trained(quantization: str, train: Callable) -> None:
    model, adapter = train(BackboneConfig("tiny", weights="random", quantization=quantization, seed=3))
    loaded, tokenizer = load_model(adapter, device="cpu")
    assert torch.equal(logits(loaded), logits(model))
    base = load_backbone(BackboneConfig("tiny", weights="random", quantization=quantization, seed=3)).model
    assert not torch.allclose(logits(loaded), logits(base), atol=0.01)
    assert not loaded.training
    assert loaded.config.use_cache
    assert tokenizer.pad_token == "<|pad|>"
    assert len(moka_layers(loaded)) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_chosen_anew(dtype: str, train: Callable) -> None:
    # Trained on a GPU, used on a CPU: the base is the same all the same.
    _, adapter = train(BackboneConfig("tiny", weights="random", compute_dtype=dtype))
    assert load_model(adapter, device="cpu")[0].dtype == torch.float32


def test_cached_generation_gives_the_logits_of_the_whole(train: Callable) -> None:
    model, adapter = train(BackboneConfig("tiny", weights="random"))
    loaded, _ = load_model(adapter, device="cpu")
    out = loaded.generate(
        input_ids=IDS[:1],
        attention_mask=torch.ones_like(IDS[:1]),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        whole = model(out.sequences).logits[:, IDS.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_another_base_is_refused(train: Callable) -> None:
    _, adapter = train(BackboneConfig("tiny", weights="random", seed=0))
    options = BackboneConfig("tiny", weights="random", seed=1).options()
    change_config(adapter, base_options=options)
    with pytest.raises(AdapterError, match="was trained on another base model: 'tiny'"):
        load_model(adapter, device="cpu")


def test_the_base_may_have_moved(tmp_path: Path, train: Callable) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    source = load_backbone(BackboneConfig("tiny", weights="random", quantization="none")).model
    source.save_pretrained(old)
    byte_tokenizer().save_pretrained(old)
    model, adapter = train(BackboneConfig(str(old)))
    old.rename(new)
    change_config(adapter, revision="v1")  # of the old place, not of the new one
    with pytest.raises(BackboneError, match="old: no such model folder"):
        load_model(adapter, device="cpu")
    loaded, _ = load_model(adapter, device="cpu", base=str(new))
    assert torch.equal(logits(loaded), logits(model))


def test_the_revision_belongs_to_the_remembered_name(
    train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = train(BackboneConfig("tiny", "v1", "random"))
    seen = []

    def load(config: BackboneConfig, device: str) -> None:
        seen.append((config.name, config.revision))
        raise BackboneError("far enough")

    monkeypatch.setattr("moka_pl.inference.load.load_backbone", load)
    for base in (None, "mirror/tiny"):
        with pytest.raises(BackboneError, match="far enough"):
            load_model(adapter, device="cpu", base=base)
    assert seen == [("tiny", "v1"), ("mirror/tiny", None)]


@pytest.mark.parametrize("options", [{"quantisation": "nf4"}, {"quantization": "int3"}, [1], None])
def test_damaged_base_options(options: object, train: Callable) -> None:
    _, adapter = train(BackboneConfig("tiny", weights="random"))
    change_config(adapter, base_options=options)
    with pytest.raises(AdapterError, match=r"adapter: base_options in adapter_config\.json are damaged"):
        load_model(adapter, device="cpu")


def test_a_missing_adapter_loads_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moka_pl.inference.load.load_backbone", lambda *_: pytest.fail("loaded the base"))
    with pytest.raises(AdapterError, match="no such folder"):
        load_model(tmp_path / "nothing")
