"""The operators that compilers see: their sizes, gradients and results."""

import copy
import pickle

import pytest
import torch
from torch import nn

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.ops.kronecker import kronecker_linear
from moka_pl.ops.layout import Shape, left_sizes, right_sizes
from moka_pl.ops.operators import operator_product

THIN = (Shape(2, 64, 12, 1), Shape(1, 22, 24, 3))
SQUARE = (Shape(4, 8, 6, 8), Shape(8, 8, 3, 8, identity=True))
M, N = 24, 64


def parts(shapes: tuple[Shape, ...]) -> list[torch.Tensor]:
    """Input, weights and packed factors."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 5, N), (len(shapes),), (sum(left_sizes(shapes)),), (sum(right_sizes(shapes)),)
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]


@pytest.mark.parametrize(("shapes", "backend"), [(THIN, "thin"), (SQUARE, "dense"), (SQUARE, "structured")])
def test_an_update_alone_is_what_it_is_without_a_compiler(shapes, backend) -> None:
    found, expected = [], []
    for function, results in ((operator_product, found), (kronecker_linear, expected)):
        given = parts(shapes)
        layer = [None] if function is operator_product else []
        out = function(*given, *layer, shapes, M, backend)
        out.square().sum().backward()
        results += [out, *(tensor.grad for tensor in given)]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("shapes", "hidden"), [(THIN, 5), (SQUARE, 0)])
def test_pytorch_finds_the_operator_to_be_what_it_says(shapes, hidden) -> None:
    sizes = [int(size) for shape in shapes for size in shape]
    backend = "thin" if hidden else "dense"
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.moka_pl.product.default,
        (*parts(shapes), None, sizes, M, backend, None, hidden, False),
        test_utils=checks,
    )


def adapted() -> MokaLinear:
    base = nn.Linear(N, M).requires_grad_(False)
    layer = MokaLinear(base, MokaConfig(components=2, filters=[[2, 64, 12, 1], [1, 22, 24, 3]]))
    nn.init.normal_(layer.moka_B)
    return layer


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_computes_with_its_own_frozen_weight(copied) -> None:
    layer, x = adapted(), torch.ones(3, N)
    twin = copied(layer)
    twin.base_layer.weight.data.zero_()
    for one in (layer, twin):
        torch.testing.assert_close(one._operator_forward(x), one(x), rtol=0, atol=0)
    assert not torch.equal(layer(x), twin(x))


def test_numbers_hold_no_layer() -> None:
    from moka_pl.ops.operators import _LAYERS

    layer = adapted()
    number = int(layer._number)
    assert _LAYERS[number] is layer
    del layer
    assert number not in _LAYERS
