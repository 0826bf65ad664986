"""Layers that read one tensor, as queries, keys and values do, add up its gradient inside their products.

Autograd gives each of them a gradient of its own and adds these up, a pass over the memory each. Here the
layers of one input form a chain::

    x ──► q ──► k ──► v            forward: each layer computes with x, and leaves a link for the next
    ∂x ◄─ q ◄── k ◄── v            backward: each product adds itself to what comes along the links

A link is an output of the layer's autograd function that nobody else sees: a tensor of the size of x without
memory of its own. To autograd the next layer reads the link in the place of x, and so hands it the gradient
of x of all layers after it, which the layer's own product then adds itself to. Nothing is assumed of a model:
layers are a chain if they were called one after another with the very same tensor. Whoever reads x otherwise
is none of it, and every layer's gradient is autograd's own business, whichever of the layers a loss needs.

Sums run in float32 and are rounded once, so numbers differ from autograd's in the last bit: on a CPU all
stays as it is.
"""

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moka_pl._compat import change_count

#: Types of devices whose layers share.
devices = {"cuda"}


class _Link(NamedTuple):
    """What the layer that has read a tensor last leaves to the next one.

    Attributes:
        x: The tensor.
        version: How often it had been changed.
        link: Stands for it in autograd's graph.
        output: The layer's output, if its part of the graph keeps x, which then does not die before the link.
    """

    x: "weakref.ref[Tensor]"
    version: int
    link: Tensor
    output: "weakref.ref[Tensor] | None"


class _Last(threading.local):
    """The last link, of each thread: checkpointed layers are computed again by autograd's own.

    A link holds the graph that has made x, so it must not outlive what can read x, or the layer's output.
    """

    link: _Link | None = None

    def forget(self, dead: "weakref.ref[Tensor]") -> None:
        if self.link is not None and (self.link.x is dead or self.link.output is dead):
            self.link = None


_last = _Last()


class Held:
    """A tensor that an autograd function computes with, though it is another input to autograd."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def shares(x: Tensor) -> bool:
    """Whether layers that read x should form a chain."""
    if x.device.type not in devices or torch.compiler.is_compiling():
        return False
    return x.requires_grad and torch.is_grad_enabled()


def call_sharing(function: Any, x: Tensor, *arguments: Any, keeps: bool = False) -> Tensor:
    """Calls an autograd function of a layer, in a chain where that is of use.

    Args:
        function: Takes what autograd reads in the place of x, ``arguments``, and a :class:`Held` x or None;
            returns the output, and where x is held a :func:`new_link`, too.
        x: The layer's input.
        *arguments: What else it takes.
        keeps: Whether it saves x for the backward pass.
    """
    if not shares(x):
        return function.apply(x, *arguments, None)  # type: ignore[no-any-return]
    last, _last.link = _last.link, None
    known = last is not None and last.x() is x and last.version == change_count(x)
    source = last.link if known and last is not None else x
    out: Tensor
    out, link = function.apply(source, *arguments, Held(x))
    output = weakref.ref(out, _last.forget) if keeps else None
    _last.link = _Link(weakref.ref(x, _last.forget), change_count(x), link, output)
    return out


def new_link(x: Tensor) -> Tensor:
    """Returns a link of x: of its size, and of one number."""
    return x.new_empty(()).expand(x.shape)


def add_product_(total: Tensor | None, grad: Tensor, weight: Tensor) -> Tensor:
    """Computes ``total + G W``, (T, n), in place where there is a total.

    Args:
        total: What the layers after this one have made of the gradient of x, (T, n), or None.
        grad: G, shape (T, m).
        weight: W, shape (m, n), in the dtype of G.
    """
    return torch.mm(grad, weight) if total is None else total.addmm_(grad, weight)
