"""The layout of TensorBoard's charts and the settings, as its plugins read them."""

import re

import pytest
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata

from moka_pl.adapters import FullFineTuning
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import BoardLogger, Dashboard, GateMonitor, Throughput
from moka_pl.callbacks.board import board_tag
from moka_pl.data import MixtureData

LAYERS = [f"layer{i:02d}.{kind}_proj" for i in range(2) for kind in "qv"]


def logged(logger):
    found = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def charts(found):
    """Tags of every chart that the custom scalars' plugin would draw, by category and title."""
    [event] = found.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    tags = found.Tags()["scalars"]
    # TensorBoard would draw all charts of a large model at once.
    assert [category.closed for category in layout.category][:2] in ([False], [False, True])
    return {
        category.title: {
            chart.title: [tag for tag in tags if any(re.match(one, tag) for one in chart.multiline.tag)]
            for chart in category.chart
        }
        for category in layout.category
    }


@pytest.fixture
def logger(tmp_path):
    return BoardLogger(tmp_path, name="run", default_hp_metric=False)


def test_one_chart_a_layer_grouped_by_projection(
    make_module, make_data, make_commonsense, make_trainer, logger
):
    data = MixtureData([make_data(), make_commonsense()], batch_size=4, eval_batch_size=4)
    callbacks = [GateMonitor(heatmap=False), Throughput(), Dashboard()]
    make_trainer(*callbacks, logger=logger, limit_train_batches=2, log_every_n_steps=1).fit(
        make_module(), data
    )
    found = logged(logger)
    shown = charts(found)
    assert list(shown) == ["run", "gates", "α q_proj", "α v_proj"]
    assert list(shown["run"])[:3] == ["loss", "accuracy", "accuracy by task"]
    losses = {"train/loss", "val/loss", "val/commonsense/loss", "val/instruction/loss"}
    assert set(shown["run"]["loss"]) == losses
    assert set(shown["run"]["accuracy by task"]) == {"val_tasks/accuracy/even", "val_tasks/accuracy/odd"}
    assert shown["gates"]["entropy, q_proj"] == ["α entropy/layer00.q_proj", "α entropy/layer01.q_proj"]
    for projection in ("q_proj", "v_proj"):
        layers = shown[f"α {projection}"]
        assert list(layers) == [layer for layer in LAYERS if layer.endswith(projection)]
        for layer, tags in layers.items():
            row = layer.partition(".")[0]
            names = [tag.removeprefix(f"α {projection}/{row}/") for tag in tags]
            assert [name.partition(": ")[0] for name in names] == ["0", "1", "2"]
            assert all(re.fullmatch(r"\d: \d+×\d+ ⊗ \d+×\d+", name) for name in names)
    # No chart is empty, and every gate and loss is on one.
    assert all(tags for category in shown.values() for tags in category.values())
    drawn = {tag for category in shown.values() for tags in category.values() for tag in tags}
    assert {tag for tag in found.Tags()["scalars"] if "α" in tag or "loss" in tag} <= drawn
    assert not [tag for tag in found.Tags()["scalars"] if "stderr" in tag]


def test_settings_with_metrics(make_module, make_data, make_trainer, logger):
    make_trainer(Dashboard(), logger=logger, limit_train_batches=1).fit(make_module(), make_data())
    content = logged(logger).SummaryMetadata
    start = metadata.parse_session_start_info_plugin_data(
        content(metadata.SESSION_START_INFO_TAG).plugin_data.content
    )
    assert start.group_name == "run/0"
    assert start.hparams["components"].number_value == 3
    assert start.hparams["learning_rate"].number_value == pytest.approx(0.01)
    assert start.hparams["method"].string_value == "MoKA"
    assert start.hparams["examples"].number_value == 13
    assert "rank" not in start.hparams
    experiment = metadata.parse_experiment_plugin_data(content(metadata.EXPERIMENT_TAG).plugin_data.content)
    # TensorBoard takes the columns from one run for all of them.
    assert {"rank", *start.hparams} <= {info.name for info in experiment.hparam_infos}
    assert experiment.metric_infos[0].name.tag == "val/loss"


def test_other_methods_have_no_gates(make_module, make_data, make_trainer, logger):
    module = make_module(backbone=BackboneConfig("tiny", weights="random", quantization="none"))
    module.adapter = FullFineTuning()
    make_trainer(GateMonitor(), Dashboard(), logger=logger, limit_train_batches=1).fit(module, make_data())
    assert list(charts(logged(logger))) == ["run"]


def test_other_loggers_get_the_settings(make_module, make_data, make_trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    make_trainer(Dashboard(), logger=logger, limit_train_batches=1).fit(make_module(), make_data())
    assert "learning_rate: 0.01\n" in (tmp_path / "run/version_0/hparams.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("val/accuracy/boolq", "val_tasks/accuracy/boolq"),
        ("test/nll/mmlu_macro", "test_tasks/nll/mmlu_macro"),
        ("val/accuracy", "val/accuracy"),
        ("val/commonsense/loss", "val/commonsense/loss"),
        ("val/commonsense/accuracy", "val/commonsense/accuracy"),
        ("train/loss", "train/loss"),
        ("hours/accuracy/x", "hours/accuracy/x"),
    ],
)
def test_tags_of_metrics(name, tag):
    assert board_tag(name) == tag
