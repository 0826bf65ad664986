"""Exports GGUF files, computed with by llama.cpp where it is installed, else read back."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moka_pl.backbone.loading import cache_root, loading, progress_bars
from moka_pl.backbone.smollm2 import SHORT_NAME, bundled_gguf
from moka_pl.errors import AdapterError
from moka_pl.export import llama_cpp
from moka_pl.export.check import Measured, check, measure
from moka_pl.export.folder import mebibytes, written_folder
from moka_pl.export.gguf import GgufType, Names, base_type, import_gguf, read_back, write_adapter, write_model
from moka_pl.export.llama_cpp import LlamaCpp, greedy
from moka_pl.export.lora import LoraForm, lora_applied
from moka_pl.export.merged import merged_parts
from moka_pl.export.modelfile import modelfile
from moka_pl.export.peft import lora_reference
from moka_pl.export.rounding import round_weights, rounds_alone
from moka_pl.export.source import Source, say
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "adapter.gguf"
#: What decides on the bounds.
_AS_DTYPE = {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.int8}
#: Prompts that are continued greedily.
_CONTINUED = 2


def export_model(source: Source, out: Path, kind: GgufType) -> None:
    """Writes the merged model as a GGUF file with a Modelfile, and compares what its reader computes.

    Args:
        source: The adapter in its model.
        out: The folder to write.
        kind: How matrices are stored.

    Raises:
        AdapterError: If the reader computes something else; nothing is written then.
        ConfigError: If the tokenizer or the model cannot be written, or ``out`` cannot.
    """
    name, dtypes = f"model-{kind}.gguf", (_AS_DTYPE[kind], source.model.dtype)
    with written_folder(out) as new:
        write_model(new / name, source.model, merged_parts(source.model), kind, source.tokenizer)
        prompt = source.info.extra.get("prompt")
        text = modelfile(f"./{name}", None, source.tokenizer, prompt)
        (new / "Modelfile").write_text(text, encoding="utf-8")
        if reader := llama_cpp.version():
            say(f"{reader} reads it back ...")
            engine = LlamaCpp(new / name)
            _check_tokens(engine, source)
            # It rounds what half-precision and 8-bit weights multiply, too: what the weights' rounding makes
            # is not all.
            say(check(source.expected, engine.measure(source.prompts), reader, *dtypes))
            _say_greedy(engine, source.model, source.prompts)
            del engine
        else:
            found, reader = _by_transformers(new / name, source)
            rounded = None
            if rounds_alone(*dtypes):
                round_weights(source.model, partial(read_back, kind=kind))
                rounded = measure(source.model, source.prompts)
            say(check(source.expected, found, reader, *dtypes, rounded=rounded))
            say("llama-cpp-python is not installed: the file's tokenizer was not compared")
    _say_size(out)


def export_adapter(source: Source, out: Path, form: LoraForm, dtype: torch.dtype) -> None:
    """Writes the adapter as a GGUF file with a Modelfile, and has llama.cpp compute with it.

    Args:
        source: The adapter in its model, which is without adapters afterwards.
        out: The folder to write.
        form: The adapter's LoRA.
        dtype: Dtype of its tensors.

    Raises:
        AdapterError: If llama.cpp computes something else; nothing is written then.
        ConfigError: If ``out`` cannot be written.
    """
    # llama.cpp rounds what it multiplies by half-precision factors, too.
    (expected, _), model = lora_reference(source, form, dtype, dtype), source.model
    with written_folder(out) as new:
        write_adapter(new / _ADAPTER, model, form, dtype)
        prompt = source.info.extra.get("prompt")
        text = modelfile(_base_file(source), f"./{_ADAPTER}", source.tokenizer, prompt)
        (new / "Modelfile").write_text(text, encoding="utf-8")
        if reader := llama_cpp.version():
            say(f"{reader} reads it back onto the same base ...")
            parts = merged_parts(model)
            kind = base_type(parts)
            base = new.parent / "base.gguf"  # removed with the folder of the unfinished export
            write_model(base, model, parts, kind)
            engine = LlamaCpp(base, new / _ADAPTER)
            dtypes = (dtype, _AS_DTYPE[kind], model.dtype)
            say(check(expected, engine.measure(source.prompts), reader, *dtypes))
            with lora_applied(model, form):
                _say_greedy(engine, model, source.prompts)
            del engine
        else:
            _read_back(new / _ADAPTER, model, form, dtype)
            say("llama-cpp-python is not installed: the file was read back by gguf, and not computed with")
    _say_size(out)


def _base_file(source: Source) -> str:
    """The GGUF file of the base if it is one, else its name, for which Ollama may have another."""
    name = source.asked_name
    if name == SHORT_NAME:
        return str(bundled_gguf(cache_root()))
    return str(expanded(name).resolve()) if name.endswith(".gguf") else source.base_name


def _check_tokens(engine: LlamaCpp, source: Source) -> None:
    texts = [source.tokenizer.decode(ids) for ids in source.prompts]
    if (text := engine.other_tokens(source.tokenizer, texts)) is not None:
        raise AdapterError(
            f"llama.cpp reads {text!r} into other tokens than the tokenizer; nothing was written. Export "
            "--to merged"
        )


def _say_greedy(engine: LlamaCpp, model: "PreTrainedModel", prompts: list[Tensor]) -> None:
    pairs = [(greedy(model, ids), engine.greedy(ids)) for ids in prompts[:_CONTINUED]]
    alike = sum(one == other for ours, theirs in pairs for one, other in zip(ours, theirs, strict=True))
    say(f"greedy tokens: {alike} of {sum(len(ours) for ours, _ in pairs)} alike")


def _by_transformers(file: Path, source: Source) -> tuple[Measured, str]:
    import transformers

    with progress_bars(show=False), loading(str(file)):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=source.model.dtype
        )
    found = measure(model.eval().to(source.model.device), source.prompts)
    return found, f"transformers {transformers.__version__}"


def _read_back(file: Path, model: "PreTrainedModel", form: LoraForm, dtype: torch.dtype) -> None:
    """Compares the file's tensors with the LoRA's, bit for bit."""
    reader, names = import_gguf().GGUFReader(file), Names(model)
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    for layer, (lora_a, lora_b) in form.factors.items():
        weight = f"{layer}.weight"
        name = names.name(weight)
        pairs = ((f"{name}.lora_a", lora_a), (f"{name}.lora_b", names.ordered(weight, lora_b)))
        if any(not torch.equal(found.pop(one), tensor.to(dtype)) for one, tensor in pairs):
            raise AdapterError(
                f"{file.name} holds other numbers of {layer} than the adapter; export it again"
            )


def _say_size(out: Path) -> None:
    names = ", ".join(sorted(file.name for file in out.iterdir()))
    say(f"{out}: {names}, {mebibytes(out):,.1f} MiB")
