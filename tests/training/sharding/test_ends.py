"""Embedding and output head that are kept elsewhere, in one process; two are in test_two_ranks.py."""

import copy

import pytest
import torch
from torch import nn

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.blocks.frozen_tensors import decoder_blocks
from moka_pl.backbone.random_weights import SHAPES
from moka_pl.lm import head_loss
from moka_pl.lm.scoring import score_tokens
from moka_pl.training.sharding.blocks import ShardedBlocks
from moka_pl.training.sharding.ends import find_ends

BOTH = pytest.mark.parametrize("tied", [False, True])
IDS = torch.arange(24).view(2, 12) * 7 % 320


def config(monkeypatch, tied):
    """Blocks that are smaller than embedding and head, as those of large vocabularies."""
    shape = SHAPES["tiny"] | {"num_hidden_layers": 4, "tie_word_embeddings": tied}
    monkeypatch.setitem(SHAPES, "tiny", shape)
    return BackboneConfig("tiny", weights="random")


def offloaded(config):
    blocks = ShardedBlocks(None, None, offload=True, device=torch.device("cpu"))
    return load_backbone(config, blocks=blocks).model, blocks


def is_whole(layer):
    layer = getattr(layer, "base_layer", layer)
    return layer.weight.untyped_storage().nbytes() >= layer.weight.numel() * layer.weight.itemsize


def watch(model, seen):
    """Notes at every block, forward and backward, which of the two is whole."""
    for block in decoder_blocks(model).values():
        block.mlp.register_forward_pre_hook(lambda *_: seen.append(whole(model)))
        block.mlp.register_full_backward_pre_hook(lambda *_: seen.append(whole(model)))


def whole(model):
    return is_whole(model.get_input_embeddings()), is_whole(model.get_output_embeddings())


def loss_of(model):
    return score_tokens(model, IDS, IDS).nll.sum()


@BOTH
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("way", ["called", "by parts"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_they_are_whole_only_while_needed(tied, adapted, way, checkpointed, monkeypatch):
    if way == "by parts":  # which reads the head's weight without a call
        monkeypatch.setattr(head_loss, "_MOST_ON_CPU", 0)
        for name in ("_LOGITS", "_FEWEST", "_FEWEST_ADAPTED"):
            monkeypatch.setattr(head_loss, name, 5)
    options, seen, runs = config(monkeypatch, tied), [], []
    for model, blocks in ((load_backbone(options).model, None), offloaded(options)):
        adapter = MokaConfig(components=2, target_modules=["v_proj", *(["lm_head"] if adapted else [])])
        torch.manual_seed(0)
        inject_adapter(model, adapter)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(0, 0.1)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if blocks is not None:
            watch(model, seen)
            blocks.begin_step()
        loss = loss_of(model)
        at_loss = whole(model)
        loss.backward()
        runs.append([loss.detach(), *(parameter.grad for parameter in trained)])
    for mine, theirs in zip(*runs, strict=True):
        assert torch.equal(mine, theirs)
    assert at_loss == (tied, True)
    assert len(seen) == (12 if checkpointed else 8)
    assert not any(end for ends in seen for end in ends)
    blocks.end_step()
    assert whole(model) == (False, False)


@BOTH
def test_a_tied_weight_is_kept_once(tied, monkeypatch):
    model, blocks = offloaded(config(monkeypatch, tied))
    blocks.end_step()
    held = blocks.held
    with blocks.whole_ends():
        assert whole(model) == (True, True)
        matrix = 4 * 320 * 64
        assert blocks.held - held == matrix * (1 if tied else 2)
        blocks.end_step()  # as ranks do that wait for others
        model(IDS)
        assert whole(model) == (True, True)
    assert whole(model) == (False, False)
    assert blocks.held == held


@BOTH
def test_logits_and_generated_tokens_are_those_of_a_whole_model(tied, monkeypatch):
    options = config(monkeypatch, tied)
    one, (other, _) = load_backbone(options).model, offloaded(options)
    for model in (one, other):
        model.generation_config.eos_token_id = None
    told = [m.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (one, other)]
    assert torch.equal(*told)
    assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_weights_that_are_read_without_a_call_are_there(monkeypatch):
    model, _ = offloaded(config(monkeypatch, tied=False))
    expected = model.model(IDS).last_hidden_state
    embedding = model.get_input_embeddings()
    model.set_input_embeddings(Reads(embedding))
    assert torch.equal(model.model(IDS).last_hidden_state, expected)


class Reads(nn.Module):
    """Looks tokens up as layers do that train some of them."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, ids):
        return nn.functional.embedding(ids, self.base_layer.weight)


def test_copies_of_layers_do_not_copy_what_gathers_them(monkeypatch):
    model, blocks = offloaded(config(monkeypatch, tied=False))
    with blocks.whole_ends():
        copied = copy.deepcopy(model.get_input_embeddings())
    expected = model.get_input_embeddings()(IDS)
    assert torch.equal(copied(IDS), expected)


def test_what_is_trained_or_read_elsewhere_stays_whole(monkeypatch):
    model = load_backbone(config(monkeypatch, tied=True)).model
    decoder, embedding, head = model.model, model.model.embed_tokens, model.lm_head
    found = find_ends(nn.ModuleList([model]))
    assert (found.decoder, found.embedding, found.head) == (decoder, embedding, head)
    assert found.tied
    inject_adapter(model, MokaConfig(components=2, target_modules=["embed_tokens", "lm_head"]))
    assert find_ends(model).embedding is embedding
    assert find_ends(model).head is head
    model.further = nn.Linear(64, 320)
    model.further.weight = head.weight
    assert find_ends(model) is None
    del model.further
    head.weight.requires_grad_(True)
    assert find_ends(model) is None
    model = load_backbone(config(monkeypatch, tied=False)).model
    model.lm_head.weight.requires_grad_(True)
    assert find_ends(model).head is None
    assert find_ends(model).embedding is model.model.embed_tokens
    assert find_ends(model.model) is None
    assert find_ends(nn.Linear(2, 2)) is None
