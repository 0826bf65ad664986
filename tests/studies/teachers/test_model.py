"""Synthetic teachers: the batched students are MokaLinear's, and the training finds what it must."""

import pytest
import torch
from torch import nn

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.adapters.filter_search.nearest import captured_share
from moka_pl.adapters.filters import listed
from moka_pl.studies.teachers.model import (
    OFFERED,
    SIDE,
    TEACHERS,
    Students,
    first_gradients,
    found_parts,
    of_right_shapes,
    teacher,
    train,
)

SHAPES = [OFFERED[1], OFFERED[6], OFFERED[8]]


def layer_like(students: Students, run: int) -> MokaLinear:
    config = MokaConfig(components=len(students.shapes), filters=[listed(s) for s in students.shapes])
    layer = MokaLinear(nn.Linear(SIDE, SIDE, bias=False), config)
    with torch.no_grad():
        layer.moka_gate.copy_(students.logits[run])
        for (a, b), left, right in zip(layer.factors(), students.left, students.right, strict=True):
            b.copy_(right[run])
            if a is not None:
                a.copy_(left[run])
    return layer


def test_runs_train_as_the_layer_does(one_thread) -> None:
    seeds, rates, steps, tokens = [0, 1], [3e-3, 1e-2], 8, 16
    targets = torch.stack([teacher(SHAPES, SIDE, seed) for seed in seeds])
    students = Students(SHAPES, SIDE, seeds)
    layers = [layer_like(students, run) for run in range(2)]
    assert not students.delta().any()
    train(students, targets, rates, steps, tokens)
    for run, layer in enumerate(layers):
        trained = [p for n, p in layer.named_parameters() if n.startswith("moka_")]
        optimizer = torch.optim.Adam(trained, lr=rates[run])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        layer.base_layer.requires_grad_(False)
        inputs = torch.Generator().manual_seed(0)
        for _ in range(steps):
            x = torch.randn(SIDE, tokens, generator=inputs).mT
            loss = (layer(x) - x @ (layer.base_layer.weight + targets[run]).mT).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(
            students.delta()[run], layer.get_delta_weight().detach(), atol=1e-4, rtol=1e-2
        )
        torch.testing.assert_close(students.logits[run].softmax(0), layer.gates(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_are_of_their_parts(name: str) -> None:
    parts = [OFFERED[i] for i in TEACHERS[name]]
    target = teacher(parts, SIDE, 3)
    assert float(target.square().sum()) == pytest.approx(SIDE, rel=0.5)
    if len(set(parts)) == 1:
        assert captured_share(target.double(), parts[0], len(parts)) == pytest.approx(1, abs=1e-5)
    others = [s for s in OFFERED[:5] if s not in parts]
    assert all(captured_share(target.double(), s) < 0.9 for s in others[1:])


def test_a_start_along_the_gradient_keeps_delta_zero(one_thread) -> None:
    targets = torch.stack([teacher([SHAPES[0]], SIDE, seed) for seed in (0, 1)])
    students = Students(SHAPES, SIDE, [0, 1])
    before = students.left[0].detach().clone()
    students.start_along(first_gradients(targets, [0, 1], 512))
    assert not students.delta().any()
    assert not torch.equal(before, students.left[0])
    found = train(students, targets, [1e-2] * 2, 30, 32)
    usual = train(Students(SHAPES, SIDE, [0, 1]), targets, [1e-2] * 2, 30, 32)
    assert (found.error < usual.error).all()
    assert (usual.error < 1).all()


def test_parts_are_found_only_if_all_are_on_top() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.4], [0.5, 0.4, 0.1]])
    assert found_parts(scores, [2, 0], SHAPES).tolist() == [True, False]
    twins = [SHAPES[0], SHAPES[2], SHAPES[2]]  # the second can stand for the third
    assert found_parts(scores, [2, 0], twins).tolist() == [True, True]
    assert of_right_shapes([2], twins) == [1, 2]
