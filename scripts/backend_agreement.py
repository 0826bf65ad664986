#!/usr/bin/env python3
"""Trains the same model with several backends and shows whether their loss curves differ by more than noise.

    python scripts/backend_agreement.py --device gpu --steps 200 --json agreement.json

The noise is what two seeds of the same backend differ by; a backend's distance is what the same seed differs
by between it and the first backend. In bfloat16 the fused backend rounds W + ΔW: if small early updates were
lost, it would show here. Without a GPU, "rounded" computes in float32 but with W + ΔW rounded to bfloat16 as
the kernels round it:

    python scripts/backend_agreement.py --device cpu --dtype float32 --backends dense rounded --batch_size 4 \
        --max_length 96
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from moka_pl import BackboneConfig, InstructionData, MokaConfig, MokaModule
from moka_pl.ops.merged_forward import DenseUpdates
from moka_pl.ops.triton.reference import round_by_thresholds

#: Steps at a run's end whose mean loss is compared; and steps that make one point of a curve.
_LAST, _WINDOW = 50, 20


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
        base = self.dense()
        update = exact(replace(self, dense=lambda: torch.zeros_like(base)), *parts)
        return round_by_thresholds(base.bfloat16().float() + update).float()

    DenseUpdates.weight = weight  # type: ignore[method-assign]
    try:
        yield
    finally:
        DenseUpdates.weight = exact  # type: ignore[method-assign]


def train(args: argparse.Namespace, backend: str, seed: int) -> dict[str, Any]:
    """Trains once; returns the curve and the held-out loss before and after."""
    pl.seed_everything(seed, verbose=False)
    weights = "random" if args.random else "pretrained"
    module = MokaModule(
        BackboneConfig(args.model, weights=weights, compute_dtype=args.dtype),
        MokaConfig(backend="dense" if backend == "rounded" else backend),
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
    return {
        "backend": backend,
        "seed": seed,
        "losses": losses.values,
        "held_out": module.eval_values["val/loss"],
    }


def finished_runs(file: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a file holds already, if it is of the same device and options."""
    if file is None or not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    return list(found["runs"]) if {key: found[key] for key in about} == about else []


def distance(one: list[float], other: list[float]) -> float:
    """Mean absolute difference of two curves after averaging over windows of steps."""
    starts = range(0, min(len(one), len(other)), _WINDOW)
    means = [
        (statistics.fmean(one[k : k + _WINDOW]), statistics.fmean(other[k : k + _WINDOW])) for k in starts
    ]
    return statistics.fmean(abs(a - b) for a, b in means)


def main() -> None:
    """Trains every backend with every seed and prints the distances."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="backbone, as in BackboneConfig")
    parser.add_argument("--random", action="store_true", help="random weights of that shape")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--dtype", default="bfloat16", help="compute dtype")
    parser.add_argument("--backends", nargs="+", default=["structured", "fused"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--batch_size", type=int, default=8, help="examples")
    parser.add_argument("--max_length", type=int, default=256, help="tokens")
    parser.add_argument("--cuda_graphs", action="store_true", help="replay the steps as CUDA graphs")
    parser.add_argument(
        "--json", type=Path, help="file for curves, versions and device; runs that it holds are not repeated"
    )
    args = parser.parse_args()
    about = {
        "device": torch.cuda.get_device_name() if args.device == "gpu" else "cpu",
        "torch": torch.__version__,
        "options": {
            key: value for key, value in vars(args).items() if key not in ("json", "backends", "seeds")
        },
    }
    runs = finished_runs(args.json, about)
    for backend in args.backends:
        for seed in args.seeds:
            run = next((r for r in runs if (r["backend"], r["seed"]) == (backend, seed)), None)
            if run is None:
                run = train(args, backend, seed)
                runs.append(run)
                if args.json:
                    args.json.write_text(json.dumps(about | {"runs": runs}) + "\n", encoding="utf-8")
            last = statistics.fmean(run["losses"][-_LAST:])
            print(
                f"{backend}, seed {seed}: last steps {last:.4f}, held out {run['held_out']:.4f}", flush=True
            )
    curves = {(run["backend"], run["seed"]): run for run in runs}
    first, seeds = args.backends[0], args.seeds
    for seed in seeds[1:]:
        noise = distance(curves[first, seeds[0]]["losses"], curves[first, seed]["losses"])
        held = abs(curves[first, seeds[0]]["held_out"] - curves[first, seed]["held_out"])
        print(f"noise, {first}, seed {seeds[0]} against {seed}: curve {noise:.4f}, held out {held:.4f}")
    for backend in args.backends[1:]:
        for seed in seeds:
            found = distance(curves[first, seed]["losses"], curves[backend, seed]["losses"])
            held = abs(curves[first, seed]["held_out"] - curves[backend, seed]["held_out"])
            print(f"{backend} against {first}, seed {seed}: curve {found:.4f}, held out {held:.4f}")


if __name__ == "__main__":
    main()
