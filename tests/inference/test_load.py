"""A trained adapter with its base model, loaded again from disk."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, moka_layers, save_adapter
from moka_pl.adapters.reading import CONFIG_NAME, WEIGHTS_NAME
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import AdapterError, BackboneError
from moka_pl.inference import Preview, load_model

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


def test_weights_that_are_given_take_the_place_of_random_ones(tmp_path: Path, train: Callable) -> None:
    model, adapter = train(BackboneConfig("tiny", weights="random", quantization="none", seed=3))
    for name, seed in (("same", 3), ("other", 4)):
        source = load_backbone(BackboneConfig("tiny", weights="random", quantization="none", seed=seed))
        source.model.save_pretrained(tmp_path / name)
        source.tokenizer.save_pretrained(tmp_path / name)
    loaded, _ = load_model(adapter, device="cpu", base=str(tmp_path / "same"))
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(AdapterError, match="was trained on another base model: 'tiny'"):
        load_model(adapter, device="cpu", base=str(tmp_path / "other"))
    again, _ = load_model(adapter, device="cpu", base="tiny")
    assert torch.equal(logits(again), logits(model))


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

    def load(config: BackboneConfig, device: str, before: object) -> None:
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


@pytest.fixture
def stored(tmp_path: Path, randomize: Callable) -> tuple[nn.Module, Path]:
    """A base in a folder, and an adapter that was trained on it in four bits."""
    model = load_backbone(BackboneConfig("tiny", weights="random", quantization="none")).model
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    config = BackboneConfig(str(tmp_path / "base"))
    quantised, adapter = load_backbone(config).model, MokaConfig(components=3)
    inject_adapter(quantised, adapter)
    randomize(quantised)
    base = BaseModel(config.name, None, fingerprint(quantised), config.options())
    return model, save_adapter(tmp_path / "adapter", quantised, adapter, base)


def test_an_adapter_is_in_its_base_before_weights_are_loaded(
    stored: tuple[nn.Module, Path], no_weights: Callable[[], None]
) -> None:
    def look(preview: Preview) -> None:
        layers = moka_layers(preview.model)
        assert len(layers) == 4
        assert all(layer.base_layer.weight.is_meta for layer in layers.values())
        state = load_file(stored[1] / WEIGHTS_NAME)
        assert {f"{n}.{k}" for n, layer in layers.items() for k in layer.tensors()} == state.keys()
        for name, layer in layers.items():
            assert all(torch.equal(t, state[f"{name}.{key}"]) for key, t in layer.tensors().items())
        raise BackboneError("far enough")

    for dtype in (torch.float32, torch.bfloat16):  # stored otherwise it is the same base
        stored[0].to(dtype).save_pretrained(stored[1].with_name("base"))
        no_weights()
        with pytest.raises(BackboneError, match="far enough"):
            load_model(stored[1], device="cpu", before=look)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("embedding", "was trained on another base model: .* with fingerprint"),
        ("matrix", "another base model: 1 of 1[0-9] weight matrices are not those of"),
        ("sizes", "was trained on another base model"),
        ("layers", "does not fit this model: .* or for another base model"),
    ],
)
def test_another_base_is_refused_before_its_weights_are_loaded(
    change: str, message: str, stored: tuple[nn.Module, Path], tmp_path: Path, no_weights: Callable[[], None]
) -> None:
    model, adapter = stored
    other = tmp_path / "other"
    if change == "layers":  # with random weights, whose files tell nothing
        model.config.num_hidden_layers = 1
        model.config.save_pretrained(other)
        change_config(adapter, base_options=BackboneConfig("tiny", weights="random").options())
    elif change == "sizes":
        model = LlamaForCausalLM(LlamaConfig(**(model.config.to_dict() | {"hidden_size": 96})))
    elif change == "matrix":
        nn.init.normal_(model.model.layers[1].mlp.up_proj.weight)
    else:
        nn.init.normal_(model.get_input_embeddings().weight)
    no_weights()
    if change != "layers":
        model.save_pretrained(other)
        byte_tokenizer().save_pretrained(other)
    with pytest.raises(AdapterError, match=message):
        load_model(adapter, device="cpu", base=str(other))


def test_a_damaged_adapter_is_refused_before_weights_are_loaded(
    stored: tuple[nn.Module, Path], no_weights: Callable[[], None]
) -> None:
    file = stored[1] / WEIGHTS_NAME
    state = load_file(file)
    next(iter(state.values()))[0] = torch.nan
    save_file(state, file)
    no_weights()
    with pytest.raises(AdapterError, match="hold a NaN or an infinity"):
        load_model(stored[1], device="cpu")
