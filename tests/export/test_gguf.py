"""GGUF files: orders and names of tensors, read by transformers, gguf, and llama.cpp where installed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers, unload
from moka_pl.cli.main import main
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.export import llama_cpp
from moka_pl.export.check import largest_difference, measure
from moka_pl.export.gguf import (
    check_architecture,
    llama_rows,
    model_size,
    read_back,
    write_adapter,
    write_model,
)
from moka_pl.export.gguf_tokenizer import _LLAMA3
from moka_pl.export.llama_cpp import LlamaCpp, greedy
from moka_pl.export.lora import lora_form
from moka_pl.export.merged import merged_parts
from moka_pl.export.modelfile import modelfile
from moka_pl.export.rounding import round_weights
from moka_pl.version import __version__

gguf = pytest.importorskip("gguf")
IDS = torch.tensor([5, 60, 7, 9, 33, 21, 90, 2])


def make_tokenizer(*splits: pre_tokenizers.PreTokenizer, rows: int = 96) -> PreTrainedTokenizerFast:
    """A byte-pair encoding of few letters, with two control tokens."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["Ġ"]
    tokens = ["<s>", "</s>", *letters, "ab", "Ġab"]
    model = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[("a", "b"), ("Ġ", "ab")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def test_rows_of_a_head_are_put_in_turn() -> None:
    rows = torch.arange(8.0)[:, None].repeat(1, 2)  # two heads of four
    assert llama_rows(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("f32", 1e-5), ("f16", 0.02), ("q8_0", 0.3)], ids=["f32", "f16", "q8_0"]
)
def test_transformers_reads_the_merged_model(
    kind, tolerance: float, make_llama: Callable, randomize: Callable, tmp_path: Path
) -> None:
    model = make_llama(intermediate_size=64)
    inject_adapter(model, MokaConfig(components=2))
    randomize(model)
    file = tmp_path / "model.gguf"
    write_model(file, model, merged_parts(model), kind, make_tokenizer(BYTES))
    told = model_size(merged_parts(model), kind, make_tokenizer(BYTES))
    assert 0.9 * file.stat().st_size < told < 1.5 * file.stat().st_size
    with torch.no_grad():
        expected = model(IDS[None]).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        difference = (found(IDS[None]).logits - expected).abs().max()
        unload(model)
        assert (model(IDS[None]).logits - expected).abs().max() > 1.5 * tolerance
    assert difference < tolerance


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_what_rounding_makes_of_a_file_is_known(
    kind: str, make_llama: Callable, randomize: Callable, tmp_path: Path
) -> None:
    model = make_llama(hidden_size=64, intermediate_size=96)
    inject_adapter(model, MokaConfig(components=2, filters="square"))
    randomize(model)
    file, before = tmp_path / "model.gguf", measure(model, [IDS])
    write_model(file, model, merged_parts(model), kind, make_tokenizer(BYTES))
    round_weights(model, partial(read_back, kind=kind))
    rounded = measure(model, [IDS])
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    largest = float(before.logits[0].abs().max())
    assert largest_difference(before, rounded) > 1e-4 * largest
    assert largest_difference(rounded, measure(found, [IDS])) < 2e-5 * largest


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [7]}], ids=str
)
def test_an_embedding_of_peft_is_written(options: dict, make_llama: Callable, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_llama(intermediate_size=64)
    config = {"target_modules": ["q_proj"], "init_lora_weights": False} | options
    inject_adapter(model, peft.LoraConfig(r=2, **config))
    file = tmp_path / "model.gguf"
    write_model(file, model, merged_parts(model), "f32", make_tokenizer(BYTES))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        torch.testing.assert_close(found(IDS[None]).logits, model(IDS[None]).logits, atol=1e-5, rtol=0)


def test_the_tokenizer_is_written(make_llama: Callable, tmp_path: Path) -> None:
    model, tokenizer = make_llama(), make_tokenizer(pre_tokenizers.Digits(individual_digits=True), BYTES)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    write_model(tmp_path / "m", model, merged_parts(model), "f32", tokenizer)
    said = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m").fields.items()}
    assert said["tokenizer.ggml.pre"] == "smollm"
    assert said["tokenizer.ggml.tokens"][:3] == ["<s>", "</s>", "a"]
    assert said["tokenizer.ggml.tokens"][31:33] == ["[PAD31]", "[PAD32]"]
    assert len(said["tokenizer.ggml.tokens"]) == len(said["tokenizer.ggml.token_type"]) == 96
    assert said["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert said["tokenizer.ggml.token_type"][31] == 5
    assert said["tokenizer.ggml.merges"] == ["a b", "Ġ ab"]
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        ([pre_tokenizers.Whitespace()], "it splits texts by Whitespace"),
        (
            [pre_tokenizers.ByteLevel(add_prefix_space=True)],
            "it splits texts by ByteLevel with a space before",
        ),
        ([pre_tokenizers.Digits(), BYTES], "it splits texts by groups of digits and ByteLevel"),
    ],
)
def test_other_tokenizers_are_refused(splits, reason: str, make_llama: Callable, tmp_path: Path) -> None:
    model = make_llama()
    with pytest.raises(
        ConfigError, match=f"the tokenizer cannot be written .*: {reason}; export --to merged"
    ):
        write_model(tmp_path / "m", model, merged_parts(model), "f32", make_tokenizer(*splits))


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ConfigError, match="not of model_type 'gemma2'; export --to merged or --to lora"):
        check_architecture("gemma2")


def test_a_tied_head_has_no_lora(make_llama: Callable, randomize: Callable, tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=True)
    inject_adapter(model, MokaConfig(components=1, target_modules=["lm_head"]))
    form = lora_form(moka_layers(model))
    unload(model)
    with pytest.raises(AdapterError, match="lm_head shares its weight with the embedding"):
        write_adapter(tmp_path / "a", model, form, torch.float32)


def test_the_adapter_is_read_back(
    make_adapter: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(llama_cpp, "version", lambda: None)
    adapter = make_adapter()
    main(["export", str(adapter), "--to", "gguf"])
    assert "llama-cpp-python is not installed" in capsys.readouterr().out
    out = adapter.with_name("adapter-gguf")
    assert sorted(file.name for file in out.iterdir()) == ["Modelfile", "adapter.gguf"]
    reader = gguf.GGUFReader(out / "adapter.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora"
    sizes = {tensor.name: tuple(tensor.data.shape) for tensor in reader.tensors}
    rank = int(said["adapter.lora.alpha"])
    assert sizes["blk.0.attn_q.weight.lora_a"] == (rank, 64)
    assert sizes["blk.1.attn_v.weight.lora_b"] == (32, rank)
    text = (out / "Modelfile").read_text()
    assert text.startswith('FROM tiny\nADAPTER ./adapter.gguf\nTEMPLATE """Below is an instruction')
    assert '### Instruction:\n{{ .Prompt }}\n\n### Response:\n{{ .Response }}"""\nPARAMETER stop' in text


CHATML = (
    "{% if messages[0].role != 'system' %}<s>system\nBe kind</s>\n{% endif %}{% for m in messages %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def test_the_template_of_a_chat() -> None:
    tokenizer = make_tokenizer(BYTES)
    tokenizer.chat_template = CHATML
    assert modelfile("./m.gguf", None, tokenizer, "chat") == (
        'FROM ./m.gguf\nTEMPLATE """{{ if .System }}<s>system\n{{ .System }}</s>\n<s>user\n'
        "{{ else }}<s>system\nBe kind</s>\n<s>user\n{{ end }}{{ .Prompt }}</s>\n<s>assistant\n"
        f'{{{{ .Response }}}}</s>"""\nPARAMETER stop "</s>"\n# moka_pl_version {__version__}\n'
    )


def test_a_template_that_ollama_cannot_say_is_left_out() -> None:
    tokenizer = make_tokenizer(BYTES)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert "# its chat template cannot be written as one of Ollama's" in modelfile(
        "m", "a", tokenizer, "chat"
    )


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0}])
def test_llama_cpp_computes_the_same(rope, make_llama: Callable, randomize: Callable, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = make_llama(hidden_size=64, **({} if rope is None else {"rope_parameters": rope}))
    inject_adapter(model, MokaConfig(components=2, filters="square"))
    randomize(model)
    with torch.no_grad():
        expected, text = model(IDS[None]).logits[0], greedy(model, IDS)
    write_model(tmp_path / "merged", model, merged_parts(model), "f32", make_tokenizer(BYTES))
    engine = LlamaCpp(tmp_path / "merged")
    torch.testing.assert_close(engine.logits(IDS), expected, atol=1e-3, rtol=1e-3)
    assert engine.greedy(IDS) == text
    assert engine.other_tokens(make_tokenizer(BYTES), ["ab abba cab"]) is None
    form = lora_form(moka_layers(model))
    unload(model)
    write_model(tmp_path / "base", model, merged_parts(model), "f32")
    write_adapter(tmp_path / "adapter", model, form, torch.float32)
    adapted = LlamaCpp(tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(adapted.logits(IDS), expected, atol=1e-3, rtol=1e-3)
    without = LlamaCpp(tmp_path / "base").logits(IDS)
    assert (without - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "splits",
    [
        [BYTES],
        [pre_tokenizers.Digits(individual_digits=True), BYTES],
        [
            pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    ],
    ids=["gpt-2", "smollm", "llama-bpe"],
)
def test_llama_cpp_reads_texts_into_the_same_tokens(splits, make_llama: Callable, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = Path(__file__).read_text()
    tokenizer.train_from_iterator([text, "I'm, we'll, THEY'RE", "1234567 2024\n\n  x\t\r\n é 你好"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    model = make_llama(vocab_size=512)
    write_model(tmp_path / "m", model, merged_parts(model), "f32", fast)
    texts = [text[start : start + 60] for start in range(0, 6000, 60)]
    more = [
        "12345678 x 1 22 333",
        "DON'T they'LL",
        "a\n\n\n  b \n c   ",
        "x.y!?;  --\n",
        "</s>a<s> b",
        "\u3000你好世界1",
    ]
    assert LlamaCpp(tmp_path / "m").other_tokens(fast, [*texts, *more]) is None
