"""``moka-pl export``: a trained adapter in the formats of other tools."""

from pathlib import Path
from typing import Literal, get_args

from moka_pl.errors import ConfigError

Target = Literal["merged", "lora", "gguf", "mlx"]
Dtype = Literal["float32", "bfloat16", "float16"]
GgufType = Literal["lora", "f32", "f16", "q8_0"]
Onto = Literal["dequantised", "original"]


def export(
    adapter: Path,
    to: Target | None = None,
    out: Path | None = None,
    base: str | None = None,
    dtype: Dtype | None = None,
    onto: Onto = "dequantised",
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = 512,
    gguf_type: GgufType = "lora",
    prompts: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter in another tool's format, read back by that tool and compared.

    Args:
        adapter: An adapter directory.
        to: merged: a plain transformers folder. lora: a PEFT directory, which vLLM, SGLang and llama.cpp's
            converter also read. gguf: a file for llama.cpp and Ollama, with a Modelfile. mlx: an adapter for
            mlx-lm.
        out: The folder to write. Default: beside the adapter, ADAPTER-merged and so on.
        base: Name or path of the base model. Default: the one stored with the adapter.
        dtype: Dtype of the written tensors. Default: bfloat16 for merged, else float32.
        onto: The weights to merge into: dequantised (as in training), or the base's original ones, which give
            a slightly different model; both losses are printed.
        rank: Truncate the LoRA to this rank, by singular values.
        energy: Truncate it to the lowest rank at which every layer keeps this share of its update's squared
            Frobenius norm, such as 0.99.
        max_rank: Refuse a LoRA of a higher rank; vLLM takes up to 512.
        gguf_type: What the GGUF file holds: the adapter as a LoRA, or the merged model with its matrices
            stored as f32, f16 or q8_0.
        prompts: A text file with one prompt per line, to compare adapter and export. Default: eight samples.
            An adapter of an image classifier is compared on images, and exports to merged and lora only.
        overwrite: Replace an older export in the output folder.
    """
    if to is None:
        raise ConfigError(f"give a format: --to {', '.join(get_args(Target))}")
    merged = to == "merged" or (to == "gguf" and gguf_type != "lora")
    if to != "gguf" and gguf_type != "lora":
        raise ConfigError(f"--gguf_type {gguf_type} is for --to gguf, not for --to {to}")
    if to == "gguf" and (dtype == "bfloat16" or (dtype and merged)):
        raise ConfigError(
            f"--dtype {dtype} is not for a GGUF file; for a model give --gguf_type, for a LoRA float32 "
            "or float16"
        )
    if merged and (rank is not None or energy is not None):
        raise ConfigError("rank and energy truncate a LoRA, and a merged model has none; leave them out")
    if not merged and onto != "dequantised":
        raise ConfigError(f"--onto {onto} is for merged models; a LoRA lies beside the base's weights")
    if max_rank < 1:
        raise ConfigError(f"max_rank must be at least 1, not {max_rank}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy < 1:
        raise ConfigError(f"energy must be between 0 and 1, not {energy}")
    if rank is not None and energy is not None:
        raise ConfigError("rank and energy exclude each other; give one of them")
    from moka_pl.adapters import read_adapter
    from moka_pl.export.folder import check_output
    from moka_pl.export.memory.allocator import return_freed_memory
    from moka_pl.export.run import FORMATS, Request

    out = out or _beside(adapter, to)
    info = read_adapter(adapter)
    check_output(out, adapter, overwrite, base or info.base.name)
    original = onto == "original"
    request = Request(adapter, out, dtype, base, original, rank, energy, max_rank, prompts, gguf_type)
    if info.labels:
        from moka_pl.vision.export import export_images

        export_images(request, to)
        return
    return_freed_memory()  # the process is the command's own
    FORMATS[to](request)


def _beside(adapter: Path, to: Target) -> Path:
    """The folder beside an adapter's; that of one on the hub is here, under its name without the owner."""
    from moka_pl.adapters.pretrained.hub import is_hub_id

    if is_hub_id(adapter.as_posix()):
        return Path(f"{adapter.name}-{to}")
    folder = adapter.resolve() if adapter.name in ("", "..") else adapter
    return folder.with_name(f"{folder.name}-{to}")
