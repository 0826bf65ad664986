"""Do backends train alike? The same model with several backends, their loss curves beside the seeds' noise.

``scripts/backend_agreement.py`` runs it.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import lightning.pytorch as pl
import torch

from moka_pl.backbone import BackboneConfig
from moka_pl.ops.dispatch import Backend
from moka_pl.ops.merged_forward import DenseUpdates
from moka_pl.ops.triton.reference import round_by_thresholds
from moka_pl.studies.common import (
    Parser,
    check_device,
    one_line_errors,
    positive_int,
    positive_number,
    write_json,
)
from moka_pl.studies.outputs import has_keys, json_output

DESCRIPTION = """\
Trains the same model with several backends and shows whether their loss curves differ by more than noise.

    python scripts/backend_agreement.py --device gpu --steps 200 --json agreement.json

The noise is the difference between two seeds of the same backend; a backend's distance is the difference from
the first backend with the same seed. In bfloat16 the fused backend rounds W + ΔW: if small early updates were
lost, it would show here. Without a GPU, "rounded" computes in float32 but with W + ΔW rounded to bfloat16 as
the kernels round it:

    python scripts/backend_agreement.py --device cpu --dtype float32 --backends dense rounded \\
        --batch-size 4 --max-length 96
"""
#: Steps at a run's end whose mean loss is shown; and steps that make one point of a curve.
_LAST, _WINDOW = 50, 20

Run = dict[str, Any]


class Losses(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Reads the logged loss."""
        self.values.append(float(trainer.callback_metrics["train/loss"]))


@contextlib.contextmanager
def rounding() -> Iterator[None]:
    """Within it the dense backend rounds W and W + ΔW to bfloat16 as the kernels do."""
    exact = DenseUpdates.weight

    def weight(self: DenseUpdates, *parts: Any) -> torch.Tensor:
        update = exact(replace(self, base_weight=None), *parts)
        if self.base_weight is None:
            return update
        base = self.base_weight()
        return round_by_thresholds(base.bfloat16().float() + update).float()

    DenseUpdates.weight = weight  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        DenseUpdates.weight = exact  # type: ignore[method-assign]


def train(args: argparse.Namespace, backend: str, seed: int) -> Run:
    """Trains once.

    Args:
        args: The parsed options.
        backend: A backend of ``MokaConfig``, or ``rounded``.
        seed: Seed of data and adapters.

    Returns:
        ``backend``, ``seed``, ``losses`` of all steps and the ``held_out`` loss.
    """
    from moka_pl.adapters import MokaConfig
    from moka_pl.data import InstructionData
    from moka_pl.training.module import MokaModule

    pl.seed_everything(seed, verbose=False)
    module = MokaModule(
        BackboneConfig(
            args.model, weights="random" if args.random else "pretrained", compute_dtype=args.dtype
        ),
        MokaConfig(backend=cast(Backend, "dense" if backend == "rounded" else backend)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=args.lr, weight_decay=0.0),
        cuda_graphs=args.cuda_graphs,
    )
    data = InstructionData(
        "sample",
        prompt="alpaca" if args.random else "chat",
        batch_size=args.batch_size,
        max_length=args.max_length,
    )
    losses = Losses()
    trainer = pl.Trainer(
        accelerator=args.device,
        devices=1,
        max_steps=args.steps,
        max_epochs=-1,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=-1,
        limit_val_batches=1.0,
        check_val_every_n_epoch=None,
        val_check_interval=args.steps,
    )
    with rounding() if backend == "rounded" else contextlib.nullcontext():
        trainer.fit(module, datamodule=data)
    held_out = module.eval_values["val/loss"]
    return {"backend": backend, "seed": seed, "losses": losses.values, "held_out": held_out}


def finished_runs(file: Path | None, about: dict[str, Any]) -> list[Run]:
    """The runs that a file holds already, if it is of the same device and options."""
    if file is None or not file.is_file():
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    return list(stored["runs"]) if {key: stored[key] for key in about} == about else []


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two curves after averaging over windows of steps."""
    starts = range(0, min(len(one), len(other)), _WINDOW)
    return fmean(abs(fmean(one[k : k + _WINDOW]) - fmean(other[k : k + _WINDOW])) for k in starts)


@one_line_errors("backend_agreement")
def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every backend with every seed and prints the distances.

    Args:
        arguments: Default: the process's.
    """
    args = _parser().parse_args(arguments)
    check_device(args.device)
    about = {
        "device": torch.cuda.get_device_name() if args.device == "gpu" else "cpu",
        "torch": torch.__version__,
        "options": {
            key: value for key, value in vars(args).items() if key not in ("json", "backends", "seeds")
        },
    }
    runs = finished_runs(args.json, about)
    known = {(run["backend"], run["seed"]): run for run in runs}
    for backend in args.backends:
        for seed in args.seeds:
            if (backend, seed) not in known:
                known[backend, seed] = train(args, backend, seed)
                runs.append(known[backend, seed])
                if args.json:
                    write_json(args.json, about | {"runs": runs})
            run = known[backend, seed]
            last = fmean(run["losses"][-_LAST:])
            print(
                f"{backend}, seed {seed}: last steps {last:.4f}, held out {run['held_out']:.4f}", flush=True
            )
    first, seeds = args.backends[0], args.seeds
    for seed in seeds[1:]:
        differ = _difference(known[first, seeds[0]], known[first, seed])
        print(f"noise, {first}, seed {seeds[0]} against {seed}: {differ}")
    for backend in args.backends[1:]:
        for seed in seeds:
            differ = _difference(known[first, seed], known[backend, seed])
            print(f"{backend} against {first}, seed {seed}: {differ}")


def _difference(one: Run, other: Run) -> str:
    held = abs(one["held_out"] - other["held_out"])
    return f"curve {distance(one['losses'], other['losses']):.4f}, held out {held:.4f}"


def _parser() -> Parser:
    parser = Parser("backend_agreement", DESCRIPTION)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="backbone, as in BackboneConfig")
    parser.add_argument("--random", action="store_true", help="random weights of that shape")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--dtype", default="bfloat16", help="compute dtype")
    parser.add_argument("--backends", nargs="+", default=["structured", "fused"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=positive_int, default=200, help="optimizer steps")
    parser.add_argument("--lr", type=positive_number, default=2e-4, help="peak learning rate")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="examples")
    parser.add_argument("--max-length", type=positive_int, default=256, help="tokens")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay the steps as CUDA graphs")
    parser.add_argument(
        "--json",
        type=json_output(has_keys("device", "torch", "options", "runs")),
        help="file for curves, versions and device; runs that it holds are not repeated",
    )
    return parser
