"""Which backend computes an update."""

import pytest
import torch

from moka_pl.ops.dispatch import can_fuse, resolve_backend
from moka_pl.ops.layout import Shape

PAIR, BLOCKS = Shape(2, 2, 4, 4), Shape(2, 2, 4, 4, identity=True)


def test_kernels_are_for_layers_of_one_kind() -> None:
    x = torch.zeros(64, 8)
    if not can_fuse(x, torch.float32, [PAIR], 8):
        pytest.fail("Triton's interpreter is missing: the test extra brings it")
    assert resolve_backend("fused", x, torch.float32, [PAIR, PAIR], 8) == "fused"
    assert resolve_backend("fused", x, torch.float32, [BLOCKS, BLOCKS], 8) == "fused"
    assert resolve_backend("fused", x, torch.float32, [PAIR, BLOCKS], 8) == "dense"
    kinds = ([PAIR], [BLOCKS, BLOCKS], [BLOCKS, PAIR])
    assert [can_fuse(x, torch.float32, shapes, 8) for shapes in kinds] == [True, True, False]
