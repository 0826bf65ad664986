"""A chat in the terminal."""

import sys
from contextlib import suppress

from moka_pl.cli.answering.printing import print_tokens
from moka_pl.cli.answering.session import Session
from moka_pl.errors import MokaError, Terminated
from moka_pl.prompts.asked import chat_row, text_row

_HELP = "/reset begins anew, /exit ends; Ctrl-C stops an answer"


def chat(session: Session) -> None:
    """Answers what the user types, each time with all that was said before, until ``/exit`` or Ctrl-D.

    Other formats than ``chat`` know no turns: there every prompt stands alone. A turn that cannot be
    answered, or whose answer was stopped, is not part of what follows.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  # the arrow keys edit the line, and bring earlier ones back

    remembers = session.prompt_format == "chat"
    alone = "" if remembers else f"; each prompt stands alone (prompt format {session.prompt_format})"
    print(f"{_HELP}{alone}", file=sys.stderr)
    turns: list[dict[str, str]] = []
    while (text := _typed()) is not None:
        command = text.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            turns.clear()
            print("the chat begins anew", file=sys.stderr)
        elif command in ("/help", "/?"):
            print(_HELP, file=sys.stderr)
        elif command:
            asked = [*turns, {"role": "user", "content": text}]
            answer = _answer(session, asked if remembers else [], text)
            if answer is not None and remembers:
                turns[:] = [*asked, {"role": "assistant", "content": answer}]


def _typed() -> str | None:
    """Returns a line of the user's; None once they end."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(session: Session, turns: list[dict[str, str]], text: str) -> str | None:
    """Prints an answer and returns it; None where there is none, or it was stopped."""
    try:
        where = "the chat" if len(turns) > 1 else "the prompt"
        ids = session.ids(chat_row(turns, where) if turns else text_row(text, where))
        return print_tokens(session, ids)
    except MokaError as error:
        remedy = "; /reset begins anew" if len(turns) > 1 else ""
        print(f"moka_pl: error: {error}{remedy}", file=sys.stderr)
    except Terminated:  # which is no wish for another prompt
        raise
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    return None
