"""Model folders and GGUF files of a tiny random LLaMA."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from moka_pl.backbone.random_weights import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, the default of this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOKA_PL_CACHE", str(folder))
    return folder


@pytest.fixture
def dense(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """The model that ``model_folder`` and ``gguf_file`` hold, in float32."""
    # One more token than the byte tokenizer knows: a GGUF file needs a merge.
    return make_llama(vocab_size=261, hidden_size=64, intermediate_size=192, num_hidden_layers=1)


@pytest.fixture
def model_folder(dense: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A local model folder with weights and tokenizer."""
    folder = tmp_path / "model"
    dense.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def gguf_file(dense: LlamaForCausalLM, tmp_path: Path) -> Path:
    """The same model as a float32 GGUF file."""
    import gguf

    file, config = tmp_path / "tiny.gguf", dense.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    ids = byte_tokenizer().get_vocab()
    tokens = [*sorted(ids, key=ids.__getitem__), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [1] * 257)  # 3 is a control token
    writer.add_token_merges(["a b", "a b"])  # transformers 5.14 to 5.17 cannot read a single one
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in dense.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = _interleaved(tensor, config.head_dim)
        writer.add_tensor(_gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """GGUF pairs neighbouring dimensions in rotary embeddings, transformers the halves of a head."""
    heads = weight.shape[0] // head_dim
    halves = weight.reshape(heads, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _gguf_name(name: str) -> str:
    for part, short in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "_proj": "",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "mlp.": "ffn_",
    }.items():
        name = name.replace(part, short)
    return name


@pytest.fixture
def ids() -> Tensor:
    """Two sequences of byte tokens, (2, 9)."""
    return torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(4))
