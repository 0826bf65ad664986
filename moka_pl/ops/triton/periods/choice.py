"""Whether tiles that shapes share serve a layer: tried once, on random numbers of its GPU.

Triton has been seen to compile products for Hopper that were wrong (see ``plan.py``). Where it does, or where
a GPU is too small for a program, the other kernels serve.
"""

from functools import cache

import torch
from torch import Tensor
from triton import TritonError

from moka_pl.ops.layout import left_sizes, right_sizes
from moka_pl.ops.triton.base_weight import WeightSource
from moka_pl.ops.triton.delta import fused_weight
from moka_pl.ops.triton.dequantise import can_dequantise
from moka_pl.ops.triton.gates import Gates
from moka_pl.ops.triton.periods.delta import weight_by_periods
from moka_pl.ops.triton.periods.plan import PeriodPlan, make_period_plan
from moka_pl.ops.triton.periods.projection import project_by_periods
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.projection import fused_projection

#: Components from which on tiles pay for W + ΔW: with two it took 44 µs in place of 28, with ten 43 of 48
#: (one H200, 4096 × 4096).
_MANY = 8
#: The largest relative difference of a trial: many times that of the factors' two bfloat16 numbers.
_TOLERANCE = 1e-3


def weight(
    plan: Plan, left: Tensor, right: Tensor, gates: Gates, dtype: torch.dtype, source: WeightSource | None
) -> Tensor:
    """As :func:`moka_pl.ops.triton.delta.fused_weight`, by the faster kernel.

    Args:
        plan: The layer's plan.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
        dtype: Result dtype.
        source: The frozen weight; None for ΔW alone.
    """
    periods = _building(plan) if source is not None and dtype is torch.bfloat16 else None
    if periods is None or source is None or not can_dequantise(source, plan.m * plan.n):
        return fused_weight(plan, left, right, gates, dtype, source)
    if periods.builds is None and not _recording():
        periods.builds = _builds(plan, periods, source)
    if not periods.builds:
        return fused_weight(plan, left, right, gates, dtype, source)
    return weight_by_periods(plan, periods, left, right, gates, source)


def projection(
    plan: Plan, grad: Tensor, left: Tensor, right: Tensor, gates: Gates
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`moka_pl.ops.triton.projection.fused_projection`, by the faster kernel.

    Args:
        plan: The layer's plan.
        grad: D, shape (m, n), contiguous.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
    """
    periods = None if grad.dtype is torch.float32 else make_period_plan(plan)
    if periods is not None and periods.projects is None and not _recording():
        periods.projects = _projects(plan, periods, grad.dtype)
    if periods is None or not periods.projects:
        return fused_projection(plan, grad, left, right, gates)
    return project_by_periods(plan, periods, grad, left, right, gates)


@cache
def _building(plan: Plan) -> PeriodPlan | None:
    """The plan to build W + ΔW with, where that pays."""
    periods = make_period_plan(plan) if len(plan.shapes) >= _MANY else None
    return periods if periods is not None and len(periods.groups) == 1 else None


def _projects(plan: Plan, periods: PeriodPlan, dtype: torch.dtype) -> bool:
    """Whether the projection is that of the other kernel."""
    generator = torch.Generator(plan.uniform.device).manual_seed(0)
    left, right = _factors(plan, generator)
    grad = _draw(generator, plan.m, plan.n, dtype=dtype)
    gates = Gates(plan.uniform)
    try:
        found = project_by_periods(plan, periods, grad, left, right, gates)
    except TritonError:
        return False
    expected = fused_projection(plan, grad, left, right, gates)
    return all(_close(*pair) for pair in zip(found, expected, strict=True))


def _builds(plan: Plan, periods: PeriodPlan, source: WeightSource) -> bool:
    """Whether W + ΔW is that of the other kernel."""
    generator = torch.Generator(plan.uniform.device).manual_seed(0)
    left, right = (factor / 10 for factor in _factors(plan, generator))
    gates = Gates(plan.uniform)
    try:
        found = weight_by_periods(plan, periods, left, right, gates, source)
    except TritonError:
        return False
    return _close(found, fused_weight(plan, left, right, gates, torch.bfloat16, source))


def _factors(plan: Plan, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random factors."""
    lefts, rights = left_sizes(plan.shapes), right_sizes(plan.shapes)
    return _draw(generator, sum(lefts)), _draw(generator, sum(rights))


def _draw(generator: torch.Generator, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, device=generator.device, generator=generator, dtype=dtype)


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = torch.linalg.vector_norm(found - expected, dtype=torch.float32)
    return bool(difference <= _TOLERANCE * torch.linalg.vector_norm(expected, dtype=torch.float32))


def _recording() -> bool:
    """Whether a graph is recorded: nothing can be tried then, but the same step has run as usual before."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
