"""What a layer saves for its backward pass, and when: checkpointing computes again only what that needs."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moka_pl._compat import saving_hooks
from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.ops.merged_forward import DenseUpdates, StructuredUpdates
from moka_pl.ops.thin import ThinUpdates

CONFIGS = {
    "thin": MokaConfig(components=2, filters="servable", rank=4),
    "dense": MokaConfig(components=2, backend="dense"),
    "structured": MokaConfig(components=2, backend="structured"),
}


@pytest.fixture(params=CONFIGS)
def block(request: pytest.FixtureRequest) -> nn.Sequential:
    """Two layers, of which the last one ends the block."""
    torch.manual_seed(0)
    layers = [MokaLinear(nn.Linear(48, 48).requires_grad_(False), CONFIGS[request.param]) for _ in range(2)]
    for parameter in nn.ModuleList(layers).parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.requires_grad else None
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def gradients(block: nn.Sequential, again: bool) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 5 * 48).view(5, 48).requires_grad_()
    out = checkpoint(block, x, use_reentrant=False) if again else block(x)
    trained = [p for p in block.parameters() if p.requires_grad]
    return list(torch.autograd.grad(out.square().sum(), [x, *trained]))


def test_checkpointing_changes_no_gradient(block: nn.Sequential) -> None:
    for found, expected in zip(gradients(block, True), gradients(block, False), strict=True):
        assert torch.equal(found, expected)


def test_the_last_product_of_a_block_is_not_computed_again(
    block: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = [], []
    for kind in (DenseUpdates, StructuredUpdates, ThinUpdates):

        def product(self, *args, own=kind.product):
            begun.append(self)
            ended.append(own(self, *args))
            return ended[-1]

        monkeypatch.setattr(kind, "product", product)
    gradients(block, True)
    # Two products forward, and when the block is computed again the first layer's whole and the last's begun.
    assert (len(begun), len(ended)) == (4, 3)


def test_other_hooks_are_heeded(block: nn.Sequential) -> None:
    packed: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    expected = gradients(block, False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = gradients(block, False)
    assert packed.count(torch.Size([5, 48])) >= 3  # both layers' inputs, and the output of tanh
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["moka_A", "moka_B", "moka_gate"])
def test_factors_changed_before_the_backward_pass_are_an_error(
    block: nn.Sequential, name: str, again: bool
) -> None:
    x = torch.ones(5, 48, requires_grad=True)
    out = checkpoint(block, x, use_reentrant=False) if again else block(x)
    with torch.no_grad():
        getattr(block[0], name).add_(1)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        out.sum().backward()


def test_nothing_is_packed_without_gradients(block: nn.Sequential) -> None:
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, lambda kept: kept):
        assert saving_hooks() is not None
        block(torch.ones(5, 48))
