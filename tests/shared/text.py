"""A tiny tokenizer, and a cache folder of our own."""

import json
from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Question: What is the capital of France? Answer: Paris",
    "Below is an instruction that describes a task. Write a response that appropriately completes it.",
    "### Instruction:\nSay hello to the cat.\n\n### Response:\nHello, cat! How are you today?",
    "system user assistant tool You are a patient teacher. One two three four five six seven.",
]


def build_tokenizer(*, bos: bool = False):
    """Byte-level BPE, a few hundred tokens, pad == eos == <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def shared_tokenizer():
    """Built once; a test that changes its tokenizer asks for `tiny_tokenizer`."""
    return build_tokenizer()


@pytest.fixture
def tiny_tokenizer(shared_tokenizer):
    """A tokenizer of the test's own."""
    import copy

    return copy.deepcopy(shared_tokenizer)


@pytest.fixture
def bos_tokenizer():
    """The same, but it puts <s> before every text by itself."""
    return build_tokenizer(bos=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is written into the user's home, and no test sees another's cache."""
    import datasets

    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes records to a file of the test's folder."""

    def write(name: str, records: list[dict]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write
