"""Linear layers that are trained as a whole beside MoKA (``modules_to_save``)."""

import pytest
import torch

from moka_pl.adapters import (
    BaseModel,
    MokaAdapters,
    MokaConfig,
    adapter_state,
    adapters_disabled,
    inject_adapter,
    load_adapter,
    moka_layers,
    save_adapter,
)
from moka_pl.adapters.methods.registry import merge, unload, unmerge
from moka_pl.adapters.reading import read_adapter
from moka_pl.adapters.trained import trained_layers
from moka_pl.errors import AdapterError

WHOLE = "model.layers.1.mlp.down_proj"


@pytest.fixture
def config():
    return MokaConfig(components=2, target_modules="all-linear", modules_to_save=["1.mlp.down_proj"])


@pytest.fixture
def changed(tiny_llama, randomize, config):
    """A LLaMA whose adapters and whole layer have learnt something."""
    inject_adapter(tiny_llama, config)
    randomize(tiny_llama)
    with torch.no_grad():
        trained_layers(tiny_llama)[WHOLE].trained.weight.mul_(1.5)
    return tiny_llama


def test_is_trained_merged_disabled_and_taken_out(changed, make_llama, token_ids):
    assert list(trained_layers(changed)) == [WHOLE]
    assert WHOLE not in moka_layers(changed)
    assert {n for n, p in changed.named_parameters() if p.requires_grad and ".moka_" not in n} == {
        f"{WHOLE}.trained.weight"
    }
    base, adapted = make_llama()(token_ids).logits, changed(token_ids).logits
    with adapters_disabled(changed):
        assert torch.equal(changed(token_ids).logits, base)
    merge(changed)
    torch.testing.assert_close(changed(token_ids).logits, adapted, rtol=1e-4, atol=1e-5)
    unmerge(changed)
    assert torch.equal(changed(token_ids).logits, adapted)
    unload(changed)
    assert torch.equal(changed(token_ids).logits, base)


def test_is_saved_beside_the_factors(changed, make_llama, token_ids, config, tmp_path):
    folder = save_adapter(tmp_path / "a", changed, config, BaseModel("base"))
    assert f"{WHOLE}.trained.weight" in adapter_state(changed)
    assert '"format_version": 5' in (folder / "adapter_config.json").read_text()
    assert read_adapter(folder).config == config
    model = make_llama()
    load_adapter(model, folder)
    assert torch.equal(model(token_ids).logits, changed(token_ids).logits)
    unload(model, merge=True)
    torch.testing.assert_close(model(token_ids).logits, changed(token_ids).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="an adapter with modules_to_save is not kept beside others"):
        MokaAdapters(make_llama()).load_adapter(folder, "a")


@pytest.mark.parametrize(
    ("named", "error"),
    [
        ("lm_head", "lm_head reads or writes tokens"),
        ("norm", "model.norm is a LlamaRMSNorm; name dense linear layers"),
        ("classifier", "modules_to_save 'classifier' matches no module of this model"),
    ],
)
def test_refuses_what_is_no_linear_layer_of_its_own(named, error, tiny_llama):
    before = [name for name, _ in tiny_llama.named_modules()]
    with pytest.raises(AdapterError, match=error):
        inject_adapter(tiny_llama, MokaConfig(components=2, modules_to_save=[named]))
    assert [name for name, _ in tiny_llama.named_modules()] == before
