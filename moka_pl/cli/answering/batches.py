"""Many prompts, answered in batches of about one length."""

import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from moka_pl.cli.answering.session import Session

if TYPE_CHECKING:
    from moka_pl.inference import Completion

#: Seconds between two updates of the progress, in a terminal and elsewhere.
_PAUSE, _LONG_PAUSE = 0.5, 30.0


def answer_all(
    session: Session, prompts: Sequence[list[int]], batch_size: int, done: Collection[int] = ()
) -> Iterator[tuple[int, "Completion"]]:
    """Answers prompts in batches of about one length, the longest first, with progress on stderr.

    The longest come first so that too little memory shows at once; then fewer are answered at a time. A batch
    draws from a seed of its own: it has the same answers whichever batches are answered before.

    Args:
        session: The model.
        prompts: Tokens of each prompt.
        batch_size: Prompts in a batch.
        done: Numbers of prompts that are answered already; a batch of none else is left out.

    Yields:
        The number of each prompt in its batch's order, and the answer.
    """
    import torch
    from tqdm import tqdm

    from moka_pl.evaluation.memory import Halving

    order = sorted(range(len(prompts)), key=lambda number: (-len(prompts[number]), number))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    seed = torch.seed() if session.sampling.seed is None else session.sampling.seed
    halving = Halving("prompts", "lower --max_new_tokens, or shorten the prompts")
    pause = _PAUSE if sys.stderr.isatty() else _LONG_PAUSE
    known = sum(len(batch) for batch in batches if set(batch) <= set(done))
    with tqdm(total=len(prompts), initial=known, unit="answer", mininterval=pause, file=sys.stderr) as bar:
        started, tokens = time.monotonic(), 0
        for index, batch in enumerate(batches):
            if set(batch) <= set(done):
                continue
            torch.manual_seed((seed + index) % 2**63)

            def answer(part: slice, batch: list[int] = batch) -> "list[Completion]":
                return session.answers([prompts[number] for number in batch[part]])

            answers = [one for part in halving.parts(len(batch), answer) for one in part]
            tokens += sum(one.tokens for one in answers)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):,.0f} tok/s", refresh=False)
            bar.update(len(batch))
            yield from zip(batch, answers, strict=True)
