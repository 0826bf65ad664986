"""Learning rates of the parts of a MoKA adapter: left factors, right factors, gates."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from moka_pl.adapters import MokaConfig
from moka_pl.errors import ConfigError

_PARTS = {"moka_A": "left", "moka_B": "right", "moka_gate": "gate", "trainable_tokens": "tokens"}
#: Layers that are trained as a whole (``modules_to_save``), at the optimizer's own rate.
_OTHER = "other"


@dataclass
class LearningRateRatios:
    """Multiples of the optimizer's learning rate for the parts of a MoKA adapter.

    They apply at every step of a schedule that scales the optimizer's rate. Parts that an adapter lacks
    (gates with ``gating: none``, left factors of MoKA_s) are ignored.

    With Adam, ``gate: 1/τ`` acts as a temperature τ of the gates, softmax(g / τ) or sigmoid(g / τ), because
    Adam's steps do not grow with the gradients. (Weight decay, clipping or a large ``eps`` change that.)

    Args:
        left: For the left factors A_i, which start random. 0 freezes a part.
        right: For the right factors B_i, which start at zero. Values above 1 correspond to LoRA+.
        gate: For the gate logits g.
    """

    left: float = 1.0
    right: float = 1.0
    gate: float = 1.0
    #: Rows of tokens have the optimizer's own rate.
    tokens: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        """Refuses ratios that cannot work."""
        for part, ratio in asdict(self).items():
            if not 0 <= ratio < math.inf:
                raise ConfigError(f"learning_rate_ratios.{part} must be 0 or more and finite, not {ratio}")

    @property
    def alike(self) -> bool:
        """Whether all parts use the optimizer's rate."""
        return self == LearningRateRatios()

    def check_fits(self, adapter: Any) -> None:
        """Refuses ratios other than 1 for an adapter that has no such parts."""
        if not self.alike and not isinstance(adapter, MokaConfig):
            raise ConfigError(
                "learning_rate_ratios apply to MoKA's factors and gates, not to "
                f"{type(adapter).__name__}; remove them"
            )


def make_optimizer(
    build: Callable[[Any], Optimizer],
    parameters: Iterable[tuple[str, nn.Parameter]],
    ratios: LearningRateRatios,
) -> Optimizer:
    """Builds an optimizer, with a group for every part unless all have one rate.

    Args:
        build: Makes it of parameters or groups of them.
        parameters: Trainable parameters by their names in the model.
        ratios: Multiples of its learning rate.

    Raises:
        ConfigError: If the optimizer takes no groups, or has no learning rate to multiply.
    """
    if ratios.alike:
        return build([parameter for _, parameter in parameters])
    by_part: dict[str, list[nn.Parameter]] = {part: [] for part in (*_PARTS.values(), _OTHER)}
    for name, parameter in parameters:
        by_part[_PARTS.get(name.rpartition(".")[2], _OTHER)].append(parameter)
    groups = [{"params": members, "name": part} for part, members in by_part.items() if members]
    try:
        optimizer = build(groups)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the optimizer rejects the parameter groups of learning_rate_ratios: {error}"
        ) from error
    for group in optimizer.param_groups:
        if group["lr"] is None:
            raise ConfigError(
                "learning_rate_ratios multiply the optimizer's learning rate, but "
                f"{type(optimizer).__name__} has no lr; set its lr, or remove the ratios"
            )
        ratio = getattr(ratios, group["name"], 1.0)
        group["lr"] = group["lr"] * ratio  # not in place: groups may share a tensor
    return optimizer


def check_scheduler(scheduler: object, optimizer: Optimizer, rates: list[Any]) -> None:
    """Refuses a scheduler that replaces the optimizer's learning rates.

    Args:
        scheduler: The scheduler.
        optimizer: Its optimizer.
        rates: The optimizer's rates before there was a scheduler.
    """
    if lowest := getattr(scheduler, "eta_min", 0):
        raise ConfigError(
            f"{type(scheduler).__name__} with eta_min {lowest} overrides learning_rate_ratios: all parts end "
            "at one learning rate; set eta_min to 0"
        )
    initial = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if any(float(a) != float(b) for a, b in zip(initial, rates, strict=True)):
        raise ConfigError(
            f"{type(scheduler).__name__} sets its own learning rates, which overrides learning_rate_ratios; "
            "choose a scheduler that scales the optimizer's rates, such as WarmupDecay"
        )


def logged_rates(optimizer: Optimizer, ratios: LearningRateRatios) -> dict[str, float]:
    """Returns the rates by tag: ``train/lr`` before the ratios, and with ratios ``train/lr_<part>``."""
    groups = optimizer.param_groups
    if ratios.alike:
        return {"train/lr": groups[0]["lr"]}
    factors = [getattr(ratios, group["name"], 1.0) for group in groups]
    plain = [group["lr"] / factor for group, factor in zip(groups, factors, strict=True) if factor > 0]
    return {"train/lr": (plain or [0.0])[0]} | {f"train/lr_{group['name']}": group["lr"] for group in groups}
