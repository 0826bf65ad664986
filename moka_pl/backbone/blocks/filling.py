"""Fills an empty model with weights, module by module, so that it is never there in full precision."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moka_pl.backbone.blocks.frozen_tensors import BlockStore, block_ends
from moka_pl.backbone.config import BackboneConfig
from moka_pl.backbone.linear_layers import is_conv1d
from moka_pl.backbone.quantization import StoredLayers, quantised_linear
from moka_pl.backbone.weight_files import WeightFiles
from moka_pl.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Source = Callable[[nn.Module, str, str, Tensor], Tensor]
"""Makes a parameter from its module, the module's name, its own name there, and itself on the meta device."""


def fill(
    model: "PreTrainedModel",
    config: BackboneConfig,
    dtype: torch.dtype,
    device: torch.device,
    source: Source,
    blocks: BlockStore | None,
    stored: Callable[[str, nn.Linear], nn.Module | None] | None = None,
) -> str | None:
    """Gives every module of a model on the meta device its parameters; linear ones are quantised at once.

    Args:
        model: The model.
        config: Its options.
        dtype: Compute dtype.
        device: Where the model is to live.
        source: Makes the parameters, on that device.
        blocks: Takes each block as soon as it is filled.
        stored: Returns a layer that is quantised already by its name and the empty layer, None for others,
            which are left as they are; None where no layer is.

    Returns:
        The name of a parameter or buffer that is still empty; None where all are filled.
    """
    head = model.get_output_embeddings()
    ends = {} if blocks is None else block_ends(model)
    makes = config.quantization != "none" and stored is None
    for name, module in list(model.named_modules()):
        ready = stored(name, module) if stored is not None and isinstance(module, nn.Linear) else None
        if ready is not None:
            model.set_submodule(name, ready)
        elif isinstance(module, nn.Linear) and module is not head and makes:
            weight = source(module, name, "weight", module.weight)
            options = config.quantization, config.double_quantization, dtype
            quantised: Any = quantised_linear(module, weight, *options)
            del weight  # before the next is made
            if module.bias is not None:
                quantised.bias.data.copy_(source(module, name, "bias", module.bias))
            model.set_submodule(name, quantised)
        elif _is_rotary(module):
            # Its buffers are computed; on the meta device they were not.
            with torch.device(device):
                model.set_submodule(name, type(module)(model.config))
        else:
            for key, empty in list(module.named_parameters(recurse=False)):
                made = source(module, name, key, empty)
                setattr(module, key, nn.Parameter(made, requires_grad=False))
        if blocks is not None and name in ends:
            blocks.add(ends[name])
    model.tie_weights()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    return left[0] if left else None


def is_complete(
    files: WeightFiles | None,
    model: "PreTrainedModel",
    quantization: Mapping[str, Any] | None,
    stored: StoredLayers | None,
) -> bool:
    """Whether files hold every parameter of a model under its own name, and nothing else is read.

    Args:
        files: What is in its folder.
        model: The model on the meta device.
        quantization: How the files are quantised already.
        stored: Their layers that are read as they are.
    """
    if files is None or (quantization is not None and stored is None):
        return False
    names = set(files.tensors) if stored is None else stored.names
    if any(name in names for name, _ in model.named_buffers()):
        return False
    if any(is_conv1d(module) for module in model.modules()):  # which transformers quantises in its own way
        return False
    computed = {key for name, m in model.named_modules() if _is_rotary(m) for key in _buffers(name, m)}
    known = names | _tied(model)
    return all(name in known for name, _ in model.named_parameters()) and all(
        name in computed for name, _ in model.named_buffers()
    )


def read_blocks(
    model: "PreTrainedModel",
    config: BackboneConfig,
    device: torch.device,
    files: WeightFiles,
    blocks: BlockStore | None,
    stored: StoredLayers | None = None,
) -> "PreTrainedModel":
    """Fills a model from safetensors files that are complete (:func:`is_complete`), tensor by tensor.

    Args:
        model: The model on the meta device, in its compute dtype.
        config: Its options.
        device: Where the model is to live.
        files: What is in its folder.
        blocks: Takes each block as soon as it is filled; None leaves all where they are.
        stored: Layers that are quantised already.
    """
    from safetensors import safe_open
    from transformers import GenerationConfig

    tied = _tied(model)
    with ExitStack() as opened:
        names = {place.file for place in files.tensors.values()}
        readers = {name: opened.enter_context(safe_open(files.folder / name, "pt")) for name in names}

        def part(full: str) -> Tensor:
            tensor: Tensor = readers[files.tensors[full].file].get_tensor(full)
            return tensor

        def read(module: nn.Module, name: str, key: str, empty: Tensor) -> Tensor:
            full = f"{name}.{key}"
            if full not in files.tensors and full in tied:
                return empty
            tensor = part(full)
            if not tensor.is_floating_point():
                raise BackboneError(f"{full} holds {tensor.dtype}, no weights; copy the model again")
            # Cast first, as transformers does, so that the codes are the same.
            return tensor.to(empty.dtype).to(device)

        def ready(name: str, layer: nn.Linear) -> nn.Module | None:
            if stored is None or name not in stored.layers:
                return None
            if layer is model.get_output_embeddings():
                raise BackboneError(
                    f"the output head {name} is quantised, which moka_pl cannot compute a loss with; give a "
                    "checkpoint whose head is not"
                )
            return stored.read(name, layer, lambda full: part(full).to(device), model.dtype)

        fill(model, config, model.dtype, device, read, blocks, None if stored is None else ready)
    with suppress(OSError):  # most models have none
        model.generation_config = GenerationConfig.from_pretrained(files.folder)
    return model


def _is_rotary(module: nn.Module) -> bool:
    return "rotary" in type(module).__name__.lower()


def _buffers(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{key}" for key, _ in module.named_buffers()]


def _tied(model: "PreTrainedModel") -> set[str]:
    """Names of the head's weight, where that is the embedding's."""
    head = model.get_output_embeddings()
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}
