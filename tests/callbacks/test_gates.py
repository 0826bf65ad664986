import io
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.adapters import moka_layers
from moka_pl.callbacks import GateMonitor
from moka_pl.callbacks.gates import gate_matrix, layer_labels, log_scalars

LAYERS = [f"layer{i:02d}.{kind}_proj" for i in range(2) for kind in "qv"]


class SetGates(Callback):
    """Sets all gate logits by hand, before every batch."""

    def __init__(self, logits):
        self.logits = torch.tensor(logits)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            for row, layer in zip(self.logits, moka_layers(pl_module.causal_lm).values(), strict=True):
                layer.moka_gate.copy_(row)


class Remember(Callback):
    """Keeps the gates after every step."""

    def __init__(self):
        self.gates = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.gates[trainer.global_step] = gate_matrix(pl_module)


@pytest.fixture
def events(tmp_path):
    """Runs a fit that logs to TensorBoard and reads the event file back."""

    def read(train, *callbacks, logger=None, **options):
        logger = logger or TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
        train(*callbacks, logger=logger, **options)
        found = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "images": 0})
        found.Reload()
        return found

    return read


def test_scalars_of_every_layer_and_component(train, events):
    remember = Remember()
    found = events(train, remember, GateMonitor(every_n_steps=2), max_epochs=1)
    tags = {tag for tag in found.Tags()["scalars"] if tag.startswith("gate")}
    assert tags == {f"gate/{layer}/alpha_{i}" for layer in LAYERS for i in range(3)} | {
        f"gate_entropy/{layer}" for layer in [*LAYERS]
    } | {"gate_entropy/mean"}
    assert len({round(float(v), 4) for v in remember.gates[4].flatten()}) > 6  # they have moved apart
    for number, layer in enumerate(LAYERS):
        for i in range(3):
            points = {e.step: e.value for e in found.Scalars(f"gate/{layer}/alpha_{i}")}
            assert points.keys() == {0, 2, 4}
            assert points[0] == pytest.approx(1 / 3)
            for step in (2, 4):
                assert points[step] == pytest.approx(float(remember.gates[step][number, i]), rel=1e-6)
        alphas = remember.gates[4][number].tolist()
        entropy = -sum(a * math.log(a) for a in alphas) / math.log(3)
        assert found.Scalars(f"gate_entropy/{layer}")[-1].value == pytest.approx(entropy, rel=1e-5)
    means = [e.value for e in found.Scalars("gate_entropy/mean")]
    last = [found.Scalars(f"gate_entropy/{layer}")[-1].value for layer in LAYERS]
    assert means[0] == pytest.approx(1)
    assert means[-1] == pytest.approx(sum(last) / 4)


def test_interval_of_the_trainer_and_the_end(train, events):
    found = events(train, GateMonitor(), max_epochs=2, log_every_n_steps=3)
    steps = [event.step for event in found.Scalars("gate_entropy/mean")]
    assert steps == [0, 3, 6, 8]
    assert [event.step for event in found.Scalars("train/loss")]  # Lightning's own scalars share the axis


def test_sigmoid_gates_have_a_sum_of_their_own(make_module, make_data, make_trainer, tmp_path):
    logits = [[0.5, -1, 2], [0, 0, 0], [3, 3, 3], [-1, -2, -3.0]]
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer = make_trainer(SetGates(logits), GateMonitor(), logger=logger, limit_train_batches=1)
    trainer.fit(make_module(lr=0.0, adapter={"gating": "sigmoid"}), make_data())
    found = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    found.Reload()

    def last(tag):
        return found.Scalars(tag)[-1].value

    assert found.Scalars("gate_sum/mean")[0].value == pytest.approx(1)
    sums = []
    for layer, row in zip(LAYERS, logits, strict=True):
        alpha = [2 / 3 / (1 + math.exp(-g)) for g in row]
        sums.append(sum(alpha))
        shares = [a / sums[-1] for a in alpha]
        assert [last(f"gate/{layer}/alpha_{i}") for i in range(3)] == pytest.approx(alpha, rel=1e-5)
        assert last(f"gate_sum/{layer}") == pytest.approx(sums[-1], rel=1e-5)
        entropy = -sum(p * math.log(p) for p in shares) / math.log(3)
        assert last(f"gate_entropy/{layer}") == pytest.approx(entropy, rel=1e-5)
    assert last("gate_sum/mean") == pytest.approx(sum(sums) / 4, rel=1e-5)


def test_heat_map(train, events):
    found = events(train, GateMonitor(), max_epochs=2)
    images = found.Images("gate_heatmap")
    assert [image.step for image in images] == [4, 8]
    picture = Image.open(io.BytesIO(images[-1].encoded_image_string))
    assert picture.format == "PNG"
    assert 150 < picture.width < 1000
    assert 100 < picture.height < 1000
    assert len(picture.getcolors(maxcolors=1 << 20)) > 20  # not an empty canvas


def test_heat_map_can_be_left_out(train, events):
    assert events(train, GateMonitor(heatmap=False), max_epochs=1).Tags()["images"] == []


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([[0.0, 0, 0]] * 4, "all gates are still uniform"),
        ([[1e-4, 0, 0]] * 4, "all gates are still uniform"),
        (
            [[0.1, 0, 0], [9.0, 0, 0], [0, 0.2, 0], [0, 0, 9.0]],
            "one component .* in 2 of 4 layers .*layer00.v_proj",
        ),
        ([[0.3, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], None),
        ([[2.0, 0, -1], [1, -1, 0], [0.5, 0, 0], [0, 3.0, 0]], None),
    ],
)
@pytest.mark.filterwarnings("error:.*gate.*:UserWarning")
def test_warnings(make_module, make_data, make_trainer, logits, message):
    _check_warning(make_module(lr=0.0), make_data, make_trainer, logits, message)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([[1e-4, 0, 0]] * 4, "all gates are still uniform"),
        ([[-0.5] * 3] * 4, None),  # all down together: they have learnt
        (
            [[0.1, 0, 0], [0, -9.0, -9.0], [0, 0.2, 0], [-9.0, -9.0, 0]],
            "one component .* in 2 of 4 layers .*layer00.v_p",
        ),
        ([[9.0, 0, -1]] * 4, None),  # others are open, too
    ],
)
@pytest.mark.filterwarnings("error:.*gate.*:UserWarning")
def test_warnings_of_sigmoid_gates(make_module, make_data, make_trainer, logits, message):
    module = make_module(lr=0.0, adapter={"gating": "sigmoid"})
    _check_warning(module, make_data, make_trainer, logits, message)


def _check_warning(module, make_data, make_trainer, logits, message):
    trainer = make_trainer(SetGates(logits), GateMonitor(), max_epochs=2)
    if message is None:
        trainer.fit(module, make_data())
        return
    with pytest.warns(UserWarning, match=message) as caught:
        trainer.fit(module, make_data())
    assert sum("gate" in str(warning.message) for warning in caught) == 1  # once, not at every validation


def test_uniform_gates_early_in_the_run_are_no_reason_to_warn(make_module, make_data, make_trainer):
    trainer = make_trainer(SetGates([[0.0] * 3] * 4), GateMonitor(), max_epochs=3, limit_train_batches=7)
    seen = []

    class Stop(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.global_step)
            trainer.should_stop = True

    trainer.callbacks.append(Stop())
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gate.*", category=UserWarning)
        trainer.fit(make_module(lr=0.0), make_data())
    assert seen == [7]  # of 21


@pytest.mark.parametrize("adapter", [{"gating": "none"}, {"components": 1, "filters": "square"}])
@pytest.mark.filterwarnings("error:.*gate.*:UserWarning")
def test_adapters_without_a_choice(make_module, make_data, make_trainer, tmp_path, adapter):
    logger = TensorBoardLogger(tmp_path, name="run")
    make_trainer(GateMonitor(), logger=logger).fit(make_module(adapter=adapter), make_data())
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    tags = found.Tags()
    assert [tag for tag in tags["scalars"] + tags["images"] if tag.startswith("gate")] == []


def test_other_loggers_and_none(train, tmp_path):
    train(GateMonitor(), logger=False, max_epochs=1)
    logger = CSVLogger(tmp_path, name="csv")
    train(GateMonitor(), logger=logger, max_epochs=1)
    assert "gate/layer01.v_proj/alpha_2" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


def test_labels():
    experts = [f"model.layers.12.mlp.experts.{i}.up_proj" for i in range(2)]
    assert layer_labels(["model.model.layers.3.self_attn.q_proj", *experts, "model.projection"]) == [
        "layer03.q_proj",
        *experts,  # one label for both would mix their curves
        "model.projection",
    ]


VALUES = {"gate/layer00.q_proj/alpha_0": 0.25, "gate_entropy/mean": 1.0}


def test_one_event_holds_all_values(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    log_scalars(logger, VALUES, 3)
    log_scalars(logger, {tag: 2 * value for tag, value in VALUES.items()}, 5)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for tag, value in VALUES.items():
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(3, value), (5, 2 * value)]


def test_other_loggers_are_given_the_values(tmp_path):
    logger = CSVLogger(tmp_path)
    log_scalars(logger, VALUES, 3)
    logger.save()
    assert "0.25" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
