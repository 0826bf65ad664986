"""What a resumable checkpoint holds, and whether a run may go on from it.

A checkpoint is Lightning's own with two changes: its state dict holds the trainable tensors only, and the
fields of :class:`StoredRun` are added.
"""

import random
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_info

from moka_pl.adapters import method_of
from moka_pl.adapters.filters import AUTO, describe_filters
from moka_pl.adapters.methods.base import check_tensors
from moka_pl.backbone import check_samples
from moka_pl.data.batching.order import describe, differences
from moka_pl.data.types import data_of
from moka_pl.errors import AdapterError, ConfigError, NonFiniteError
from moka_pl.ops.finite import non_finite_names
from moka_pl.training.accidents.non_finite import NON_FINITE_REMEDY
from moka_pl.training.course import (
    CONSEQUENCES,
    Changed,
    Course,
    adapter_course,
    changed_course,
    check_changes,
    only_held_out,
    quantization_of,
)
from moka_pl.training.learning_rates import LearningRateRatios
from moka_pl.utils import warn

if TYPE_CHECKING:
    from moka_pl.training.module import MokaModule

LAST_NAME = "last.ckpt"

#: Where the checkpoint callback's state keeps the version of the run's logs.
VERSION_KEY = "moka_log_version"

#: Stands before the name of each field of :class:`StoredRun`.
_PREFIX = "moka_"

#: Options of MoKA that a configuration has as they are trained; filters and tokens depend on the model.
_KNOWN_EARLY = ("components", "rank", "gating")

_REMEDY = "Resume with the configuration of the original run"


@dataclass
class StoredRun:
    """What a checkpoint holds beside Lightning's own; an older one may lack fields, which then have defaults.

    Attributes:
        base: The frozen base's ``name``, ``fingerprint``, ``samples``, ``quantization`` and ``new_tokens``.
        adapter: Options of the adapter.
        learning_rate_ratios: Ratios by part, as :class:`LearningRateRatios` has them.
        rng: The states of the random generators.
        course: What else decides the run's course, by change and option; empty without training.
        prompt: Name of the prompt that the data were written in.
        accidents: The last losses, and what is kept to undo a spike; what fits into the memory.
    """

    base: dict[str, str] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    learning_rate_ratios: dict[str, float] = field(default_factory=lambda: asdict(LearningRateRatios()))
    rng: dict[str, Any] | None = None
    course: Course = field(default_factory=dict)
    prompt: str | None = None
    accidents: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, module: "MokaModule") -> Self:
        """Describes the run of a module that has built its model."""
        assert module.base is not None
        return cls(
            base={
                "name": module.base.name,
                "fingerprint": module.base.fingerprint,
                "samples": module.base.samples,
                "quantization": module.base.options["quantization"],
                "new_tokens": ", ".join(map(repr, module.backbone.new_tokens)) or "none",
            },
            adapter=method_of(module.adapter).options(),
            learning_rate_ratios=asdict(module.learning_rate_ratios),
            rng=rng_state(module.device),
            course=module.course,
            prompt=data_of(module.trainer).prompt,
            accidents=module.accidents_state(),
        )

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any]) -> Self:
        """Reads the fields of a checkpoint."""
        names = [f.name for f in fields(cls) if f"{_PREFIX}{f.name}" in checkpoint]
        return cls(**{name: checkpoint[f"{_PREFIX}{name}"] for name in names})


def complete_checkpoint(checkpoint: dict[str, Any], module: "MokaModule") -> None:
    """Drops the frozen tensors of Lightning's checkpoint and adds the run, in place.

    Raises:
        NonFiniteError: If it would hold a NaN or an infinity: it must not replace an older checkpoint.
    """
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    tensors = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: tensor for name, tensor in tensors.items() if name in trainable}
    kept = {name: checkpoint.get(name) for name in ("state_dict", "optimizer_states")}
    if bad := non_finite_names(kept):
        raise NonFiniteError(
            f"no checkpoint is written after step {module.trainer.global_step}: {len(bad)} tensors are not "
            f"finite (first {bad[0]}); older files are kept. {NON_FINITE_REMEDY}"
        )
    checkpoint |= {f"{_PREFIX}{name}": value for name, value in vars(StoredRun.of(module)).items()}


def check_checkpoint(checkpoint: Mapping[str, Any], module: "MokaModule", training: bool) -> Changed:
    """Refuses a checkpoint that is not of the module's run; returns the changes that are allowed.

    Args:
        checkpoint: What :func:`complete_checkpoint` made.
        module: The module, with its model.
        training: Whether training resumes from it.
    """
    stored, current = StoredRun.read(checkpoint), StoredRun.of(module)
    # Before the sizes: factors of other shapes may fill vectors of the same length.
    check_same_factors(stored.adapter, current.adapter)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    check_tensors(checkpoint["state_dict"], trainable, "the checkpoint", _REMEDY)
    if stored.base.get("fingerprint", current.base["fingerprint"]) != current.base["fingerprint"]:
        raise AdapterError(
            f"the checkpoint was trained on another base model ({stored.base['name']!r}); this run has "
            f"{current.base['name']!r} with another fingerprint. Load the checkpoint's base instead"
        )
    tokens = [base.get("new_tokens", current.base["new_tokens"]) for base in (stored.base, current.base)]
    if tokens[0] != tokens[1]:
        raise AdapterError(
            f"the checkpoint was trained with the new tokens {tokens[0]}; this run has {tokens[1]}. {_REMEDY}"
        )
    if stored.base:
        samples = stored.base.get("samples", ""), current.base["samples"]
        check_samples(*samples, "the checkpoint", stored.base["name"])
    return check_run(checkpoint, module, module.course, training)


def check_run(checkpoint: Mapping[str, Any], module: "MokaModule", course: Course, training: bool) -> Changed:
    """Refuses a run whose options are not the module's; returns the changes that are allowed.

    It needs no model. What the stored run does not tell, or the module not yet, is not compared.

    Args:
        checkpoint: A checkpoint of the run.
        module: The module that goes on.
        course: What is known of the course of its run.
        training: Whether training resumes.
    """
    if training and "optimizer_states" not in checkpoint:
        raise ConfigError(
            "the checkpoint holds weights only, so no training can resume from it. Train with "
            "checkpoint.save_weights_only: false"
        )
    stored, changed = StoredRun.read(checkpoint), Changed()
    ratios = asdict(module.learning_rate_ratios)
    for part, ratio in ratios.items() if training else ():
        if stored.learning_rate_ratios[part] == ratio:
            continue
        if "learning_rate" not in module.allow_changes:  # the stored optimizer brings its own
            raise AdapterError(
                f"the checkpoint was trained with learning_rate_ratios.{part} "
                f"{stored.learning_rate_ratios[part]:g}, but this run has {ratio:g}. {_REMEDY}, or allow the "
                "change: --model.allow_changes '[learning_rate]'"
            )
        both = (stored.learning_rate_ratios[part], ratio)
        changed.setdefault("learning_rate", {})[f"learning_rate_ratios.{part}"] = both
    if training:
        for name, found in changed_course(stored.course, course).items():
            changed.setdefault(name, {}).update(found)
    options = method_of(module.adapter).options()
    if getattr(module.adapter, "filters", None) != AUTO:  # which decide on the number of components
        # First: what follows may be allowed, another number of components cannot.
        check_same_factors(stored.adapter, options, _KNOWN_EARLY)
    was, now = (adapter_course(o, training) if o else {} for o in (stored.adapter, options))
    if different := differences(was, now):
        changed["adapter"] = different
    held_out = epoch_is_over(checkpoint) and only_held_out(changed)
    check_changes(changed, module.allow_changes | ({"data"} if held_out else set()))
    return changed


def epoch_is_over(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was written after the last batch of an epoch."""
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return False
    epochs = loop["epoch_progress"]["total"]
    return bool(
        loop["epoch_loop.batch_progress"]["is_last_batch"] or epochs["started"] == epochs["processed"]
    )


def _lost_batches(checkpoint: Mapping[str, Any], accumulated: object) -> int:
    """Counts the batches of the step that a checkpoint was written within, as other callbacks may; 0 if none.

    Args:
        checkpoint: A loaded checkpoint.
        accumulated: Batches of a step; no number where they change from epoch to epoch.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None or epoch_is_over(checkpoint) or not isinstance(accumulated, int):
        return 0
    return int(loop["epoch_loop.batch_progress"]["current"]["ready"]) % accumulated


def say_differences(
    checkpoint: Mapping[str, Any], changed: Changed, module: "MokaModule", training: bool
) -> None:
    """Says what the changes do, and what could not be compared or does not matter enough to refuse.

    Args:
        checkpoint: A loaded checkpoint.
        changed: Changes that are allowed.
        module: The module that goes on.
        training: Whether training resumes.
    """
    stored = StoredRun.read(checkpoint)
    for name, found in changed.items():
        then = CONSEQUENCES[name] if training else "the evaluation uses the new values"
        rank_zero_info(f"another {name.replace('_', ' ')} than the checkpoint's ({describe(found)}): {then}")
    if training and not stored.course:
        rank_zero_info(
            "the checkpoint is of an earlier version of moka_pl and does not tell its data, batches, "
            "optimizer and precision; make sure that they are this run's"
        )
    if training:
        accumulated = stored.course.get("accumulation", {}).get("accumulate_grad_batches")
        if lost := _lost_batches(checkpoint, accumulated):
            warn(
                f"the checkpoint was written within an optimizer step: the gradient of {lost} "
                f"batch{'es' * (lost > 1)} is lost, and the run is not the one that was never stopped"
            )
        return
    prompt = data_of(module.trainer).prompt
    if stored.prompt is not None and prompt is not None and prompt != stored.prompt:
        warn(f"the checkpoint was trained with the prompt {stored.prompt!r}, these data have {prompt!r}")
    was = stored.course.get("quantization", {})
    if different := differences(was, quantization_of(module.backbone.options())):
        warn(f"the checkpoint was trained on a base quantised in another way: {describe(different)}")


def check_same_factors(
    stored: Mapping[str, Any], current: Mapping[str, Any], only: Collection[str] | None = None
) -> None:
    """Refuses a checkpoint whose adapters have other factors than this model's, by the options of both.

    Args:
        stored: The checkpoint's; empty where it does not tell.
        current: This model's.
        only: The options that are compared; None for all that factors depend on.
    """
    methods = [options.get("peft_type", "MOKA") for options in (stored or current, current)]
    if methods[0] != methods[1]:
        raise AdapterError(
            f"the checkpoint does not fit this model: its method is {methods[0]}, this model's is "
            f"{methods[1]}. {_REMEDY}"
        )
    # Of another method's options any may change what the same tensors mean.
    ours = ("filters", "components", "rank", "gating", "ensure_weight_tying", "trainable_token_indices")
    names = ours if methods[1] == "MOKA" else sorted(current)
    for name in names:
        if only is not None and name not in only:
            continue
        if "dropout" not in name and name in stored and stored[name] != current[name]:
            raise AdapterError(
                f"the checkpoint does not fit this model: its adapter.{name} is {_short(stored[name])}, "
                f"this model's is {_short(current[name])}. {_REMEDY}"
            )


def _short(value: Any) -> str:
    """Returns a value as text; filters of hundreds of layers are described."""
    return describe_filters(value) if isinstance(value, dict) else repr(value)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the random generators of torch, the device and Python, in plain types."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": list(random.getstate()[1]),
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device, rank: int) -> None:
    """Restores the generators to a stored state.

    Args:
        state: What :func:`rng_state` returned on the first rank.
        device: The device of this rank.
        rank: Number of this rank; all but the first use seeds derived from the state.
    """
    if rank > 0:
        torch.manual_seed(int(state["torch"].long().sum()) + rank)
        return
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    version, _, gauss = random.getstate()
    random.setstate((version, tuple(state["python"]), gauss))
