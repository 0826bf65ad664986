"""Resolves ``filters: auto`` and ``start: gradient`` from the gradient of a run's first batches.

The training itself is left as it is: batches come from a loader of their own, random generators are put back,
and the result is an explicit configuration, with which the run goes on as if it had been given.
"""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from moka_pl._compat import training_loader
from moka_pl.adapters import MokaConfig, find_targets, inject_adapter, moka_layers
from moka_pl.adapters.filter_search.gradients import weight_gradients
from moka_pl.adapters.filter_search.search import choose_within, initial_left_factors, layer_budgets
from moka_pl.adapters.filters import AUTO, WITHOUT_TRAINER, listed
from moka_pl.errors import ConfigError, MokaError
from moka_pl.lm.attention import PackedAttention
from moka_pl.lm.scoring import score_tokens
from moka_pl.ops.layout import Shape
from moka_pl.utils import silenced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Optimizer steps whose batches the gradient is taken of, on the first rank.
STEPS = 4


class ResolvedFilters(NamedTuple):
    """What the gradient decided: a configuration with explicit filters, and what to start from.

    Attributes:
        left_factors: A_i, shape (m_a, n_a), by layer, on the CPU; None for those that start at random. Layers
            that start at random as a whole are left out.
    """

    config: MokaConfig
    left_factors: dict[str, list[Tensor | None]]


class DeferredFilters:
    """Filters and a start that are resolved only when a fit begins, or by a checkpoint.

    Made of an adapter's configuration, of any method; or of None where the run starts from an adapter
    directory, which leaves nothing to resolve. ``pending`` says whether filters or start still are.
    """

    def __init__(self, config: Any | None) -> None:
        self._auto = isinstance(config, MokaConfig) and config.filters == AUTO
        self.pending = self._auto or (isinstance(config, MokaConfig) and config.start == "gradient")

    def is_due(self, trainer: Trainer | None, resumes: bool) -> bool:
        """Whether to resolve them now (or, without a trainer, to refuse)."""
        return self.pending and (trainer is None or (trainer.state.fn == "fit" and not resumes))

    def inject(
        self, model: "PreTrainedModel", config: Any, trainer: Trainer | None, resumes: bool
    ) -> tuple[Any, list[str]]:
        """Puts adapters into a plain model; as long as filters are pending and ΔW = 0 any will do.

        Args:
            model: The model, on its device.
            config: The adapter's configuration.
            trainer: The trainer, if there is one.
            resumes: Whether a checkpoint will be loaded next.

        Returns:
            The configuration, explicit once filters are resolved, and the names of the adapted layers.
        """
        if not self.pending:
            return config, inject_adapter(model, config)
        if not self.is_due(trainer, resumes):
            filters = "diverse" if config.filters == AUTO else config.filters
            return config, inject_adapter(model, replace(config, filters=filters, budget=None))
        resolved = resolve_filters(model, config, trainer)
        names = inject_adapter(model, resolved.config)
        layers = moka_layers(model)
        with torch.no_grad():
            for name, starts in resolved.left_factors.items():
                for (factor, _), start in zip(layers[name].factors(), starts, strict=True):
                    if factor is not None and start is not None:
                        factor.copy_(start)
        self.pending = False
        return resolved.config, names

    def adopt(self, config: Any, stored: Mapping[str, Any]) -> Any:
        """Returns the configuration, where ``auto`` was asked for with the filters of the run that is loaded.

        ``stored`` are that run's adapter options, as its checkpoint holds them.
        """
        filters = stored.get("filters")
        if self._auto and isinstance(filters, dict) and stored.get("components") == config.components:
            self.pending = False
            return config if filters == config.filters else replace(config, filters=filters, budget=None)
        self.pending = self.pending and config.filters == AUTO  # a start is in the tensors that come
        return config


def resolve_filters(model: "PreTrainedModel", config: MokaConfig, trainer: Trainer | None) -> ResolvedFilters:
    """Resolves ``filters: auto`` and ``start: gradient``; the first rank does so for all.

    The gradient is taken of the batches of the first ``STEPS`` optimizer steps, on the model's device, a few
    layers at a time (:func:`moka_pl.adapters.filter_search.gradients.weight_gradients` says at what cost).

    Args:
        model: The frozen model without adapters, on its device.
        config: The adapter's configuration.
        trainer: The trainer that is about to fit, with its data set up.

    Raises:
        ConfigError: If there is no trainer, or no training batch with token ids and labels.
    """
    if trainer is None:
        option = "filters: auto" if config.filters == AUTO else "start: gradient"
        raise ConfigError(
            f"{option} needs the training data of a Trainer's fit. Without a trainer, {WITHOUT_TRAINER}, and "
            "set start: zero"
        )
    outcome: ResolvedFilters | MokaError | None = None
    if trainer.is_global_zero:
        try:
            with isolate_rng():
                outcome = _resolve_on_this_rank(model, config, trainer)
        except MokaError as error:
            outcome = error  # the other ranks wait for it
    outcome = trainer.strategy.broadcast(outcome)
    if isinstance(outcome, MokaError):
        raise outcome
    assert outcome is not None
    return outcome


def _resolve_on_this_rank(model: "PreTrainedModel", config: MokaConfig, trainer: Trainer) -> ResolvedFilters:
    started = time.monotonic()
    names = find_targets(model, config)
    budgets = layer_budgets(model, names, config.components, config.budget)
    batches = first_batches(trainer, STEPS * trainer.accumulate_grad_batches)
    packed = PackedAttention(model) if "position_ids" in batches[0] else None

    def loss(batch: dict[str, Any]) -> Tensor:
        moved = move_data_to_device(batch, model.device)
        inputs = {} if packed is None else packed.inputs(moved)
        return score_tokens(model, moved["input_ids"], moved["labels"], **inputs).nll.sum()

    chosen: dict[str, list[list[int]]] = {}
    used: Counter[Shape] = Counter()
    left_factors: dict[str, list[Tensor | None]] = {}
    for name, gradient in weight_gradients(model, names, batches, loss):
        if config.filters == AUTO:
            shapes = choose_within(gradient, config.components, budgets[name])
            chosen[name] = [listed(shape) for shape in shapes]
            used.update(shapes)
        else:
            shapes = list(config.shapes_of(name, *gradient.shape))
        if config.start == "gradient":
            factors = initial_left_factors(gradient, shapes)
            left_factors[name] = [None if factor is None else factor.cpu() for factor in factors]
    if chosen:
        config = replace(config, filters=chosen, budget=None)
    parts = []
    if chosen:
        most = used.most_common(5)
        named = ", ".join(f"{shape} {count}×" for shape, count in most)
        if others := used.total() - sum(count for _, count in most):
            named += f", others {others}×"
        parts.append(f"filters chosen in {len(chosen)} layers ({named})")
    if left_factors:
        parts.append("left factors initialised along it")
    seconds = time.monotonic() - started
    rank_zero_info(f"gradient of the first {len(batches)} batches: {'; '.join(parts)}; {seconds:.1f} s")
    return ResolvedFilters(config, left_factors)


def first_batches(trainer: Trainer, count: int) -> list[dict[str, Any]]:
    """Reads this rank's first training batches, on the CPU, by a loader that the training does not use.

    Raises:
        ConfigError: If there are none, or they have no token ids and labels.
    """
    # Lightning calls configure_model with the model's device as the default one; loaders work on the CPU.
    loader = training_loader(trainer)
    batches: list[Any] = []
    if loader is not None:
        # Quiet: the line on an epoch's batches comes when the training makes its own loader.
        with torch.device("cpu"), silenced("lightning.pytorch.utilities.rank_zero"):
            batches = list(islice(loader(), count))
    if not batches or not all(isinstance(b, dict) and {"input_ids", "labels"} <= b.keys() for b in batches):
        raise ConfigError(
            "filters: auto and start: gradient need training batches with input_ids and labels, but this run "
            "has none; use one of moka_pl's data modules"
        )
    return batches
