"""Blocks that are kept elsewhere, in one process; two are in test_two_ranks.py."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import StrategyRegistry
from safetensors.torch import load_file, save_file

from moka_pl.adapters import FullFineTuning
from moka_pl.backbone import BackboneConfig, load_backbone, weight_samples
from moka_pl.backbone.blocks.frozen_tensors import decoder_blocks, frozen_tensors
from moka_pl.backbone.quantization import dense_weight, is_quantised
from moka_pl.backbone.random_weights import SHAPES, byte_tokenizer
from moka_pl.errors import BackboneError, ConfigError
from moka_pl.training.module import MokaModule
from moka_pl.training.sharding.blocks import ShardedBlocks
from moka_pl.training.sharding.shard import BlockShard
from moka_pl.training.sharding.strategy import ShardedStrategy


@pytest.fixture
def folder(make_llama, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 320}
    model = make_llama(**sizes, tie_word_embeddings=True, attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def offload():
    return ShardedBlocks(None, None, offload=True, device=torch.device("cpu"))


def offloaded(config):
    blocks = offload()
    return load_backbone(config, blocks=blocks).model, blocks


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_weights_are_those_of_a_model_that_is_loaded_as_a_whole(folder, weights, quantization):
    config = BackboneConfig(folder, weights=weights, quantization=quantization)
    whole = load_backbone(config).model
    model, blocks = offloaded(config)
    ready = blocks.reading(model)
    for (name, mine), theirs in zip(
        decoder_blocks(model).items(), decoder_blocks(whole).values(), strict=True
    ):
        ready(f"{name}.mlp.up_proj.weight")
        places = list(frozen_tensors(mine)), list(frozen_tensors(theirs))
        assert len(places[0]) == (14 if quantization == "nf4" else 7)
        for one, other in zip(*places, strict=True):
            assert torch.equal(one.tensor, other.tensor)
    named = dict(whole.named_parameters())
    with blocks.whole_ends():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or ".layers." not in name:
                assert torch.equal(parameter, named[name]), name
    assert weight_samples(model, ready=ready) == weight_samples(whole)
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_layers_that_a_configuration_leaves_out_are_refused(folder):
    described = Path(folder) / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"num_hidden_layers": 1}))
    with pytest.raises(
        BackboneError, match=r"hold layers that config\.json leaves out \(first model\.layers\.1"
    ):
        offloaded(BackboneConfig(folder, quantization="none"))


@pytest.mark.parametrize(
    ("name", "told"), [("model.layers.0.self_attn.rotary_emb.inv_freq", False), ("vision.patch.weight", True)]
)
def test_tensors_that_are_no_part_of_the_model_are_told(folder, name, told):
    file = sorted(Path(folder).glob("*.safetensors"))[0]
    save_file(load_file(file) | {name: torch.ones(2)}, file, {"format": "pt"})
    config, blocks = BackboneConfig(folder, quantization="none"), offload()
    notes = load_backbone(config).notes
    assert load_backbone(config, blocks=blocks).notes == notes
    assert any(name in note for note in notes) == told


def test_files_are_read_block_by_block(folder, monkeypatch):
    monkeypatch.setattr("moka_pl.backbone.load._pretrained", None)  # which reads all of them
    model, blocks = offloaded(BackboneConfig(folder))
    assert len(blocks) == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_a_whole_model_with_two_blocks_at_a_time(checkpointed, monkeypatch):
    config = BackboneConfig("tiny", weights="random")
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["tiny"] | {"num_hidden_layers": 5})
    gradients = []
    for model, blocks in ((load_backbone(config).model, None), offloaded(config)):
        inputs = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if checkpointed:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        most = []
        for block in decoder_blocks(model).values() if blocks else ():
            block.mlp.register_forward_pre_hook(lambda *_, b=blocks, m=most: m.append(b.held))
        loss = model(inputs_embeds=inputs).logits.square().mean()
        loss.backward()
        gradients.append((loss.detach(), inputs.grad))
        if blocks is not None:
            blocks.end_step()
            assert len(most) == (10 if checkpointed else 5)
            assert max(most) <= blocks.held * 7 / 5
            stored = [m.weight.untyped_storage().nbytes() for m in model.modules() if is_quantised(m)]
            assert max(stored) <= 1
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)


class Memory:
    """Fails when it has been taken so many times."""

    left, failed = 0, False

    def take(self):
        self.left -= 1
        if self.left == 0:
            self.failed = True
            raise torch.OutOfMemoryError("out of memory on purpose")


@pytest.mark.parametrize("place", ["gathering", "forward", "backward"])
def test_a_pass_that_lacked_memory_begins_again_with_two_blocks_at_a_time(place, monkeypatch):
    config = BackboneConfig("tiny", weights="random")
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["tiny"] | {"num_hidden_layers": 5})
    inputs = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradient(model):
        return torch.autograd.grad(model(inputs_embeds=inputs).logits.square().mean(), inputs)[0]

    expected = gradient(load_backbone(config).model)
    model, blocks = offloaded(config)
    memory, most = Memory(), []
    for block in decoder_blocks(model).values():
        block.mlp.register_forward_pre_hook(lambda *_: most.append(blocks.held))
        if place == "forward":
            block.mlp.register_forward_pre_hook(lambda *_: memory.take())
        elif place == "backward":
            block.mlp.register_full_backward_pre_hook(lambda *_: memory.take())
    if place == "gathering":
        reserve = BlockShard.reserve

        def look(shard):
            memory.take()
            reserve(shard)

        monkeypatch.setattr(BlockShard, "reserve", look)
    for tried in range(1, 100):  # the first, the second, … time that memory is taken
        memory.left, memory.failed = tried, False
        with contextlib.suppress(torch.OutOfMemoryError):
            gradient(model)
        if not memory.failed:
            break
        assert torch.equal(gradient(model), expected)
        blocks.end_step()
    assert tried > 5
    blocks.end_step()
    assert max(most) <= blocks.held * 7 / 5


def test_layers_are_tried_one_by_one():
    model, blocks = offloaded(BackboneConfig("tiny", weights="random"))
    blocks.end_step()
    layer = model.model.layers[1].mlp.up_proj
    x = torch.ones(2, 64, requires_grad=True)
    with blocks.by_layer():
        layer(x).sum().backward()
    whole = load_backbone(BackboneConfig("tiny", weights="random")).model.model.layers[1].mlp.up_proj
    torch.testing.assert_close(x.grad, torch.ones(2, 128) @ dense_weight(whole))


def test_what_is_not_there_computes_nothing():
    model, blocks = offloaded(BackboneConfig("tiny", weights="random"))
    blocks.end_step()
    with pytest.raises((RuntimeError, AttributeError)):
        model.model.layers[0].mlp.up_proj(torch.zeros(2, 64))
    with pytest.raises((RuntimeError, AttributeError)):
        dense_weight(model.model.layers[0].mlp.up_proj)
    model, blocks = offloaded(BackboneConfig("tiny", weights="random", quantization="none"))
    blocks.end_step()
    assert model.model.layers[0].mlp.up_proj(torch.zeros(1, 64)).isnan().all()


@pytest.fixture
def alone(monkeypatch):
    """Leaves nothing of a process group of one behind."""
    before = dict(os.environ)
    yield {"strategy": ShardedStrategy(offload=True)}
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def test_offloaded_training_is_training(make_module, make_data, make_trainer, step_log, alone):
    runs = []
    for options in ({}, alone):
        module, log = make_module(), step_log()
        trainer = make_trainer(log, **options)
        trainer.fit(module, make_data())
        runs.append((log.losses, trainer.callback_metrics.get("val/loss")))
    assert runs[0] == runs[1]


def test_names_are_registered():
    assert {"sharded", "sharded_offload"} <= set(StrategyRegistry.available_strategies())
    assert StrategyRegistry.get("sharded_offload").offload
    assert not StrategyRegistry.get("sharded").offload


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": FullFineTuning()}, "sharded keeps the base frozen"),
        ({"cuda_graphs": True}, "cuda_graphs is true"),
    ],
)
def test_what_needs_the_whole_base_is_refused_before_loading(
    options, message, make_data, make_trainer, alone, monkeypatch
):
    monkeypatch.setattr(MokaModule, "load_base", None)
    module = MokaModule(BackboneConfig("tiny", weights="random", quantization="none"), **options)
    with pytest.raises(ConfigError, match=message):
        make_trainer(**alone).fit(module, make_data())
