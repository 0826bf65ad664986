"""One function for each format: what can be refused before anything is loaded, then the export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moka_pl.adapters import AdapterInfo, MokaConfig, moka_layers, read_adapter
from moka_pl.adapters.reading import read_adapter_state
from moka_pl.backbone.quantization import quantization_of
from moka_pl.errors import ConfigError
from moka_pl.export import llama_cpp
from moka_pl.export.folder import check_space
from moka_pl.export.gguf import GgufType, base_type, check_adapter, check_model, import_gguf, model_size
from moka_pl.export.lora import LoraForm, check_rank, lora_form, stored_rank
from moka_pl.export.memory.on_disk import put_on_disk
from moka_pl.export.merged import base_dtype, export_merged, folder_size, merged_parts
from moka_pl.export.mlx import check_layers, export_mlx, import_mlx
from moka_pl.export.peft import export_lora, import_peft
from moka_pl.export.source import (
    Source,
    check_no_experts,
    check_original,
    onto_original,
    open_source,
    say,
    stored_quantised,
)
from moka_pl.export.to_gguf import export_adapter, export_model
from moka_pl.inference import Preview
from moka_pl.utils import existing_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    dtype = request.torch_dtype(torch.bfloat16)

    def size(preview: Preview) -> int:
        return folder_size(merged_parts(preview.model), dtype, preview.tokenizer)

    export_merged(_opened(request, size), request.out, dtype)


def run_lora(request: Request) -> None:
    """Exports a PEFT directory."""
    import_peft()
    source, form = _with_lora(request)
    export_lora(source, request.out, form, request.torch_dtype(torch.float32))


def run_gguf(request: Request) -> None:
    """Exports a GGUF file: the adapter, or with another ``gguf_type`` the merged model."""
    import_gguf()
    kind = request.gguf_type

    def size(preview: Preview) -> int:
        parts = merged_parts(preview.model)
        check_model(preview.model, parts, kind, preview.tokenizer)
        return model_size(parts, kind, preview.tokenizer)

    def takes_lora(preview: Preview) -> int:
        check_adapter(preview.model, moka_layers(preview.model, shared=True))
        if not llama_cpp.version():
            return 0
        parts = merged_parts(preview.model)  # of the base, which is written, too
        check_model(preview.model, parts, "f32")
        return model_size(parts, base_type(parts))

    if kind == "lora":
        source, form = _with_lora(request, takes_lora)
        export_adapter(source, request.out, form, request.torch_dtype(torch.float32))
    else:
        export_model(_opened(request, size), request.out, kind)


def run_mlx(request: Request) -> None:
    """Exports an adapter of mlx-lm's."""
    import_mlx()

    def takes_lora(preview: Preview) -> int:
        check_layers(moka_layers(preview.model))
        parts = merged_parts(preview.model)  # of the base, which is written, too
        return folder_size(parts, base_dtype(parts), preview.tokenizer)

    source, form = _with_lora(request, takes_lora)
    export_mlx(source, request.out, form, request.torch_dtype(torch.float32))


FORMATS: dict[str, Callable[[Request], None]] = {
    "merged": run_merged,
    "lora": run_lora,
    "gguf": run_gguf,
    "mlx": run_mlx,
}


def _opened(request: Request, size: Callable[[Preview], int]) -> Source:
    """Loads the adapter on the weights that it is to be merged into.

    Args:
        request: What is to be exported.
        size: Refuses what the format cannot hold, and returns the bytes that it writes.
    """
    info = read_adapter(request.adapter)

    def look(preview: Preview) -> int:
        if request.original and preview.quantised:
            raise stored_quantised(request.base or info.base.name)
        return size(preview)

    if request.original:
        check_original(info)
    source = _lightly(request, look)
    if not request.original:
        return source
    trained = source.expected.loss
    source = onto_original(request.adapter, source, request.base)
    say(f"loss {trained:.5f} on the weights of training, {source.expected.loss:.5f} on the original ones")
    return source


def _lightly(request: Request, size: Callable[[Preview], int]) -> Source:
    """Loads the adapter with as little memory as there is to a quantised base.

    Args:
        request: What is to be exported.
        size: Refuses what cannot be written, and returns the bytes that are.
    """
    written = 0

    def look(preview: Preview) -> None:
        nonlocal written
        written = size(preview)
        check_space(request.out, written)

    def lighten(model: "PreTrainedModel") -> None:
        if quantization_of(model)[0] != "none":
            put_on_disk(model, existing_folder(request.out.absolute().parent), written)

    return open_source(request.adapter, request.base, request.prompts, look, lighten)


def _with_lora(
    request: Request, before: Callable[[Preview], int] = lambda preview: 0
) -> tuple[Source, LoraForm]:
    """Writes the adapter as a LoRA, which takes no weights of its base, then loads it.

    Args:
        request: What is to be exported.
        before: Refuses what the format cannot hold, and returns the bytes that it writes beside the LoRA.
    """
    info = read_adapter(request.adapter)
    known = _stored_rank(request, info)
    forms: list[LoraForm] = []

    def look(preview: Preview) -> int:
        beside = before(preview)
        layers = moka_layers(preview.model, shared=True)
        check_no_experts(preview.model, layers)
        form = lora_form(layers, request.rank, request.energy, request.max_rank)
        forms.append(form)
        return form.size(request.torch_dtype(torch.float32)) + beside

    source = _lightly(request, look)
    if not known:
        say(f"{request.adapter} is exactly a LoRA of rank {forms[0].needed}")
    return source, forms[0]


def _stored_rank(request: Request, info: AdapterInfo) -> int | None:
    """Says the LoRA's rank where the adapter directory alone tells it, and refuses what does not go with it.

    Raises:
        ConfigError: If the adapter is not of MoKA, or needs another rank.
    """
    if not isinstance(info.config, MokaConfig):
        raise ConfigError(
            "only MoKA adapters are written as a LoRA; PEFT reads the folders of its own methods, and "
            "any method can be exported --to merged"
        )
    if info.config.trainable_token_indices:
        raise ConfigError(
            f"{request.adapter} has rows of {len(info.config.trainable_token_indices)} tokens, which a LoRA "
            "does not hold; export --to merged, or --to gguf with another --gguf_type than lora (PEFT reads "
            "such rows in a LoRA, but vLLM and llama.cpp refuse them)"
        )
    if info.config.modules_to_save:
        raise ConfigError(
            f"{request.adapter} trained {', '.join(info.config.modules_to_save)} as a whole "
            "(modules_to_save), which is no LoRA; export it --to merged"
        )
    most = max(info.exact_lora_rank, default=None)
    known = stored_rank(read_adapter_state(request.adapter), most)
    if known:
        say(f"{request.adapter} is exactly a LoRA of rank {known}")
        check_rank(known, request.rank, request.energy, request.max_rank)
    return known
