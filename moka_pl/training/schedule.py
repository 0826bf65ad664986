"""The default learning-rate schedule."""

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moka_pl.errors import ConfigError


class WarmupDecay(LambdaLR):
    """Linear warm-up to the optimizer's learning rate, then decay to a share of it.

    With w warm-up steps of N, the factor at step t is ``(t + 1) / w`` during warm-up. Afterwards, with
    ``p = (t - w) / (N - w)``, it is (1 + cos πp) / 2 for ``cosine``, 1 - p for ``linear`` and 1 for
    ``constant``, mapped to the range from ``min_lr_ratio`` to 1.

    Args:
        optimizer: The optimizer whose learning rate is scaled.
        warmup: Number of warm-up steps (1 or more), or their share of all steps (below 1).
        decay: Shape of the decay.
        min_lr_ratio: Final share of the learning rate, 0 to 1.
        total_steps: Optimizer steps N of the run; ``null`` takes them from the trainer.

    Raises:
        ConfigError: For a value out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.03,
        decay: Literal["cosine", "linear", "constant"] = "cosine",
        min_lr_ratio: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        if not 0 <= warmup < math.inf:
            raise ConfigError(f"warmup must be 0 or more, not {warmup}")
        if total_steps is not None and total_steps < 1:
            raise ConfigError(f"total_steps must be at least 1, not {total_steps}")
        if not 0 <= min_lr_ratio <= 1:
            raise ConfigError(f"min_lr_ratio must be between 0 and 1, not {min_lr_ratio}")
        if decay not in ("cosine", "linear", "constant"):
            raise ConfigError(f"unknown decay {decay!r}; choose cosine, linear or constant")
        self.warmup, self.decay = warmup, decay
        self.min_lr_ratio, self.total_steps = min_lr_ratio, total_steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Returns the factor on the learning rate at optimizer step ``step``, counted from 0."""
        total = self.total_steps or 1
        warmup = math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        fall = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * fall[self.decay]

    def set_total_steps(self, total_steps: int) -> None:
        """Sets N before training, and updates the current learning rates."""
        self.total_steps = total_steps
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self.factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
