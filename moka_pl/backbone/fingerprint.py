"""What tells base models apart, whatever they are called or how they are stored.

A hash of some signs of the embedding, which rounding keeps; and samples of every weight matrix, which tell
apart what shares the embedding: a merge, or another fine-tune of the same model.
"""

import base64
import binascii
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from moka_pl.backbone.linear_layers import is_conv1d
from moka_pl.backbone.quantization import NF4_LEVELS, relative_entries, rounding_of, storage_of, weight_count
from moka_pl.errors import AdapterError, MokaWarning
from moka_pl.lm.experts import SplitExperts, fused_experts, stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_ROWS = 256
#: Of each matrix some entries of a few of its blocks are sampled.
_BLOCK, _BLOCKS, _STEP = 64, 4, 4
_ENTRIES = _BLOCKS * _BLOCK // _STEP


def fingerprint(model: "PreTrainedModel") -> str:
    """Hashes the model's sizes and the signs of some rows of its embedding (16 hexadecimal digits).

    The embedding is never quantised, and rounding to another dtype keeps every sign (of zero, too): loading
    the same weights in another dtype or quantisation gives the same fingerprint, other weights give another.
    """
    digest = hashlib.sha256()
    sizes = {key: getattr(model.config, key, None) for key in _SIZES}
    # Rows that were added for new tokens are no part of the base.
    if sizes["vocab_size"] is not None:
        sizes["vocab_size"] = getattr(model.get_input_embeddings(), "frozen_vocabulary", sizes["vocab_size"])
    digest.update(repr(list(sizes.values())).encode())
    embedding = _embedding(model).detach().flatten(1)  # (vocabulary, hidden), (channels, others) of images
    rows = torch.arange(_ROWS, device=embedding.device) * (embedding.shape[0] - 1) // (_ROWS - 1)
    digest.update(embedding[rows].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _embedding(model: "PreTrainedModel") -> Tensor:
    """The weight that a model's input meets first: of an image, that of a convolution."""
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        convolution: Tensor = next(p for p in model.parameters() if p.ndim == 4)
        return convolution
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def weight_samples(
    model: "PreTrainedModel", left_out: Collection[str] = (), ready: Callable[[str], None] | None = None
) -> str:
    """Samples every matrix of a model, for :func:`compare_samples`: how it is stored, its names, its entries.

    An entry is stored as NF4 would, in four bits and relative to the largest of its block: so the samples of
    weights in NF4 are those of the weights that they were made of.

    Args:
        model: A model, adapted or not.
        left_out: Names of parameters that are no part of the base.
        ready: Called with each parameter's name before that is read; None where all are there.
    """
    names, codes, storages = [], [], []
    for name, parameter in _matrices(model, ready):
        if parameter.ndim < 2 or parameter.is_meta or name in left_out or ".merged_layer." in name:
            continue
        names.append(name.replace(".base_layer.", "."))
        codes.append(_codes(parameter))
        storages.append(storage_of(parameter))
    if not names:
        return ""
    table = torch.stack(codes).cpu()  # (L, 64)
    packed = (table[:, ::2] * 16 + table[:, 1::2]).numpy().tobytes()
    storage = max(set(storages), key=storages.count)
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    return f"{storage}:{digest}:{base64.b64encode(packed).decode()}"


def check_samples(stored: str, current: str, source: str, base: str) -> None:
    """Refuses a base whose matrices are not those that something was trained on.

    Args:
        stored: Samples of the matrices that it was trained on; empty if that is older than they are.
        current: Samples of this base's.
        source: What was trained, for messages.
        base: Name of the base that it was trained on, for messages.

    Raises:
        AdapterError: If some differ.
    """
    found = compare_samples(stored, current)
    if found is None:
        warnings.warn(
            f"{source} has no comparable samples of its base's weights (it was saved by another version): "
            "only the embeddings were compared",
            MokaWarning,
            stacklevel=3,
        )
    elif found.different:
        raise AdapterError(
            f"{source} was trained on another base model: {found.different} of {found.sampled} weight "
            f"matrices are not those of {base!r}, whose embedding this base has. Load that base instead"
        )


class Comparison(NamedTuple):
    """How many of the sampled matrices differ by more than storing them otherwise would explain."""

    different: int
    sampled: int


def compare_samples(first: str, second: str) -> Comparison | None:
    """Compares what :func:`weight_samples` returned of two models; None where that cannot be compared.

    Weights stored alike must have equal samples. Rounding to another dtype moves some entries to the next of
    the sixteen levels, 8 bits some, FP4 and its like many to the ones behind it.
    """
    one, other = _read(first), _read(second)
    if one is None or other is None or one.names != other.names or one.codes.shape != other.codes.shape:
        return None
    distance = (one.codes - other.codes).abs()  # (L, 64)
    steps, entries, share = _tolerance(one.storage, other.storage)
    moved = distance > 0
    different = (distance > steps).any(1) | (moved.sum(1) > entries)  # (L,)
    if moved.float().mean() > share and moved.sum() > 1:
        different |= moved.any(1)
    return Comparison(int(different.sum()), len(different))


def _tolerance(one: str, other: str) -> tuple[int, int, float]:
    """Most steps of an entry; entries of a matrix, and share of all entries, that may be a step away."""
    if one == other:  # devices do not agree on the last bit
        return 1, 1, 0.0005
    roundings = {rounding_of(one), rounding_of(other)}
    if roundings == {"same"}:
        return 1, 5, 0.015
    if roundings == {"far"} and one.partition("-")[0] == other.partition("-")[0]:
        return 2, 5, 0.015
    return (1, _ENTRIES // 4, 0.1) if "far" not in roundings else (3, _ENTRIES, 1.0)


def _matrices(model: nn.Module, ready: Callable[[str], None] | None) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of a model by name, as linear layers have them.

    Of a block's experts, split or not, it yields those of the first.
    """
    turned = {f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module)}
    split = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SplitExperts))
    fused = {f"{name}.": module for name, module in fused_experts(model)}
    for name, parameter in model.named_parameters():
        if ready is not None:
            ready(name)
        block = next((block for block in (*split, *fused) if name.startswith(block)), None)
        if block is None:
            yield name, parameter.detach().t() if name in turned else parameter
        elif block in fused and parameter.dim() == 3:
            yield (
                f"{block}0.{name.removeprefix(block)}.weight",
                stored(fused[block], parameter.detach()[:1])[0],
            )
        elif name.startswith(f"{block}0."):
            yield name, parameter


class _Samples(NamedTuple):
    storage: str
    names: str
    codes: Tensor  # (L, 64), int16


def _read(samples: str) -> _Samples | None:
    parts = samples.split(":")
    try:
        packed = base64.b64decode(parts[-1], validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(parts) != 3 or not packed or len(packed) % (_ENTRIES // 2):
        return None
    pairs = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(-1, _ENTRIES // 2)  # (L, 32)
    return _Samples(parts[0], parts[1], torch.stack([pairs // 16, pairs % 16], 2).flatten(1).to(torch.int16))


def _codes(parameter: Tensor) -> Tensor:
    """NF4's levels of some entries of a matrix, (64,), uint8."""
    count = weight_count(parameter)
    blocks = max(1, count // _BLOCK)
    first = torch.arange(_BLOCKS, device=parameter.device) * (blocks - 1) // (_BLOCKS - 1)  # (4,)
    entries = first[:, None] * _BLOCK + torch.arange(_BLOCK, device=parameter.device)  # (4, 64)
    values = relative_entries(parameter, entries.clamp(max=count - 1))
    values = values / values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=values.device)
    codes = torch.bucketize(values[:, ::_STEP].contiguous(), (levels[1:] + levels[:-1]) / 2)
    return codes.flatten().to(torch.uint8)
