"""Operands of 8-bit products, under Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor, nn

from moka_pl.backbone.quantization import kernel_weight, quantised_linear

pytest.importorskip("triton")
float8 = pytest.importorskip("moka_pl.ops.triton.float8.operands")
Source = pytest.importorskip("moka_pl.ops.triton").WeightSource

pytestmark = pytest.mark.usefixtures("float8_rounding")


def _source(m: int, n: int, nested: bool) -> tuple[Source, Tensor]:
    """A 4-bit weight and what it stands for, float32; bitsandbytes misreads some of these on some CPUs."""
    torch.manual_seed(m)
    whole = quantised_linear(nn.Linear(m * n, 1), torch.randn(1, m * n) / 50, "nf4", nested, torch.float32)
    source = kernel_weight(whole, torch.float32, even=True)
    byte = source.data.flatten()
    numbers = torch.stack([byte >> 4, byte & 15], 1).flatten().long()
    scales = source.absmax
    if source.nested is not None:
        values, outer, offset = source.nested
        scales = values[scales.long()] * outer.repeat_interleave(256)[: len(scales)] + offset
    return source, (source.code[numbers] * scales.repeat_interleave(64)[: m * n]).view(m, n)


def _differing(found: Tensor, expected: Tensor) -> int:
    return int((found.view(torch.uint8) != expected.view(torch.uint8)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [16, 83])
def test_rows_are_those_of_the_reference(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    x[1], x[2], x[3, 0] = 0, x[2] * 1e-6, 1000
    found, expected = float8.scale_rows(x), float8.reference_rows(x)
    assert _differing(found.numbers, expected.numbers) == 0
    assert torch.equal(found.scales, expected.scales)
    assert found.numbers.float().abs().amax(1).tolist() == [448, 0, 448, 448, 448]
    assert ((found.numbers.double() * found.scales - x).abs() <= x.abs() / 16 + found.scales / 1000).all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_row_that_is_not_finite_stays_so_alone() -> None:
    x = torch.ones(3, 16)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    found = float8.scale_rows(x)
    whole = found.numbers.float() * found.scales
    assert whole[:2].sum(1).isnan().all()
    assert torch.equal(whole[2], x[2])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "n", "nested"), [(3 * 16, 5 * 16, True), (16, 64, False), (144, 80, True)])
def test_weights_are_those_of_the_reference(m: int, n: int, nested: bool, transposed: bool) -> None:
    source, weight = _source(m, n, nested)
    scales = float8.WeightScales.of(weight)
    found = float8.scale_weight(source, scales, transposed)
    inverse = scales.by_columns if transposed else scales.by_rows
    oriented = weight.T.contiguous() if transposed else weight
    expected = float8.reference_weight(oriented, inverse)
    assert found.numbers.shape == expected.shape
    assert found.numbers.is_contiguous()
    # The kernel rounds the factors of an entry in another order.
    assert _differing(found.numbers, expected) <= m * n // 500
    assert (found.numbers.float().abs().amax(1) == 448).all()
    error = (found.numbers.double() * found.scales - oriented.double()).norm() / oriented.double().norm()
    assert 0.01 < error < 0.03  # of evenly spread numbers 2.6%
