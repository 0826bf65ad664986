"""Training on checkpoints that are quantised already: gradients, resumed runs, merged weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from shared.quantised_checkpoints import Checkpoint
from torch import nn
from transformers import AutoModelForCausalLM

from moka_pl.adapters import MokaConfig, adapter_state, inject_adapter, save_adapter
from moka_pl.adapters.directory import BaseModel
from moka_pl.backbone import fingerprint, load_backbone, weight_samples
from moka_pl.cli.main import main
from moka_pl.training.sharding.blocks import ShardedBlocks


def input_gradient(model: nn.Module) -> torch.Tensor:
    inputs = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model(inputs_embeds=inputs).logits.square().mean().backward()
    assert inputs.grad is not None
    return inputs.grad


def test_gradients_are_those_of_its_weights(checkpoint: Checkpoint) -> None:
    """Of the input, through all layers, and the same where blocks are kept elsewhere."""
    config = checkpoint.config
    whole = load_backbone(config).model
    grad = input_gradient(whole)
    torch.testing.assert_close(grad, input_gradient(checkpoint.dense), atol=1e-6, rtol=1e-4)
    blocks = ShardedBlocks(None, None, offload=True, device=torch.device("cpu"))
    model = load_backbone(config, blocks=blocks).model
    assert weight_samples(model, ready=blocks.reading(model)) == weight_samples(whole)
    assert torch.equal(input_gradient(model), grad)


def test_a_resumed_run_equals_one_never_stopped(
    checkpoint: Checkpoint, make_module: Callable, make_data: Callable, make_trainer: Callable, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        module = make_module(backbone=checkpoint.config, adapter={"dropout": 0.1})
        saving = ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1, every_n_train_steps=2)
        trainer = make_trainer(saving, enable_checkpointing=True, max_steps=4, limit_val_batches=0)
        trainer.fit(module, make_data(), ckpt_path=ckpt_path, weights_only=True)
        return adapter_state(module.causal_lm)

    whole = fit()
    resumed = fit(next((tmp_path / "kept").glob("step=2.ckpt")))
    assert any(float(tensor.abs().max()) > 0 for name, tensor in whole.items() if "moka_B" in name)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_merged_weights_are_its_own_and_the_update(checkpoint: Checkpoint, tmp_path: Path, capsys) -> None:
    """What ``export`` writes computes what the adapted layers do, in transformers alone."""
    base = checkpoint.config
    model, adapter = load_backbone(base).model, MokaConfig(components=2, target_modules="all-linear")
    inject_adapter(model, adapter)
    for tensor in adapter_state(model).values():
        tensor.normal_(std=0.1)
    remembered = BaseModel(base.name, None, fingerprint(model), base.options())
    folder = save_adapter(tmp_path / "adapter", model, adapter, remembered)
    main(["export", str(folder), "--to", "merged", "--dtype", "float32", "--out", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        assert (merged(ids).logits - checkpoint.dense(ids).logits).abs().max() > 0.01
