"""States of optimizers and modules, compared."""

from typing import Any

import torch


def equal(one: Any, other: Any) -> bool:
    """Whether both hold the same tensors, bit for bit, and other values, however these lie in each other."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    return bool(one == other)
