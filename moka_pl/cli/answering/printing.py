"""Answers as they are printed: token by token where that is possible."""

import sys

from moka_pl.cli.answering.session import Session
from moka_pl.errors import printable


def print_tokens(session: Session, ids: list[int]) -> str:
    """Prints the answer to a prompt's tokens while it is generated, and returns it.

    Beams are known at their end only; their answer is printed then.
    """
    if session.sampling.num_beams > 1:
        text = session.answers([ids])[0].text
        print(shown(text), flush=True)
        return text
    from transformers.generation.streamers import TextStreamer

    def show(text: str, stream_end: bool = False) -> None:
        print(shown(text), end="\n" if stream_end else "", flush=True)

    streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = show
    return session.answers([ids], streamer)[0].text


def shown(text: str) -> str:
    """Returns a text as it is, but for a terminal without what that would act upon."""
    return printable(text, kept="\n\t") if sys.stdout.isatty() else text
