"""Which backend computes an update."""

from types import SimpleNamespace

import pytest
import torch

from moka_pl.adapters.filters import filter_shapes
from moka_pl.ops import dispatch
from moka_pl.ops.dispatch import can_fuse, can_fuse_thin, resolve_backend
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


def test_on_a_gpu_fused_takes_the_kernels_of_thin_products() -> None:
    if not can_fuse(torch.zeros(64, 576), torch.float32, [PAIR], 576):
        pytest.fail("Triton's interpreter is missing: the test extra brings it")
    thin, square = [Shape(4, 144, 144, 4)], [Shape(24, 24, 24, 24)]
    found = []
    for on_gpu in (True, False):
        x = SimpleNamespace(is_cuda=on_gpu, shape=(64, 576))
        found.append([resolve_backend("fused", x, torch.float32, shapes, 576) for shapes in (thin, square)])
    assert found == [["thin", "fused"], ["fused", "fused"]]


@pytest.mark.parametrize(
    ("rank", "compute", "capability", "fits"),
    [
        (16, torch.bfloat16, (8, 0), True),
        (64, torch.float32, (9, 0), True),
        (64, torch.bfloat16, (7, 5), False),
        (256, torch.bfloat16, (9, 0), False),  # more hidden numbers than the tiles take
        (16, torch.float16, (9, 0), False),
    ],
)
def test_thin_kernels_are_for_few_hidden_numbers_on_newer_gpus(
    monkeypatch, rank, compute, capability, fits
) -> None:
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    x = SimpleNamespace(is_cuda=True, device=None, shape=(64, 4096))
    shapes = filter_shapes("servable", 1, 4096, 4096, rank)
    assert can_fuse_thin(x, compute, torch.float32, shapes, 4096) is fits
    x.is_cuda = False
    assert not can_fuse_thin(x, compute, torch.float32, shapes, 4096)
