"""What Lightning and this package's callbacks add to a bare training loop."""

import contextlib
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence

from moka_pl.studies.benchmark.bench import Record, Values
from moka_pl.studies.benchmark.cases import ALL, CAPTURED, Preset
from moka_pl.studies.common import first_line, free_memory

_ADAPTERS: dict[str, dict[str, object]] = {
    "MoKA r10 fit": {},
    "MoKA r2 all linear fit": {"components": 2, "target_modules": ALL},
    "MoKA servable r16 all linear fit": {
        "components": 1,
        "target_modules": ALL,
        "filters": "servable",
        "rank": 16,
    },
}
ROWS = [*_ADAPTERS, *(name + CAPTURED for name in _ADAPTERS)]


def measure_fit(preset: Preset, checkpointing: bool | str, names: Sequence[str]) -> Iterator[Record]:
    """Runs ``fit`` through the command line, with all of its default callbacks and TensorBoard logs.

    Args:
        preset: Model, batch and steps.
        checkpointing: Compute activations again in the backward pass; ``offload`` as ``fit`` has it.
        names: Only these rows of ``ROWS``; for none the first alone.

    Yields:
        A record a row.
    """
    for name in [row for row in ROWS if row in names] if names else ROWS[:1]:
        values: Values = {}
        problem = None
        try:
            values = time_fit(preset, checkpointing, name)
        except (Exception, SystemExit) as error:  # the parser of the command line ends the process
            problem = first_line(error)
        free_memory()
        yield Record("fit", name, bool(checkpointing), {}, values, problem)


def time_fit(preset: Preset, checkpointing: bool | str, name: str = ROWS[0]) -> Values:
    """Times the steps of a ``fit``, and of a bare loop on its model before and after it.

    Args:
        preset: Model, batch and steps.
        checkpointing: Compute activations again in the backward pass; ``offload`` as ``fit`` has it.
        name: One of ``ROWS``: the adapter, and whether ``fit`` replays its steps as CUDA graphs, as the bare
            loop never does.

    Returns:
        ``fit_ms`` and ``bare_ms`` (medians), ``fit_mean_ms`` and ``bare_mean_ms`` (what is done every few
        steps, such as logging, shows in the mean), ``ratio`` and ``mean_ratio`` of fit to bare, ``peak_gib``
        and ``trainable``.
    """
    from moka_pl.cli.lightning import run
    from moka_pl.studies.benchmark.probe import Probe

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),  # standard output is for the table
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        options = _options(preset, checkpointing, folder) | _row_options(name)
        run(["fit", *(f"--{key}={value}" for key, value in options.items())])
    probe, Probe.latest = Probe.latest, None
    assert probe is not None
    fit, bare = statistics.median(probe.fit_ms), statistics.median(probe.bare_ms)
    fit_mean, bare_mean = statistics.mean(probe.fit_ms), statistics.mean(probe.bare_ms)
    return {
        "fit_ms": fit,
        "fit_mean_ms": fit_mean,
        "bare_ms": bare,
        "bare_mean_ms": bare_mean,
        "ratio": fit / bare,
        "mean_ratio": fit_mean / bare_mean,
        "peak_gib": probe.peak,
        "trainable": probe.trainable,
        "steps": len(probe.fit_ms),
    }


def _row_options(name: str) -> dict[str, object]:
    adapter = _ADAPTERS[name.removesuffix(CAPTURED)]
    graphs = {"model.cuda_graphs": "true"} if name.endswith(CAPTURED) else {}
    return {**{f"model.adapter.{key}": value for key, value in adapter.items()}, **graphs}


def _options(preset: Preset, checkpointing: bool | str, folder: str) -> dict[str, object]:
    """Those of ``configs/llama2.yaml``, on a model and data without downloads."""
    batches = preset.warmup + preset.fit_steps
    return {
        "model.backbone.name": preset.shape,
        "model.backbone.weights": "random",
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 2e-4,
        "model.optimizer.weight_decay": 0.0,
        "model.lr_scheduler": "moka_pl.WarmupDecay",
        "model.gradient_checkpointing": str(checkpointing).lower(),
        "data": "moka_pl.studies.benchmark.probe.SyntheticData",
        "data.batch_size": preset.batch,
        "data.length": preset.length,
        "data.batches": batches,
        "data.num_workers": preset.workers,
        "trainer.accelerator": "gpu" if preset.device == "cuda" else "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": batches,
        "trainer.log_every_n_steps": 10,
        "trainer.callbacks": "moka_pl.studies.benchmark.probe.Probe",
        "trainer.callbacks.warmup": preset.warmup,
        "trainer.callbacks.steps": preset.fit_steps,
        "trainer.logger.save_dir": folder,
        "checkpoint.every_n_train_steps": 200,
    }
