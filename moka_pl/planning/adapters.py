"""The adapters of a run: which layers, how many parameters, which LoRA ranks, how large on disk."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from moka_pl.adapters import MokaConfig, MokaEmbedding, inject_adapter, method_of, moka_layers
from moka_pl.adapters.filters import AUTO
from moka_pl.adapters.methods.base import AdaptedLayer
from moka_pl.adapters.methods.registry import adapted_layers
from moka_pl.adapters.reading import read_adapter_shapes
from moka_pl.adapters.vocabulary.token_rows import TokenRows
from moka_pl.planning.memory import merged_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Layers:
    """Adapted layers that are alike.

    Attributes:
        name: Their name, ``*`` in place of the block's number.
        count: How many there are.
        outputs: m.
        inputs: n.
        parameters: Trained numbers of each.
        filters: The r components' shapes as text, ``m_a×n_a ⊗ m_b×n_b``, equal ones counted.
        exact_lora_rank: Rank of the LoRA that each is exactly; None where none is told.
    """

    name: str
    count: int
    outputs: int
    inputs: int
    parameters: int
    filters: list[str] = field(default_factory=list)
    exact_lora_rank: int | None = None


@dataclass(frozen=True)
class Adapters:
    """All adapters of a model.

    Attributes:
        method: The method's name.
        layers: The adapted layers, alike ones together, in model order.
        parameters: Trained numbers.
        file_bytes: Size of ``adapter_model.safetensors``.
        kept: Bytes a token that the adapted layers keep for the backward pass, in all blocks together.
        products: Those of them that fused MLPs compute again.
    """

    method: str
    layers: list[Layers]
    parameters: int
    file_bytes: int
    kept: float
    products: float = 0.0


def plan_adapters(
    model: "PreTrainedModel", config: Any, adapter_path: str | None, itemsize: int, notes: list[str]
) -> Adapters:
    """Puts the adapters into a model without memory, and counts.

    Args:
        model: The model on the meta device; it is adapted afterwards.
        config: The adapter's configuration, of any method.
        adapter_path: The adapter directory that the run starts from, if any.
        itemsize: Bytes of the compute dtype.
        notes: Where it is said what is counted otherwise than it may come out.

    Raises:
        AdapterError: If the model cannot be adapted so.
        ConfigError: If a listed filter does not fit a layer.
    """
    if isinstance(config, MokaConfig) and config.filters == AUTO:
        notes.append("filters: auto chooses shapes when the run begins; counted as diverse, its usual budget")
        config = replace(config, filters="diverse", budget=None)
    saved = None if adapter_path is None else read_adapter_shapes(adapter_path)
    with torch.device("meta"):
        inject_adapter(model, config, saved=saved)
    method = method_of(config)
    state = method.state(model)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = _kept(model, config, itemsize, notes)
    products = itemsize * gated_products(model) if isinstance(config, MokaConfig) else 0
    return Adapters(method.title, _layers(model, state), parameters, _file_bytes(state), kept, products)


def _layers(model: "PreTrainedModel", state: dict[str, Tensor]) -> list[Layers]:
    counts: Counter[tuple[Any, ...]] = Counter()
    mokas = moka_layers(model)
    sizes: Counter[str] = Counter()
    for tensor_name, tensor in state.items():
        sizes[tensor_name.removeprefix("base_model.model.")] += tensor.numel()
    for name, layer in adapted_layers(model).items():
        size = sum(count for tensor, count in sizes.items() if tensor.startswith(f"{name}."))
        outputs, inputs = _size(layer)
        filters: tuple[str, ...] = ()
        rank = None
        if (moka := mokas.get(name)) is not None:
            told = Counter(map(str, moka.shapes))
            filters = tuple(text if n == 1 else f"{n} of {text}" for text, n in told.items())
            rank = moka.exact_lora_rank()
        counts[_NUMBER.sub(".*.", name), outputs, inputs, size, filters, rank] += 1
    return [
        Layers(name, count, m, n, size, list(filters), rank)
        for (name, m, n, size, filters, rank), count in counts.items()
    ]


def _kept(model: "PreTrainedModel", config: Any, itemsize: int, notes: list[str]) -> float:
    """Bytes a token that adapted layers keep; what was not measured is said."""
    layers = adapted_layers(model).items()
    # An embedding keeps no more than its tokens.
    widths = {n: _size(layer)[1] for n, layer in layers if not isinstance(layer, MokaEmbedding | TokenRows)}
    shared = itemsize * merged_inputs(widths)
    if isinstance(config, MokaConfig):
        if config.dropout > 0 or config.backend == "structured":
            notes.append(
                "memory: a lower bound, since layers with dropout or backend structured keep more than "
                "the estimate counts"
            )
        return shared
    if getattr(config, "peft_type", None) is None:
        notes.append("memory: full fine-tuning was not measured; every layer is counted with its input")
        return float(itemsize * sum(m.in_features for m in model.modules() if isinstance(m, nn.Linear)))
    if type(config).__name__ != "LoraConfig" or getattr(config, "use_dora", False):
        notes.append(f"memory: {method_of(config).title} was not measured; its layers are counted as LoRA's")
    rank = getattr(config, "r", 0)
    # PEFT turns the input of each layer to the factors' float32, a copy that each keeps.
    inputs = shared if itemsize == 4 else 4 * sum(widths.values())
    return inputs + 4 * rank * len(widths)


def gated_products(model: "PreTrainedModel") -> int:
    """Returns the widths of the products of gated MLPs that adapted layers read, as Liger's MLPs have them.

    Args:
        model: The model, with its adapters.
    """
    config = model.config.get_text_config()
    if getattr(config, "hidden_act", None) != "silu":
        return 0
    adapted = adapted_layers(model)
    names = [name for name in adapted if name.endswith(".down_proj")]
    return sum(
        _size(adapted[name])[1]
        for name in names
        if hasattr(model.get_submodule(name.rpartition(".")[0]), "gate_proj")
    )


def _size(layer: AdaptedLayer) -> tuple[int, int]:
    """(m, n) of a layer's weight."""
    m, n = cast(Tensor, layer.base_layer.weight).shape
    return m, n


def _file_bytes(state: dict[str, Tensor]) -> int:
    """Size of a safetensors file with these tensors in float32: 8 bytes, a header, the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(state.items()):  # the file's order
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end
