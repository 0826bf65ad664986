"""A plan of a run as a whole, as a table or as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from moka_pl.data import MokaDataModule
from moka_pl.planning.adapters import Adapters
from moka_pl.planning.estimator import Device, Estimator, devices_present, needed
from moka_pl.planning.memory import GIB, Memory
from moka_pl.planning.work import Run, Work, plan_work
from moka_pl.training.module import MokaModule


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
        return needed(self.memory, self.on_gpu)

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
    estimator = Estimator.of(module, options, notes)
    config, run, on_gpu = estimator.config, estimator.run, estimator.on_gpu
    work = plan_work(data, estimator.tokenizer, run, module.adapter_prompt)
    peaks = {batch: estimator.memory(*batch) for batch in work.batches}
    largest = max(peaks, key=lambda batch: peaks[batch].peak)
    computing = str(estimator.dtype).removeprefix("torch.")
    stored_as = computing if config.quantization == "none" else config.quantization
    return Plan(
        model=f"{config.name} in {stored_as}, computing in {computing}",
        parameters=estimator.sizes.linear + estimator.sizes.other,
        adapters=estimator.adapters,
        memory=peaks[largest],
        batch=largest,
        checkpointing=bool(module.gradient_checkpointing),
        on_gpu=on_gpu,
        run=run,
        devices=devices_present(on_gpu),
        work=work,
        tokens_per_second=tokens_per_second,
        notes=notes,
    )


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
