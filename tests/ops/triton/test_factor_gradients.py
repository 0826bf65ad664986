"""Factors' gradients without the gradient of ΔW, under Triton's interpreter where there is no GPU."""

import pytest
import torch

from moka_pl.adapters.filters import filter_shapes
from moka_pl.ops.dense import project
from moka_pl.ops.gating import gates_of, logits_gradient
from moka_pl.ops.layout import Shape, left_sizes, right_sizes

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")
from moka_pl.ops.triton import factor_gradients as module  # noqa: E402

CASES = {
    "one": ((Shape(5, 5, 13, 9),), 60, 40),
    "several, cut": ((Shape(4, 6, 5, 7), Shape(3, 10, 8, 5)), 20, 42),
    "smaller than the layer": ((Shape(2, 3, 4, 4), Shape(3, 2, 3, 3)), 30, 20),
    "rows of B in parts": ((Shape(3, 2, 150, 3), Shape(150, 6, 3, 1)), 450, 6),
}


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_the_gradient_of_the_update(case: str, gating, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", 5)  # several tokens each, and not as many for the last
    torch.manual_seed(len(case))
    shapes, m, n = CASES[case]
    plan = kernels.make_plan(shapes, m, n, torch.device("cpu"))
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    x, grad, logits = torch.randn(23, n), torch.randn(23, m), torch.randn(len(shapes))
    gates = kernels.layer_gates(plan, logits, 3.0, gating)
    found = module.factor_gradients(plan, module.FactorPlan(plan), grad, x, left, right, gates)
    alpha = gates_of(logits.double(), gating)
    update = grad.double().mT @ x.double()
    parts = project(update, left.double(), right.double(), 3 * alpha, shapes)
    for ours, exact in zip(found, (*parts[:2], logits_gradient(alpha, parts[2] * 3, gating)), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max() + 1))


def test_they_pay_for_few_components_and_many_tokens() -> None:
    def pays(components: int, tokens: int, m: int = 4096, n: int = 4096) -> bool:
        plan = kernels.make_plan(filter_shapes("diverse", components, m, n), m, n, torch.device("cpu"))
        sums = module.make_factor_plan(plan)
        assert sums is not None
        return sums.pays(tokens)

    assert pays(1, 4096)
    assert pays(2, 4096)
    assert pays(2, 4096, 11008)
    assert pays(2, 4096, 4096, 11008)
    assert not pays(20, 4096)
    assert not pays(1, 0)


def test_sums_that_are_wrong_are_not_used(monkeypatch) -> None:
    monkeypatch.setattr(module, "_TRIED", 20)
    shapes = (Shape(4, 4, 16, 16),)
    plan = kernels.make_plan(shapes, 64, 64, torch.device("cpu"))
    assert module.FactorPlan(plan).agrees
    wrong = module.FactorPlan(plan)
    wrong.components[0].sizes = (4, 4, 16, 16, 16, 16, 16, 8)  # of each row of B half
    monkeypatch.setattr(module.FactorPlan, "pays", lambda self, tokens: True)
    assert not wrong.usable(64)
    monkeypatch.setattr(module, "_recording", lambda: True)
    assert not module.FactorPlan(plan).usable(64)  # not tried yet


def test_an_identity_has_its_update_projected() -> None:
    plan = kernels.make_plan(filter_shapes("prime", 3, 40, 200), 40, 200, torch.device("cpu"))
    assert module.make_factor_plan(plan) is None
