"""One function for each format: what is checked before anything is loaded, then the export."""

from pathlib import Path

import torch

from moka_pl.adapters import read_adapter
from moka_pl.adapters.reading import read_adapter_state
from moka_pl.export.lora import check_rank, lora_form, stored_rank
from moka_pl.export.peft import export_lora, import_peft
from moka_pl.export.source import open_source, say


def run_lora(
    adapter: Path,
    out: Path,
    base: str | None,
    dtype: str,
    rank: int | None,
    energy: float | None,
    max_rank: int,
    prompts: Path | None,
) -> None:
    """Exports a PEFT directory.

    Args:
        adapter: The adapter directory.
        out: The folder to write.
        base: Name or folder of the base; None is the stored one.
        dtype: Dtype of the tensors.
        rank: Rank to truncate to.
        energy: Share of the squared norm that every layer is to keep.
        max_rank: Largest rank.
        prompts: A text file with a prompt a line.
    """
    import_peft()
    info = read_adapter(adapter)
    most = max(info.exact_lora_rank, default=None)
    known = stored_rank(read_adapter_state(adapter), most)
    if known:
        say(f"{adapter} is exactly a LoRA of rank {known}")
        check_rank(known, rank, energy, max_rank)
    source = open_source(adapter, base, prompts)
    form = lora_form(source.moka_layers(), rank, energy, max_rank)
    export_lora(source, out, form, getattr(torch, dtype))
