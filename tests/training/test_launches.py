"""Optimizers in few kernels, and autograd's nodes on one stream."""

import gc
import weakref
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from moka_pl.training import launches
from moka_pl.training.launches import (
    AnyRank,
    HostCopy,
    compute_as,
    fuse_on_gpu,
    gradient_nodes,
    rebuild_fused,
)


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]


BUILDS: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.9)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def steps(optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for number in range(count):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.sin(parameter.detach() + number)
        optimizer.step()


@pytest.mark.parametrize("name", BUILDS)
def test_a_fused_optimizer_takes_the_same_steps(name: str) -> None:
    results = []
    for fused in (False, True):
        params = parameters()
        optimizer = BUILDS[name]([{"params": params[:1], "name": "a", "lr": 5e-2}, {"params": params[1:]}])
        optimizer = rebuild_fused(optimizer) if fused else optimizer
        assert [group.get("name") for group in optimizer.param_groups] == ["a", None]
        assert [group["lr"] for group in optimizer.param_groups] == [5e-2, 1e-2]
        steps(optimizer)
        results.append(params)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", BUILDS)
def test_on_a_cpu_an_optimizer_stays_as_it_is(name: str) -> None:
    optimizer = BUILDS[name](parameters())
    assert fuse_on_gpu(optimizer) is optimizer


def test_a_stored_optimizer_goes_on_with_this_run_s_kernels() -> None:
    params, copies = parameters(), parameters()
    before = BUILDS["AdamW"](params)
    steps(before)
    checkpoint = {"optimizer_states": [deepcopy(before.state_dict())]}
    after = rebuild_fused(BUILDS["AdamW"](copies))
    for copy, parameter in zip(copies, params, strict=True):
        copy.data.copy_(parameter.data)
    compute_as(checkpoint, after)
    after.load_state_dict(checkpoint["optimizer_states"][0])
    assert after.param_groups[0]["fused"] is True
    steps(before)
    steps(after)
    for one, other in zip(params, copies, strict=True):
        torch.testing.assert_close(one, other)


def test_a_parameter_s_node_is_the_one_that_was_made_first() -> None:
    parameter, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    (node,) = gradient_nodes([parameter, frozen])
    node.metadata["made"] = "first"
    found = (2 * parameter).grad_fn.next_functions[0][0]
    assert found.metadata == {"made": "first"}
    del node, found
    assert (2 * parameter).grad_fn.next_functions[0][0].metadata == {}


def test_a_copy_keeps_what_was_there() -> None:
    tensor = torch.tensor([1.0, 2.0])
    copy = HostCopy(tensor)
    tensor.zero_()
    assert copy.arrived
    assert copy.read().tolist() == [1, 2]


@pytest.mark.parametrize("flag", [True, False])
def test_a_rank_alone_agrees_with_itself(tmp_path: Path, flag: bool) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert AnyRank(flag, torch.device("cpu")).answer() is flag
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def collected(uncollected, monkeypatch) -> None:
    """Runs look through all objects, as outside of pytest."""
    monkeypatch.setattr(launches, "gc", gc)


@pytest.mark.parametrize("fails", [False, True])
def test_objects_of_before_are_kept_from_the_collector_while_training(
    collected, make_module, make_data, make_trainer, fails: bool
) -> None:
    frozen = []

    class Look(Callback):
        def on_train_batch_end(self, *of_batch) -> None:
            frozen.append(gc.get_freeze_count())
            if fails:
                raise RuntimeError

    before = gc.get_freeze_count()
    with pytest.raises(RuntimeError) if fails else nullcontext():
        make_trainer(Look()).fit(make_module(), make_data())
    assert frozen[0] > before + 100_000
    assert gc.get_freeze_count() <= before


def test_what_nobody_refers_to_does_not_keep_its_memory_while_training(
    collected, make_module, make_data, make_trainer
) -> None:
    alive = []

    class Circle:
        def __init__(self) -> None:
            self.own = self

    class Look(Callback):
        def on_train_batch_end(self, *of_batch) -> None:
            gc.collect()
            alive.append(circle() is not None)

    make_trainer().fit(make_module(), make_data())  # what fits import lies there already
    gc.disable()
    try:
        circle = weakref.ref(Circle())
        assert circle() is not None
        make_trainer(Look()).fit(make_module(), make_data())
    finally:
        gc.enable()
    assert not any(alive)
