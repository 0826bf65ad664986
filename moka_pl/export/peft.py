"""A LoRA as a PEFT directory, which PEFT, vLLM, SGLang and llama.cpp's converter read."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moka_pl.adapters import unload
from moka_pl.backbone.linear_layers import conv1d_names
from moka_pl.backbone.quantization import import_quantiser
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.export.check import Measured, check, measure
from moka_pl.export.folder import marked, mebibytes, written_folder
from moka_pl.export.lora import LoraForm, lora_applied
from moka_pl.export.memory.shard import write_tensors
from moka_pl.export.rounding import rounds_alone
from moka_pl.export.source import Source, say
from moka_pl.lm.experts import has_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The values that vLLM takes for ``--max-lora-rank``.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def import_peft() -> str:
    """Returns PEFT's name and version.

    Raises:
        ConfigError: If it is not installed.
    """
    import_quantiser("nf4")  # which PEFT would import in its own way
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "--to lora is read back by PEFT, which is not installed; pip install 'moka_pl[peft]'"
        ) from error
    return f"PEFT {peft.__version__}"


def export_lora(source: Source, out: Path, form: LoraForm, dtype: torch.dtype) -> None:
    """Writes the PEFT directory ``out``, reads it back by PEFT onto the same base and compares both.

    Args:
        source: The adapter in its model, which is without adapters afterwards.
        out: The folder to write.
        form: The adapter's LoRA.
        dtype: Dtype of its tensors.

    Raises:
        AdapterError: If PEFT computes something else than the adapter; nothing is written then.
        ConfigError: If ``out`` cannot be written.
    """
    reader = import_peft()
    expected, rounded = lora_reference(source, form, dtype)
    with written_folder(out) as new:
        write_peft(new, form, source.model, source.base_name, source.revision, dtype)
        say(f"{reader} reads it back ...")
        served = read_peft(source.model, new)
        _check_layers(served, form, reader)
        found, dtypes = measure(served, source.prompts), (dtype, source.model.dtype)
        routed = has_experts(source.model)
        say(check(expected, found, reader, *dtypes, rounded=rounded, routed=routed))
    say(f"{out}: rank {form.rank}, {mebibytes(out):.1f} MiB; {_vllm(form.rank)}")


def lora_reference(
    source: Source, form: LoraForm, dtype: torch.dtype, *compute: torch.dtype
) -> tuple[Measured, Measured | None]:
    """Takes the adapter out; returns what its LoRA is to compute, and what its tensors in a dtype are to.

    The first is the adapter's own if the LoRA is exact. To that the second adds the errors of rounding; it is
    None where rounding is not all that tells the two apart.

    Args:
        source: The adapter in its model, which is the frozen base afterwards.
        form: Its LoRA; if that is truncated, the loss before and after is printed.
        dtype: Dtype of the exported tensors.
        *compute: In what the reader computes, and further roundings of its.
    """
    model, written, rounded = source.model, form.rounded(dtype), None
    known = rounds_alone(dtype, model.dtype, *compute)
    if known and not form.lost:
        with lora_applied(model, written), lora_applied(model, form.negative()):
            rounded = measure(model, source.prompts)
    unload(model)
    if not form.lost:
        return source.expected, rounded
    with lora_applied(model, form):
        cut = measure(model, source.prompts)
    if known:
        with lora_applied(model, written):
            rounded = measure(model, source.prompts)
    say(f"rank {form.rank} of {form.needed}; share of the update's energy lost, by layer:")
    for name, lost in form.lost.items():
        say(f"  {name:<44} {lost:.3%}")
    say(f"loss {source.expected.loss:.5f} before, {cut.loss:.5f} truncated")
    return cut, rounded


def read_peft(model: "PreTrainedModel", folder: Path) -> Any:
    """Loads a PEFT directory onto a plain base, as its users do."""
    from peft import PeftModel

    with warnings.catch_warnings():  # of transformers' to PEFT
        warnings.simplefilter("ignore", FutureWarning)
        # Of tied weights of which each has its own update: that is what was trained.
        warnings.filterwarnings("ignore", ".*tie_word_embeddings=True.*")
        return PeftModel.from_pretrained(model, str(folder)).eval()


def _check_layers(served: nn.Module, form: LoraForm, reader: str) -> None:
    """Refuses an adapter whose layers PEFT takes for fused experts, by their last names."""
    read = {name for name, _ in served.named_parameters() if ".lora_" in name}
    for name in form.factors:
        ends = ("lora_A.default.weight", "lora_embedding_A.default")
        if not read & {f"base_model.model.{name}.{end}" for end in ends}:
            raise AdapterError(
                f"{reader} does not adapt {name} of this model, but its fused experts; nothing was written. "
                "Train without it (exclude_modules), or export --to merged"
            )


def _vllm(rank: int) -> str:
    """What vLLM has to be told."""
    step = next((step for step in _VLLM_RANKS if step >= rank), None)
    return f"vLLM: --max-lora-rank {step}" if step else f"vLLM takes ranks up to {_VLLM_RANKS[-1]}"


def write_peft(
    folder: Path,
    form: LoraForm,
    model: nn.Module,
    base: str,
    revision: str | None,
    dtype: torch.dtype,
    whole: Mapping[str, nn.Linear] | None = None,
) -> None:
    """Writes a PEFT directory that all readers of such directories understand alike.

    ``lora_alpha`` is r, so that every reader's scale is 1; there is no rsLoRA, DoRA, bias or pattern.

    Args:
        folder: An empty folder.
        form: The LoRA.
        model: The frozen base, for the names of its layers.
        base: Its name or folder.
        revision: Its revision on the hub.
        dtype: Dtype of the tensors.
        whole: Layers that are stored as a whole, by name; image classifiers alone have such.
    """
    config = {
        "peft_type": "LORA",
        "task_type": None if whole else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": form.rank,
        "lora_alpha": form.rank,
        "lora_dropout": 0.0,
        "target_modules": target_modules(model, list(form.factors)),
        "bias": "none",
        "fan_in_fan_out": set(form.factors) <= set(conv1d_names(model)),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": list(whole) if whole else None,
    }
    tensors = {
        f"base_model.model.{name}.{key}": tensor.detach().to(dtype).contiguous()
        for name, layer in (whole or {}).items()
        for key, tensor in layer.named_parameters()
    }
    for name, (lora_a, lora_b) in form.factors.items():
        layer = f"base_model.model.{name}"
        if isinstance(model.get_submodule(name), nn.Embedding):  # which PEFT takes for a linear map of V to d
            tensors[f"{layer}.lora_embedding_A"] = lora_b.T.to(dtype).contiguous()  # (r, V)
            tensors[f"{layer}.lora_embedding_B"] = lora_a.T.to(dtype).contiguous()  # (d, r)
            continue
        tensors[f"{layer}.lora_A.weight"] = lora_a.to(dtype).contiguous()  # (r, n)
        tensors[f"{layer}.lora_B.weight"] = lora_b.to(dtype).contiguous()  # (m, r)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(folder / "adapter_model.safetensors", tensors, marked("pt"))


def target_modules(model: nn.Module, layers: list[str]) -> list[str]:
    """Returns the last parts of the layers' names, or the whole names where other layers end alike."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    alike = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and name.rpartition(".")[2] in ends
    }
    return ends if alike == set(layers) else layers
