"""What TensorBoard shows beside curves: a layout of charts, and settings by which runs are compared."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.filters import describe_filters
from moka_pl.adapters.methods.base import name_targets
from moka_pl.adapters.methods.registry import method_of
from moka_pl.callbacks.board import write_summary
from moka_pl.callbacks.gate_tags import ALPHA, GatedLayer, projections
from moka_pl.callbacks.gates import GateMonitor, gated_layers
from moka_pl.data.types import data_of
from moka_pl.training.module import MokaModule
from moka_pl.training.trainer_state import is_trial

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

Layout = dict[str, dict[str, list[str]]]
"""Regular expressions of tags, by category and chart."""

#: Charts of every run.
_RUN_CHARTS = {
    "loss": ["^train/loss$", "^val/(.+/)?loss$"],
    "tokens or images per second": ["^train/(tokens|images)_per_second$"],
    "gradient norm": ["^train/grad_norm$"],
    "learning rate": ["^train/lr"],
}
#: Charts of runs that are evaluated on multiple choice.
_TASK_CHARTS = {
    "accuracy": ["^val/(.+/)?accuracy$", "^val/(.+/)?acc_norm$"],
    "accuracy by task": ["^val(_tasks)?/accuracy/(?!.*_stderr$)"],
}

#: Metrics of the HPARAMS tab, which shows the last value of each tag.
METRICS = (
    "val/loss",
    "val/accuracy",
    "val/acc_norm",
    "train/loss",
    "train/tokens_per_second",
    "train/peak_memory_gib",
)
#: Settings that are numbers; the others are texts. TensorBoard takes the columns of the first run for all.
_NUMBERS = {
    "components",
    "rank",
    "scaling",
    "parameters",
    "learning_rate",
    "weight_decay",
    "warmup",
    "batch_size",
    "accumulation",
    "processes",
    "max_length",
    "seed",
    "steps",
    "examples",
    "truncated",
    "dropped",
}


class Dashboard(Callback):
    """Gives TensorBoard a layout of its charts and the run's settings; other loggers get the settings.

    The tab CUSTOM SCALARS has a category ``run`` (losses, accuracies, speed), one of the gates' entropies,
    and one for each projection with one chart per layer. The tab HPARAMS has the settings and the last
    metrics.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the layout and the settings."""
        if not trainer.is_global_zero or is_trial(trainer):
            return
        assert isinstance(pl_module, MokaModule)
        settings = run_settings(trainer, pl_module)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams({name: value for name, value in settings.items() if value is not None})
                continue
            write_summary(logger, layout_summary(run_layout(trainer, pl_module)))
            for summary in _hparams(settings, f"{logger.name}/{logger.version}"):
                write_summary(logger, summary)


def run_layout(trainer: Trainer, pl_module: LightningModule) -> Layout:
    """Returns the charts of a run."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    logged = any(isinstance(callback, GateMonitor) for callback in callbacks)
    tasks = any(tasks for _, tasks in data_of(trainer).eval_sets)
    return layout(gated_layers(pl_module) if logged else [], tasks)


def layout(layers: Sequence[GatedLayer], tasks: bool) -> Layout:
    """Returns the charts: of the run, of the gates' entropies, and of each layer's gates by projection.

    Args:
        layers: The layers whose gates are logged.
        tasks: Whether the run is evaluated on multiple choice.
    """
    loss = {"loss": _RUN_CHARTS["loss"]}
    categories: Layout = {"run": loss | (_TASK_CHARTS if tasks else {}) | _RUN_CHARTS}
    names = projections(layers)
    if layers:
        entropies = {"entropy, mean": [f"^{ALPHA}/entropy"]}
        by_layer = {f"entropy, {name}": [f"^{ALPHA} entropy/.*{re.escape(name)}$"] for name in names}
        categories["gates"] = entropies | by_layer
    for name in names:
        own = [layer for layer in layers if layer.projection == name]
        categories[f"{ALPHA} {name}"] = {layer.label: [f"^{re.escape(layer.group)}"] for layer in own}
    return categories


def layout_summary(layout: Layout) -> "Summary":
    """Returns what the custom scalars' plugin reads; all categories but the first are folded at first."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    categories = [
        layout_pb2.Category(
            title=category,
            closed=number > 0,
            chart=[
                layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=tags))
                for title, tags in charts.items()
            ],
        )
        for number, (category, charts) in enumerate(layout.items())
    ]
    stored = layout_pb2.Layout(category=categories).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        tensor=TensorProto(dtype="DT_STRING", string_val=[stored]),
        metadata=SummaryMetadata(plugin_data=plugin),
    )
    return Summary(value=[value])


def run_settings(trainer: Trainer, module: MokaModule) -> dict[str, str | float | None]:
    """Returns what decides a run, by name: the same names for all runs, None where one does not apply."""
    method, course = method_of(module.adapter), module.course
    options, report = method.options(), data_of(trainer).report.get("train")
    kronecker = isinstance(module.adapter, MokaConfig)
    settings: dict[str, Any] = {
        "base": module.backbone.name,
        "quantization": module.backbone.quantization,
        "method": method.title,
        "filters": describe_filters(options["filters"]) if kronecker else None,
        "components": options.get("components"),
        "rank": options.get("rank") if kronecker else options.get("r"),
        "gating": options.get("gating"),
        "scaling": module.adapter.effective_scaling if isinstance(module.adapter, MokaConfig) else None,
        "targets": name_targets(options.get("target_modules") or ""),
        "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "learning_rate": course["learning_rate"].get("lr"),
        "schedule": course["scheduler"].get("decay") or course["scheduler"].get("class"),
        "warmup": course["scheduler"].get("warmup"),
        "optimizer": course["optimizer"].get("class"),
        "weight_decay": course["optimizer"].get("weight_decay"),
        "steps": trainer.estimated_stepping_batches,
        "batch_size": course["batch_size"].get("batch_size"),
        "accumulation": trainer.accumulate_grad_batches,
        "processes": trainer.world_size,
        "seed": course["seed"].get("seed"),
        "precision": course["precision"].get("compute_dtype"),
        "data": type(trainer.datamodule).__name__,  # type: ignore[attr-defined]
        "prompt": data_of(trainer).prompt,
        "max_length": course["data"].get("max_length"),
        "examples": report and report.kept,
        "truncated": report and report.truncated,
        "dropped": report and report.dropped,
    }
    return {
        name: value if value is None else float(value) if name in _NUMBERS else str(value)
        for name, value in settings.items()
    }


def _hparams(settings: Mapping[str, str | float | None], run: str) -> list[Any]:
    """Returns the summaries of the HPARAMS tab.

    Args:
        settings: The run's settings.
        run: The run's name.
    """
    # Its public ``api`` needs TensorFlow.
    from tensorboard.plugins.hparams import summary_v2 as api

    columns = [api.HParam(name) for name in settings]
    given = {name: value for name, value in settings.items() if value is not None}
    metrics = [api.Metric(tag) for tag in METRICS]
    return [api.hparams_config_pb(columns, metrics), api.hparams_pb(given, trial_id=run)]
