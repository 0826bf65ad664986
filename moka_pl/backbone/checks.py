"""Refuses models that cannot work: before memory is taken for them, and on a few tokens once they are there.

Model folders come from strangers. What a ``config.json`` asks for is compared with its weight files.
"""

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from moka_pl.backbone.loading import loading
from moka_pl.errors import BackboneError, one_line
from moka_pl.lm.own_loss import OwnForward, run_own_forward
from moka_pl.lm.scoring import score_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: Entries of a configuration that say how many parts are built one by one, and how large they are.
_PARTS = re.compile(r"(layer|block|expert|head|stage)s?$|depth$")
_SIZES = re.compile(r"hidden|intermediate|dim|size|rank|width|embd|inner|d_model|ff|channel|state|group")
_UNBOUNDED = re.compile(r"vocab|position|length|token|param|chunk|window|block_size")
_MOST_PARTS, _LARGEST, _MOST_BUFFERED = 4096, 2**20, 2**29
#: Relative difference of two computations of a loss, in full and in half precision.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 3e-2


def read_config(name: str, **location: Any) -> "PretrainedConfig":
    """Reads the configuration of a model; looks at its numbers before transformers builds anything of it.

    Args:
        name: The model's name, for messages.
        **location: Where transformers finds it.

    Raises:
        BackboneError: If it is damaged, or as :func:`check_numbers`.
    """
    from transformers import AutoConfig, PretrainedConfig

    with loading(name):
        if "gguf_file" not in location:
            check_numbers(PretrainedConfig.get_config_dict(**location)[0], name)
        return AutoConfig.from_pretrained(**location, trust_remote_code=False)


def check_numbers(config: Mapping[str, Any], name: str) -> None:
    """Refuses a configuration with counts and sizes that no model has, which would take hours to build.

    Raises:
        BackboneError: Naming the entry and its value.
    """
    for key, value in _numbers(config):
        most = _MOST_PARTS if _PARTS.search(key) else _LARGEST if _SIZES.search(key) else None
        if most is not None and value > most and not _UNBOUNDED.search(key):
            raise BackboneError(
                f"{name} cannot be loaded: {key} in config.json is {value}, more than any model's; copy the "
                "model again"
            )


def check_size(model: "PreTrainedModel", name: str, device: torch.device, bits: float) -> None:
    """Refuses a model that memory cannot hold.

    Args:
        model: The model, on the meta device.
        name: Its name, for messages.
        device: Where it is to go.
        bits: Fewest bits that one of its parameters takes there.
    """
    parameters, buffered = (sum(t.numel() for t in ts) for ts in (model.parameters(), model.buffers()))
    if buffered > _MOST_BUFFERED:
        raise BackboneError(
            f"{name} cannot be loaded: config.json asks for {buffered:,} numbers beside the parameters; copy "
            "the model again"
        )
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if parameters * bits / 8 > memory:
        raise BackboneError(
            f"{name} cannot be loaded: {parameters:,} parameters take at least "
            f"{parameters * bits / 2**33:,.1f} GiB, but {device} has {memory / 2**30:,.1f} GiB; choose a "
            "smaller model, or another backbone.quantization"
        )


def check_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    config: "PretrainedConfig",
    rows: int,
    name: str,
    random: bool,
    new: Collection[str] = (),
) -> None:
    """Refuses tokens that the model has no embedding for.

    Args:
        tokenizer: The tokenizer.
        config: The model's configuration, whose special tokens are looked at.
        rows: Rows of the embedding, or of the output head if that has fewer.
        name: The model's name, for messages.
        random: Whether the weights are, which fit any vocabulary.
        new: Tokens that were added, of which the adapter brings the rows.

    Raises:
        BackboneError: Naming the largest or the first such token.
    """
    known = [number for token, number in tokenizer.get_vocab().items() if token not in new]
    last = max(max(known, default=0), len(tokenizer) - len(new) - 1)
    if last >= rows:
        remedy = (
            f"set vocab_size in config.json to at least {last + 1}"
            if random
            else "take the tokenizer that the model was saved with, or resize its embedding and save it"
        )
        raise BackboneError(
            f"{name}: vocab_size is {rows}, but the tokenizer has {last + 1} tokens; {remedy}"
        )
    sources = {
        "the tokenizer": tokenizer,
        "config.json": config,
        "config.json's text_config": config.get_text_config(),
    }
    for source, holder in sources.items():
        check_special_tokens(holder, source, rows, name)


def check_special_tokens(holder: Any, source: str, rows: int, name: str) -> None:
    """Refuses special tokens that the model has no embedding for.

    Args:
        holder: A tokenizer or a configuration.
        source: What it is, for messages.
        rows: Rows of the embedding.
        name: The model's name, for messages.

    Raises:
        BackboneError: Naming the first such token.
    """
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        ids = getattr(holder, kind, None)
        for token in ids if isinstance(ids, list | tuple) else [ids]:
            if token is not None and not (isinstance(token, int) and 0 <= token < rows):
                raise BackboneError(
                    f"{name}: {kind} of {source} is {token!r}, but the model's tokens are 0 to {rows - 1}; "
                    "correct it, or take it out"
                )


def check_loss(model: "PreTrainedModel", name: str) -> None:
    """Compares the package's loss of a few tokens with the model's own.

    Raises:
        BackboneError: If they differ by more than rounding, if a token's depends on later ones, if it is not
            finite, or if the model cannot be run.
    """
    kind = type(model).__name__
    try:
        own = run_own_forward(model)
        with torch.no_grad():
            scores = score_tokens(model, own.ids, own.labels)
        first, second = scores.nll.view(2, -1).sum(1).tolist()
        ours = float(scores.nll.mean())
    except Exception as error:  # whatever an architecture raises that needs other inputs
        raise BackboneError(
            f"{name} ({kind}) cannot be run on a few tokens: {type(error).__name__}: {one_line(error)}"
        ) from error
    _compare(f"{name} ({kind})", own, ours, (first, second), len(scores.nll) // 2, model.dtype)


def _compare(
    name: str, own: OwnForward, ours: float, rows: tuple[float, float], tokens: int, dtype: torch.dtype
) -> None:
    if own.loss is None:
        raise BackboneError(f"{name} computes no loss of its own, to compare with; give another model")
    if not (math.isfinite(own.loss) and math.isfinite(ours)):
        raise BackboneError(
            f"{name} has a loss of {own.loss} on a few tokens: its weights hold NaN or inf, or overflow in "
            f"{str(dtype).removeprefix('torch.')}; copy the model again, or set backbone.compute_dtype"
        )
    tolerance = _TOLERANCE if dtype in (torch.float32, torch.float64) else _TOLERANCE_HALF
    if abs(own.loss - ours) > tolerance * max(1.0, abs(own.loss)):
        raise BackboneError(
            f"{name} computes its loss in a way that moka_pl does not know: {own.loss:.4f} on a few tokens, "
            f"where moka_pl computes {ours:.4f}; give another model"
        )
    if abs(rows[0] - rows[1]) > tolerance * max(1.0, abs(own.loss)) * tokens:
        raise BackboneError(
            f"{name} lets tokens see later ones, which moka_pl does not know how to train; give a causal "
            "language model (is_decoder in config.json?)"
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """Yields all whole numbers of a configuration with the names of their entries."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield key, value
