"""Chat templates, which are programs of strangers, rendered within bounds."""

import contextlib
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 1
"""CPU time in which a template must have rendered a few short chats."""

BYTES = 2**30
"""Memory that it may take for them."""

TRIES = 2
"""How often it is tried before it is refused: a busy machine may make a good one miss a bound."""

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
"""A chat that every template should take."""

SYSTEM = {"role": "system", "content": "Be brief."}
"""What some templates refuse, and others cannot do without."""

_TOOL = {
    "name": "answer",
    "description": "Answers.",
    "parameters": {"type": "object", "properties": {"text": {"type": "string", "description": "A text."}}},
}
_LONGEST_WAIT = 60  # seconds; on a busy machine a second of work may take many
_bounded: dict[str, bool] = {}


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", turns: Sequence[Mapping[str, Any]], *, prompt: bool, **options: Any
) -> str:
    """Returns the text that the tokenizer's chat template makes of messages.

    Args:
        tokenizer: A tokenizer with a chat template.
        turns: The messages.
        prompt: Whether the text ends where an answer begins.
        **options: What else ``apply_chat_template`` takes, such as ``tools``.

    Raises:
        DataError: The template does not come to an end, or fills the memory.
    """
    check_template(tokenizer)
    return str(
        tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=prompt, **options
        )
    )


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuses a chat template that does not end in time, or fills the memory: tried in another process.

    Raises:
        DataError: It does, each time that it is tried.
    """
    template = str(tokenizer.chat_template)
    if template not in _bounded:
        _bounded[template] = any(_ends(lambda: _render_samples(tokenizer)) for _ in range(TRIES))
    if not _bounded[template]:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"the chat template of the tokenizer ({name}) takes more than {SECONDS} s or {BYTES >> 30} GiB "
            "for a few short messages. Do not trust this model's files, or correct its chat template"
        )


def _render_samples(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Renders chats of few and many messages, and of a long one; what is refused is another matter."""
    turns = [QUESTION, ANSWER]
    long = [{**turn, "content": turn["content"] * 300} for turn in turns]
    tools = [{"type": "function", "function": _TOOL}] * 16
    for chat in (turns, [SYSTEM, *turns], turns * 16, long):
        for options in ({}, {"add_generation_prompt": True}, {"tools": tools}):
            try:
                tokenizer.apply_chat_template(chat, tokenize=False, **options)
            except MemoryError:
                raise
            except Exception:
                continue


def _ends(work: Callable[[], None]) -> bool:
    """Whether ``work`` ends within the bounds, in a process of its own (where it is safe to fork one)."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return True
    collects, child = gc.isenabled(), None
    gc.disable()  # in the child it would copy the pages of all objects, and may wait for a thread left here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child only renders, and takes no lock
            child = os.fork()
    finally:
        if collects and child != 0:
            gc.enable()
    if child == 0:
        status = 0
        try:
            with contextlib.suppress(OSError, ValueError):
                _limit()
            work()
        except MemoryError:
            status = 1
        finally:
            os._exit(status)  # whatever was raised
    deadline = time.monotonic() + _LONGEST_WAIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


def _limit() -> None:
    """Bounds the time and the further memory of this process."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except OSError:
        return
    limit, (_, hard) = pages * resource.getpagesize() + BYTES, resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
