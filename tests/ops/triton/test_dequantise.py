"""A frozen 4-bit weight as a matrix, under Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch import nn

from moka_pl.backbone.quantization import dense_weight, kernel_weight, quantised_linear

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("m", "n"), [(3, 64), (65, 128)])
def test_it_is_bitsandbytes_own_bit_for_bit(m: int, n: int, nested: bool) -> None:
    torch.manual_seed(m)
    layer = quantised_linear(nn.Linear(n, m), torch.randn(m, n) / 50, "nf4", nested, torch.float32)
    source = kernel_weight(layer, torch.float32, even=True)
    assert kernels.can_dequantise(source, m * n)
    assert torch.equal(kernels.dequantise(source, m, n, torch.float32), dense_weight(layer))


def test_what_it_cannot_read_is_left_to_others() -> None:
    layer = quantised_linear(nn.Linear(64, 3), torch.randn(3, 64), "nf4", False, torch.float32)
    source = kernel_weight(layer, torch.float32, even=True)
    assert not kernels.can_dequantise(None, 192)
    assert not kernels.can_dequantise(kernels.WeightSource(torch.ones(3, 64)), 192)
    assert not kernels.can_dequantise(source, 200)
    data = torch.zeros(97, dtype=torch.uint8)[1:]  # words must be aligned
    assert not kernels.can_dequantise(kernels.WeightSource(data, source.absmax, source.code, 64), 192)
