"""How much faster options are scored when their common prompt is computed once, and whether answers agree.

python scripts/prefix_sharing_speed.py COMMONSENSE_FOLDER MMLU_FOLDER [--items 60] [--repeats 3]

Scores some questions of each task's test file with SmolLM2-135M in float32, both ways in turn, and prints the
medians. On a CPU the seconds are those of the process, on one thread: other work on the machine then counts
least.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data import CommonsenseData, MmluData, MokaDataModule
from moka_pl.evaluation.metrics import is_right
from moka_pl.evaluation.shared_prompt import score_shared
from moka_pl.lm.scoring import TokenScores, row_sums, score_tokens


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commonsense", type=Path, help="folder with TASK/test.json")
    parser.add_argument("mmlu", type=Path, help="folder with dev/ and test/")
    parser.add_argument("--items", type=int, default=60, help="questions of each task")
    parser.add_argument("--mmlu_items", type=int, default=8, help="questions of each MMLU subject")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each way")
    parser.add_argument("--batch_size", type=int, default=16, help="questions of a batch")
    parser.add_argument("--prompt", default="cloze", help="prompt of the commonsense tasks")
    parser.add_argument("--tasks", nargs="*", default=["arc_easy", "arc_challenge", "openbookqa", "boolq"])
    parser.add_argument("--subjects", nargs="*", default=["astronomy", "marketing", "global_facts"])
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    torch.set_num_threads(1)
    loaded = load_backbone(BackboneConfig(quantization="none", compute_dtype="float32"), device)
    print(f"{'task':<32}{'items':>6}{'whole/s':>9}{'shared/s':>9}{'ratio':>7}{'same':>7}{'max diff':>10}")
    ratios = []
    for name, data in sources(arguments):
        data.connect(loaded.tokenizer)
        data.setup("validate")
        whole, shared = [], []
        for _ in range(arguments.repeats):
            for times, share in ((whole, "never"), (shared, "auto")):
                data.share_prefix = share
                batches = list(data.val_dataloader())
                start = clock()
                found = [score(loaded.model, batch, device) for batch in batches]
                times.append(clock() - start)
                if share == "never":
                    alone = by_item(batches, found)
                else:
                    together = by_item(batches, found)
        ratio = statistics.median(whole) / statistics.median(shared)
        ratios.append(ratio)
        count = len(alone)
        same = sum(alone[key][0] == together[key][0] for key in alone)
        worst = max(abs(a - b) for key in alone for a, b in zip(alone[key][1], together[key][1], strict=True))
        speeds = f"{count / statistics.median(whole):>9.2f}{count / statistics.median(shared):>9.2f}"
        print(f"{name:<32}{count:>6}{speeds}{ratio:>7.2f}{same:>4}/{count:<3}{worst:>9.1e}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}, lowest {min(ratios):.2f}")


def sources(arguments: argparse.Namespace) -> list[tuple[str, MokaDataModule]]:
    """The data modules of all tasks, cut to the wanted number of questions."""
    options = {"batch_size": arguments.batch_size}
    found: list[tuple[str, MokaDataModule]] = [
        (
            f"{task} ({arguments.prompt})",
            CommonsenseData(
                arguments.commonsense,
                tasks=[task],
                validation_limit=arguments.items,
                prompt=arguments.prompt,
                generated_tokens=0,
                **options,
            ),
        )
        for task in arguments.tasks
    ]
    for scoring in ("letters", "text") if arguments.subjects else ():
        data = MmluData(arguments.mmlu, arguments.subjects, 5, scoring, arguments.mmlu_items, **options)
        found.append((f"mmlu, 5 shots ({scoring})", data))
    return found


@torch.no_grad()
def score(model: torch.nn.Module, batch: dict, device: str) -> torch.Tensor:
    """Log-likelihoods of a batch's options, with the layout that the batch has."""
    scores: TokenScores
    if "shared" in batch:
        scores = score_shared(model, {name: tensor.to(device) for name, tensor in batch["shared"].items()})
    else:
        scores = score_tokens(model, batch["input_ids"].to(device), batch["labels"].to(device))
    return -row_sums(scores, len(batch["input_ids"])).cpu()


def by_item(batches: list[dict], found: list[torch.Tensor]) -> dict[str, tuple[bool, list[float]]]:
    """Whether an item is answered rightly, and its options' scores, by its tokens."""
    items = {}
    for batch, scores in zip(batches, found, strict=True):
        right = is_right(scores.double(), batch["item"], batch["is_answer"])
        for number in range(int(batch["item"].max()) + 1):
            own = batch["item"] == number
            ends = [int(row.nonzero().max()) + 1 for row in batch["labels"][own] >= 0]
            key = str([ids[:end].tolist() for ids, end in zip(batch["input_ids"][own], ends, strict=True)])
            items[key] = (bool(right[own].any()), scores[own].tolist())
    return items


if __name__ == "__main__":
    main()
