"""A merged model as a plain transformers folder, written shard by shard.

Only one tensor is dense in memory at a time: a 7B model in 4 bits takes its own 4 GB and a little more.
"""

import copy
import gc
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.methods.registry import is_untied, outer_modules, untie
from moka_pl.adapters.vocabulary.token_rows import TokenRows
from moka_pl.backbone.linear_layers import conv1d_names, is_conv1d
from moka_pl.backbone.loading import loading, progress_bars
from moka_pl.backbone.quantization import dense_weight, is_quantised
from moka_pl.errors import AdapterError
from moka_pl.export.check import Measured, check, measure
from moka_pl.export.folder import marked, mebibytes, written_folder
from moka_pl.export.memory.placement import largest_layer, placement
from moka_pl.export.memory.shard import Planned, write_safetensors
from moka_pl.export.rounding import pieces, round_weights, rounds_alone, to_dtype
from moka_pl.export.source import Source, say
from moka_pl.lm.experts import SplitExperts, has_experts, stored
from moka_pl.utils import silenced

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: How the name of a layer ends of which PEFT trains rows (``trainable_token_indices``).
_PEFT_ROWS = ".token_adapter"
#: Bytes of a shard.
_SHARD = 2**30
#: Bytes of a model up to which another engine's check has its base in float32.
_SMALL = 2**32
#: Bytes that a tokenizer's file takes for each of its tokens, about: SmolLM2's 71, LLaMA3's 134.
BYTES_OF_TOKEN = 100


@dataclass(frozen=True)
class Part:
    """A tensor of the merged model that is not made yet.

    Attributes:
        name: Its name in transformers' folder.
        shape: Its sizes.
        make: Makes it, dense.
        integers: Its dtype if it holds no floating-point numbers, which are written in the export's.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    integers: torch.dtype | None = None

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()


def merged_parts(model: "PreTrainedModel") -> list[Part]:
    """Lists the tensors of the model with its updates merged: dense, each once, in the model's order.

    Args:
        model: A model with adapters of any method, or without.
    """
    kept = set(model.state_dict())
    parts: list[Part] = []
    seen: set[int] = set()
    for name, module, layer in outer_modules(model):
        if layer is not None:
            if getattr(layer, "owns_factors", True):  # else it is tied, as the base is
                parts += _adapted(name.removesuffix(_PEFT_ROWS), layer)
            continue
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = f"{name}.{own}" if name else own
            if id(tensor) in seen or full not in kept:  # tied, or made anew by every model
                continue
            seen.add(id(tensor))
            parts.append(_plain(full, module, tensor))
    turned = {f"{name}.weight" for name in conv1d_names(model) if not is_conv1d(model.get_submodule(name))}
    return _fused(model, [_turned(part) if part.name in turned else part for part in parts])


def _fused(model: nn.Module, parts: list[Part]) -> list[Part]:
    """Puts the matrices of a block's experts together, as transformers has them."""
    blocks = {
        f"{name}.": module for name, module in model.named_modules() if isinstance(module, SplitExperts)
    }
    whole: list[Part] = []
    groups: dict[str, list[Part]] = {}
    for part in parts:
        block = next((block for block in blocks if part.name.startswith(block)), None)
        if block is None:
            whole.append(part)
            continue
        key, _, own = part.name.removeprefix(block).partition(".")[2].rpartition(".")
        name = f"{block}{key}" if own == "weight" else f"{block}{key}_{own}"
        if name not in groups:
            groups[name] = []
            whole.append(_stack(name, groups[name], blocks[block], (len(blocks[block]), *part.shape)))
        groups[name].append(part)
    return whole


def _stack(name: str, parts: list[Part], block: SplitExperts, shape: tuple[int, ...]) -> Part:
    """One parameter of fused experts, of the parts (m, n) of each, or (m) of a bias."""

    def make() -> Tensor:
        first = parts[0].make()
        made = first.new_empty(shape)  # (E, m, n) or (E, m)
        for i, part in enumerate(parts):
            made[i] = part.make() if i else first
        return stored(block.shell, made) if made.dim() == 3 else made

    empty = torch.empty(shape, device="meta")
    return Part(name, tuple((stored(block.shell, empty) if len(shape) == 3 else empty).shape), make)


def _turned(part: Part) -> Part:
    """The weight of a linear layer, (m, n), as a Conv1D has it."""
    return Part(part.name, part.shape[::-1], lambda: part.make().t(), part.integers)


def _plain(name: str, module: nn.Module, tensor: Tensor) -> Part:
    if is_quantised(module) and tensor is module.weight:
        return Part(name, (module.out_features, module.in_features), lambda: dense_weight(module))
    integers = None if tensor.is_floating_point() else tensor.dtype
    return Part(name, tuple(tensor.shape), lambda: tensor.detach(), integers)


def _adapted(name: str, layer: Any) -> Iterator[Part]:
    """The merged weight of an adapted layer, and its bias."""

    def merged(own: str) -> Tensor:
        was = layer.merged_layer is not None
        layer.merge()
        made: Tensor = getattr(layer.merged_layer, own).detach()
        if not was:
            layer.unmerge()
        return made

    base = layer.base_layer
    sizes = (base.out_features, base.in_features) if is_quantised(base) else tuple(base.weight.shape)
    if isinstance(layer, TokenRows):
        sizes = layer.out_features, layer.in_features
    yield Part(f"{name}.weight", sizes, lambda: merged("weight"))
    if getattr(base, "bias", None) is not None:
        yield Part(f"{name}.bias", sizes[:1], lambda: merged("bias"))


def converted(part: Part, dtype: torch.dtype) -> Tensor:
    """Makes a part in another dtype, on the CPU.

    Raises:
        AdapterError: If a number is too large for it.
    """
    tensor = part.make()
    if tensor.dtype.is_floating_point:
        tensor = tensor.to(dtype)
        if not all(bool(torch.isfinite(piece).all()) for piece in pieces(tensor)):
            raise AdapterError(
                f"{part.name} holds numbers beyond {str(dtype).removeprefix('torch.')}; export with "
                "another --dtype"
            )
    return tensor.cpu().contiguous()


def write_weights(folder: Path, parts: list[Part], dtype: torch.dtype) -> None:
    """Writes safetensors, and an index where there are several files.

    Args:
        folder: An empty folder.
        parts: What to write.
        dtype: Dtype of floating-point tensors.
    """
    shards: list[list[Part]] = [[]]
    room = _SHARD
    for part in parts:
        size = part.entries * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = _SHARD
        room -= size
        shards[-1].append(part)
    names: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        tensors = [
            Planned(part.name, part.integers or dtype, part.shape, partial(converted, part, dtype))
            for part in shard
        ]
        total += sum(tensor.bytes for tensor in tensors)
        names |= {part.name: file for part in shard}
        write_safetensors(folder / file, tensors, marked("pt"))
        say(f"wrote {file} ({number} of {len(shards)}, {total / 2**20:,.0f} MiB so far)")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def plain_config(model: "PreTrainedModel", dtype: torch.dtype) -> Any:
    """Returns a copy of a model's configuration for its dense weights in a dtype."""
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    return config


def write_description(
    folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", dtype: torch.dtype
) -> None:
    """Writes config, generation config, tokenizer and chat template; nothing in them speaks of quantisation.

    Args:
        folder: The folder of the weights.
        model: The adapted model.
        tokenizer: Its tokenizer.
        dtype: Dtype of the weights.
    """
    config = plain_config(model, dtype)
    config.use_cache = True
    if is_untied(model):
        untie(config)  # the head's update is not the embedding's
    config.save_pretrained(folder)
    _name_rope(folder / "config.json")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _name_rope(file: Path) -> None:
    """Writes RoPE by its older names, too: readers that know no ``rope_parameters`` take a base of 10,000.

    mlx-lm 0.32 is one, and transformers 4 with what builds on it.
    """
    stored = json.loads(file.read_text(encoding="utf-8"))
    rope = stored.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return
    stored.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        stored.setdefault("rope_scaling", {key: rope[key] for key in rope if key != "rope_theta"})
    file.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_merged(source: Source, out: Path, dtype: torch.dtype) -> None:
    """Writes the folder ``out``, loads it by transformers alone and compares it with the adapter.

    Args:
        source: The adapter in its model, which is given up once it is written.
        out: The folder to write.
        dtype: Dtype of the weights.

    Raises:
        AdapterError: If transformers computes something else, reads texts into other tokens, or a weight
            does not fit into ``dtype``; nothing is written then.
        ConfigError: If ``out`` cannot be written.
    """
    import transformers

    reader = f"transformers {transformers.__version__}"
    device, compute = source.model.device, source.model.dtype
    parts = merged_parts(source.model)
    with written_folder(out) as new:
        write_weights(new, parts, dtype)
        write_description(new, source.model, source.tokenizer, dtype)
        reading = dtype if device.type == "cuda" else compute
        entries, routed = _entries(parts), has_experts(source.model)
        layer = largest_layer((part.name, part.entries) for part in parts)
        parts.clear()
        rounded = None
        if rounds_alone(dtype, compute, reading):
            say("computing them with rounded weights ...")
            round_weights(source.model, to_dtype(dtype))
            rounded = measure(source.model, source.prompts)
        # What it computes is known, and the written model takes as much memory once more.
        del source.model
        gc.collect()
        say(f"{reader} reads it back ...")
        found = reloaded(new, source, device, reading, entries, layer)
        say(check(source.expected, found, reader, dtype, compute, rounded=rounded, routed=routed))
    say_size(out, entries)


def say_size(out: Path, entries: int) -> None:
    """Prints how many parameters a written folder holds, and its size."""
    say(f"{out}: {entries:,} parameters, {mebibytes(out):,.1f} MiB")


def _entries(parts: Iterable[Part]) -> int:
    return sum(part.entries for part in parts)


def weights_size(parts: Iterable[Part], dtype: torch.dtype) -> int:
    """Returns how many bytes tensors take in a dtype."""
    return dtype.itemsize * _entries(parts)


def folder_size(parts: Iterable[Part], dtype: torch.dtype, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns about how many bytes a merged folder takes.

    Args:
        parts: The tensors.
        dtype: Their dtype.
        tokenizer: What is written beside them.
    """
    return weights_size(parts, dtype) + BYTES_OF_TOKEN * len(tokenizer)


def base_dtype(parts: Iterable[Part]) -> torch.dtype:
    """Returns the dtype in which a base is written for another engine's check: float32 unless it is large."""
    return torch.float32 if weights_size(parts, torch.float32) <= _SMALL else torch.float16


def reloaded(
    folder: Path, source: Source, device: torch.device, compute: torch.dtype, entries: int, layer: int
) -> Measured:
    """Loads a written folder and measures it; what does not fit into memory is read as it is computed with.

    Args:
        folder: The folder.
        source: The adapter, for prompts and tokenizer.
        device: Where to compute.
        compute: Dtype of the computation.
        entries: How many numbers the folder holds.
        layer: How many its largest layer holds.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for ids in source.prompts:
        text = source.tokenizer.decode(ids)
        ours, theirs = (list(one(text).input_ids) for one in (source.tokenizer, tokenizer))
        if ours != theirs or tokenizer.chat_template != source.tokenizer.chat_template:
            raise AdapterError(
                f"the written tokenizer reads {text!r} into other tokens; nothing was written. Report it"
            )
    placed = placement(folder, device, entries * compute.itemsize, layer * compute.itemsize)
    with (
        progress_bars(show=False),
        loading(str(folder)),
        silenced("accelerate.big_modeling", below=logging.ERROR),
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute, **placed)
    return measure(model.eval(), source.prompts)
