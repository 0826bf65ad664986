"""The cases of the benchmark: presets of model, batch and device, and the rows that run on them.

A row is what is put into the frozen model, and how it is taken out again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from moka_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Remove = Callable[[], None]
Put = Callable[["PreTrainedModel"], Remove]

FROZEN, BASELINE = "frozen base", "LoRA r8 q,v"
QV = ["q_proj", "v_proj"]
#: The usual target modules of QLoRA without the output projections.
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

#: Every linear layer except the output head.
ALL = "all-linear"

#: Parts of the names of the factors that start at zero.
_ZERO_STARTS = ("moka_B", "lora_B", "lokr_w1")


@dataclass(frozen=True)
class Row:
    """Something to measure.

    Attributes:
        name: The row's name.
        put: Changes the frozen model in place, and returns what undoes it.
        spoils: Whether the model cannot be used again even then.
        captured: Whether its training step is replayed as a CUDA graph.
        backbone: Options of ``BackboneConfig`` that its model is built with.
    """

    name: str
    put: Put
    spoils: bool = False
    captured: bool = False
    backbone: Mapping[str, str] = field(default_factory=dict)


def frozen(name: str = FROZEN) -> Row:
    """The base as it is."""
    return Row(name, lambda model: lambda: None)


def moka(name: str, **options: Any) -> Row:
    """MoKA adapters with these options of ``MokaConfig``."""

    def put(model: "PreTrainedModel") -> Remove:
        from moka_pl.adapters import MokaConfig, inject_adapter, unload

        inject_adapter(model, MokaConfig(**options))
        randomise(model)
        return lambda: unload(model)

    return Row(name, put)


def servable() -> Row:
    """MoKA whose updates are LoRAs of rank 16, on every linear layer."""
    options = {"filters": "servable", "rank": 16, "components": 1, "target_modules": ALL}
    return moka("MoKA servable r16 all linear", **options)


def lora(name: str, rank: int, modules: list[str] | str, **options: Any) -> Row:
    """PEFT's LoRA, or a variant of it that ``options`` choose.

    Args:
        name: The row's name.
        rank: The rank; the scaling is 2.
        modules: Target modules.
        **options: Further options of ``LoraConfig``.
    """
    return _peft(name, "LoraConfig", r=rank, lora_alpha=2 * rank, target_modules=modules, **options)


def lokr(name: str, rank: int, modules: list[str]) -> Row:
    """PEFT's LoKr.

    Args:
        name: The row's name.
        rank: The rank; the scaling is 1.
        modules: Target modules.
    """
    return _peft(name, "LoKrConfig", r=rank, alpha=rank, target_modules=modules)


def step_rows(device: str, quantisers: bool = False) -> list[Row]:
    """The rows of the table; the frozen base comes again at the end, to show how the machine drifted.

    Args:
        device: ``cuda`` or ``cpu``.
        quantisers: Whether there are those of :func:`quantiser_rows`, too.
    """
    backends = ["structured", "dense", *(["fused"] if device == "cuda" else [])]
    recorded = [
        frozen(),
        moka("MoKA r10"),
        moka("MoKA r2 all linear", components=2, target_modules=ALL),
        servable(),
        lora(BASELINE, 8, QV),
    ]
    captured = [captured_row(row) for row in recorded]
    return [
        frozen(),
        moka("MoKA r10"),
        *(moka(f"MoKA r10 {backend}", backend=backend) for backend in backends),
        moka("MoKA r1", components=1),
        moka("MoKA r20", components=20),
        moka("MoKA_s r10", filters="prime"),
        moka("MoKA r2 all linear", components=2, target_modules=ALL),
        servable(),
        lora(BASELINE, 8, QV),
        *(lora(f"LoRA r{rank} all linear", rank, ALL) for rank in (1, 2, 16)),
        lora("LoRA r64 q,v", 64, QV),
        lora("LoRA r32 q,k,v,up,down", 32, FIVE),
        lora("DoRA r64 q,v", 64, QV, use_dora=True),
        lokr("LoKr r64 q,v", 64, QV),
        *(captured if device == "cuda" else []),
        *(backbone_rows() if device == "cuda" else []),
        *(quantiser_rows() if quantisers else []),
        frozen(f"{FROZEN} (again)"),
    ]


#: How the names of rows end whose steps are replayed as a CUDA graph.
CAPTURED = ", CUDA graph"


def captured_row(row: Row) -> Row:
    """The same with its step replayed as a CUDA graph."""
    return replace(row, name=row.name + CAPTURED, captured=True)


def on_backbone(row: Row, **options: str) -> Row:
    """The same on a base with these options of ``BackboneConfig``, which its name ends with."""
    told = "".join(f", {key} {value}" for key, value in options.items())
    return replace(row, name=f"{row.name}{told}", backbone=options)


#: Which of unsloth's rows answers the same wish as one of ours.
_PEERS = {
    "MoKA r10": "unsloth LoRA r8 q,v",
    "MoKA r10 fit": "unsloth LoRA r8 q,v",
    "LoRA r8 q,v": "unsloth LoRA r8 q,v",
    "MoKA r2 all linear": "unsloth LoRA r16 all linear",
    "MoKA r2 all linear fit": "unsloth LoRA r16 all linear",
    "MoKA servable r16 all linear": "unsloth LoRA r16 all linear",
    "MoKA servable r16 all linear fit": "unsloth LoRA r16 all linear",
    "LoRA r16 all linear": "unsloth LoRA r16 all linear",
    "LoRA r32 q,k,v,up,down": "unsloth LoRA r32 q,k,v,up,down",
}


def peer(name: str) -> str | None:
    """Name of unsloth's row that a row competes with, whatever its base or its step; None where none does."""
    return _PEERS.get(name.partition(", ")[0])


def backbone_rows() -> list[Row]:
    """Rows on a base that is not built as it is by default."""
    ours = [
        frozen(),
        moka("MoKA r10"),
        moka("MoKA r2 all linear", components=2, target_modules=ALL),
        servable(),
    ]
    peft = [
        lora(BASELINE, 8, QV),
        lora("LoRA r16 all linear", 16, ALL),
        lora("LoRA r32 q,k,v,up,down", 32, FIVE),
    ]
    rows = [on_backbone(row, compile="layers") for row in ours]
    float8 = [on_backbone(row, matmul="fp8") for row in (frozen(), moka("MoKA r10"), servable(), *peft)]
    rows += [*float8, *(captured_row(row) for row in float8[:3])]
    return rows + [on_backbone(row, kernels="none") for row in (frozen(), *peft)]


def quantiser_rows() -> list[Row]:
    """MoKA on bases stored by each quantiser, some of which need packages of their own."""
    row = moka("MoKA r2 all linear", components=2, target_modules=ALL)
    return [on_backbone(row, quantization=name) for name in ("fp4", "int8", "int4", "float8", "hqq", "none")]


def choose(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows with these names, or all where none are named."""
    return [row for row in rows if not names or row.name in names]


def randomise(model: "PreTrainedModel") -> None:
    """Fills the adapters' zero factors with small random values: no product of zeros is timed."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in name for part in _ZERO_STARTS):
            torch.nn.init.normal_(parameter, std=1e-3)


def _peft(name: str, kind: str, **options: Any) -> Row:
    def put(model: "PreTrainedModel") -> Remove:
        try:
            import peft
        except ImportError as error:
            raise ConfigError("PEFT is not installed; pip install 'moka_pl[studies]'") from error
        config = getattr(peft, kind)(**options)
        # A model with random weights lacks the mark by which PEFT chooses its layers for 4-bit weights.
        model.is_loaded_in_4bit = True
        try:
            wrapped = peft.get_peft_model(model, config)
        finally:
            del model.is_loaded_in_4bit
        randomise(model)

        def remove() -> None:
            wrapped.unload()
            if hasattr(model, "peft_config"):
                del model.peft_config  # PEFT would warn of a second adapter

        return remove

    return Row(name, put)


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
        context_seconds: Time to search the longest row of tokens of a row.
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
    context_seconds: float = 35.0
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
        Preset("llama3-8b-2048-h100", "llama3-8b", "cuda", batch=2, length=2048),
        Preset("llama3-8b-4096-h100", "llama3-8b", "cuda", batch=1, length=4096),
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
            raise ConfigError(f"preset {name} needs a CUDA device; choose {possible}")
    return preset


def beside_liger(rows: Sequence[Row]) -> list[Row]:
    """The rows on a base without Liger's kernels, and then two on a base with them."""
    plain = [replace(row, backbone={"kernels": "none", **row.backbone}) for row in rows]
    return [*plain, with_liger(frozen()), with_liger(moka("MoKA r10"))]


def with_liger(row: Row) -> Row:
    """The row on a base with Liger's kernels for norms, rotary embeddings and gated MLPs, if it has any."""

    def put(model: "PreTrainedModel") -> Remove:
        from moka_pl.lm.kernels import fused_modules

        if not fused_modules(model):
            raise ConfigError("the base has none of Liger's kernels, which need a GPU and liger-kernel")
        return row.put(model)

    return Row(f"{row.name} + Liger", put, backbone={"kernels": "auto"})
