"""The memory of micro-batches, from the options of a run: for a plan, and where a run has too little."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch

from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.load import compute_dtype
from moka_pl.backbone.quantization import dequantising_bytes, weight_bytes
from moka_pl.lm.kernels import knows
from moka_pl.planning.adapters import Adapters, plan_adapters
from moka_pl.planning.memory import GIB, Memory, Setup, Sizes, estimate, sizes_of
from moka_pl.planning.shape import empty_model, stored_bytes, tokenizer_at_hand
from moka_pl.planning.work import Run
from moka_pl.training.base import with_rows_of
from moka_pl.training.module import MokaModule
from moka_pl.training.preflight import strategy_parts
from moka_pl.training.trial_optimizer import state_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What a GPU holds beside tensors: the CUDA context, and gaps of the allocator.
_CONTEXT, _GAPS = 0.6 * GIB, 1.03


@dataclass(frozen=True)
class Device:
    """A device that is present.

    Attributes:
        name: Its name.
        gib: Its memory, GiB.
    """

    name: str
    gib: float


def describe_batch(module: MokaModule, options: dict[str, Any], rows: int, tokens: int, trained: int) -> str:
    """Says what a micro-batch takes by the estimate of a plan, and what it would take otherwise.

    Args:
        module: The module that is trained.
        options: The trainer's options by name.
        rows: Rows of the micro-batch.
        tokens: Tokens of a row, with padding.
        trained: Tokens of all rows that are predicted.
    """
    estimator = Estimator.of(module, options, [])

    def gib(share: float = 1, **changes: Any) -> str:
        memory = estimator.memory(round(share * rows * tokens), round(share * trained), **changes)
        return f"{needed(memory, estimator.on_gpu) / GIB:.1f}"

    others = [f"{gib(0.5)} with half of the rows"] if rows > 1 else []
    if not module.gradient_checkpointing:
        others.append(f"{gib(checkpointing=True)} with gradient checkpointing")
    elif module.gradient_checkpointing != "offload" and estimator.on_gpu:
        others.append(f"{gib(offloaded=True)} with offloaded checkpointing")
    device = devices_present(estimator.on_gpu)[:1]
    has = f", and {device[0].name} has {device[0].gib:.1f} GiB" if device else ""
    instead = f" ({', '.join(others)})" if others else ""
    return f"plan estimates {gib()} GiB for a rank with such a batch{instead}{has}"


@dataclass(frozen=True)
class Estimator:
    """What estimates the memory of micro-batches.

    Attributes:
        config: The base's options.
        dtype: Its compute dtype.
        sizes: Its sizes.
        adapters: The adapters.
        run: The trainer's options.
        on_gpu: Whether the run is for GPUs.
        setup: Makes the setup of a micro-batch, from its padded and its predicted tokens.
        tokenizer: The base's tokenizer, if it is here.
    """

    config: BackboneConfig
    dtype: torch.dtype
    sizes: Sizes
    adapters: Adapters
    run: Run
    on_gpu: bool
    setup: Callable[[int, int], Setup]
    tokenizer: "PreTrainedTokenizerBase | None"

    @classmethod
    def of(cls, module: MokaModule, options: dict[str, Any], notes: list[str]) -> Self:
        """Finds out what the module and the trainer's options take, but for the batch.

        Args:
            module: The module.
            options: The trainer's options by name.
            notes: Is told what the estimate leaves out.
        """
        on_gpu = _on_gpu(options.get("accelerator"))
        dtype = _dtype(module, on_gpu)
        model, config = empty_model(module.backbone, dtype, notes)
        sizes = sizes_of(model)
        notes += _unmeasured(module, config.attention, "" if sizes.known else type(model).__name__, on_gpu)
        run = Run(_ranks(options, on_gpu), options)
        setup = _setup(module, model, config, run, on_gpu)
        tokenizer = tokenizer_at_hand(config)
        adapter = _with_new_tokens(module, tokenizer, sizes.vocabulary)
        adapters = plan_adapters(model, adapter, module.adapter_path, dtype.itemsize, notes)
        return cls(config, dtype, sizes, adapters, run, on_gpu, setup, tokenizer)

    def memory(self, tokens: int, trained: int, **changes: Any) -> Memory:
        """Estimates the peak of a rank.

        Args:
            tokens: Padded tokens of the micro-batch.
            trained: Those that are predicted.
            **changes: What is to be other than in the run.
        """
        setup = replace(self.setup(tokens, trained), **changes)
        own = self.adapters
        return estimate(self.sizes, setup, own.parameters, own.kept, own.products)


def needed(memory: Memory, on_gpu: bool) -> float:
    """Bytes that a rank takes: on a GPU the peak, the context and gaps of the allocator."""
    return memory.peak * _GAPS + _CONTEXT if on_gpu else memory.peak


def _with_new_tokens(module: MokaModule, tokenizer: "PreTrainedTokenizerBase | None", vocabulary: int) -> Any:
    """Returns the adapter with the rows of new tokens; where there is no tokenizer, with so many rows."""
    tokens, config = module.backbone.new_tokens, module.adapter
    if not tokens or module.adapter_path is not None:
        return config
    numbers = range(vocabulary, vocabulary + len(tokens))
    found = list(numbers) if tokenizer is None else tokenizer.convert_tokens_to_ids(tokens)
    return with_rows_of(config, found)


def _setup(
    module: MokaModule, model: "PreTrainedModel", config: BackboneConfig, run: Run, on_gpu: bool
) -> Callable[[int, int], Setup]:
    """Returns what makes the setup of a micro-batch, from its padded and its predicted tokens.

    Args:
        module: The module.
        model: The base on the meta device, without adapters.
        config: The base's options.
        run: The trainer's.
        on_gpu: Whether the run is for GPUs.
    """
    quantised, storage = config.quantization != "none", (config.quantization, config.double_quantization)
    spreads, base_offloaded = _sharding(run.options.get("strategy"))
    fuses = on_gpu and config.kernels == "auto" and config.compile == "none"
    return partial(
        Setup,
        itemsize=model.dtype.itemsize,
        checkpointing=bool(module.gradient_checkpointing),
        linear=weight_bytes(*storage, model.dtype) if quantised else None,
        dequantised=dequantising_bytes(config.quantization, model.dtype),
        state=state_bytes(module.optimizer),
        gradients=8 if run.ranks > 1 else 4,
        stored=None if on_gpu else stored_bytes(config, model.num_parameters()) if quantised else 0,
        fused=fuses and knows(model),
        by_parts=on_gpu,
        offloaded=on_gpu and module.gradient_checkpointing == "offload",
        spread=run.ranks if spreads and (run.ranks > 1 or base_offloaded) else None,
        base_offloaded=base_offloaded,
    )


def _unmeasured(module: MokaModule, attention: str, unknown: str, on_gpu: bool) -> list[str]:
    """Returns what the estimate of memory leaves out.

    Args:
        module: The module.
        attention: The base's attention.
        unknown: Its architecture, if that was not measured.
        on_gpu: Whether the run is for GPUs.
    """
    notes = []
    if unknown:
        notes.append(f"memory: {unknown} was not measured; it is counted as a LLaMA of its sizes")
    if attention == "eager":
        notes.append("memory: a lower bound, since attention eager keeps its weights; sdpa does not")
    if module.cuda_graphs and on_gpu:
        notes.append("memory: cuda_graphs keeps a batch's activations for each size of batches; not counted")
    return notes


def _on_gpu(accelerator: Any) -> bool:
    return accelerator in ("gpu", "cuda") or (accelerator in ("auto", None) and torch.cuda.is_available())


def _sharding(strategy: Any) -> tuple[bool, bool]:
    """Whether a strategy (a name, or a class with options) spreads the base, and offloads its parts."""
    name, options = strategy_parts(strategy)
    spreads = name == "ShardedStrategy" or name.startswith("sharded")
    return spreads, name == "sharded_offload" or (spreads and bool(options.get("offload")))


def _dtype(module: MokaModule, on_gpu: bool) -> torch.dtype:
    """The compute dtype; of a GPU that is not here, the one of today's."""
    if module.backbone.compute_dtype == "auto" and on_gpu and not torch.cuda.is_available():
        return torch.bfloat16
    return compute_dtype(module.backbone, torch.device("cuda" if on_gpu else "cpu"))


def _ranks(options: dict[str, Any], on_gpu: bool) -> int:
    """Processes over all nodes, as the trainer would count them."""
    devices = options.get("devices")
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        count = len(devices)
    elif isinstance(devices, int) and devices > 0:
        count = devices
    else:  # auto, -1
        count = max(1, torch.cuda.device_count()) if on_gpu else 1
    return count * int(options.get("num_nodes") or 1)


def devices_present(on_gpu: bool) -> list[Device]:
    """Returns the GPUs, or this machine."""
    if on_gpu:
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [Device(found.name, found.total_memory / GIB) for found in properties]
    return [Device("this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB)]
