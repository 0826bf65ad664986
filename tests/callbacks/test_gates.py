import gc
import io
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.adapters import moka_layers
from moka_pl.adapters.filters import filter_shapes
from moka_pl.callbacks import BoardLogger, GateMonitor
from moka_pl.callbacks.board import log_scalars
from moka_pl.callbacks.gate_tags import GatedLayer, board_scalars, layer_labels
from moka_pl.callbacks.gates import _SCALAR_BYTES, gate_matrix, gated_layers, logged_steps
from moka_pl.callbacks.heatmap import gate_heatmaps
from moka_pl.inspection.history import read_gate_curves

LAYERS = [f"layer{i:02d}.{kind}_proj" for i in range(2) for kind in "qv"]


def alpha_tags(found, layer):
    """Tags of a layer's gates, by component."""
    row, projection = layer.split(".")
    return sorted(t for t in found.Tags()["scalars"] if t.startswith(f"α {projection}/{row}/"))


class SetGates(Callback):
    """Sets all gate logits by hand, before every batch."""

    def __init__(self, logits):
        self.logits = torch.tensor(logits)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            for row, layer in zip(self.logits, moka_layers(pl_module.causal_lm).values(), strict=True):
                layer.moka_gate.copy_(row)


class Remember(Callback):
    """Keeps the gates after every step, and the module."""

    def __init__(self):
        self.gates = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.module = pl_module
        self.gates[trainer.global_step] = gate_matrix(pl_module)


@pytest.fixture
def events(tmp_path):
    """Runs a fit that logs to TensorBoard and reads the event file back."""

    def read(train, *callbacks, logger=None, **options):
        logger = logger or BoardLogger(tmp_path, name="run", default_hp_metric=False)
        train(*callbacks, logger=logger, **options)
        found = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "images": 0})
        found.Reload()
        return found

    return read


def test_scalars_of_every_layer_and_component(train, events):
    remember = Remember()
    found = events(train, remember, GateMonitor(every_n_steps=2), max_epochs=1)
    tags = {tag for tag in found.Tags()["scalars"] if tag.startswith("α")}
    shapes = {
        f"{layer.group}{i}: {shape}"
        for layer in gated_layers(remember.module)
        for i, shape in enumerate(layer.shapes)
    }
    assert len(shapes) == 12
    assert "α q_proj/layer00/1: 4×16 ⊗ 16×4" in shapes
    assert tags == shapes | {f"α entropy/{layer}" for layer in LAYERS} | {
        "α/entropy",
        "α/entropy q_proj",
        "α/entropy v_proj",
    }
    # What is looked at first comes first.
    assert sorted({tag.split("/")[0] for tag in found.Tags()["scalars"]}) == [
        "train",
        "val",
        "α",
        "α entropy",
        "α q_proj",
        "α v_proj",
    ]
    assert len({round(float(v), 4) for v in remember.gates[4].flatten()}) > 6  # they have moved apart
    for number, layer in enumerate(LAYERS):
        for i, tag in enumerate(alpha_tags(found, layer)):
            points = {e.step: e.value for e in found.Scalars(tag)}
            assert points.keys() == {0, 2, 4}
            assert points[0] == pytest.approx(1 / 3)
            for step in (2, 4):
                assert points[step] == pytest.approx(float(remember.gates[step][number, i]), rel=1e-6)
        alphas = remember.gates[4][number].tolist()
        entropy = -sum(a * math.log(a) for a in alphas) / math.log(3)
        assert found.Scalars(f"α entropy/{layer}")[-1].value == pytest.approx(entropy, rel=1e-5)
    means = [e.value for e in found.Scalars("α/entropy")]
    last = [found.Scalars(f"α entropy/{layer}")[-1].value for layer in LAYERS]
    assert means[0] == pytest.approx(1)
    assert means[-1] == pytest.approx(sum(last) / 4)


def test_interval_of_the_trainer_and_the_end(train, events):
    found = events(train, GateMonitor(), max_epochs=2, log_every_n_steps=3)
    steps = [event.step for event in found.Scalars("α/entropy")]
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

    assert found.Scalars("α/sum")[0].value == pytest.approx(1)
    sums = []
    for layer, row in zip(LAYERS, logits, strict=True):
        alpha = [2 / 3 / (1 + math.exp(-g)) for g in row]
        sums.append(sum(alpha))
        shares = [a / sums[-1] for a in alpha]
        assert [last(tag) for tag in alpha_tags(found, layer)] == pytest.approx(alpha, rel=1e-5)
        assert last(f"α sum/{layer}") == pytest.approx(sums[-1], rel=1e-5)
        entropy = -sum(p * math.log(p) for p in shares) / math.log(3)
        assert last(f"α entropy/{layer}") == pytest.approx(entropy, rel=1e-5)
    assert last("α/sum") == pytest.approx(sum(sums) / 4, rel=1e-5)


def test_heat_maps(train, events):
    found = events(train, GateMonitor(), max_epochs=2, limit_train_batches=3)
    assert found.Tags()["images"] == ["α/heat map q_proj", "α/heat map v_proj"]
    images = found.Images("α/heat map q_proj")
    assert [image.step for image in images] == [2, 4]
    picture = Image.open(io.BytesIO(images[-1].encoded_image_string))
    assert picture.format == "PNG"
    assert picture.width == 328  # of TensorBoard's cards
    assert 100 < picture.height < 400


def test_heat_maps_of_a_run_that_ends_between_validations(train, events):
    found = events(train, GateMonitor(), max_epochs=-1, max_steps=2)
    assert [image.step for image in found.Images("α/heat map v_proj")] == [2]


def test_colours_of_a_heat_map():
    """The one raised gate is red, the lowered one blue, and those at 1/r are white."""
    layers = [GatedLayer("layer00.q_proj", "q_proj", filter_shapes("square", 4, 16, 16))]
    picture = gate_heatmaps(torch.tensor([[0.25, 0.5, 0.125, 0.25]]), layers)["q_proj"]
    pixels = Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB")
    row = [pixels.getpixel((x, 60)) for x in range(pixels.width)]
    white = [x for x, (r, g, b) in enumerate(row) if min(r, g, b) > 235]
    red = [x for x, (r, g, b) in enumerate(row) if r > b + 50]
    blue = [x for x, (r, g, b) in enumerate(row) if b > r + 50]
    inside = [x for x in red if x < 250], [x for x in blue if x < 250]
    assert 30 < len(inside[0]) == pytest.approx(len(inside[1]), abs=3)
    assert max(inside[0]) < min(inside[1])
    assert any(x < min(inside[0]) for x in white)


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
    assert [tag for tag in tags["scalars"] + tags["images"] if tag.startswith("α")] == []


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


VALUES = {"α q_proj/layer00/0: 4×4 ⊗ 8×8": 0.25, "α/entropy": 1.0}


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


def test_curves_are_read_back(train, events, tmp_path):
    remember = Remember()
    found = events(train, remember, GateMonitor(every_n_steps=1), max_epochs=1, limit_train_batches=3)
    curves = read_gate_curves(Path(found.path))
    assert curves.steps == [0, 1, 2]
    assert curves.layers == LAYERS
    assert curves.shapes == [list(map(str, layer.shapes)) for layer in gated_layers(remember.module)]
    assert torch.equal(curves.alpha, torch.stack(list(remember.gates.values())))
    assert read_gate_curves(tmp_path / "nothing") is None


def test_of_a_resumed_run_the_later_values_are_read(tmp_path):
    layers = [
        GatedLayer(name, name.split(".")[-1], filter_shapes("square", 2, 4, 4))
        for name in ("head", "layer01.b")
    ]
    for part, steps in enumerate((range(4), range(2, 6))):
        logger = TensorBoardLogger(tmp_path, name="", version="", filename_suffix=f".{part}")
        for step in steps:
            gates = torch.full((2, 2), step + 10.0 * part)
            log_scalars(logger, board_scalars(gates, layers, "softmax"), step)
        logger.finalize("success")
    for part, file in enumerate(sorted(tmp_path.glob("events*"), key=lambda path: path.suffix)):
        file.rename(tmp_path / f"events.out.tfevents.{part}")
    curves = read_gate_curves(tmp_path)
    assert curves.layers == ["head", "layer01.b"]
    assert curves.alpha[:, 1, 1].tolist() == [0, 1, 12, 13, 14, 15]


def test_a_large_run_logs_50_mb_at_most(tmp_path):
    """10,000 steps of LLaMA2-7B with all linear layers: 224 of 10 components."""
    sizes = {"q": (64, 64), "k": (64, 64), "v": (64, 64), "o": (64, 64)}
    sizes |= {"up": (172, 64), "gate": (172, 64), "down": (64, 172)}
    layers = [
        GatedLayer(f"layer{i:02d}.{name}_proj", f"{name}_proj", filter_shapes("diverse", 10, 64 * m, 64 * n))
        for i in range(32)
        for name, (m, n) in sizes.items()
    ]
    gates = torch.rand(224, 10).softmax(1)
    values = board_scalars(gates, layers, "sigmoid")
    every = logged_steps(10_000, sum(_SCALAR_BYTES + len(tag.encode()) for tag in values), 10)
    assert every % 10 == 0
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_scalars(logger, values, 0)
    logger.finalize("success")
    [file] = tmp_path.glob("events*")
    pictures = 50 * sum(len(one.encoded_image_string) for one in gate_heatmaps(gates, layers).values())
    assert 30e6 < 10_000 / every * file.stat().st_size + pictures < 50e6
    assert logged_steps(200, 1000, 10) == 10  # a short run logs as often as it is asked to


def test_a_monitor_does_not_keep_the_model_when_training_ends(make_module, make_data, make_trainer) -> None:
    monitor, module = GateMonitor(), make_module()
    make_trainer(monitor).fit(module, make_data())
    layers = set(map(id, moka_layers(module.causal_lm).values()))
    assert layers
    assert not layers & set(map(id, gc.get_referents(*vars(monitor).values())))


def test_a_validation_after_training_needs_no_training_data(make_module, make_data, make_trainer) -> None:
    trainer, module = make_trainer(GateMonitor()), make_module()
    trainer.fit(module, make_data())
    (metrics,) = trainer.validate(module, make_data())
    assert metrics
