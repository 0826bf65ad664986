"""A ``Modelfile``, by which Ollama takes a GGUF file: template and stop words."""

from typing import TYPE_CHECKING

from moka_pl.errors import MokaError
from moka_pl.export.folder import MARK
from moka_pl.prompts.ends import adds_bos, end_tokens, template_tail
from moka_pl.prompts.rendering import render_chat
from moka_pl.prompts.templates import alpaca_prompt, cloze_prompt
from moka_pl.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _PROMPT = "{{ .System }}", "{{ .Prompt }}"


def modelfile(
    model: str, adapter: str | None, tokenizer: "PreTrainedTokenizerBase", prompt_format: str | None
) -> str:
    """Returns the text of a Modelfile.

    Args:
        model: The base's file or its name in Ollama.
        adapter: The file of the adapter; None if it is merged.
        tokenizer: The base's tokenizer.
        prompt_format: The prompt of the adapter's training; None takes the chat template, if there is one.
    """
    lines = [f"FROM {model}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    template = _template(tokenizer, prompt_format)
    if template is None:
        lines.append("# its chat template cannot be written as one of Ollama's; set TEMPLATE by hand")
    else:
        lines.append(f'TEMPLATE """{template}"""')
    ends = (tokenizer.convert_ids_to_tokens(one) for one in end_tokens(tokenizer))
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    return "\n".join([*lines, f"# {MARK} {__version__}"]) + "\n"


def _template(tokenizer: "PreTrainedTokenizerBase", prompt_format: str | None) -> str | None:
    """The prompt in Go's template language; None where it cannot be said in it."""
    chosen = prompt_format or ("chat" if tokenizer.chat_template else "raw")
    if chosen in ("alpaca", "llm_adapters"):
        return f"{alpaca_prompt(_PROMPT)}{{{{ .Response }}}}"
    if chosen in ("cloze", "letters"):
        return f"{cloze_prompt(_PROMPT)}{{{{ .Response }}}}"
    if chosen != "chat":
        return f"{_PROMPT}{{{{ .Response }}}}"
    user = {"role": "user", "content": _PROMPT}
    plain = _rendered(tokenizer, [user])
    system = _rendered(tokenizer, [{"role": "system", "content": _SYSTEM}, user])
    if plain is None or (system or plain).partition(_PROMPT)[2] != plain.partition(_PROMPT)[2]:
        return None
    before, _, after = plain.partition(_PROMPT)
    tail = (template_tail(tokenizer) or "").rstrip("\n")
    opening = before
    if system is not None and _SYSTEM in system:
        opening = f"{{{{ if .System }}}}{system.partition(_PROMPT)[0]}{{{{ else }}}}{before}{{{{ end }}}}"
    return f"{opening}{_PROMPT}{after}{{{{ .Response }}}}{tail}"


def _rendered(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]]) -> str | None:
    """The chat template's text without the token that llama.cpp puts before it; None if it refuses."""
    try:
        text = render_chat(tokenizer, turns, prompt=True)
    except MokaError:
        return None
    except Exception:  # templates raise whatever they like
        return None
    opening = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
    text = text.removeprefix(opening)
    free = text.replace(_SYSTEM, "").replace(_PROMPT, "", 1)
    return None if "{{" in free or '"""' in free or _PROMPT not in text else text
