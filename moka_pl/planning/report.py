"""A plan of a run as a whole, as a table or as JSON."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.load import compute_dtype
from moka_pl.backbone.quantization import weight_bytes
from moka_pl.data import MokaDataModule
from moka_pl.lm.kernels import knows
from moka_pl.planning.adapters import Adapters, plan_adapters
from moka_pl.planning.memory import GIB, Memory, Setup, estimate, sizes_of
from moka_pl.planning.shape import empty_model, stored_bytes, tokenizer_at_hand
from moka_pl.planning.work import Run, Work, plan_work
from moka_pl.training.base import with_rows_of
from moka_pl.training.module import MokaModule
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


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        model: The base's name and how its weights are stored.
        parameters: Parameters of the base.
        adapters: The adapters.
        memory: The peak of one rank, by its parts.
        batch: (T, N) of the micro-batch that peaks: padded tokens, and predicted ones.
        checkpointing: Whether blocks are computed again in the backward pass.
        on_gpu: Whether the run is for GPUs.
        run: The trainer's options.
        devices: Devices of that kind that are present.
        work: Tokens and steps.
        tokens_per_second: The stated rate, over all ranks; None where none was stated.
        notes: What the numbers leave out.
    """

    model: str
    parameters: int
    adapters: Adapters
    memory: Memory
    batch: tuple[int, int]
    checkpointing: bool
    on_gpu: bool
    run: Run
    devices: list[Device]
    work: Work
    tokens_per_second: float | None
    notes: list[str]

    @property
    def seconds(self) -> float | None:
        """Time of training without validation; None where tokens or rate are unknown."""
        if self.tokens_per_second is None or self.work.tokens is None:
            return None
        return self.work.tokens / self.tokens_per_second

    @property
    def needed(self) -> float:
        """Bytes that a rank takes: on a GPU the peak, the context and gaps of the allocator."""
        return self.memory.peak * _GAPS + _CONTEXT if self.on_gpu else self.memory.peak

    @property
    def needed_gib(self) -> float:
        """GiB that a GPU must have, or a machine, whose memory all its ranks share."""
        return self.needed * (1 if self.on_gpu else self.run.ranks // self.run.number("num_nodes", 1)) / GIB

    @property
    def warnings(self) -> list[str]:
        """A line for each device present that is too small, with what to lower."""
        remedy = "lower data.init_args.batch_size or data.init_args.max_length"
        if not self.checkpointing:
            remedy = f"set model.gradient_checkpointing: true, or {remedy}"
        return [
            f"{device.name} has {device.gib:.1f} GiB, but the run needs {self.needed_gib:.1f}; {remedy}"
            for device in dict.fromkeys(self.devices)
            if device.gib < self.needed_gib
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; bytes as whole numbers."""
        memory = {name: round(value) for name, value in asdict(self.memory).items()}
        return {
            "model": self.model,
            "parameters": self.parameters,
            "adapters": asdict(self.adapters),
            "memory": {**memory, "peak": round(self.memory.peak), "needed": round(self.needed)},
            "batch": {"tokens": self.batch[0], "trained": self.batch[1]},
            "ranks": self.run.ranks,
            "devices": [asdict(device) for device in self.devices],
            "work": asdict(self.work),
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "notes": self.notes,
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        adapters, memory, work = self.adapters, self.memory, self.work
        share = 100 * adapters.parameters / max(1, self.parameters)
        lines = [
            ("base model", self.model),
            ("parameters", f"{self.parameters:,}"),
            (adapters.method, f"{adapters.parameters:,} trained parameters ({share:.3f}%)"),
            ("adapter on disk", f"{adapters.file_bytes / 2**20:.2f} MiB"),
        ]
        table = [*_named(lines), "", *_layer_table(adapters), ""]
        kept = "checkpointing" if self.checkpointing else "no checkpointing"
        parts = [(name, value) for name, value in asdict(memory).items() if value and name != "host"]
        table += [f"estimated peak memory of a rank, {self.batch[0]:,} tokens a micro-batch, {kept}"]
        table += [f"  {name:<28}{value / GIB:8.2f} GiB" for name, value in parts]
        table += [f"  {'peak':<28}{memory.peak / GIB:8.2f} GiB"]
        if memory.host:
            table += [f"  {'besides, in the host':<28}{memory.host / GIB:8.2f} GiB"]
        kind = "GPU" if self.on_gpu else "CPU"
        present = ", ".join(f"{device.name} ({device.gib:.0f} GiB)" for device in self.devices)
        table += [
            f"  {f'a {kind} needs' if self.on_gpu else 'the machine needs':<28}{self.needed_gib:8.2f} GiB",
            "",
        ]
        facts = [("ranks", f"{self.run.ranks}"), ("devices present", present or f"no {kind}")]
        if work.examples is not None:
            facts.append(("an epoch", f"{work.examples:,} examples, {work.epoch_tokens:,} tokens"))
        else:
            facts.append(("training data", f"unknown: {work.unknown}"))
        facts.append(("steps", "unknown" if work.steps is None else f"{work.steps:,}"))
        at_most = "" if work.examples is not None else "at most "
        facts.append(("tokens", "unknown" if work.tokens is None else f"{at_most}{work.tokens:,}"))
        if self.seconds is not None:
            facts.append(
                ("time", f"{at_most}{_duration(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s")
            )
        table += _named(facts)
        table += [f"note: {note}" for note in self.notes]
        return "\n".join(table + [f"warning: {warning}" for warning in self.warnings])


def make_plan(
    module: MokaModule, data: MokaDataModule, options: dict[str, Any], tokens_per_second: float | None = None
) -> Plan:
    """Plans a fit; of a hub model nothing but ``config.json`` is fetched, and that only if need be.

    Args:
        module: The module that would be trained.
        data: Its data.
        options: The trainer's options by name.
        tokens_per_second: A rate, over all ranks.

    Raises:
        BackboneError: If nothing tells the base's sizes.
        AdapterError: If it cannot be adapted so.
        ConfigError: If a listed filter does not fit a layer.
    """
    notes: list[str] = []
    on_gpu = _on_gpu(options.get("accelerator"))
    config = module.backbone
    dtype = _dtype(module, on_gpu)
    model, config = empty_model(config, dtype, notes)
    sizes = sizes_of(model)
    parameters = sizes.linear + sizes.other
    notes += _unmeasured(module, config.attention, "" if sizes.known else type(model).__name__, on_gpu)
    run = Run(_ranks(options, on_gpu), options)
    setup = _setup(module, model, config, run, on_gpu)
    tokenizer = tokenizer_at_hand(config)
    adapter = _with_new_tokens(module, tokenizer, sizes.vocabulary)
    adapters = plan_adapters(model, adapter, module.adapter_path, dtype.itemsize, notes)
    work = plan_work(data, tokenizer, run, module.adapter_prompt)
    peaks = {
        batch: estimate(sizes, setup(*batch), adapters.parameters, adapters.kept) for batch in work.batches
    }
    largest = max(peaks, key=lambda batch: peaks[batch].peak)
    computing = str(dtype).removeprefix("torch.")
    stored_as = computing if config.quantization == "none" else config.quantization
    return Plan(
        model=f"{config.name} in {stored_as}, computing in {computing}",
        parameters=parameters,
        adapters=adapters,
        memory=peaks[largest],
        batch=largest,
        checkpointing=bool(module.gradient_checkpointing),
        on_gpu=on_gpu,
        run=run,
        devices=_devices(on_gpu),
        work=work,
        tokens_per_second=tokens_per_second,
        notes=notes,
    )


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


def _layer_table(adapters: Adapters) -> list[str]:
    """A line for alike layers, with their filters below."""
    wide = max([len(layers.name) for layers in adapters.layers], default=0) + 2
    lines = [f"{'adapted layers':<{wide}}{'count':>6}{'m × n':>15}{'each':>12}{'all':>13}  exact LoRA rank"]
    for layers in adapters.layers:
        size = f"{layers.outputs} × {layers.inputs}"
        rank = "" if layers.exact_lora_rank is None else f"  {layers.exact_lora_rank}"
        lines.append(
            f"{layers.name:<{wide}}{layers.count:>6}{size:>15}{layers.parameters:>12,}"
            f"{layers.count * layers.parameters:>13,}{rank}"
        )
        if layers.filters:
            lines.append(f"  {', '.join(layers.filters)}")
    return lines


def _named(facts: list[tuple[str, str]]) -> list[str]:
    return [f"{name:<22}{value}" for name, value in facts]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02} min" if hours else f"{rest // 60} min {rest % 60:02} s"


def _on_gpu(accelerator: Any) -> bool:
    return accelerator in ("gpu", "cuda") or (accelerator in ("auto", None) and torch.cuda.is_available())


def _sharding(strategy: Any) -> tuple[bool, bool]:
    """Whether a strategy (a name, or a class with options) spreads the base, and offloads its parts."""
    if isinstance(strategy, dict):
        spreads = str(strategy.get("class_path", "")).endswith("ShardedStrategy")
        return spreads, spreads and bool((strategy.get("init_args") or {}).get("offload"))
    return str(strategy).startswith("sharded"), strategy == "sharded_offload"


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


def _devices(on_gpu: bool) -> list[Device]:
    if on_gpu:
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [Device(found.name, found.total_memory / GIB) for found in properties]
    return [Device("this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB)]
