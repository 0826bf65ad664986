"""``moka-pl generate``: answers from a base model with its adapter."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moka_pl.cli.answering.prompt_files import read_prompts
from moka_pl.cli.answering.sampling import Sampling
from moka_pl.cli.answering.session import Session, check_format, open_session
from moka_pl.errors import ConfigError
from moka_pl.prompts.asked import text_row
from moka_pl.prompts.choice import PromptFormat


def generate(
    adapter: Path,
    prompt: str | Sequence[str] = (),
    file: Path | None = None,
    compare: bool = False,
    merge: bool = False,
    base: str | None = None,
    prompt_format: PromptFormat | None = None,
    system: str = "",
    batch_size: int = 8,
    **sampling: Any,
) -> None:
    """Generate answers with a trained adapter: to prompts, to a file of them, or in a chat.

    Args:
        adapter: An adapter directory.
        prompt: Prompts; prompt_format wraps each. Without any, and without a file, a chat begins in the
            terminal.
        file: A file of prompts: .txt with one on each line, or .jsonl, .json, .csv, .tsv or .parquet with
            prompt, instruction (and input), messages or conversations in each record.
        compare: Also print the frozen base model's answer.
        merge: Compute with dense W + ΔW in place of the adapted layers, which takes more memory.
        base: Name or path of the base model. Default: the one stored with the adapter.
        prompt_format: Template for the prompts: chat (the tokenizer's chat template), alpaca (also
            llm_adapters), cloze ("Question: … Answer:"; also letters, with the options in the prompt) or raw
            (none). Default: the adapter's training prompt, else chat if the tokenizer has a template, else
            raw.
        system: A system message before each chat.
        batch_size: Prompts of a file that are answered at a time.
        **sampling: Options of :class:`Sampling`.
    """
    chosen = Sampling(**sampling)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if prompts and file is not None:
        raise ConfigError("prompts cannot be combined with --file; leave one of them out")
    if not all(text.strip() for text in prompts):
        raise ConfigError("prompt is empty; give some text")
    if compare and (merge or not prompts):
        other = "--merge" if merge else "--file" if file else "a chat"
        raise ConfigError(f"--compare cannot be combined with {other}; give it prompts only")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    check_format(prompt_format, "prompt_format")
    if not prompts and file is None and not sys.stdin.isatty():
        raise ConfigError(
            "nothing to answer; give a prompt, or --file FILE (a chat needs a terminal, which stdin is not)"
        )
    if file is None:
        names = [f"prompt {n}" for n in range(1, len(prompts) + 1)] if len(prompts) > 1 else ["the prompt"]
        rows = [text_row(text, name) for text, name in zip(prompts, names, strict=False)]
    else:
        rows = read_prompts(file)
    session, ids = open_session(
        adapter, chosen, rows, base=base, prompt_format=prompt_format, system=system, merged=merge
    )
    if not rows:
        from moka_pl.cli.answering.chat import chat

        chat(session)
    elif file is None:
        _print_each(session, rows, ids, compare)
    else:
        _print_batches(session, rows, ids, batch_size)


def _print_each(
    session: Session, rows: Sequence[dict[str, Any]], prompts: Sequence[list[int]], compare: bool
) -> None:
    """Prints the answers to some prompts one after another, each while it is generated.

    Args:
        session: The model.
        rows: The prompts.
        prompts: Their tokens.
        compare: Whether the frozen base answers, too.
    """
    from moka_pl.adapters import adapters_disabled
    from moka_pl.cli.answering.printing import print_tokens

    for number, ids in enumerate(prompts):
        _head(rows, number)
        if compare:
            print("[base] ", end="", flush=True)
            with adapters_disabled(session.model):
                print_tokens(session, ids)
            print("\n[adapted] ", end="", flush=True)
        print_tokens(session, ids)


def _print_batches(
    session: Session, rows: Sequence[dict[str, Any]], prompts: Sequence[list[int]], batch_size: int
) -> None:
    """Prints the answers to the prompts of a file in its order, as far as they are known.

    Args:
        session: The model.
        rows: The prompts.
        prompts: Their tokens.
        batch_size: How many are answered at a time.
    """
    from moka_pl.cli.answering.batches import answer_all
    from moka_pl.cli.answering.printing import shown

    known: dict[int, str] = {}
    printed = 0
    for number, answer in answer_all(session, prompts, batch_size):
        known[number] = answer.text
        while printed in known:
            _head(rows, printed)
            print(shown(known.pop(printed)), flush=True)
            printed += 1


def _head(rows: Sequence[dict[str, Any]], number: int) -> None:
    """Prints which of several prompts is answered next."""
    from moka_pl.cli.answering.printing import shown
    from moka_pl.prompts.asked import question

    if len(rows) > 1:
        row = rows[number]
        text = row["messages"][-1]["content"] if row["messages"] else question(row)
        print(f"{chr(10) if number else ''}> {shown(text)}", flush=True)
