"""Which base a run trains on, as its adapters and checkpoints tell."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from moka_pl.adapters import AdapterInfo, BaseModel, MokaConfig
from moka_pl.adapters.filters import AUTO
from moka_pl.adapters.reading import read_counted_shapes
from moka_pl.backbone import Backbone, BackboneConfig, compute_dtype, fingerprint, weight_samples
from moka_pl.errors import AdapterError, ConfigError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moka_pl.training.module import MokaModule
    from moka_pl.training.sharding.blocks import ShardedBlocks

#: New tokens that a line names.
_NAMED = 8


def take_stored(module: "MokaModule", stored: AdapterInfo | None) -> None:
    """Checks the adapter that a run starts from, if any, and takes over its new tokens.

    Args:
        module: The module, with its options.
        stored: What the directory of that adapter says.

    Raises:
        AdapterError: If its weights are damaged, or it is of an image classifier and the module is not; image
            classifiers refuse others themselves.
        ConfigError: If the new tokens are others, or do not go with the adapter.
    """
    if module.adapter_path is not None:
        read_counted_shapes(module.adapter_path)
    if stored is not None and stored.labels and not module.classifies:
        raise AdapterError(
            f"adapter_path {module.adapter_path} classifies images; give --model moka_pl.VisionModule and "
            "images, or an adapter of a language model"
        )
    _take_new_tokens(module, stored)


def _take_new_tokens(module: "MokaModule", stored: AdapterInfo | None) -> None:
    """Checks the new tokens of a run's base, which are those of the adapter that it starts from, if any."""
    own, config = module.backbone.new_tokens, module.adapter
    if stored is not None:
        theirs = stored.base.options.get("new_tokens", [])
        if own not in ([], theirs):
            raise ConfigError(
                f"backbone.new_tokens is {own}, but the adapter in {module.adapter_path} has "
                f"{theirs or 'none'}; leave the option out"
            )
        module.backbone.new_tokens = own = theirs
    if not own:
        return
    if not isinstance(config, MokaConfig):
        raise ConfigError(
            f"backbone.new_tokens are trained beside MoKA, not by {type(config).__name__}; set another "
            "adapter, or leave them out"
        )
    if stored is None and (config.filters == AUTO or config.start == "gradient"):
        raise ConfigError(
            "backbone.new_tokens have no gradient before they are trained; set other filters than auto, and "
            "start: zero"
        )


def number_new_tokens(module: "MokaModule") -> None:
    """Names the rows of new tokens in the configuration of a new adapter, by the tokens' numbers."""
    tokens, config = module.backbone.new_tokens, module.adapter
    if not tokens or module.adapter_path is not None:
        return
    module.adapter = with_rows_of(config, module.tokenizer.convert_tokens_to_ids(tokens))


def with_rows_of(config: MokaConfig, tokens: Iterable[int]) -> MokaConfig:
    """Returns a configuration with which rows of these tokens are trained, too."""
    known = config.trainable_token_indices or ()
    return replace(config, trainable_token_indices=sorted({*known, *tokens}))


def name_new_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: list[str]) -> str:
    """Returns new tokens with their numbers as a line; empty without any."""
    named = [f"{token} {tokenizer.convert_tokens_to_ids(token)}" for token in tokens]
    return f"new tokens: {listed(named, _NAMED)}" if tokens else ""


def describe_base(
    loaded: Backbone,
    asked: BackboneConfig,
    device: torch.device,
    blocks: "ShardedBlocks | None" = None,
) -> BaseModel:
    """Describes a base that has no adapters yet, with the options that were applied.

    Args:
        loaded: The base.
        asked: The options that were asked for.
        device: Where it lives.
        blocks: What keeps its weights; None where all are there. All ranks describe it together.
    """
    options = (loaded.config or asked).options()
    options["compute_dtype"] = str(compute_dtype(asked, device)).removeprefix("torch.")
    ready = None if blocks is None else blocks.reading(loaded.model)
    with nullcontext() if blocks is None else blocks.whole_ends():
        return BaseModel(
            name=asked.name,
            revision=asked.revision,
            fingerprint=fingerprint(loaded.model),
            options=options,
            samples=weight_samples(loaded.model, ready=ready),
        )
