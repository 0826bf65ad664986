"""Which model, batch and device a benchmark runs on."""

from dataclasses import dataclass
from typing import Literal

from moka_pl.errors import ConfigError

_SIZES = ("smollm2-135m", "llama3-1b", "llama2-7b", "llama3-8b", "llama2-13b")


@dataclass(frozen=True)
class Preset:
    """A model, a batch and how long to measure.

    Attributes:
        name: The preset's name.
        shape: Shape of the model (a name that ``BackboneConfig`` knows with ``weights: random``).
        device: ``cuda`` or ``cpu``.
        batch: Rows of a batch.
        length: Tokens of a row.
        warmup: Steps before the measured ones.
        steps: Measured steps of a row.
        seconds: Longest time for the measured steps of a row; a slower row is given fewer steps.
        fit_steps: Measured optimizer steps of a whole ``fit``.
        new_tokens: Measured tokens of generation.
        workers: Processes that load batches in ``fit``.
        components: Numbers of components r to grow over.
        tokens: Tokens of a batch to grow over.
        shapes: Shapes to grow over, small to large.
    """

    name: str
    shape: str
    device: Literal["cpu", "cuda"]
    batch: int
    length: int
    warmup: int = 3
    steps: int = 10
    seconds: float = 30.0
    fit_steps: int = 50
    new_tokens: int = 64
    workers: int = 2
    components: tuple[int, ...] = (1, 2, 5, 10, 20, 40)
    tokens: tuple[int, ...] = (1, 8, 64, 512, 4096, 32768)
    shapes: tuple[str, ...] = _SIZES


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "smollm2-cpu",
            "smollm2-135m",
            "cpu",
            batch=8,  # as in configs/smollm2.yaml
            length=64,
            warmup=1,
            steps=3,
            seconds=4.0,
            fit_steps=10,
            new_tokens=16,
            workers=0,
            # A CPU has no "out of memory" to catch: the system would end the process.
            tokens=(1, 8, 64, 512),
            shapes=("smollm2-135m", "llama3-1b"),
        ),
        Preset("smollm2-h100", "smollm2-135m", "cuda", batch=32, length=64, warmup=5, steps=20),
        Preset("llama2-7b-h100", "llama2-7b", "cuda", batch=8, length=512),
        Preset("llama2-7b-odd-h100", "llama2-7b-odd", "cuda", batch=8, length=512),
        Preset("llama3-8b-h100", "llama3-8b", "cuda", batch=8, length=512),
        # A single short example, for which the update itself weighs most.
        Preset(
            "smollm2-cpu-short", "smollm2-135m", "cpu", batch=1, length=64, warmup=2, steps=12, seconds=8.0
        ),
    )
}


def find_preset(name: str) -> Preset:
    """Returns the preset of this name, if it can run here.

    Raises:
        ConfigError: For an unknown name, or a GPU's preset on a machine without one.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if preset.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            possible = ", ".join(p.name for p in PRESETS.values() if p.device == "cpu")
            raise ConfigError(f"preset {name} needs a CUDA device, and there is none here; choose {possible}")
    return preset
