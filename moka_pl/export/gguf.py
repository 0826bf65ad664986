"""GGUF files, which llama.cpp and Ollama read: an adapter from its LoRA, or a merged model.

llama.cpp turns pairs (2i, 2i + 1) of a head's entries by RoPE where transformers turns (i, i + d/2): of LLaMA
architectures, the rows of q_proj and k_proj are put in that order, head by head.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from moka_pl.adapters.layer import MokaLayer
from moka_pl.adapters.vocabulary.embedding import MokaEmbedding
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.export.gguf_tokenizer import add_tokenizer, vocabulary_rows
from moka_pl.export.lora import LoraForm
from moka_pl.export.merged import BYTES_OF_TOKEN, Part, base_dtype, converted
from moka_pl.export.source import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GgufType = Literal["lora", "f32", "f16", "q8_0"]
"""What a GGUF file holds: a LoRA, or a merged model whose matrices are stored like that."""

#: transformers' model types whose layers llama.cpp computes as its architecture "llama".
_LLAMA = ("llama", "mistral")
_BLOCK = 32  # entries that share a scale in Q8_0


def import_gguf() -> Any:
    """Returns the ``gguf`` package.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(
            "--to gguf needs the gguf package: pip install 'moka_pl[demo]' (or gguf)"
        ) from error
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that is not made yet.

    Attributes:
        name: Its name in the file.
        shape: Its sizes, as of transformers.
        make: Makes it in float32, on the CPU, its rows in llama.cpp's order.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def check_architecture(model_type: str) -> None:
    """Refuses models that are not written here.

    Raises:
        ConfigError: Naming the way by llama.cpp's own converter.
    """
    if model_type not in _LLAMA:
        raise ConfigError(
            f"--to gguf writes models of {' and '.join(_LLAMA)}, not of model_type {model_type!r}; "
            "export --to merged or --to lora, and convert that by llama.cpp's convert_hf_to_gguf.py or "
            "convert_lora_to_gguf.py"
        )


def llama_rows(tensor: Tensor, heads: int) -> Tensor:
    """Puts the rows of every head, (i) and (i + d/2), in turn: the same shape, (heads · d, …)."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # (heads, 2, d/2, …)
    return halves.transpose(1, 2).reshape(tensor.shape)  # (heads · d, …)


class Names:
    """Names and orders of llama.cpp's tensors.

    Args:
        model: The model, of an architecture that :func:`check_architecture` passes.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        gguf, config = import_gguf(), model.config
        check_architecture(config.model_type)
        self._map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def name(self, name: str) -> str:
        """Returns llama.cpp's name of a tensor.

        Raises:
            AdapterError: If it has none.
        """
        found: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise AdapterError(f"llama.cpp has no tensor for {name}; export --to merged instead")
        return found

    def ordered(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a weight, bias or lora_B, shape (m, …), with its rows in llama.cpp's order."""
        heads = self._heads.get(name.split(".")[-2])
        return tensor if heads is None else llama_rows(tensor, heads)


def write_adapter(file: Path, model: "PreTrainedModel", form: LoraForm, dtype: torch.dtype) -> None:
    """Writes a LoRA for llama.cpp's ``--lora`` and Ollama's ``ADAPTER``; alpha is the rank: the scale is 1.

    Args:
        file: The file to write.
        model: The frozen base.
        form: The LoRA.
        dtype: Dtype of its tensors, float32 or float16.
    """
    gguf, names = import_gguf(), Names(model)
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(form.rank))
    check_adapter(model, {name: model.get_submodule(name) for name in form.factors})
    tensors = []
    for layer, (lora_a, lora_b) in form.factors.items():
        weight = f"{layer}.weight"
        name = names.name(weight)
        tensors.append(_made(f"{name}.lora_a", lora_a))
        tensors.append(_made(f"{name}.lora_b", names.ordered(weight, lora_b)))
    _write(writer, tensors, file, "f16" if dtype == torch.float16 else "f32")


def check_adapter(model: "PreTrainedModel", layers: Mapping[str, Any]) -> None:
    """Refuses adapted layers that a GGUF adapter cannot name; needs no weights.

    Args:
        model: The base, perhaps on the meta device.
        layers: Its adapted layers by name, or the frozen ones in their place.

    Raises:
        AdapterError: Naming the first of them.
        ConfigError: If the base is of another architecture.
    """
    names, embedding = Names(model), model.get_input_embeddings().weight
    for name, layer in layers.items():
        names.name(f"{name}.weight")
        if isinstance(layer, MokaEmbedding | nn.Embedding):
            raise AdapterError(
                f"--to gguf writes no LoRA of {name}, an embedding; merge it by another --gguf_type"
            )
        frozen = layer.base_layer if isinstance(layer, MokaLayer) else layer
        if frozen.weight is embedding:
            raise AdapterError(
                f"{name} shares its weight with the embedding, so that a GGUF LoRA cannot adapt it alone; "
                "merge it by another --gguf_type"
            )


def _made(name: str, tensor: Tensor) -> GgufTensor:
    return GgufTensor(name, tuple(tensor.shape), lambda: tensor.float())


def write_model(
    file: Path,
    model: "PreTrainedModel",
    parts: list[Part],
    kind: GgufType,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Writes a whole model, tensor by tensor.

    Raises what :func:`check_model` does.

    Args:
        file: The file to write.
        model: The model, for its sizes.
        parts: Its tensors.
        kind: How matrices are stored; vectors are float32.
        tokenizer: Its tokenizer; without one the file takes and gives token ids only.
    """
    writer, tensors = _planned(model, parts, kind, tokenizer)
    _write(writer, tensors, file, kind)


def check_model(
    model: "PreTrainedModel",
    parts: list[Part],
    kind: GgufType,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Refuses a model that :func:`write_model` could not write; needs no weights.

    Args:
        model: The model, perhaps on the meta device.
        parts: Its tensors.
        kind: How matrices are stored.
        tokenizer: Its tokenizer.

    Raises:
        ConfigError: If the tokenizer or the RoPE cannot be written so that llama.cpp computes the same.
        AdapterError: If llama.cpp has no name for a tensor.
    """
    _planned(model, parts, kind, tokenizer)


def base_type(parts: list[Part]) -> GgufType:
    """Returns how a base is stored for llama.cpp's check of its adapter."""
    return "f32" if base_dtype(parts) == torch.float32 else "f16"


def model_size(parts: list[Part], kind: GgufType, tokenizer: "PreTrainedTokenizerBase | None" = None) -> int:
    """Returns about how many bytes :func:`write_model` writes.

    Args:
        parts: The model's tensors.
        kind: How matrices are stored.
        tokenizer: The tokenizer, if it is written.
    """
    size = sum(_stored(part.shape, kind)[2] for part in parts)
    return size if tokenizer is None else size + BYTES_OF_TOKEN * len(tokenizer)


def _planned(
    model: "PreTrainedModel",
    parts: list[Part],
    kind: GgufType,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> tuple[Any, list[GgufTensor]]:
    """Returns a writer that knows all but the tensors, and these, which are not made yet."""
    gguf, names = import_gguf(), Names(model)
    writer = gguf.GGUFWriter(None, "llama")
    _add_sizes(writer, model, gguf.LlamaFileType[f"MOSTLY_{kind.upper()}" if kind != "f32" else "ALL_F32"])
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, model, tokenizer)
    tensors = [_part(part, names) for part in parts]
    if (factors := _rope_factors(model)) is not None:
        tensors.append(_made("rope_freqs.weight", factors))
    return writer, tensors


def _part(part: Part, names: Names) -> GgufTensor:
    return GgufTensor(
        names.name(part.name),
        part.shape,
        lambda: names.ordered(part.name, converted(part, torch.float32)),
    )


def _add_sizes(writer: Any, model: "PreTrainedModel", file_type: int) -> None:
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_vocab_size(vocabulary_rows(model))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)


def _rope_factors(model: "PreTrainedModel") -> Tensor | None:
    """What the plain RoPE frequencies of a head are divided by, shape (d/2,); None if by 1."""
    kind = model.config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"--to gguf cannot write the model's RoPE of type {kind!r}; export --to merged")
    # Computed anew: the model may be on the meta device.
    scaled = type(model.model.rotary_emb)(model.config).inv_freq.float()  # (d/2,)
    plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled)) / len(scaled))  # (d/2,)
    factors = plain / scaled  # (d/2,)
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


def _write(writer: Any, tensors: Iterable[GgufTensor], file: Path, kind: GgufType) -> None:
    """Writes metadata, then one tensor after another."""
    gguf, tensors = import_gguf(), list(tensors)
    for tensor in tensors:
        one, number, size = _stored(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, tensor.shape, number, size, raw_dtype=one)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for count, tensor in enumerate(tensors, 1):
            values = tensor.make().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(values, _stored(tensor.shape, kind)[0]))
            if count % 100 == 0:
                say(f"wrote {count} of {len(tensors)} tensors")
    finally:
        writer.close()


def read_back(tensor: Tensor, kind: GgufType) -> Tensor:
    """Returns what a file holds of a tensor, in float32; its rows may be in any order."""
    gguf, one = import_gguf(), _stored(tuple(tensor.shape), kind)[0]
    values = gguf.quants.quantize(tensor.float().cpu().contiguous().numpy(), one)
    return torch.from_numpy(gguf.quants.dequantize(values, one).copy()).reshape(tensor.shape)


def _stored(shape: tuple[int, ...], kind: GgufType) -> tuple[Any, Any, int]:
    """How a tensor is stored: its type, its dtype before that, and its bytes."""
    import numpy as np

    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    fits = kind != "q8_0" or shape[-1] % _BLOCK == 0
    one = types.F32 if len(shape) < 2 or kind == "f32" else types[kind.upper()] if fits else types.F16
    block, bytes_of_block = gguf.GGML_QUANT_SIZES[one]
    count = int(np.prod(shape))
    return one, np.dtype(np.float16 if one == types.F16 else np.float32), count // block * bytes_of_block
