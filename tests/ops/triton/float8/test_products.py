"""Products in 8-bit floats, and inputs that several layers read."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
products = pytest.importorskip("moka_pl.ops.triton.float8.products")
operands = pytest.importorskip("moka_pl.ops.triton.float8.operands")

pytestmark = pytest.mark.usefixtures("float8_rounding")


def _whole(scaled: operands.Scaled) -> Tensor:
    return scaled.numbers.double() * scaled.scales


def _activations(tokens: int = 7, n: int = 32) -> Tensor:
    """What an operation of a model has made."""
    return torch.randn(tokens, n, requires_grad=True) * 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_numbers_and_their_scales(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 32), torch.randn(48, 32) * torch.logspace(-3, 3, 48)[:, None]
    bias = torch.randn(48).to(torch.bfloat16)
    own = operands.scale_rows(x), operands.scale_rows(weight)
    expected = _whole(own[0]) @ _whole(own[1]).mT
    found = products.multiply(*own, dtype)
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5
    )
    if dtype is torch.bfloat16:
        torch.testing.assert_close(
            products.multiply(*own, dtype, bias).double(), expected + bias, rtol=1e-2, atol=0.1
        )


def test_an_input_of_several_layers_is_scaled_once() -> None:
    x = _activations()
    first = products.scale_input(x)
    assert products.scale_input(x) is first
    with torch.no_grad():
        assert products.scale_input(x.reshape(7, 32)) is first
        assert products.scale_input(x[:6]) is not first
    assert products.scale_input(x) is not first  # the last alone is remembered
    assert products.scale_input(x.clone()) is not products.scale_input(x)


def test_an_input_that_changes_is_scaled_again() -> None:
    x = _activations()
    first = products.scale_input(x)
    with torch.no_grad():
        x.mul_(2)
    again = products.scale_input(x)
    assert torch.equal(_whole(again), 2 * _whole(first))


def test_what_is_gone_is_forgotten_and_leaves_are_never_remembered() -> None:
    leaf = torch.randn(7, 32)
    assert products.scale_input(leaf) is not products.scale_input(leaf)
    x = _activations()
    products.scale_input(x)
    assert products._last
    del x
    assert not products._last


def test_a_cpu_is_refused() -> None:
    assert "NVIDIA GPU" in products.unsupported_reason(torch.device("cpu"))
