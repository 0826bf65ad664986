"""Adapted embeddings and output heads, tied and not, against the dense matrices that they stand for."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moka_pl.adapters import (
    BaseModel,
    MokaAdapters,
    MokaConfig,
    MokaEmbedding,
    adapters_disabled,
    attach,
    inject_adapter,
    load_adapter,
    merge,
    moka_layers,
    save_adapter,
    unload,
    unmerge,
)
from moka_pl.adapters.reading import read_adapter_state
from moka_pl.adapters.vocabulary.embedding import MokaTiedHead
from moka_pl.errors import AdapterError
from moka_pl.export.lora import lora_form
from moka_pl.export.peft import write_peft
from moka_pl.inspection.report import inspect_adapter
from moka_pl.lm.head_loss import nll_at_head, token_nll
from moka_pl.planning.adapters import plan_adapters

FILTERS = {
    "diverse": {"components": 5},
    "thin": {"components": 2, "filters": "servable", "rank": 4},
    "identities": {"components": 2, "filters": "prime"},
    "both": {"components": 2, "filters": [[4, 5, 7], [3, 5, 11, 3]]},
}
#: What is adapted, whether the model is tied, and which of the two then computes with an update.
CASES = {
    "embedding": (["embed_tokens"], False, False),
    "embedding of a tied pair": (["embed_tokens"], True, False),
    "head of a tied pair": (["lm_head"], True, False),
    "each of a tied pair": (["embed_tokens", "lm_head"], True, False),
    "a tied pair as one": (["embed_tokens"], True, True),
    "a tied pair as one, by the head's name": (["lm_head", "q_proj"], True, True),
}


def adapted(make_llama: Callable, randomize: Callable, targets: list[str], tied: bool, shared: bool):
    model = make_llama(tie_word_embeddings=tied)
    config = MokaConfig(components=2, target_modules=targets, ensure_weight_tying=shared)
    inject_adapter(model, config)
    randomize(model)
    return model, config


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@settings(max_examples=8, deadline=None)
@given(m=st.integers(20, 60), n=st.integers(8, 40), seed=st.integers(0, 99))
def test_rows_and_gradients_are_those_of_the_dense_matrix(options: dict, m: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = MokaEmbedding(nn.Embedding(m, n).double(), MokaConfig(**options), torch.float64)
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter)
    ids, weights = torch.randint(m, (3, 5)), torch.randn(3, 5, n, dtype=torch.float64)
    dense = layer.base_layer.weight + layer.get_delta_weight()  # (m, n)
    out = layer(ids)
    torch.testing.assert_close(out, F.embedding(ids, dense))
    trained = list(layer.parameters(recurse=False))
    ours = torch.autograd.grad((out * weights).sum(), trained)
    theirs = torch.autograd.grad((F.embedding(ids, dense) * weights).sum(), trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert layer.exact_lora_rank() >= torch.linalg.matrix_rank(layer.get_delta_weight())
    lora_a, lora_b = layer.lora_factors()
    torch.testing.assert_close(lora_b @ lora_a, layer.get_delta_weight())


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")  # PEFT's
@pytest.mark.parametrize(("targets", "tied", "shared"), CASES.values(), ids=CASES)
def test_every_combination_computes_saves_merges_and_exports_alike(
    targets, tied, shared, make_llama, randomize, token_ids, exported, tmp_path: Path
) -> None:
    base = make_llama(tie_word_embeddings=tied)
    frozen = logits(base, token_ids)
    model, config = adapted(make_llama, randomize, targets, tied, shared)
    found = logits(model, token_ids)
    # By dense weights of each end's own.
    dense, layers = copy.deepcopy(base), moka_layers(model, shared=True)
    dense.lm_head.weight = nn.Parameter(dense.lm_head.weight.detach().clone())
    with torch.no_grad():
        for name, layer in layers.items():
            dense.get_submodule(name).weight += layer.get_delta_weight()
    torch.testing.assert_close(found, logits(dense, token_ids), atol=1e-4, rtol=1e-4)
    if shared:
        assert isinstance(model.lm_head, MokaTiedHead)
        assert "lm_head" not in moka_layers(model)
    with adapters_disabled(model):
        assert torch.equal(logits(model, token_ids), frozen)
    # Saved and loaded; the frozen base stays as it is.
    path = save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny"))
    again = make_llama(tie_word_embeddings=tied)
    load_adapter(again, path)
    assert torch.equal(logits(again, token_ids), found)
    assert len({name.rpartition(".moka_")[0] for name in read_adapter_state(path)}) == len(moka_layers(model))
    for name, tensor in base.state_dict().items():
        module, _, own = name.rpartition(".")
        owner = again.get_submodule(module)
        assert torch.equal(getattr(getattr(owner, "base_layer", owner), own), tensor)
    again.tie_weights()  # as trainers of transformers do
    copied = copy.deepcopy(again)
    assert torch.equal(logits(copied, token_ids), found)
    merge(again)
    torch.testing.assert_close(logits(again, token_ids), found, atol=1e-4, rtol=1e-4)
    unmerge(again)
    assert torch.equal(logits(again, token_ids), found)
    # Exported, and read by transformers and PEFT alone.
    plain = exported(model)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == shared
    torch.testing.assert_close(logits(plain, token_ids), found, atol=1e-4, rtol=1e-4)
    form = lora_form(layers)
    out = tmp_path / "lora"
    out.mkdir()
    write_peft(out, form, base, "tiny", None, torch.float32)
    served = peft.PeftModel.from_pretrained(base, str(out))
    torch.testing.assert_close(logits(served, token_ids), found, atol=1e-4, rtol=1e-4)
    # Unloaded and saved by transformers, it stays what it is.
    unload(again, merge=True)
    again.save_pretrained(tmp_path / "unloaded")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "unloaded")
    torch.testing.assert_close(logits(plain, token_ids), found, atol=1e-4, rtol=1e-4)


def test_an_adapted_pair_is_trained_as_one_weight(make_llama, randomize, token_ids) -> None:
    model, _ = adapted(make_llama, randomize, ["embed_tokens"], True, True)
    model.double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 3  # the left factors, the right ones, the gates
    dense = copy.deepcopy(model)
    ours = torch.autograd.grad(model(token_ids).logits.log_softmax(-1)[..., 5].sum(), trained)
    weight = dense.model.embed_tokens.base_layer.weight + dense.model.embed_tokens.get_delta_weight()
    own = [parameter for parameter in dense.parameters() if parameter.requires_grad]
    unload(dense)
    del dense.lm_head.weight, dense.model.embed_tokens.weight
    dense.lm_head.weight = dense.model.embed_tokens.weight = weight
    theirs = torch.autograd.grad(dense(token_ids).logits.log_softmax(-1)[..., 5].sum(), own)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_of_a_tied_head_needs_no_logits_of_all_tokens(make_llama, randomize, monkeypatch) -> None:
    monkeypatch.setattr("moka_pl.lm.head_loss._MOST_ON_CPU", 0)
    monkeypatch.setattr("moka_pl.lm.head_loss.part_size", lambda *_, **__: 3)
    model, _ = adapted(make_llama, randomize, ["lm_head"], True, True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hidden, wanted = torch.randn(7, 32), torch.randint(96, (7,))
    nll, expected = nll_at_head(model.lm_head, hidden, wanted), token_nll(model.lm_head(hidden), wanted)
    torch.testing.assert_close(nll, expected)
    ours, theirs = (torch.autograd.grad(value.sum(), trained) for value in (nll, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_an_embedding_that_scales_its_rows_scales_the_update(randomize, token_ids) -> None:
    from shared.tiny import SHAPE, build
    from transformers import Gemma3TextConfig

    base = build(Gemma3TextConfig(**SHAPE, head_dim=8, tie_word_embeddings=True))
    model = copy.deepcopy(base)
    inject_adapter(model, MokaConfig(components=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    randomize(model)
    with torch.no_grad():
        base.lm_head.weight += model.model.embed_tokens.get_delta_weight()
    torch.testing.assert_close(logits(model, token_ids), logits(base, token_ids), atol=1e-4, rtol=1e-4)


REFUSED = {
    "not tied": (False, {"target_modules": ["lm_head"]}, "output head has a weight of its own"),
    "neither": (True, {"target_modules": ["q_proj"]}, "names neither model.embed_tokens nor lm_head"),
}


@pytest.mark.parametrize(("tied", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_tied_is_refused(tied: bool, options: dict, reason: str, make_llama) -> None:
    model = make_llama(tie_word_embeddings=tied)
    with pytest.raises(AdapterError, match=f"ensure_weight_tying is set, but .*{reason}"):
        inject_adapter(model, MokaConfig(components=1, ensure_weight_tying=True, **options))
    assert not moka_layers(model)


def test_an_embedding_that_is_no_lookup_is_refused(tiny_llama) -> None:
    tiny_llama.model.embed_tokens.max_norm = 1.0
    with pytest.raises(AdapterError, match="a Embedding computes more than the rows of W"):
        inject_adapter(tiny_llama, MokaConfig(components=1, target_modules=["embed_tokens"]))


def test_rows_of_a_batch_have_their_own_embedding(make_llama, randomize, token_ids) -> None:
    model = attach(make_llama(), MokaConfig(components=1, target_modules=["embed_tokens"]), base="tiny")
    randomize(model)
    first, adapters = logits(model, token_ids), MokaAdapters(model, "a")
    adapters.add_adapter("b", MokaConfig(components=1, target_modules=["embed_tokens", "lm_head"]))
    with torch.no_grad():
        for parameter in adapters._layers["b"]["model.embed_tokens"].parameters(recurse=False):
            parameter.fill_(0.3)
    adapters.set_adapter("b")
    second = logits(model, token_ids)
    with torch.no_grad():
        mixed = adapters(token_ids, adapter_names=["b", "a"]).logits
    torch.testing.assert_close(mixed, torch.stack([second[0], first[1]]))
    adapters.add_weighted_adapter(["a", "b"], [1.0, -0.5], "sum")
    layers = adapters._layers
    expected = layers["a"]["model.embed_tokens"].get_delta_weight()
    expected = expected - 0.5 * layers["b"]["model.embed_tokens"].get_delta_weight()
    torch.testing.assert_close(layers["sum"]["model.embed_tokens"].get_delta_weight(), expected)
    with pytest.raises(AdapterError, match="with ensure_weight_tying is not kept beside others"):
        adapters.add_adapter("c", MokaConfig(ensure_weight_tying=True))


def test_a_plan_and_an_inspection_count_the_shared_update_once(make_llama, randomize, tmp_path) -> None:
    model, config = adapted(make_llama, randomize, ["lm_head"], True, True)
    empty = make_llama(tie_word_embeddings=True).to("meta")
    empty.tie_weights()  # which the move has untied
    planned = plan_adapters(empty, config, None, 4, [])
    assert planned.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [(layer.name, layer.outputs, layer.inputs) for layer in planned.layers] == [
        ("model.embed_tokens", 96, 32),
        ("lm_head", 96, 32),
    ]
    path = save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny"))
    (numbers,) = inspect_adapter(path).layers
    assert numbers.name == "model.embed_tokens"
    delta = model.model.embed_tokens.get_delta_weight().detach()
    assert numbers.norm == pytest.approx(float(delta.norm()), rel=1e-4)
