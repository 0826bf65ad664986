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
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_CONTROL = 3  # the type of tokens that no text is read as
_PLAIN = {"add_special_tokens": False}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_metadata(file: Path) -> dict[str, Any]:
    """Reads what a GGUF file says about its tokenizer, by name without ``tokenizer.ggml.``."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    said = {name.removeprefix(_PREFIX): field for name, field in fields.items() if name.startswith(_PREFIX)}
    return {name: field.contents() for name, field in said.items() if name not in ("merges", "scores")}


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
