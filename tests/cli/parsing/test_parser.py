"""The option ``model.adapter``, and other methods through Lightning: parsing, training, resuming."""

import sys

import peft
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from moka_pl.adapters import AdapterConfig, FullFineTuning, MokaConfig, adapter_state
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint, GateMonitor
from moka_pl.errors import AdapterError
from moka_pl.inference import load_model
from moka_pl.training.module import MokaModule

LORA = {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]}
DATA = ["--data=moka_pl.data.InstructionData", "--data.path=sample"]


@pytest.fixture
def write(tmp_path):
    def write_config(adapter):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({"model": {"adapter": adapter}}))
        return f"--config={file}"

    return write_config


@pytest.mark.parametrize(
    ("adapter", "options", "expected"),
    [
        (
            {"class_path": "peft.LoraConfig", "init_args": LORA},
            ["--model.adapter.r=4"],
            {"r": 4, "lora_alpha": 7},
        ),
        ({"class_path": "peft.LoKrConfig", "init_args": {"alpha": 3}}, [], {"alpha": 3}),
        ({"class_path": "moka_pl.adapters.KronA"}, [], {"components": 1, "gating": "none"}),
        ({"class_path": "MokaS"}, ["--model.adapter.components=4"], {"components": 4, "filters": "prime"}),
        ({"class_path": "MokaServable"}, ["--model.adapter.rank=4"], {"rank": 4, "components": 1}),
        ({"components": 2}, ["--model.adapter.filters=servable"], {"rank": 16, "components": 2}),
        ({"class_path": "peft.LoraConfig"}, [], {"r": 8, "target_modules": None}),
        ({"class_path": "FullFineTuning"}, [], {"target_modules": "all"}),
        ({"components": 4}, ["--model.adapter.filters=square"], {"components": 4, "filters": "square"}),
        ({"components": 4}, ["--model.adapter=KronA"], {"components": 4, "gating": "none"}),
        (None, ["--model.adapter=KronA"], {"components": 1, "gating": "none", "scaling": 1.0}),
    ],
)
def test_parses(build_cli, write, adapter, options, expected):
    given = [] if adapter is None else [write(adapter)]
    found = build_cli("fit", *given, *options, *DATA, "--trainer.accelerator=cpu").model.adapter
    assert isinstance(found, AdapterConfig)
    assert {name: getattr(found, name) for name in expected} == expected
    if adapter and "class_path" in adapter:
        assert type(found).__name__ == adapter["class_path"].rpartition(".")[2]


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"class_path": "peft.LoraConfig", "init_args": {"rr": 8}},
            "rr is no option of peft.LoraConfig",
        ),
        ({"class_path": "peft.Nothing"}, "peft has no Nothing"),
        ({"class_path": "peft.no.Such"}, "peft has no no"),
        ({"class_path": "torch.nn.Linear"}, "torch.nn.Linear is no AdapterConfig"),
        ({"class_path": "AdapterConfig"}, "AdapterConfig"),  # abstract; its words differ by version
        (
            {"componets": 3},
            "model.adapter.componets is no option of moka_pl.MokaConfig",
        ),
        ({"components": "many"}, "model.adapter.components must be a whole number, not 'many'"),
        ({"filters": "servable", "rank": 1.5}, "model.adapter.rank must be a whole number or null, not 1.5"),
        ({"filters": "servable", "rank": {"q_proj": 16}}, "a whole number or null, not {'q_proj': 16}"),
    ],
)
def test_a_wrong_option_or_class_is_told_in_one_line(build_cli, write, capsys, adapter, message):
    with pytest.raises(SystemExit) as end:
        build_cli("fit", write(adapter), *DATA)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert line.startswith("moka_pl fit: error: ")
    assert line.endswith(" (all options: moka_pl fit --help)")


class NoPeft:
    """Finds no PEFT, as if it were not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")


def test_a_missing_peft_is_told_with_its_remedy(build_cli, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setattr(sys, "meta_path", [NoPeft, *sys.meta_path])
    with pytest.raises(SystemExit):
        build_cli("fit", "--model.adapter=peft.LoraConfig", *DATA)
    assert "pip install 'moka_pl[peft]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--model.adapter.components=5"],
        ["--model.adapter=KronA"],
        ["--model.adapter=peft.LoraConfig", "--model.adapter.r=3"],
        ["--model.adapter=FullFineTuning"],
    ],
    ids=lambda options: options[0].partition("=")[2],
)
def test_a_printed_configuration_is_read_back(build_cli, capsys, tmp_path, options):
    with pytest.raises(SystemExit):
        build_cli("fit", *options, *DATA, "--print_config")
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    first = build_cli("fit", *options, *DATA).model.adapter
    again = build_cli("fit", f"--config={tmp_path / 'printed.yaml'}").model.adapter
    assert again == first
    with pytest.raises(SystemExit):
        build_cli("fit", f"--config={tmp_path / 'printed.yaml'}", "--print_config")
    assert capsys.readouterr().out == printed


def lora(dropout=0.1):
    return peft.LoraConfig(**LORA, lora_dropout=dropout)


def test_resuming_lora_goes_on_as_if_never_stopped(make_module, make_data, make_trainer, step_log, tmp_path):
    def run(*callbacks, ckpt_path=None, adapter=None, **options):
        steps, module = step_log(), make_module(lr=1e-2)
        module.adapter = adapter or lora()
        keeping = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        trainer = make_trainer(steps, *callbacks, enable_checkpointing=keeping, max_epochs=1, **options)
        trainer.fit(module, make_data(), ckpt_path=ckpt_path, weights_only=True)
        return steps.losses, module, trainer

    whole, module, _ = run(GateMonitor(), AdapterCheckpoint(dirpath=str(tmp_path / "adapters")))
    keep = ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=3, save_top_k=-1)
    run(keep)
    file = next((tmp_path / "c").glob("*step=3*"))
    stored = torch.load(file, weights_only=True)
    assert stored["state_dict"].keys() == {n for n, p in module.named_parameters() if p.requires_grad}
    resumed, again, _ = run(ckpt_path=file)
    assert resumed == {step: loss for step, loss in whole.items() if step > 3}
    assert len(resumed) > 2
    for name, tensor in adapter_state(module.causal_lm).items():
        assert torch.equal(tensor, adapter_state(again.causal_lm)[name])
    with pytest.raises(AdapterError, match="lora_alpha is 7, this model's is 9"):
        run(ckpt_path=file, adapter=peft.LoraConfig(**(LORA | {"lora_alpha": 9})))
    with pytest.raises(AdapterError, match="its method is LORA, this model's is MOKA"):
        run(ckpt_path=file, adapter=MokaConfig(components=2))

    # The directory that the run left gives the trained model, and the same module to validate with.
    loaded, _ = load_model(tmp_path / "adapters/last", device="cpu")
    ids = torch.randint(4, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, module.causal_lm.eval()(ids).logits)
    other = MokaModule(
        BackboneConfig(name="tiny", weights="random", seed=1), adapter_path=str(tmp_path / "adapters/last")
    )
    with pytest.raises(AdapterError, match="another base model"):
        other.configure_model()


def test_full_fine_tuning_trains_and_keeps_everything(make_module, make_data, make_trainer, tmp_path):
    module = make_module(lr=1e-3, backbone=BackboneConfig("tiny", weights="random", quantization="none"))
    module.adapter = FullFineTuning()
    keep = ModelCheckpoint(dirpath=tmp_path / "c", save_last=True)
    trainer = make_trainer(keep, AdapterCheckpoint(dirpath=str(tmp_path / "a")), enable_checkpointing=True)
    trainer.fit(module, make_data())
    stored = torch.load(tmp_path / "c/last.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {name for name, _ in module.named_parameters()}
    loaded, _ = load_model(tmp_path / "a/last", device="cpu")
    for one, other in zip(loaded.parameters(), module.causal_lm.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_is_named_with_its_options_short(build_cli):
    from moka_pl.vision import DigitsData, VisionModule

    data = ["--data", "moka_pl.DigitsData", "--data.digits", "[3,5]"]
    model = [
        "--model",
        "moka_pl.VisionModule",
        "--model.adapter.components",
        "3",
        "--model.optimizer.lr",
        "0.5",
    ]
    built = build_cli("fit", *model, *data, "--seed_everything", "7")
    assert type(built.model) is VisionModule
    assert built.model.adapter.components == 3
    assert built.model.backbone.name == "vit-digits"
    assert type(built.datamodule) is DigitsData
    assert (built.datamodule.digits, built.datamodule.seed) == ([3, 5], 7)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--data", "moka_pl.DigitsData"], "; images need --model moka_pl.VisionModule"),
        (
            ["--model", "moka_pl.VisionModule", "--data", "moka_pl.TextData"],
            "; a VisionModule takes images: moka_pl.ImageFolderData or moka_pl.DigitsData",
        ),
    ],
)
def test_data_of_the_other_kind_are_told(arguments, hint, build_cli, capsys):
    with pytest.raises(SystemExit):
        build_cli("fit", *arguments)
    [error] = capsys.readouterr().err.splitlines()
    assert f"{hint} (all options: " in error
