"""Workspaces: which are kept, and that nothing of one call is seen by another."""

import threading

import pytest
import torch
from torch import Tensor

from moka_pl.adapters.filters import filter_shapes
from moka_pl.ops.kronecker import kronecker_linear
from moka_pl.ops.layout import Shape, left_sizes, right_sizes
from moka_pl.ops.workspaces import Workspaces

SHAPES = (Shape(2, 3, 6, 4),)


class Buffer:
    def __init__(self, shapes: tuple[Shape, ...], size: int, like: Tensor) -> None:
        self.tensor = like.new_empty(1)
        self.entries = size


@pytest.fixture
def workspaces() -> Workspaces[Buffer]:
    return Workspaces(Buffer)


def test_one_of_the_same_sizes_and_dtype_is_kept(workspaces) -> None:
    first = workspaces.of(SHAPES, 12, like=torch.zeros(1))
    assert workspaces.of(SHAPES, 12, like=torch.ones(3)) is first
    assert workspaces.of(SHAPES, 13, like=torch.zeros(1)) is not first
    assert workspaces.of(SHAPES * 2, 12, like=torch.zeros(1)) is not first
    double = workspaces.of(SHAPES, 12, like=torch.zeros(1).double())
    assert double.tensor.dtype == torch.float64


def test_large_ones_and_those_of_other_devices_are_not_kept(workspaces) -> None:
    for size, like in ((2**20 + 1, torch.zeros(1)), (12, torch.zeros(1, device="meta"))):
        assert workspaces.of(SHAPES, size, like=like) is not workspaces.of(SHAPES, size, like=like)


def test_few_are_kept(workspaces) -> None:
    made = [workspaces.of(SHAPES, size, like=torch.zeros(1)) for size in range(1, 10)]
    assert workspaces.of(SHAPES, 9, like=torch.zeros(1)) is made[-1]
    assert workspaces.of(SHAPES, 1, like=torch.zeros(1)) is not made[0]


def test_each_thread_has_its_own(workspaces) -> None:
    seen = [workspaces.of(SHAPES, 12, like=torch.zeros(1))]
    thread = threading.Thread(target=lambda: seen.append(workspaces.of(SHAPES, 12, like=torch.zeros(1))))
    thread.start()
    thread.join()
    assert seen[0] is not seen[1]


def test_what_an_evaluation_makes_first_serves_training(workspaces) -> None:
    with torch.inference_mode():
        workspaces.of(SHAPES, 12, like=torch.zeros(1))
    assert not workspaces.of(SHAPES, 12, like=torch.zeros(1)).tensor.is_inference()


@pytest.mark.parametrize("backend", ["dense", "structured"])
@pytest.mark.parametrize("m", [1, 12])
@pytest.mark.parametrize("tokens", [1, 5])
def test_another_call_leaves_outputs_and_gradients_as_they_are(backend, m, tokens) -> None:
    """With sizes of 1 a transpose is no copy, so that a result could be a view of a buffer."""
    n = 20
    shapes = (*filter_shapes("square", 3, m, n), Shape(2, 3, 2, 3))

    def call() -> tuple[Tensor, ...]:
        x, left, right, weights = (
            torch.randn(*size, dtype=torch.float64, requires_grad=True)
            for size in ((tokens, n), (sum(left_sizes(shapes)),), (sum(right_sizes(shapes)),), (len(shapes),))
        )
        out = kronecker_linear(x, weights, left, right, shapes, m, backend)
        return out.detach(), *torch.autograd.grad(out, (x, left, right, weights), torch.randn_like(out))

    first = call()
    copies = [part.clone() for part in first]
    call()
    for part, copy in zip(first, copies, strict=True):
        assert torch.equal(part, copy)
