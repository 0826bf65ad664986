"""The trainings that are measured."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Optimizer steps of a timed block, of which one logs: ``trainer.log_every_n_steps`` is the same.
BLOCK = 5


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        shape: Shape of the model (see ``BackboneConfig.name``).
        strategy: Lightning's name of the strategy.
        devices: Number of GPUs.
        batch_size: Rows per GPU.
        warmup: Optimizer steps at the beginning whose speed does not count.
        blocks: Blocks of :data:`BLOCK` steps whose speed counts.
        memory_limit: GiB of each GPU that may be used; None for all.
        resumes: Strategy and number of GPUs of a training of as many steps that this one resumes; None where
            it begins anew.
        cuda_graphs: Whether steps are replayed as CUDA graphs.
        offload: Whether checkpointing keeps the inputs of the layers in the host's memory.
    """

    shape: str = "llama2-7b"
    strategy: str = "ddp"
    devices: int = 1
    batch_size: int = 8
    warmup: int = 10
    blocks: int = 6
    memory_limit: float | None = None
    resumes: tuple[str, int] | None = None
    cuda_graphs: bool = False
    offload: bool = False

    @property
    def saves_at(self) -> int:
        """The step after which a checkpoint is written: the last timed one, which one more follows."""
        return self.warmup + BLOCK * self.blocks

    @property
    def steps(self) -> int:
        """All its optimizer steps."""
        return self.saves_at + 1

    @property
    def name(self) -> str:
        """What tells it from others, as part of a file's name."""
        parts = [Path(self.shape).name, self.strategy, f"{self.devices}x{self.batch_size}"]
        parts += [] if self.memory_limit is None else [f"{self.memory_limit:g}gib"]
        parts += [] if self.resumes is None else ["resumed"]
        parts += ["graphs"] if self.cuda_graphs else []
        return "-".join([*parts, *(["offload"] if self.offload else [])])

    def as_dict(self) -> dict[str, Any]:
        """Returns the options that JSON holds."""
        return asdict(self)


def _limited(strategy: str, devices: int) -> Case:
    return Case("llama2-70b", strategy, devices, 1, 5, 2, 24.0)


def _pairs(shape: str, rows: int, warmup: int, blocks: int) -> list[Case]:
    return [Case(shape, s, n, rows, warmup, blocks) for n in (2, 4) for s in ("ddp", "sharded")]


def _resumed(first: str, then: str) -> Case:
    return Case(strategy=then, devices=2, warmup=4, blocks=1, resumes=(first, 4))


#: Which trainings belong together, by name.
GROUPS: dict[str, list[Case]] = {
    "ddp": [Case(devices=n, cuda_graphs=graphs) for graphs in (True, False) for n in (1, 2, 4)],
    "limited": [_limited("sharded", 2), _limited("sharded_offload", 1)],
    "13b": _pairs("llama2-13b", 8, 8, 4),
    "70b": _pairs("llama2-70b", 4, 5, 2),
    "resume": [_resumed("sharded", "ddp"), _resumed("ddp", "sharded")],
}
