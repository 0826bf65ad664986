"""A loaded model that answers prompts in the words of its training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moka_pl.cli.answering.sampling import Sampling
from moka_pl.errors import ConfigError
from moka_pl.prompts.asked import asked_text, chat_row, question, text_row
from moka_pl.prompts.choice import PromptFormat
from moka_pl.prompts.ends import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from moka_pl.inference import Completion, Preview


@dataclass(frozen=True)
class Session:
    """A model with its adapter, and how it is asked.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        prompt_format: What surrounds a prompt.
        is_trained: Whether the adapter was trained with that format.
        system: A system message before every chat; empty for none.
        sampling: How tokens are chosen.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    prompt_format: PromptFormat
    is_trained: bool
    system: str
    sampling: Sampling

    def ids(self, row: Mapping[str, Any]) -> list[int]:
        """Returns the tokens of a checked row.

        Raises:
            ConfigError: If it has none, or so many that the model's context has no room for an answer.
        """
        from moka_pl.inference import context_window

        if self.system:
            turns = row["messages"] or [{"role": "user", "content": question(row)}]
            if turns[0]["role"] != "system":
                system = {"role": "system", "content": self.system}
                row = chat_row([system, *turns], row["location"])
        text = asked_text(row, self.tokenizer, self.prompt_format)
        ids = prompt_ids(self.tokenizer, text, self.prompt_format, self.is_trained)
        if not ids:
            raise ConfigError(f"{row['location']} has no token for the tokenizer; give another text")
        window = context_window(self.model)
        if window is not None and len(ids) >= window:
            raise ConfigError(
                f"{row['location']} has {len(ids):,} tokens, which leave no room for an answer in the "
                f"model's context of {window:,}; shorten it"
            )
        return ids

    def answers(
        self, prompts: Sequence[Sequence[int]], streamer: "BaseStreamer | None" = None
    ) -> "list[Completion]":
        """Answers some prompts, given as tokens, in one batch; ``streamer`` is given a single one's."""
        from moka_pl.inference import complete

        options, most = self.sampling.options(), self.sampling.max_new_tokens
        return complete(self.model, self.tokenizer, prompts, most, streamer, **options)


def open_session(
    adapter: Path,
    sampling: Sampling,
    rows: Sequence[Mapping[str, Any]] = (),
    *,
    base: str | None = None,
    prompt_format: PromptFormat | None = None,
    system: str = "",
    merged: bool = False,
) -> tuple[Session, list[list[int]]]:
    """Loads an adapter with its base, once all prompts are known to have room for an answer.

    Args:
        adapter: An adapter directory.
        sampling: How tokens are chosen.
        rows: Checked rows to answer; none for a chat.
        base: Name or path of the base model; None is the one stored with the adapter.
        prompt_format: What surrounds prompts; None is the training's, else ``chat`` if the tokenizer has a
            template, else ``raw``.
        system: A system message.
        merged: Whether the adapter is merged into the weights.

    Returns:
        The session, and the tokens of each row's prompt.

    Raises:
        ConfigError: If the prompt format is unknown or has no system message, or a prompt cannot be answered.
    """
    check_format(prompt_format, "prompt_format")
    import torch

    from moka_pl.adapters import merge, read_adapter
    from moka_pl.inference import load_model

    trained = read_adapter(adapter).extra.get("prompt")
    if prompt_format is None:
        prompt_format = trained
        check_format(prompt_format, f"{adapter} was trained with an unknown prompt; --prompt_format")
    if system and prompt_format not in (None, "chat"):
        raise ConfigError(f"the prompt format {prompt_format} has no system message; leave --system out")
    sessions: list[Session] = []
    prompts: list[list[int]] = []

    def ask(preview: "Preview") -> None:
        """Turns the prompts into tokens, which takes no weights."""
        chosen: PromptFormat = prompt_format or ("chat" if preview.tokenizer.chat_template else "raw")
        if system and chosen != "chat":
            raise ConfigError("the base model's tokenizer has no chat template; leave --system out")
        session = Session(preview.model, preview.tokenizer, chosen, chosen == trained, system, sampling)
        if chosen == "chat" and not rows:
            session.ids(text_row("Hello", "the chat with its --system message" if system else "the chat"))
        sessions.append(session)
        prompts.extend(map(session.ids, rows))

    model, _ = load_model(adapter, base=base, before=ask)
    if merged:
        merge(model)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    return replace(sessions[0], model=model), prompts


def check_format(value: Any, name: str) -> None:
    """Refuses an unknown prompt format; ``name`` says where it comes from."""
    known = get_args(PromptFormat)
    if value is not None and value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
