"""The rows of the benchmark: what is put into the frozen model, and how it is taken out again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moka_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Remove = Callable[[], None]
Put = Callable[["PreTrainedModel"], Remove]

FROZEN = "frozen base"
QV = ["q_proj", "v_proj"]
#: The usual target modules of QLoRA without the output projections.
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

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
    """

    name: str
    put: Put
    spoils: bool = False
    captured: bool = False


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


def lora(name: str, rank: int, modules: list[str] | str, **options: Any) -> Row:
    """PEFT's LoRA, or a variant of it that ``options`` choose."""
    return _peft(name, "LoraConfig", r=rank, lora_alpha=2 * rank, target_modules=modules, **options)


def lokr(name: str, rank: int, modules: list[str]) -> Row:
    """PEFT's LoKr."""
    return _peft(name, "LoKrConfig", r=rank, alpha=rank, target_modules=modules)


def step_rows(device: str) -> list[Row]:
    """The rows of the table; the frozen base comes again at the end, to show how the machine drifted."""
    backends = ["structured", "dense", *(["fused"] if device == "cuda" else [])]
    captured = [captured_row(moka("MoKA r10")), captured_row(lora("LoRA r8 q,v", 8, QV))]
    return [
        frozen(),
        moka("MoKA r10"),
        *(moka(f"MoKA r10 {backend}", backend=backend) for backend in backends),
        moka("MoKA r1", components=1),
        moka("MoKA r20", components=20),
        moka("MoKA_s r10", filters="prime"),
        moka("MoKA r2 all linear", components=2, target_modules="all-linear"),
        lora("LoRA r8 q,v", 8, QV),
        lora("LoRA r2 all linear", 2, "all-linear"),
        lora("LoRA r64 q,v", 64, QV),
        lora("LoRA r32 q,k,v,up,down", 32, FIVE),
        lora("DoRA r64 q,v", 64, QV, use_dora=True),
        lokr("LoKr r64 q,v", 64, QV),
        *(captured if device == "cuda" else []),
        frozen(f"{FROZEN} (again)"),
    ]


def captured_row(row: Row) -> Row:
    """The same with its step replayed as a CUDA graph."""
    return replace(row, name=f"{row.name}, CUDA graph", captured=True)


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
            raise ConfigError("PEFT is not installed; pip install 'moka_pl[bench]'") from error
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
