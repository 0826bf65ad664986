"""Tokenizers that transformers reads otherwise than the GGUF file has them."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.gguf_tokenizer import read_metadata, read_tokenizer

_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# llama.cpp writes the token ▁▁ as two spaces.
_USER_DEFINED = ["\n\n", "  "]
_NORMAL = ["▁", "a", "b", "c", "bc", "ab", "cab", "▁ab", "\n", "<"]
_NAMES = {
    "embed_tokens": "token_embd",
    "layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "model.": "",
}


@pytest.fixture
def gemma() -> Gemma3ForCausalLM:
    """A tiny random Gemma 3."""
    torch.manual_seed(0)
    tokens = len(_SPECIAL + _BYTES + _USER_DEFINED + _NORMAL)
    config = Gemma3TextConfig(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        sliding_window=32,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = Gemma3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def gemma_file(gemma: Gemma3ForCausalLM, tmp_path: Path) -> Path:
    """It as a GGUF file."""
    file, config = tmp_path / "gemma.gguf", gemma.config
    writer = GGUFWriter(file, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(1000000.0)
    tokens = _SPECIAL + _BYTES + _USER_DEFINED + _NORMAL
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(len(tokens))])
    writer.add_token_types([3] * 4 + [6] * 256 + [4] * len(_USER_DEFINED) + [1] * len(_NORMAL))
    for said, number in (("padding", 0), ("eos", 1), ("bos", 2), ("unknown", 3)):
        writer.add_uint32(f"tokenizer.ggml.{said}_token_id", number)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, tensor in gemma.state_dict().items():
        if name != "lm_head.weight":  # tied
            # llama.cpp multiplies by what transformers adds 1 to.
            writer.add_tensor(_gguf_name(name), (tensor + 1 if "norm" in name else tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_name(name: str) -> str:
    if name == "model.norm.weight":
        return "output_norm.weight"
    for ours, theirs in _NAMES.items():
        name = name.replace(ours, theirs)
    return name


def test_gemma_loads_with_its_own_weights_and_tokenizer(
    gemma_file: Path, gemma: Gemma3ForCausalLM, ids: Tensor
) -> None:
    loaded = load_backbone(BackboneConfig(str(gemma_file), quantization="none"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, gemma(ids).logits, atol=1e-5, rtol=1e-5)
    assert loaded.tokenizer("ab").tokens() == ["<bos>", "ab"]
    assert loaded.tokenizer.eos_token == "<eos>"
    assert loaded.tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("abc", ["a", "bc"]),  # "bc" comes before "ab"
        ("bcab", ["bc", "ab"]),  # scores alone would say "b" and "cab"
        ("ab ab", ["ab", "▁ab"]),
        ("a  b", ["a", "▁▁", "b"]),
        ("a\n\nb", ["a", "\n\n", "b"]),
        ("<eos>a", ["<eos>", "a"]),
        ("é", ["<0xC3>", "<0xA9>"]),
    ],
)
def test_gemmas_tokenizer_merges_pairs_in_the_order_of_the_file(
    text: str, tokens: list[str], gemma_file: Path
) -> None:
    tokenizer = read_tokenizer(gemma_file, read_metadata(gemma_file))
    encoded = tokenizer(text)
    assert encoded.tokens() == ["<bos>", *tokens]
    assert tokenizer.decode(encoded.input_ids[1:]) == text
