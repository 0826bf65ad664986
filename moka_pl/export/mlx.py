"""A LoRA as mlx-lm reads it: transposed factors, and a configuration of its own."""

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moka_pl.errors import AdapterError, ConfigError, one_line
from moka_pl.export.check import Measured, check, measured
from moka_pl.export.folder import marked, mebibytes, written_folder
from moka_pl.export.lora import LoraForm
from moka_pl.export.memory.shard import write_tensors
from moka_pl.export.merged import base_dtype, merged_parts, write_description, write_weights
from moka_pl.export.peft import lora_reference
from moka_pl.export.source import Source, say
from moka_pl.lm.experts import has_experts


def import_mlx() -> str:
    """Returns the reader's name and version.

    Raises:
        ConfigError: If mlx-lm is not installed.
    """
    try:
        import mlx.core  # noqa: F401
        import mlx_lm.utils  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--to mlx is read back by mlx-lm, which is not installed; pip install 'moka_pl[mlx]'"
        ) from error
    return f"mlx-lm {version('mlx-lm')}"


def within_block(name: str) -> str:
    """Returns a layer's name within its block, such as ``self_attn.q_proj``.

    Raises:
        ConfigError: If the layer is in no block: mlx-lm puts adapters into blocks alone.
    """
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        raise ConfigError(f"--to mlx writes layers of the model's blocks, not {name}; export --to merged")
    return ".".join(parts[number + 1 :])


def check_layers(names: Iterable[str]) -> None:
    """Refuses adapted layers that mlx-lm cannot adapt, with a ``ConfigError``."""
    for name in names:
        within_block(name)


def write_mlx(folder: Path, form: LoraForm, blocks: int, dtype: torch.dtype) -> None:
    """Writes ``lora_a = lora_Aᵀ`` (n, r) and ``lora_b = lora_Bᵀ`` (r, m) of every layer, and a scale of 1.

    Args:
        folder: An empty folder.
        form: The LoRA.
        blocks: Number of blocks of the model, all of which are adapted.
        dtype: Dtype of the tensors.
    """
    tensors = {}
    for name, (lora_a, lora_b) in form.factors.items():
        tensors[f"{name}.lora_a"] = lora_a.T.to(dtype).contiguous()  # (n, r)
        tensors[f"{name}.lora_b"] = lora_b.T.to(dtype).contiguous()  # (r, m)
    keys = sorted({within_block(name) for name in form.factors})
    config = {
        "fine_tune_type": "lora",
        "num_layers": blocks,
        "lora_parameters": {"rank": form.rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(folder / "adapters.safetensors", tensors, marked("mlx"))


def export_mlx(source: Source, out: Path, form: LoraForm, dtype: torch.dtype) -> None:
    """Writes the folder ``out``, and has mlx-lm compute with it on the same base.

    Args:
        source: The adapter in its model, which is without adapters afterwards.
        out: The folder to write.
        form: The adapter's LoRA.
        dtype: Dtype of its tensors.

    Raises:
        AdapterError: If mlx-lm cannot read it, or computes something else; nothing is written then.
        ConfigError: If ``out`` cannot be written.
    """
    reader, model = import_mlx(), source.model
    compute = base_dtype(merged_parts(model))
    expected, rounded = lora_reference(source, form, dtype, compute)
    with written_folder(out) as new:
        write_mlx(new, form, model.config.get_text_config().num_hidden_layers, dtype)
        base = new.parent / "base"  # removed with the folder of the unfinished export
        base.mkdir()
        write_weights(base, merged_parts(model), compute)
        write_description(base, model, source.tokenizer, compute)
        say(f"{reader} reads it back onto the same base ...")
        found, dtypes = measure_mlx(base, new, source.prompts), (dtype, compute, model.dtype)
        say(check(expected, found, reader, *dtypes, rounded=rounded, routed=has_experts(model)))
    say(f"{out}: rank {form.rank}, {mebibytes(out):.1f} MiB")


def measure_mlx(base: Path, adapter: Path, prompts: list[torch.Tensor]) -> Measured:
    """Runs mlx-lm's model on every prompt.

    Args:
        base: A transformers folder.
        adapter: The adapter's folder.
        prompts: Tokens of the prompts.

    Raises:
        AdapterError: If mlx-lm does not know the model, or its layers.
    """
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_adapters, load_model

    try:
        model: Any = load_adapters(load_model(base)[0], str(adapter))
    except (ValueError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"mlx-lm cannot read the adapter ({one_line(error)}), and nothing was written; export --to merged"
        ) from error
    model.eval()
    out = [model(mx.array(ids[None].numpy()))[0].astype(mx.float32) for ids in prompts]  # (T, V) each
    return measured([torch.from_numpy(np.array(logits)) for logits in out], prompts)
