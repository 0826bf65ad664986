"""``moka-pl export``: a trained adapter in the formats of other tools."""

from pathlib import Path
from typing import Literal, get_args

from moka_pl.errors import ConfigError

Target = Literal["lora"]
Dtype = Literal["float32", "bfloat16", "float16"]


def export(
    adapter: Path,
    to: Target | None = None,
    out: Path | None = None,
    base: str | None = None,
    dtype: Dtype | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = 512,
    prompts: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter in another tool's format, read back by that tool and compared.

    Args:
        adapter: An adapter directory.
        to: lora: a PEFT directory, which vLLM, SGLang and llama.cpp's converter read, too.
        out: The folder to write. Default: beside the adapter, ADAPTER-lora and so on.
        base: Name or path of the base model. Default: the one stored with the adapter.
        dtype: Dtype of the written tensors. Default: float32.
        rank: Truncate the LoRA to this rank, by singular values.
        energy: Truncate it to the lowest rank with which every layer keeps this share of its update's squared
            Frobenius norm, such as 0.99.
        max_rank: Refuse a LoRA of a higher rank; vLLM takes up to 512.
        prompts: A text file with a prompt a line, on which both are compared. Default: eight samples.
        overwrite: Replace an older export in the output folder.
    """
    if to is None:
        raise ConfigError(f"give a format: --to {', '.join(get_args(Target))}")
    if max_rank < 1:
        raise ConfigError(f"max_rank must be at least 1, not {max_rank}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy < 1:
        raise ConfigError(f"energy must be between 0 and 1, not {energy}")
    if rank is not None and energy is not None:
        raise ConfigError("rank and energy exclude each other; give one of them")
    from moka_pl.export.folder import check_output
    from moka_pl.export.run import run_lora

    out = out or adapter.with_name(f"{adapter.name}-{to}")
    check_output(out, adapter, overwrite)
    run_lora(adapter, out, base, dtype or "float32", rank, energy, max_rank, prompts)
