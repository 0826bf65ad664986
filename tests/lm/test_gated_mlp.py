"""Gated MLPs that compute their product again, with stand-ins for Liger's kernels where there is no GPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.lm.checkpointing import checkpoint_layers
from moka_pl.lm.gated_mlp import without_product
from moka_pl.lm.replaced_forward import given, replace_forward
from moka_pl.lm.scoring import score_tokens

pytest.importorskip("liger_kernel")


class Silu(torch.autograd.Function):
    """silu(gate) * up; its backward pass overwrites both, as Liger's does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, *_: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            inputs = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
            grads = torch.autograd.grad(F.silu(inputs[0]) * inputs[1], inputs, grad)
        gate.data.copy_(grads[0])
        up.data.copy_(grads[1])
        return gate, up, None, None


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Sizes of the products that are computed again."""
    sizes: list[torch.Size] = []

    def forward(gate: Tensor, up: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        sizes.append(gate.shape)
        return gate, up, F.silu(gate) * up

    monkeypatch.setattr("liger_kernel.transformers.swiglu.LigerSiLUMulFunction", Silu)
    monkeypatch.setattr("liger_kernel.ops.swiglu.swiglu_forward", forward)
    return sizes


def step(model: Any) -> tuple[Tensor, ...]:
    ids = torch.arange(3, 25).view(2, 11)
    loss = score_tokens(model, ids, ids).nll.sum()
    return loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


# With down_proj alone nothing of the first layer's product needs a gradient, nor keeps its two parts.
@pytest.mark.parametrize(("targets", "count"), [(["down_proj"], 1), ("all-linear", 2), (["q_proj"], 0)])
def test_gradients_stay_bit_for_bit(
    tiny_llama: Any, randomize: Any, again: Any, targets: Any, count: int
) -> None:
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    inject_adapter(tiny_llama, MokaConfig(components=2, target_modules=targets, backend="dense"))
    randomize(tiny_llama)
    tiny_llama.train()
    plain = step(tiny_llama)
    for layer in tiny_llama.model.layers:
        own = type(layer.mlp).forward
        assert without_product(own) is own
        replace_forward(layer.mlp, given, without_product(LigerSwiGLUMLP.forward))
    for found, expected in zip(step(tiny_llama), plain, strict=True):
        assert torch.equal(found, expected)
    assert len(again) == count
    again.clear()
    checkpoint_layers(tiny_llama)
    for found, expected in zip(step(tiny_llama), plain, strict=True):
        torch.testing.assert_close(found, expected)
    assert not again  # a layer's tensors are checkpointing's to keep
    tiny_llama.eval()
    with torch.no_grad():
        score_tokens(tiny_llama, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    assert not again
