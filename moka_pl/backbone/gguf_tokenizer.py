"""The tokenizer of a GGUF file as the file itself describes it, whatever a version of transformers reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import BackboneError
from moka_pl.prompts.ends import adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PREFIX = "tokenizer.ggml."
_BESIDE = {"architecture": "general.architecture", "chat_template": "tokenizer.chat_template"}
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens; no text is read as a control token
_SPACE = "▁"  # as SentencePiece spells it
_PLAIN = {"add_special_tokens": False}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_metadata(file: Path) -> dict[str, Any]:
    """Reads what a GGUF file says about its tokenizer, by name without ``tokenizer.ggml.``.

    With ``architecture`` and ``chat_template``, where it has them. Gemma's tokens of several spaces, which
    llama.cpp writes as spaces, are spelled as in the model's own tokenizer.
    """
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    said = {name.removeprefix(_PREFIX): field for name, field in fields.items() if name.startswith(_PREFIX)}
    metadata = {name: field.contents() for name, field in said.items() if name not in ("merges", "scores")}
    metadata |= {name: fields[field].contents() for name, field in _BESIDE.items() if field in fields}
    if _is_gemma(metadata):
        tokens = metadata["tokens"]
        metadata["tokens"] = [_SPACE * len(token) if not token.strip(" ") else token for token in tokens]
    return metadata


def read_tokenizer(file: Path, metadata: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    """Reads the tokenizer of a GGUF file.

    Args:
        file: The file.
        metadata: What ``read_metadata`` returned for it.
    """
    from transformers import AutoTokenizer

    if _is_gemma(metadata):
        return _gemma_tokenizer(metadata)
    with bos_optional():
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def _is_gemma(metadata: Mapping[str, Any]) -> bool:
    """Whether it is Gemma's, a SentencePiece model that merges pairs ("llama" in GGUF)."""
    return str(metadata.get("architecture")).startswith("gemma") and metadata.get("model") == "llama"


def _gemma_tokenizer(metadata: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    """Builds Gemma's tokenizer; transformers before 5.24 makes a unigram model of it, which cuts words apart.

    The file lists no merges. They are all ways to cut a token in two others, in the order of the tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = metadata["tokens"], metadata.get("token_type", [])
    numbers = {token: number for number, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in numbers and token[cut:] in numbers
    ]
    special = {name: metadata.get(f"{said}_token_id") for name, said in _SPECIAL.items()}
    names = {f"{name}_token": tokens[n] for name, n in special.items() if n is not None and n < len(tokens)}
    model = BPE(numbers, merges, unk_token=names.get("unk_token"), fuse_unk=True, byte_fallback=True)
    built = Tokenizer(model)
    built.normalizer = normalizers.Replace(" ", _SPACE)
    built.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for kind, add in ((_CONTROL, built.add_special_tokens), (_USER_DEFINED, built.add_tokens)):
        add([AddedToken(tokens[n], normalized=False) for n, it in enumerate(kinds) if it == kind])
    if metadata.get("add_bos_token", True) and (bos := names.get("bos_token")):
        built.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, numbers[bos])]
        )
    template = metadata.get("chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=built, chat_template=template, **names)


def count_weights(file: Path) -> int:
    """Returns the number of weights in a GGUF file."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)


@contextmanager
def bos_optional() -> Iterator[None]:
    """Lets the body read a file that names no beginning-of-sequence token.

    transformers 5.14 to 5.17 fail without one. There the first token stands in for it, until
    ``set_special_tokens`` takes it away.
    """
    from transformers.integrations import ggml

    proto = getattr(ggml, "GGUFTokenizerSkeleton", None)
    if proto is None or hasattr(proto, "bos_token_id"):
        yield
        return
    proto.bos_token_id = 0
    try:
        yield
    finally:
        del proto.bos_token_id


def set_special_tokens(
    tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", metadata: Mapping[str, Any]
) -> None:
    """Gives a tokenizer, and the model that goes with it, the special tokens that the file names.

    Args:
        tokenizer: As transformers read it.
        model: Its model.
        metadata: What ``read_metadata`` returned.
    """
    tokens = metadata.get("tokens", [])
    if "bos_token_id" not in metadata and tokenizer.bos_token in tokens[:1]:
        tokenizer.bos_token = None  # what stood in for it
    for name, said in _SPECIAL.items():
        number = metadata.get(f"{said}_token_id")
        if number is None or not 0 <= number < len(tokens):
            continue
        setattr(tokenizer, f"{name}_token", tokens[number])
        if name != "unk":
            setattr(model.config, f"{name}_token_id", number)
    ends = [metadata[name] for name in _ENDS if 0 <= metadata.get(name, -1) < len(tokens)]
    if model.generation_config is not None and ends:
        model.generation_config.eos_token_id = list(dict.fromkeys(ends)) if len(set(ends)) > 1 else ends[0]
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", metadata: Mapping[str, Any], file: Path) -> None:
    """Compares a tokenizer with the file that it was read from.

    Args:
        tokenizer: The tokenizer.
        metadata: What ``read_metadata`` returned for the file.
        file: The file, for messages.

    Raises:
        BackboneError: A token has another number, a special token is another one or is not read as one token,
            or a beginning-of-sequence token is added where the file says none is, or the other way round.
    """
    import transformers

    for difference in _differences(tokenizer, metadata):
        raise BackboneError(
            f"{file} cannot be used: transformers {transformers.__version__} reads its tokenizer wrongly: "
            f"{difference}. Install another version of transformers, or use the model's own folder"
        )


def _differences(tokenizer: "PreTrainedTokenizerBase", metadata: Mapping[str, Any]) -> Iterator[str]:
    tokens = metadata.get("tokens", [])
    if len(tokenizer) < len(tokens):
        yield f"it has {len(tokenizer)} tokens, the file {len(tokens)}"
        return
    found = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    if wrong := [number for number, token in enumerate(tokens) if token != found[number]]:
        first = wrong[0]
        yield f"{len(wrong)} tokens differ (token {first} is {found[first]!r}, in the file {tokens[first]!r})"
    for name, said in _SPECIAL.items():
        number, ours = metadata.get(f"{said}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if number is not None and 0 <= number < len(tokens) and ours != number:
            yield f"the {name} token has the number {ours}, in the file {number} ({tokens[number]!r})"
    written = str(tokenizer.chat_template or "")
    for number, kind in enumerate(metadata.get("token_type", [])[: len(tokens)]):
        token = tokens[number]
        if kind == _CONTROL and token in written and tokenizer(token, **_PLAIN).input_ids != [number]:
            yield f"the control token {token!r} is not read as one token"
    bos = metadata.get("add_bos_token")
    if bos is not None and tokenizer.bos_token_id is not None and bool(bos) != adds_bos(tokenizer):
        yield f"it adds {'no' if bos else 'a'} beginning-of-sequence token, unlike the file"
