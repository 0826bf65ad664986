"""Adapts a small vision transformer to new digits by several methods; ``scripts/digits.py`` runs it."""

import argparse
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from moka_pl.adapters import FullFineTuning, MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.studies.common import (
    Parser,
    device_name,
    one_line_errors,
    positive_int,
    silenced_lightning,
    versions,
    write_atomically,
    write_json,
)
from moka_pl.studies.outputs import REPLACED, has_keys, json_output, text_output

DESCRIPTION = """\
Trains a small vision transformer on the digits 0 to 4, and adapts it to the digits 5 to 9.

    python scripts/digits.py --json scripts/results/vision/digits.json

For each seed a base is trained from scratch. Every method then adapts all linear layers of the same base,
with the same batches, and trains a new head. Its learning rate is the one with the lowest validation loss
over all seeds, never the edge of those tried; the test uses other images. Results: mean ± standard error over
the seeds, and differences to LoRA on the same base. About ten minutes on one core.
"""

OLD, NEW = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]
#: Shares of the images of each new digit that are held out: one in five is left to train on.
_VALIDATION, _TEST = 0.2, 0.6
_BATCH, _BASE_RATE = 32, 1e-3
_HEAD = "| method | trained | rate | test accuracy (%) | test loss | accuracy − LoRA's | loss − LoRA's |"
#: Suffix of the table's file.
_TABLE = ".md"
#: Factor between neighbouring learning rates, and most that are added beyond the edges.
_FACTOR, _WIDEN = 3.0, 4


@dataclass(frozen=True)
class Method:
    """A method to compare.

    Attributes:
        name: Its name in the table.
        config: Makes the adapter's configuration.
        rates: Learning rates to begin with, ascending.
    """

    name: str
    config: Callable[[], Any]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """What one training came to.

    Attributes:
        method: Name of the method.
        rate: Learning rate.
        seed: Seed of base, adapter and batches.
        parameters: Trained parameters, the head's among them.
        validation_loss: Mean -log p of the validation images' classes, nats.
        test_loss: The same of the test images.
        test_accuracy: Share of test images whose class is the likeliest.
        seconds: Of training and evaluation.
    """

    method: str
    rate: float
    seed: int
    parameters: int
    validation_loss: float
    test_loss: float
    test_accuracy: float
    seconds: float


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


_ADAPTED = (3e-3, 9e-3, 2.7e-2)
METHODS = (
    Method(
        "MoKA, square",
        lambda: MokaConfig(components=4, filters="square", target_modules="all-linear"),
        _ADAPTED,
    ),
    Method(
        "MoKA, servable",
        lambda: MokaConfig(components=4, rank=16, filters="servable", target_modules="all-linear"),
        _ADAPTED,
    ),
    Method("LoRA r4", _lora, _ADAPTED),
    Method("full fine-tuning", FullFineTuning, (3e-4, 1e-3, 3e-3)),
    Method("head only", lambda: FullFineTuning(target_modules=["classifier"]), (1e-2, 3e-2, 9e-2)),
)
REFERENCE = "LoRA r4"


def train_base(folder: Path, seed: int, epochs: int) -> float:
    """Trains a base from scratch on the old digits, and writes it; returns its accuracy on their test images.

    Args:
        folder: Where it is written, as a transformers folder.
        seed: Of its weights and batches.
        epochs: Passes over the images.
    """
    shape = BackboneConfig("vit-digits", weights="random", quantization="none", seed=seed)
    module, values = _fit(shape, FullFineTuning(), OLD, _BASE_RATE, seed, epochs)
    module.causal_lm.save_pretrained(folder)
    module.image_processor.save_pretrained(folder)
    return float(values["test/accuracy"])


def adapt(base: Path, method: Method, rate: float, seed: int, epochs: int) -> Run:
    """Adapts a base to the new digits.

    Args:
        base: Its folder.
        method: By what.
        rate: Learning rate.
        seed: Of adapter and batches.
        epochs: Passes over the images.
    """
    started = time.monotonic()
    backbone = BackboneConfig(str(base), quantization="none")
    held_out = {"validation_share": _VALIDATION, "test_share": _TEST}
    module, values = _fit(backbone, method.config(), NEW, rate, seed, epochs, **held_out)
    return Run(
        method=method.name,
        rate=rate,
        seed=seed,
        parameters=sum(p.numel() for p in module.parameters() if p.requires_grad),
        validation_loss=values["val/loss"],
        test_loss=values["test/loss"],
        test_accuracy=values["test/accuracy"],
        seconds=time.monotonic() - started,
    )


def _fit(
    backbone: BackboneConfig,
    adapter: Any,
    digits: list[int],
    rate: float,
    seed: int,
    epochs: int,
    **split: float,
) -> tuple[Any, dict[str, float]]:
    """Trains, validates and tests; returns the module and all metrics."""
    from lightning.pytorch import Trainer, seed_everything

    from moka_pl.vision import DigitsData, VisionModule

    with silenced_lightning():
        seed_everything(seed)
        module = VisionModule(
            backbone, adapter, optimizer=lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.0)
        )
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=epochs,
        )
        data = DigitsData(digits, batch_size=_BATCH, eval_batch_size=512, seed=seed, **split)
        trainer.fit(module, data)
        values = dict(module.eval_values)
        trainer.test(module, data, verbose=False)
    return module, values | module.eval_values


def pick_rate(rates: Sequence[float], loss_at: Callable[[float], float]) -> tuple[float, bool]:
    """Returns the rate of the lowest loss, and whether it is an edge of all that were tried.

    Beyond an edge that is the best a further rate is tried, up to four of them.

    Args:
        rates: Rates to begin with, ascending.
        loss_at: The validation loss of a rate.
    """
    losses = {rate: loss_at(rate) for rate in rates}
    for _ in range(_WIDEN):
        best = min(losses, key=losses.__getitem__)
        if best not in (min(losses), max(losses)):
            return best, False
        further = best * _FACTOR if best == max(losses) else best / _FACTOR
        losses[further] = loss_at(further)
    best = min(losses, key=losses.__getitem__)
    return best, best in (min(losses), max(losses))


def compare(seeds: int, epochs: int, base_epochs: int) -> dict[str, Any]:
    """Trains all there is to train, and returns what was found as JSON values.

    Args:
        seeds: Number of seeds.
        epochs: Passes over the new digits' images.
        base_epochs: Passes over the old ones'.
    """
    runs: list[Run] = []
    picked: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        bases = [Path(scratch, str(seed)) for seed in range(seeds)]
        accuracies = []
        for seed, folder in enumerate(bases):
            accuracies.append(train_base(folder, seed, base_epochs))
            print(f"base {seed}: {accuracies[-1]:.1%} of the test images of the digits 0 to 4", flush=True)
        for method in METHODS:

            def loss_at(rate: float, method: Method = method) -> float:
                made = [adapt(folder, method, rate, seed, epochs) for seed, folder in enumerate(bases)]
                runs.extend(made)
                loss, seconds = (fmean(getattr(r, n) for r in made) for n in ("validation_loss", "seconds"))
                print(f"{method.name}, rate {rate:.2g}: validation {loss:.4f}, {seconds:.1f} s", flush=True)
                return loss

            rate, edge = pick_rate(method.rates, loss_at)
            picked[method.name] = {"rate": rate, "edge": edge}
    return {"base_accuracy": accuracies, "picked": picked, "runs": [asdict(run) for run in runs]}


def table(found: dict[str, Any]) -> str:
    """Writes the comparison as a Markdown table.

    Args:
        found: What :func:`compare` returned.
    """
    runs = [Run(**run) for run in found["runs"]]
    rows = {
        name: sorted((r for r in runs if (r.method, r.rate) == (name, picked["rate"])), key=lambda r: r.seed)
        for name, picked in found["picked"].items()
    }
    lines = [
        _HEAD,
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in rows.items():
        rate = f"{own[0].rate:.2g}" + ("*" if found["picked"][name]["edge"] else "")
        accuracy, loss = [100 * r.test_accuracy for r in own], [r.test_loss for r in own]
        beside = [""] * 2
        if name != REFERENCE and REFERENCE in rows:
            pairs = list(zip(own, rows[REFERENCE], strict=True))
            beside = [
                mean_error([100 * (a.test_accuracy - b.test_accuracy) for a, b in pairs], "+.1f"),
                mean_error([a.test_loss - b.test_loss for a, b in pairs], "+.3f"),
            ]
        cells = [
            f"{own[0].parameters:,}",
            rate,
            mean_error(accuracy, ".1f"),
            mean_error(loss, ".3f"),
            *beside,
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_error(values: Sequence[float], shown: str) -> str:
    """Returns mean ± standard error of the mean as text; of a single value that alone."""
    mean = format(fmean(values), shown)
    if len(values) < 2:
        return mean
    return f"{mean} ± {format(stdev(values) / math.sqrt(len(values)), shown.lstrip('+'))}"


def _outputs(text: str) -> Path:
    """The type of the option for the file of all runs, beside which there is one for the table."""
    if Path(text).suffix == _TABLE:
        raise argparse.ArgumentTypeError(f"{text} would be the table's name; end it with .json")
    text_output(_HEAD)(str(Path(text).with_suffix(_TABLE)))
    return json_output(has_keys("command", "versions", "picked", "runs"))(text)


@one_line_errors("digits")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("digits", DESCRIPTION)
    parser.add_argument(
        "--seeds", type=positive_int, default=5, help="seeds, each with a base of its own (5)"
    )
    parser.add_argument(
        "--epochs", type=positive_int, default=30, help="passes over the new digits' images (30)"
    )
    parser.add_argument("--base-epochs", type=positive_int, default=30, help="passes over the old ones' (30)")
    parser.add_argument("--json", type=_outputs, help=f"a file for all runs, and .md beside it; {REPLACED}")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    found = compare(args.seeds, args.epochs, args.base_epochs)
    text = table(found)
    print(f"\n{text}")
    if args.json is not None:
        about = {
            "command": f"python {shlex.join(sys.argv)}",
            "versions": versions("scikit-learn"),
            "device": device_name("cpu"),
            "seconds": round(time.monotonic() - started),
            "epochs": args.epochs,
            "base_epochs": args.base_epochs,
        }
        write_json(args.json, about | found)
        write_atomically(args.json.with_suffix(_TABLE), text + "\n")
