"""A tokenizer as llama.cpp reads it, where it can be written so that texts become the same tokens."""

import json
from typing import TYPE_CHECKING, Any

from moka_pl.errors import ConfigError
from moka_pl.prompts.ends import adds_bos, end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def add_tokenizer(writer: Any, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Writes tokens, merges, special tokens and chat template.

    Args:
        writer: A ``gguf.GGUFWriter``.
        model: The model: its embedding may have more rows than there are tokens.
        tokenizer: Its tokenizer.

    Raises:
        ConfigError: If llama.cpp would read texts into other tokens, as far as is known.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    kind, pre = _kind(content)
    rows = vocabulary_rows(model)
    added = {token["id"]: token for token in content["added_tokens"]}
    texts = dict.fromkeys(range(rows), "") | {number: text for text, number in tokenizer.get_vocab().items()}
    if len(texts) > rows:
        raise _refused(f"it has {len(texts)} tokens, the model {rows}")
    names = [text or f"[PAD{number}]" for number, text in sorted(texts.items())]
    types = [_type(number, texts[number], added, content["model"]) for number in range(rows)]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(types)
    if kind == "llama":
        writer.add_token_scores([0.0 if kind != _NORMAL else -float(n) for n, kind in enumerate(types)])
        writer.add_add_space_prefix(_prepends(content))
    else:
        merges = content["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if (turn := [one for one in end_tokens(tokenizer) if one != tokenizer.eos_token_id]) != []:
        writer.add_eot_token_id(turn[0])
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary_rows(model: "PreTrainedModel") -> int:
    """Returns the rows of a model's embedding, new tokens' included; PEFT's layers have a weight only."""
    embedding: Any = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", len(embedding.weight)))


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"the tokenizer cannot be written so that llama.cpp reads texts into the same tokens: {reason}; "
        "export --to merged and convert that by llama.cpp's convert_hf_to_gguf.py, or export the adapter "
        "alone, --gguf_type lora"
    )


def _kind(content: dict[str, Any]) -> tuple[str, str]:
    """Returns llama.cpp's names of the tokenizer and of how it splits texts first."""
    model, splits = content["model"], _splits(content.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not model.get("merges"):
        raise _refused("it is no byte-pair encoding")
    if model.get("byte_fallback"):
        if splits not in ([], ["Metaspace"]) or not _by_number(model):
            raise _refused("its merges do not follow the numbers of its tokens")
        return "llama", "default"
    if content.get("normalizer") is not None:
        raise _refused(f"it normalises texts ({content['normalizer']['type']})")
    known = {
        ("ByteLevel",): "gpt-2",
        ("Digits", "ByteLevel"): "smollm",
        (f"Split {_LLAMA3}", "Bytes"): "llama-bpe",
    }
    if (pre := known.get(tuple(splits))) is None:
        raise _refused(f"it splits texts by {' and '.join(splits) or 'nothing'}")
    return "gpt2", pre


def _splits(pre: dict[str, Any] | None) -> list[str]:
    """What a tokenizer does before it merges, in words."""
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [word for one in pre["pretokenizers"] for word in _splits(one)]
    if pre["type"] == "ByteLevel":
        name = "ByteLevel" if pre.get("use_regex", True) else "Bytes"
        return [name if not pre.get("add_prefix_space") else f"{name} with a space before"]
    if pre["type"] == "Digits":
        return ["Digits" if pre.get("individual_digits") else "groups of digits"]
    if pre["type"] == "Split" and pre.get("behavior") == "Isolated" and not pre.get("invert"):
        return [f"Split {pre['pattern'].get('Regex')}"]
    return [str(pre["type"])]


def _by_number(model: dict[str, Any]) -> bool:
    """Whether earlier merges make lower tokens, as SentencePiece's scores have it."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    numbers = [model["vocab"]["".join(pair)] for pair in pairs]
    return numbers == sorted(numbers)


def _prepends(content: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    text = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _type(number: int, text: str, added: dict[int, dict[str, Any]], model: dict[str, Any]) -> int:
    if not text:
        return _UNUSED
    if text == model.get("unk_token") and model.get("byte_fallback"):
        return _UNKNOWN
    if number in added:
        return _CONTROL if added[number]["special"] else _USER
    if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
        return _BYTE
    return _NORMAL
