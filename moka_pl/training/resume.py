"""Goes on from a checkpoint of a run that was other than this one, where its changes are allowed.

All is done to the loaded checkpoint before Lightning restores from it.
"""

import warnings
from collections.abc import Collection
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from moka_pl.training.checkpoint import epoch_is_over
from moka_pl.training.course import OTHER_BATCHES, Changed


def begins_epoch_anew(changed: Collection[str]) -> bool:
    """Whether the batches that were served are of another order than those to come."""
    return not OTHER_BATCHES.isdisjoint(changed)


def begin_epoch_anew(checkpoint: dict[str, Any]) -> None:
    """Forgets how far the checkpoint's epoch was, unless it was over."""
    loop = checkpoint["loops"]["fit_loop"]
    loop["state_dict"].pop("combined_loader", None)
    over = epoch_is_over(checkpoint)
    for counts in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
        # The epoch of a checkpoint that was written after its last batch is not counted yet.
        done = counts["processed"] + int(over and counts["started"] > counts["processed"])
        counts |= {"ready": done, "started": done, "processed": done, "completed": done}
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False


def adjust_optimizer(
    checkpoint: dict[str, Any], changed: Changed, optimizer: Optimizer, scheduler: Any
) -> None:
    """Gives the stored optimizer and scheduler the options of this run's, which are as good as new.

    Args:
        checkpoint: The loaded checkpoint.
        changed: What may differ and does.
        optimizer: This run's optimizer.
        scheduler: Its scheduler.
    """
    if not {"optimizer", "learning_rate", "scheduler"} & changed.keys() or not checkpoint["optimizer_states"]:
        return
    stored = checkpoint["optimizer_states"][0]
    groups: list[dict[str, Any]] = stored["param_groups"]
    if "scheduler" in changed:
        _catch_up(scheduler, checkpoint["global_step"])
        rates = [group["lr"] for group in optimizer.param_groups]
        checkpoint["lr_schedulers"] = []
    else:
        shares = [_share(group) for group in groups]
        fresh = optimizer.param_groups
        shares = shares if len(shares) == len(fresh) else shares[:1] * len(fresh)
        rates = [_base(group) * share for group, share in zip(fresh, shares, strict=True)]
        for state in checkpoint["lr_schedulers"]:
            state |= {"base_lrs": [_base(group) for group in fresh], "_last_lr": list(rates)}
    another = "class" in changed.get("optimizer", {}) or len(groups) != len(optimizer.param_groups)
    if another:
        checkpoint["optimizer_states"] = []  # it starts with an empty state
        groups = optimizer.param_groups
    for group, fresh_group, rate in zip(groups, optimizer.param_groups, rates, strict=True):
        group |= {name: value for name, value in fresh_group.items() if name != "params"} | {"lr": rate}


def _base(group: dict[str, Any]) -> Any:
    """Returns a group's rate before its schedule."""
    return group.get("initial_lr", group["lr"])


def _share(group: dict[str, Any]) -> float:
    """Returns the share of a group's rate that the schedule has come to."""
    base = float(_base(group))
    return float(group["lr"]) / base if base else 1.0


def _catch_up(scheduler: Any, steps: int) -> None:
    """Steps a new scheduler as often as the run has; one that follows a metric begins anew."""
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have the optimizer step first
        for _ in range(steps):
            scheduler.step()
