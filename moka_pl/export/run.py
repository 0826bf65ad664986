"""One function for each format: what can be refused before anything is loaded, then the export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moka_pl.adapters import read_adapter
from moka_pl.adapters.reading import read_adapter_state
from moka_pl.export.gguf import GgufType, import_gguf
from moka_pl.export.lora import LoraForm, check_rank, lora_form, stored_rank
from moka_pl.export.merged import export_merged
from moka_pl.export.peft import export_lora, import_peft
from moka_pl.export.source import Source, onto_original, open_source, say
from moka_pl.export.to_gguf import export_adapter, export_model


@dataclass(frozen=True)
class Request:
    """What is to be exported.

    Attributes:
        adapter: The adapter directory.
        out: The folder to write.
        dtype: Dtype of the written tensors; None takes the format's own.
        base: Name or folder of the base; None is the stored one.
        original: Whether to merge into the unquantised weights of the base.
        rank: Rank to truncate the LoRA to; None for none.
        energy: Share of the squared norm of its update that every layer is to keep; None for all.
        max_rank: Largest rank of a LoRA.
        prompts: A text file with a prompt a line; None takes the package's own.
        gguf_type: What a GGUF file is to hold.
    """

    adapter: Path
    out: Path
    dtype: str | None = None
    base: str | None = None
    original: bool = False
    rank: int | None = None
    energy: float | None = None
    max_rank: int = 512
    prompts: Path | None = None
    gguf_type: GgufType = "lora"

    def torch_dtype(self, usual: torch.dtype) -> torch.dtype:
        """Returns the dtype that was asked for, or the format's own."""
        dtype: torch.dtype = getattr(torch, self.dtype) if self.dtype else usual
        return dtype


def run_merged(request: Request) -> None:
    """Exports a merged transformers folder."""
    source = _opened(request)
    export_merged(source, request.out, request.torch_dtype(torch.bfloat16))


def run_lora(request: Request) -> None:
    """Exports a PEFT directory."""
    import_peft()
    source, form = _with_lora(request)
    export_lora(source, request.out, form, request.torch_dtype(torch.float32))


def run_gguf(request: Request) -> None:
    """Exports a GGUF file: the adapter, or with another ``gguf_type`` the merged model."""
    import_gguf()
    if request.gguf_type == "lora":
        source, form = _with_lora(request)
        export_adapter(source, request.out, form, request.torch_dtype(torch.float32))
    else:
        export_model(_opened(request), request.out, request.gguf_type)


FORMATS: dict[str, Callable[[Request], None]] = {"merged": run_merged, "lora": run_lora, "gguf": run_gguf}


def _opened(request: Request) -> Source:
    """Loads the adapter on the weights that it is to be merged into."""
    source = open_source(request.adapter, request.base, request.prompts)
    if not request.original:
        return source
    trained = source.expected.loss
    source = onto_original(request.adapter, source, request.base)
    say(f"loss {trained:.5f} on the weights of training, {source.expected.loss:.5f} on the original ones")
    return source


def _with_lora(request: Request) -> tuple[Source, LoraForm]:
    """Loads the adapter and writes it as a LoRA; says the rank first, and refuses one before loading."""
    info = read_adapter(request.adapter)
    most = max(info.exact_lora_rank, default=None)
    known = stored_rank(read_adapter_state(request.adapter), most)
    if known:
        say(f"{request.adapter} is exactly a LoRA of rank {known}")
        check_rank(known, request.rank, request.energy, request.max_rank)
    source = open_source(request.adapter, request.base, request.prompts)
    form = lora_form(source.moka_layers(), request.rank, request.energy, request.max_rank)
    if not known:
        say(f"{request.adapter} is exactly a LoRA of rank {form.needed}")
    return source, form
