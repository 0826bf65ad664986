"""Which base a run trains on, as its adapters and checkpoints tell."""

from collections.abc import Callable

import torch

from moka_pl.adapters import BaseModel
from moka_pl.backbone import Backbone, BackboneConfig, compute_dtype, fingerprint, weight_samples


def describe_base(
    loaded: Backbone,
    asked: BackboneConfig,
    device: torch.device,
    ready: Callable[[str], None] | None = None,
) -> BaseModel:
    """Describes a base that has no adapters yet, with the options that were applied.

    Args:
        loaded: The base.
        asked: The options that were asked for.
        device: Where it lives.
        ready: Called with each parameter's name before that is read; None where all are there.
    """
    options = (loaded.config or asked).options()
    options["compute_dtype"] = str(compute_dtype(asked, device)).removeprefix("torch.")
    return BaseModel(
        name=asked.name,
        revision=asked.revision,
        fingerprint=fingerprint(loaded.model),
        options=options,
        samples=weight_samples(loaded.model, ready=ready),
    )
