"""How much faster options are scored when their common prompt is computed once, and whether answers agree.

``scripts/prefix_sharing_speed.py`` runs it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data import CommonsenseData, MmluData, MokaDataModule
from moka_pl.errors import DataError
from moka_pl.evaluation.metrics import is_right
from moka_pl.evaluation.shared_prompt import score_shared
from moka_pl.lm.scoring import row_sums, score_tokens
from moka_pl.studies.common import Parser, one_line_errors, positive_int

DESCRIPTION = """\
Measures how much faster options are scored when their common prompt is computed once.

    python scripts/prefix_sharing_speed.py COMMONSENSE_FOLDER MMLU_FOLDER [--items 60] [--repeats 3]

Scores some questions of each task's test file with SmolLM2-135M in float32, with and without sharing in turn,
and prints the medians. On a CPU it counts the process's CPU seconds, on one thread, which other work on the
machine disturbs least.
"""

#: Whether an item is answered rightly, and its options' scores, by its tokens.
Answers = dict[str, tuple[bool, list[float]]]


class Measured(NamedTuple):
    """What one task took.

    Attributes:
        whole: Seconds of every repetition with each option in a row of its own.
        shared: Seconds of every repetition with shared prompts.
        answers: The answers of both, in this order.
    """

    whole: list[float]
    shared: list[float]
    answers: tuple[Answers, Answers]

    @property
    def ratio(self) -> float:
        """How many times faster sharing is."""
        return median(self.whole) / median(self.shared)


@one_line_errors("prefix_sharing_speed")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints a table.

    Args:
        arguments: Default: the process's.
    """
    args = _parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for folder, wanted in ((args.commonsense, args.tasks), (args.mmlu, args.subjects)):
        if wanted and not folder.is_dir():
            raise DataError(f"{folder} is no folder; give those of the commonsense tasks and of MMLU")
    torch.set_num_threads(1)
    loaded = load_backbone(BackboneConfig(quantization="none", compute_dtype="float32"), device)
    print(f"{'task':<32}{'items':>6}{'whole/s':>9}{'shared/s':>9}{'ratio':>7}{'same':>7}{'max diff':>10}")
    ratios = []
    for name, data in _sources(args):
        data.connect(loaded.tokenizer)
        data.setup("validate")
        measured = measure(loaded.model, data, args.repeats, device)
        ratios.append(measured.ratio)
        print(line(name, measured), flush=True)
    print(f"median ratio {median(ratios):.2f}, lowest {min(ratios):.2f}")


def measure(model: Any, data: MokaDataModule, repeats: int, device: str) -> Measured:
    """Scores all validation questions with and without sharing, in turn.

    Args:
        model: The model.
        data: Multiple-choice data, set up.
        repeats: Measurements of each.
        device: Where the model lies.
    """
    clock: Callable[[], float] = time.perf_counter if device == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {"never": [], "auto": []}
    answers: dict[str, Answers] = {}
    for _ in range(repeats):
        for share in ("never", "auto"):
            data.share_prefix = share
            batches = list(data.val_dataloader())
            start = clock()
            scores = [score(model, batch, device) for batch in batches]
            seconds[share].append(clock() - start)
            answers[share] = by_item(batches, scores)
    return Measured(seconds["never"], seconds["auto"], (answers["never"], answers["auto"]))


def line(name: str, measured: Measured) -> str:
    """The table's line of a task."""
    alone, together = measured.answers
    count = len(alone)
    same = sum(alone[key][0] == together[key][0] for key in alone)
    worst = max(abs(a - b) for key in alone for a, b in zip(alone[key][1], together[key][1], strict=True))
    speeds = "".join(f"{count / median(seconds):>9.2f}" for seconds in (measured.whole, measured.shared))
    return f"{name:<32}{count:>6}{speeds}{measured.ratio:>7.2f}{same:>4}/{count:<3}{worst:>9.1e}"


@torch.no_grad()
def score(model: Any, batch: dict[str, Any], device: str) -> Tensor:
    """Log-likelihoods of a batch's options, (B,), with the layout that the batch has.

    Args:
        model: The model.
        batch: What the data module's loader gives.
        device: Where the model lies.
    """
    if "shared" in batch:
        scores = score_shared(model, move_data_to_device(batch["shared"], torch.device(device)))
    else:
        scores = score_tokens(model, batch["input_ids"].to(device), batch["labels"].to(device))
    return -row_sums(scores, len(batch["input_ids"])).cpu()


def by_item(batches: Sequence[dict[str, Any]], scores: Sequence[Tensor]) -> Answers:
    """The answers to all items, by their tokens.

    Args:
        batches: What was scored.
        scores: Log-likelihoods of each batch's options, (B,) each.
    """
    items = {}
    for batch, of_batch in zip(batches, scores, strict=True):
        right = is_right(of_batch.double(), batch["item"], batch["is_answer"])
        for number in range(int(batch["item"].max()) + 1):
            options = batch["item"] == number
            ends = [int(row.nonzero().max()) + 1 for row in batch["labels"][options] >= 0]
            rows = zip(batch["input_ids"][options], ends, strict=True)
            key = str([ids[:end].tolist() for ids, end in rows])
            items[key] = (bool(right[options].any()), of_batch[options].tolist())
    return items


def _sources(args: argparse.Namespace) -> list[tuple[str, MokaDataModule]]:
    """The data modules of all tasks, cut to the wanted number of questions."""
    sources: list[tuple[str, MokaDataModule]] = [
        (
            f"{task} ({args.prompt})",
            CommonsenseData(
                args.commonsense,
                tasks=[task],
                validation_limit=args.items,
                prompt=args.prompt,
                generated_tokens=0,
                batch_size=args.batch_size,
            ),
        )
        for task in args.tasks
    ]
    for scoring in ("letters", "text") if args.subjects else ():
        data = MmluData(args.mmlu, args.subjects, 5, scoring, args.mmlu_items, batch_size=args.batch_size)
        sources.append((f"mmlu, 5 shots ({scoring})", data))
    return sources


def _parser() -> Parser:
    parser = Parser("prefix_sharing_speed", DESCRIPTION)
    parser.add_argument("commonsense", type=Path, help="folder with TASK/test.json")
    parser.add_argument("mmlu", type=Path, help="folder with dev/ and test/")
    parser.add_argument("--items", type=positive_int, default=60, help="questions of each task")
    parser.add_argument("--mmlu-items", type=positive_int, default=8, help="questions of each MMLU subject")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="number of measurements with and without sharing"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, help="questions of a batch")
    parser.add_argument("--prompt", default="cloze", help="prompt of the commonsense tasks")
    parser.add_argument("--tasks", nargs="*", default=["arc_easy", "arc_challenge", "openbookqa", "boolq"])
    parser.add_argument("--subjects", nargs="*", default=["astronomy", "marketing", "global_facts"])
    return parser
