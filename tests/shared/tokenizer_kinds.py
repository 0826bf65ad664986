"""Tiny tokenizers of many kinds, which tell the positions of white space well, badly or not at all."""

from collections.abc import Callable
from functools import cache
from typing import Any

from shared.text import CHATML, CORPUS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|im_end|>"
_TRAINED_ON = [*CORPUS, "  a  b\n\n  c\t\td   e\n    f", "return 1 2 33 x = 1.5\n", "### Response:\n  x"] * 9
_BYTES = [f"<0x{number:02X}>" for number in range(256)]


def _byte_level(
    *, trim: bool = False, digits: bool = False, prefix: bool = False, normalizer: Any = None
) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    )
    backend.decoder = decoders.ByteLevel()
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=prefix)
    return _trained(backend, alphabet=pre_tokenizers.ByteLevel.alphabet())


def _sentencepiece(pre_tokenizer: Any = None, *, opens: bool = True) -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if pre_tokenizer is None:  # as LLaMA's
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if opens else [])])
    return _trained(backend, special=["<unk>", *_BYTES])


def _trained(backend: Tokenizer, special: Any = (), alphabet: Any = ()) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "<|im_start|>", END, *special],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(_TRAINED_ON, trainer)
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": _byte_level,
    "trimmed": lambda: _byte_level(trim=True),
    "trimmed digits": lambda: _byte_level(trim=True, digits=True),
    "prefix space": lambda: _byte_level(trim=True, prefix=True),
    "metaspace": lambda: _sentencepiece(pre_tokenizers.Metaspace()),
    "metaspace first": lambda: _sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace never": lambda: _sentencepiece(pre_tokenizers.Metaspace(prepend_scheme="never"), opens=False),
    "llama": _sentencepiece,
    "normalized": lambda: _byte_level(
        trim=True, normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
}
"""Kinds by name."""


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of a kind with the end-of-sequence token ``END`` and a ChatML template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](),
        bos_token="<s>",
        eos_token=END,
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer
