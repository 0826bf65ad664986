"""The optimizer and the scheduler, built on placeholders to see what is wrong with them before a model is."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from moka_pl.adapters import MokaConfig
from moka_pl.errors import ConfigError, MokaError, one_line
from moka_pl.training.learning_rates import check_scheduler, make_optimizer

if TYPE_CHECKING:
    from moka_pl.training.module import MokaModule

#: No optimizer is known that learns with a rate above.
_HIGHEST_RATE = 1000.0
_USUAL = "such as 2e-4 to 4e-3 for AdamW"

_NAMES = ("layer.moka_A", "layer.moka_B", "layer.moka_gate")


def build_trial(module: "MokaModule", device: torch.device | str = "cpu") -> tuple[Optimizer, Any]:
    """Builds them as ``configure_optimizers`` does, on a parameter of each kind, and checks their numbers.

    Args:
        module: The module that has them.
        device: Where the parameters are, whatever the default device is.

    Raises:
        ConfigError: They refuse their options, or the options cannot train anything.
    """
    # MoKA's factors and gates are vectors; of other methods matrices are the rule, as some optimizers want.
    shape = (4,) if isinstance(module.adapter, MokaConfig) else (2, 2)
    parts = [(name, nn.Parameter(torch.zeros(shape, device=device))) for name in _NAMES]
    with refused_options():
        optimizer = make_optimizer(module.optimizer, parts, module.learning_rate_ratios)
        rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        _check_numbers(optimizer)
        scheduler: Any = module.lr_scheduler(optimizer)
    if not module.learning_rate_ratios.alike:
        check_scheduler(scheduler, optimizer, rates)
    _check_rates(optimizer, scheduler)
    return optimizer, scheduler


@contextmanager
def refused_options() -> Iterator[None]:
    """Runs the body, which builds an optimizer and a scheduler, and tells in one line what they refuse."""
    try:
        yield
    except MokaError:
        raise
    except Exception as error:  # whatever an optimizer of others raises
        raise ConfigError(f"the optimizer or its schedule refuses its options: {one_line(error)}") from error


def check_learns(module: "MokaModule", device: torch.device | str = "cpu") -> None:
    """Refuses an optimizer that :func:`build_trial` refuses, has no learning rate, or cannot take a step.

    Args:
        module: The module that has it.
        device: Where it will train.

    Raises:
        ConfigError: They refuse their options, or the options cannot train anything.
    """
    optimizer, scheduler = build_trial(module)
    failure = _failure(optimizer)
    if failure is not None and torch.device(device).type != "cpu":  # some are for GPUs only
        failure = _failure(build_trial(module, device)[0])
    if failure is not None:
        raise ConfigError(
            f"{type(optimizer).__name__} fails at its first step: {one_line(failure).rstrip('.')}. Correct "
            "its options, or choose another optimizer, such as torch.optim.AdamW"
        ) from failure
    _step(scheduler)
    rates = _base_rates(optimizer, scheduler)
    if rates and not any(rates):
        raise ConfigError(
            f"{type(optimizer).__name__}: with a learning rate of 0 nothing is trained; set lr, {_USUAL}"
        )


def _failure(optimizer: Optimizer) -> Exception | None:
    """Takes a step as in training, with gradients of a loss; returns why it cannot."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def loss() -> Any:
        optimizer.zero_grad()
        total = torch.stack([(p - 1).square().sum() for p in parameters]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    try:
        with isolate_rng(include_cuda=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the optimizer's, which training shows
            optimizer.step(torch.enable_grad()(loss))
    except Exception as error:  # whatever an optimizer of others raises
        return error
    return None


def _step(scheduler: Any) -> None:
    """Steps a scheduler twice: some divide by their options only then."""
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would have the optimizer step first
            scheduler.step()
            scheduler.step()
    except Exception as error:  # whatever a scheduler of others raises
        raise ConfigError(f"{type(scheduler).__name__} refuses its options: {one_line(error)}") from error


def _check_numbers(optimizer: Optimizer) -> None:
    for name, value in optimizer.defaults.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, Real) and not math.isfinite(number):
                raise ConfigError(f"{type(optimizer).__name__}: {name} must be finite, not {number}")


def _check_rates(optimizer: Optimizer, scheduler: Any) -> None:
    """Refuses learning rates that cannot train; the scheduler may have set its own."""
    for rate in _base_rates(optimizer, scheduler):
        if not 0 <= rate <= _HIGHEST_RATE:
            raise ConfigError(
                f"{type(optimizer).__name__}: a learning rate of {rate:g} cannot train; set lr above 0 and "
                f"below {_HIGHEST_RATE:g}, {_USUAL}"
            )


def _base_rates(optimizer: Optimizer, scheduler: Any) -> list[float]:
    rates = [float(rate) for rate in getattr(scheduler, "base_lrs", [])]
    return rates or [float(g["lr"]) for g in optimizer.param_groups if g.get("lr") is not None]


def state_bytes(build: Callable[..., Optimizer]) -> float:
    """Bytes of an optimizer's state for each number, by a step on a few; AdamW's where that fails."""
    trial = nn.Parameter(torch.zeros(64, 64, device="cpu"))
    trial.grad = torch.ones_like(trial)
    try:
        optimizer = build([trial])
        optimizer.step()
    except Exception:  # one for GPUs, or that needs a closure
        return 8
    held = optimizer.state[trial].values()
    return sum(t.nbytes for t in held if isinstance(t, torch.Tensor) and t.dim() > 0) / trial.numel()
