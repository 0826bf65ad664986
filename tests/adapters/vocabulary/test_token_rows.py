"""New tokens: their rows alone are trained and stored, and the frozen base stays as it is."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from moka_pl.adapters import (
    BaseModel,
    MokaConfig,
    adapters_disabled,
    inject_adapter,
    load_adapter,
    merge,
    save_adapter,
    unload,
    unmerge,
)
from moka_pl.adapters.reading import read_adapter, read_adapter_state
from moka_pl.adapters.vocabulary.token_rows import TokenHead, token_rows
from moka_pl.backbone import fingerprint
from moka_pl.backbone.quantization import quantised_linear
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.inspection.report import inspect_adapter
from moka_pl.lm.head_loss import nll_at_head, token_nll
from moka_pl.lm.scoring import score_tokens

#: Rows inside of the 96 of the base, below them, and both.
INDICES = {"inside": [3, 95], "below": [96, 97], "both": [5, 95, 96, 97, 98]}


def with_rows(make_llama: Callable, randomize: Callable, indices: list[int], tied: bool = True):
    model = make_llama(tie_word_embeddings=tied)
    config = MokaConfig(components=2, trainable_token_indices=indices)
    inject_adapter(model, config)
    randomize(model)
    with torch.no_grad():
        for layer in token_rows(model).values():
            if layer.owns_factors:
                layer.trainable_tokens.normal_(0, 0.3)
    return model, config


def dense(model: nn.Module, make_llama: Callable, tied: bool) -> nn.Module:
    """A plain model of so many tokens, with the rows in its weights and the adapters merged."""
    vocabulary = model.model.embed_tokens.num_embeddings
    plain = make_llama(vocab_size=vocabulary, tie_word_embeddings=tied)
    merged = copy.deepcopy(model)
    unload(merged, merge=True)
    state = {name: t for name, t in merged.state_dict().items() if name not in ("lm_head.weight",)}
    state["model.embed_tokens.weight"] = rows_of(model.model.embed_tokens)
    state["lm_head.weight"] = rows_of(model.lm_head)
    plain.load_state_dict(state)
    return plain


def rows_of(layer: nn.Module) -> torch.Tensor:
    weight = layer.base_layer.weight.detach()
    whole = torch.cat([weight, torch.zeros(layer.out_features - len(weight), weight.shape[1])])
    whole[layer.indices] = layer.rows().detach()
    return whole


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("indices", "tied"),
    [(INDICES["inside"], False), (INDICES["below"], True), (INDICES["both"], True), (INDICES["both"], False)],
)
def test_rows_compute_save_merge_and_export_as_a_larger_model(
    indices, tied, make_llama, randomize, exported, tmp_path: Path
) -> None:
    base = make_llama(tie_word_embeddings=tied)
    model, config = with_rows(make_llama, randomize, indices, tied)
    ids = torch.tensor([[1, *indices, 7, 8], [9, 10, *indices, 11]])
    found, plain = logits(model, ids), dense(model, make_llama, tied)
    assert found.shape[-1] == max(96, indices[-1] + 1) == model.config.vocab_size
    torch.testing.assert_close(found, logits(plain, ids), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        loss = float(plain(ids, labels=ids).loss)
        assert float(model(ids, labels=ids).loss) == pytest.approx(loss, rel=1e-4)
        assert float(score_tokens(model, ids, ids).nll.mean()) == pytest.approx(loss, rel=1e-4)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    assert model.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()
    assert fingerprint(model) == fingerprint(base)
    # Only the rows are stored, and the base stays as it is.
    path = save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny"))
    stored = {name: tuple(t.shape) for name, t in read_adapter_state(path).items() if ".moka_" not in name}
    ends = ["model.embed_tokens"] if tied else ["lm_head", "model.embed_tokens"]
    assert stored == {f"{end}.trainable_tokens": (len(indices), 32) for end in ends}
    assert read_adapter(path).config.trainable_token_indices == indices
    assert inspect_adapter(path).layers[0].name.endswith("q_proj")
    again = make_llama(tie_word_embeddings=tied)
    load_adapter(again, path, fingerprint(again))
    assert torch.equal(logits(again, ids), found)
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(again.get_submodule(name).base_layer.weight, base.get_submodule(name).weight)
    again.tie_weights()  # as trainers of transformers do
    merge(again)
    torch.testing.assert_close(logits(again, ids), found, atol=1e-4, rtol=1e-4)
    unmerge(again)
    assert torch.equal(logits(again, ids), found)
    read = exported(model)
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(read, ids), found, atol=1e-4, rtol=1e-4)
    # Taken out, the base is what it was; or merged, a larger model.
    unload(again)
    known = ids.clamp(max=90)
    assert torch.equal(logits(again, known), logits(base, known))
    assert again.config.vocab_size == 96


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_reach_the_rows_alone(tied, make_llama, randomize) -> None:
    indices = INDICES["both"]
    model, _ = with_rows(make_llama, randomize, indices, tied)
    plain = dense(model, make_llama, tied)
    model.double(), plain.double()
    ids = torch.tensor([[1, *indices, 7, 96, 8]])
    score_tokens(model, ids, ids).nll.sum().backward()
    plain.requires_grad_(True)
    score_tokens(plain, ids, ids).nll.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(".moka_" in name or name.endswith(".trainable_tokens") for name in trained)
    for name, layer in token_rows(model).items():
        if layer.owns_factors:
            theirs = plain.get_submodule(name).weight.grad[indices]
            torch.testing.assert_close(layer.trainable_tokens.grad, theirs, atol=1e-5, rtol=1e-3)


def test_the_loss_of_parts_is_that_of_all_logits(make_llama, randomize, monkeypatch) -> None:
    monkeypatch.setattr("moka_pl.lm.head_loss._MOST_ON_CPU", 0)
    monkeypatch.setattr("moka_pl.lm.head_loss.part_size", lambda *_, **__: 3)
    model, _ = with_rows(make_llama, randomize, INDICES["both"], tied=False)
    model.lm_head.base_layer.bias = nn.Parameter(torch.randn(96))
    assert isinstance(model.lm_head, TokenHead)
    hidden, wanted = torch.randn(5, 32), torch.tensor([5, 95, 96, 98, -100])
    scores = hidden @ rows_of(model.lm_head).T
    scores[:, :96] += model.lm_head.bias
    torch.testing.assert_close(model.lm_head(hidden), scores)
    torch.testing.assert_close(nll_at_head(model.lm_head, hidden, wanted), token_nll(scores, wanted))
    model.lm_head.merge()
    torch.testing.assert_close(model.lm_head(hidden), scores)


def test_without_the_adapter_new_tokens_are_what_they_started_as(make_llama, randomize) -> None:
    model, _ = with_rows(make_llama, randomize, INDICES["both"])
    weight = model.model.embed_tokens.base_layer.weight.detach()
    with adapters_disabled(model), torch.no_grad():
        rows = model.model.embed_tokens(torch.tensor([5, 95, 96, 98, 7]))
        assert model(torch.tensor([[1, 96, 5]])).logits.shape == (1, 3, 99)
    mean = weight.mean(0)
    torch.testing.assert_close(rows, torch.stack([weight[5], weight[95], mean, mean, weight[7]]))


REFUSED = {
    "far away": ({"trainable_token_indices": [10**15]}, "row 96 would be missing"),
    "a hole": ({"trainable_token_indices": [96, 98]}, "rows 0 to 95, and row 97 would be missing"),
    "adapted, too": (
        {"trainable_token_indices": [96], "target_modules": ["lm_head"]},
        "target_modules adapts lm_head, of which new tokens",
    ),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused(options: dict, reason: str, tiny_llama) -> None:
    with pytest.raises(AdapterError, match=reason):
        inject_adapter(tiny_llama, MokaConfig(components=1, **options))
    assert not token_rows(tiny_llama)
    assert tiny_llama.config.vocab_size == 96


def test_rows_of_a_quantised_head_are_refused(make_llama) -> None:
    model = make_llama(tie_word_embeddings=False)
    head = model.lm_head
    model.lm_head = quantised_linear(head, head.weight.detach(), "nf4", True, torch.float32)
    with pytest.raises(AdapterError, match="rows of lm_head, which is a Linear4bit; leave it out"):
        inject_adapter(model, MokaConfig(components=1, trainable_token_indices=[5]))


@pytest.mark.parametrize("indices", [[], [-1], [4, 4]])
def test_numbers_that_are_none_are_refused(indices: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"trainable_token_indices is .*; list numbers of tokens"):
        MokaConfig(trainable_token_indices=indices)
