"""Training an image classifier: what is trained, the loss, resuming, and adapters of other classes."""

import math

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ConvNextConfig, ResNetConfig

from moka_pl.adapters import FullFineTuning, MokaConfig, adapters_disabled, moka_layers, read_adapter
from moka_pl.adapters.methods.registry import merge, unload, unmerge
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint, GateMonitor, RunCheckpoint
from moka_pl.errors import AdapterError, ConfigError, DataError, NonFiniteError
from moka_pl.evaluation.metrics import EvalMetrics
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.training.learning_rates import LearningRateRatios
from moka_pl.training.module import MokaModule
from moka_pl.vision import load_classifier
from moka_pl.vision.backbone import load_image_backbone


class OtherData(LightningDataModule):
    def train_dataloader(self):
        return [{}]


def trained_names(module):
    return {name.removeprefix("model.") for name, p in module.named_parameters() if p.requires_grad}


def test_learns_colours_by_adapters_and_head_alone(make_vision, make_images, make_trainer, vit):
    module = make_vision()
    make_trainer(max_epochs=2, check_val_every_n_epoch=2).fit(module, make_images())
    assert module.eval_values["val/accuracy"] == 1
    assert module.eval_values["val/loss"] < math.log(2)
    assert "val/acc_norm" not in module.eval_values  # classes have no length
    assert module.labels == ["blue", "red"]
    assert {name.rpartition(".moka_")[0] for name in trained_names(module) if ".moka_" in name} == {
        f"vit.layers.0.attention.{name}_proj" for name in "qv"
    }
    others = {name for name in trained_names(module) if ".moka_" not in name}
    assert others == {"classifier.trained.weight", "classifier.trained.bias"}
    # Without them it is the base again, bit for bit.
    pixels = torch.randn(3, 3, 8, 8)
    adapted = module.model.eval()(pixels).logits
    with adapters_disabled(module.model):
        assert module.model(pixels).logits.abs().max() == 0
    merge(module.model)
    torch.testing.assert_close(module.model(pixels).logits, adapted)
    unmerge(module.model)
    assert torch.equal(module.model(pixels).logits, adapted)
    unload(module.model)
    base = load_image_backbone(
        BackboneConfig(str(vit), quantization="none"), module.labels
    ).model.state_dict()
    state = module.model.state_dict()
    assert state.keys() == base.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize(
    ("adapter", "others"),
    [
        (MokaConfig(components=2, target_modules="all-linear"), {"classifier.trained.weight"}),
        (FullFineTuning(target_modules=["fc1"]), {"classifier.weight", "vit.layers.0.mlp.fc1.weight"}),
        (FullFineTuning(target_modules=["classifier"]), {"classifier.weight"}),
        (FullFineTuning(), {"classifier.weight", "vit.embeddings.patch_embeddings.projection.weight"}),
    ],
)
def test_the_head_is_trained_with_every_method(adapter, others, make_vision):
    module = make_vision(adapter, labels=["a", "b"])
    module.configure_model()
    names = {name for name in trained_names(module) if name.endswith("weight") and ".moka_" not in name}
    assert others <= names
    if not isinstance(adapter, FullFineTuning) or adapter.target_modules != "all":
        assert names == others
    assert ("classifier" in moka_layers(module.model)) is False


def test_a_lora_is_trained_saved_and_loaded_with_the_head(make_vision, make_images, make_trainer, tmp_path):
    peft = pytest.importorskip("peft")
    module = make_vision(peft.LoraConfig(r=2, target_modules="all-linear"))
    make_trainer(AdapterCheckpoint(dirpath=tmp_path)).fit(module, make_images())
    names = trained_names(module)
    assert {name for name in names if ".lora_" not in name} == {
        f"classifier.modules_to_save.default.{key}" for key in ("weight", "bias")
    }
    model, _ = load_classifier(tmp_path / "last")
    pixels = torch.randn(3, 3, 8, 8)
    assert torch.equal(model(pixels).logits, module.model.eval()(pixels).logits)
    assert model(pixels).logits.abs().max() > 0


def test_loss_and_gradient_are_those_of_all_images_of_a_step(make_vision, make_images, make_trainer):
    """Of micro-batches of uneven sizes: 4, 4 and 2 images are one step."""
    module, reference = make_vision(lr=0.0), make_vision(lr=0.0)
    reference.labels = ["blue", "red"]
    gradients, losses = {}, []

    def keep(optimizer, values, copy):
        losses.append(float(values[0]))
        gradients.update({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    module._non_finite.check = keep
    torch.manual_seed(0)
    trainer = make_trainer(accumulate_grad_batches=3)
    trainer.fit(module, make_images())
    torch.manual_seed(0)
    reference.configure_model()
    reference.model.load_state_dict(module.model.state_dict())
    loader = make_images()
    loader.connect(module.image_processor)
    loader.setup()
    whole = list(loader.train_dataloader())
    pixels, labels = (torch.cat([batch[name] for batch in whole]) for name in ("pixel_values", "labels"))
    loss = F.cross_entropy(reference.model(pixels).logits, labels)
    loss.backward()
    assert losses == [pytest.approx(loss.item(), rel=1e-6)]
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_resumes_bit_for_bit_in_the_middle_of_an_epoch(
    make_vision, make_images, make_trainer, step_log, tmp_path
):
    whole = step_log()
    first = make_vision(MokaConfig(components=2, dropout=0.1))
    saving = RunCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    make_trainer(whole, saving, max_epochs=2, enable_checkpointing=True).fit(first, make_images(flip=True))
    again = step_log()
    second = make_vision(MokaConfig(components=2, dropout=0.1))
    trainer = make_trainer(again, max_epochs=2)
    trainer.fit(second, make_images(flip=True), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    assert again.losses == {step: loss for step, loss in whole.losses.items() if step > 2}
    assert len(again.losses) == 4
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    with pytest.raises(ConfigError, match=r"of a run with other options .*flip True, now False"):
        make_trainer(max_epochs=2).fit(
            make_vision(MokaConfig(components=2, dropout=0.1)),
            make_images(),
            ckpt_path=tmp_path / "step=2.ckpt",
            weights_only=True,
        )


def test_an_adapter_directory_knows_its_classes(adapter, make_vision, make_images, make_trainer):
    stored = read_adapter(adapter)
    assert stored.extra["labels"] == ["blue", "red"]
    assert stored.config.modules_to_save == ["classifier"]
    assert stored.extra["metrics"]["val/accuracy"] == 1
    card = (adapter / "README.md").read_text()
    assert "| classes | blue, red |" in card
    assert "load_classifier(" in card
    again = make_vision(adapter_path=str(adapter))
    make_trainer().test(again, make_images(), verbose=False)
    assert again.eval_values["test/accuracy"] == 1
    model, processor = load_classifier(adapter)
    pixels = torch.randn(3, 3, 8, 8)
    assert torch.equal(model(pixels).logits, again.model.eval()(pixels).logits)
    assert model.config.id2label == {0: "blue", 1: "red"}
    assert processor.size["height"] == 8


def test_a_language_model_refuses_the_adapter_of_a_classifier(adapter):
    with pytest.raises(
        AdapterError, match=r"classifies images; give --model moka_pl\.VisionModule and images"
    ):
        MokaModule(BackboneConfig("tiny", weights="random"), adapter_path=str(adapter))


def test_refuses_other_classes_and_another_base(
    adapter, vit, make_vision, make_images, make_trainer, squares, tmp_path
):
    for name in ("blue", "green", "red"):
        (tmp_path / "three" / name).mkdir(parents=True)
        (tmp_path / "three" / name / "1.png").symlink_to(squares / "red/1.png")
    with pytest.raises(
        AdapterError, match=r"has 3 classes \(blue, green, red\), but the model of .* 2 classes"
    ):
        make_trainer().test(make_vision(adapter_path=str(adapter)), make_images(path=str(tmp_path / "three")))
    other = BackboneConfig("vit-digits", weights="random", quantization="none")
    module = make_vision(adapter_path=str(adapter), backbone=other)
    with pytest.raises(AdapterError, match="was trained on another base model"):
        module.configure_model()
    with pytest.raises(AdapterError, match=r"has 2 classes \(blue, red\), but the model of .* 3 classes"):
        make_vision(adapter_path=str(adapter), labels=["a", "b", "c"])


def test_refuses_what_cannot_work(make_vision, make_images, make_trainer):
    for options, name in (({"filters": "auto"}, "filters: auto"), ({"start": "gradient"}, "start: gradient")):
        with pytest.raises(ConfigError, match=f"{name} follows the first gradient"):
            make_vision(MokaConfig(components=2, **options))
    with pytest.raises(ConfigError, match=r"labels must be at least two different classes, not \['a', 'a'\]"):
        make_vision(labels=["a", "a"])
    with pytest.raises(ConfigError, match=r"OtherData has none; use moka_pl\.ImageFolderData"):
        make_trainer().fit(make_vision(), OtherData())
    with pytest.raises(ConfigError, match="the classes are not known: give labels"):
        make_vision().configure_model()
    data = make_images()
    data.setup()
    with pytest.raises(DataError, match="is for image classifiers, but the model is no VisionModule"):
        data.train_dataloader()
    assert isinstance(make_vision(), MokaModule)


def test_names_the_images_of_steps_that_are_not_finite(make_vision, make_images, make_trainer):
    module = make_vision(max_non_finite_steps=1)
    data = make_images(batch_size=10)

    def spoil(batch, idx):
        batch["pixel_values"][3] = math.nan
        return batch

    data.on_before_batch_transfer = spoil
    named = r"step 1 is skipped: its loss is nan; first layer .*; rows: (blue|red)/[^ ,]*\.png\. Skipped"
    with pytest.warns(UserWarning, match=named), pytest.raises(NonFiniteError):
        make_trainer().fit(module, data)


def test_rates_have_ratios_and_the_head_the_optimizers(make_vision):
    module = make_vision(labels=["a", "b"], learning_rate_ratios=LearningRateRatios(gate=3.0), lr=0.5)
    module.configure_model()
    groups = {group["name"]: group for group in module.configure_optimizers()["optimizer"].param_groups}
    assert {name: group["initial_lr"] for name, group in groups.items()} == {
        "left": 0.5,
        "right": 0.5,
        "gate": 1.5,
        "other": 0.5,
    }
    assert len(groups["other"]["params"]) == 2


def test_checkpointing_gives_the_same_gradients(make_vision):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = make_vision(labels=["a", "b"], gradient_checkpointing=checkpointing)
        module.configure_model()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.3)
        batch = {"pixel_values": torch.ones(2, 3, 8, 8), "labels": torch.tensor([0, 1])}
        module.token_scores(batch).nll.sum().backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_convolutions_are_left_alone_in_other_families(make_vision, tmp_path):
    linear = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32}
    none = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    config = MokaConfig(components=2, target_modules="all-linear")
    for name, shape in (("some", ConvNextConfig(**linear)), ("none", ResNetConfig(**none))):
        AutoModelForImageClassification.from_config(shape).save_pretrained(tmp_path / name)
    backbones = [BackboneConfig(str(tmp_path / name), quantization="none") for name in ("some", "none")]
    module = make_vision(config, labels=["a", "b"], backbone=backbones[0])
    module.configure_model()
    assert {name.rpartition(".")[2] for name in module.adapted} == {"pwconv1", "pwconv2"}
    with pytest.raises(AdapterError, match=r"'all-linear' matches only classifier\.1, which modules_to_save"):
        make_vision(config, labels=["a", "b"], backbone=backbones[1]).configure_model()


def test_fillers_of_other_ranks_count_nowhere(make_vision):
    module = make_vision(labels=["a", "b"])
    module.configure_model()
    module._metrics = EvalMetrics([("images", ["images"])])
    batch = {"pixel_values": torch.ones(3, 3, 8, 8), "labels": torch.tensor([0, IGNORE_INDEX, 1])}
    assert module.token_scores(batch).nll.tolist() == pytest.approx([math.log(2)] * 2)
    module.validation_step(batch, 0)
    counts = module._metrics.compute().tasks["images"]
    assert (counts.items, counts.correct, counts.tokens) == (2, 1, 2)  # of a tie the first class counts
    assert counts.nll == pytest.approx(2 * math.log(2))


def test_gates_are_logged_by_layer(make_vision, make_images, make_trainer, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    trainer = make_trainer(GateMonitor(), logger=CSVLogger(tmp_path, name="", version=""))
    trainer.fit(make_vision(), make_images())
    header = (tmp_path / "metrics.csv").read_text().partition("\n")[0]
    for projection in ("q_proj", "v_proj"):
        assert f"{projection}/alpha_0" in header
