"""The validation before training, which gives the same numbers in every run of a base on the same data."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from moka_pl.adapters import method_of
from moka_pl.backbone.loading import cache_root
from moka_pl.callbacks.monitors import validates_whole
from moka_pl.data.types import data_of
from moka_pl.evaluation.kept_results import KeptResults, batch_settings, machine_settings, model_hash
from moka_pl.training.module import MokaModule
from moka_pl.training.sharding.strategy import ShardedStrategy


class BaseScores(Callback):
    """Takes the results of the validation before the first step from the cache, if they are there.

    Before the first step ΔW is exactly zero, whatever will be trained: the results depend on the base, the
    validation data and how both are computed with. All of it is compared: every weight, the model's
    configuration, the rows and batches, the adapter's options, the package's code, the libraries, the device.
    If anything differs, the validation is computed, and kept for the next run. It is always computed for
    subclasses of :class:`~moka_pl.training.module.MokaModule` that are not the package's.

    Args:
        reuse: Whether to take and keep them.
    """

    def __init__(self, reuse: bool = True) -> None:
        self.reuse = reuse
        self._kept: KeptResults | None = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks for the results, on the first rank for all."""
        assert isinstance(pl_module, MokaModule)
        first = trainer.sanity_checking and validates_whole(trainer) and trainer.global_step == 0
        if not (self.reuse and first) or isinstance(trainer.strategy, ShardedStrategy):
            return
        found = None
        if trainer.is_global_zero and (settings := _settings(trainer, pl_module)) is not None:
            folder = cache_root(pl_module.backbone.cache_dir) / "base_scores"
            self._kept = KeptResults(folder, settings)
            found = self._kept.read()
        pl_module.recalled = trainer.strategy.broadcast(found)
        if pl_module.recalled is not None and self._kept is not None:
            rank_zero_info(
                f"validation before training: taken from {self._kept.file}, as an earlier run with the same "
                "base, data and settings computed it; --base_scores.reuse false computes it again"
            )
            self._kept = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps results that were computed."""
        assert isinstance(pl_module, MokaModule)
        kept, self._kept = self._kept, None
        if kept is not None and pl_module.eval_results is not None:
            kept.write(pl_module.eval_results)


def _settings(trainer: Trainer, module: MokaModule) -> dict[str, Any] | None:
    """Returns all that decides the results; None where that is not known, as of a class of the user's."""
    loaders: Any = trainer.val_dataloaders
    batches = batch_settings(loaders if isinstance(loaders, list) else [loaders])
    own = type(module).__module__.startswith("moka_pl.")  # others may compute anything
    if batches is None or module.base is None or not own:
        return None
    data = data_of(trainer)
    return {
        "base": [module.backbone.options(), module.base.options, model_hash(module.causal_lm)],
        "adapter": [method_of(module.adapter).kind, method_of(module.adapter).options()],
        "data": [batches, data.eval_sets, dict(data.task_groups), trainer.limit_val_batches],
        "run": [str(trainer.precision), trainer.world_size, type(trainer.strategy).__name__],
        **machine_settings(module.device),
    }
