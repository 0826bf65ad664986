"""What a configuration may name: nothing that it may not is imported or called."""

import sys

import pytest
import torch
import yaml

from moka_pl.cli.class_paths import names_kind, restrict_class_paths, split_trust
from moka_pl.errors import ConfigError

DATA = {"class_path": "moka_pl.data.InstructionData", "init_args": {"path": "sample"}}
OWN = """
from pathlib import Path
import torch
(Path(__file__).parent / "imported").touch()
class Mine(torch.optim.SGD): pass
def made(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters)
"""
SAVING = """
from moka_pl.data import InstructionData
class Data(InstructionData):
    def __init__(self, path: str = "sample", batch_size: int = 3):
        super().__init__(path, batch_size=batch_size)
        self.save_hyperparameters()
"""


def spec(path, **options):
    return {"class_path": path, "init_args": options}


SHELL = spec("os.system", command="touch called")
PYTHON = "may not name what belongs to Python or its tools"
FOREIGN = "is no installed package, and a configuration may name nothing else"
NO_OPTIMIZER = "is no Optimizer; name a class of that kind"

#: The others take the same ways.
FEW = (0, 4, 8, 9, 15, 26)
ATTACKS = [
    ("model.optimizer", SHELL, PYTHON),
    ("model.optimizer", "os.system", PYTHON),
    ("model.optimizer", spec("torch.os.system", command="touch called"), PYTHON),
    ("model.optimizer", spec("subprocess.Popen", args="touch called", shell=True), PYTHON),
    ("model.optimizer", spec("functools.partial", func="os.system"), PYTHON),
    ("model.optimizer", spec("builtins.exec"), PYTHON),
    ("model.optimizer", spec("jsonargparse.set_parsing_settings"), PYTHON),
    ("model.optimizer", spec("own_module.Mine", lr=0.1), FOREIGN),
    ("model.optimizer", "own_module.made", FOREIGN),
    ("model.optimizer", spec("torch.load", f="x"), NO_OPTIMIZER),
    ("model.optimizer", spec("torch.optim.Optimizer", defaults={}), NO_OPTIMIZER),
    ("model.optimizer", {"class_path": ["os.system"]}, "unhashable"),
    ("model.optimizer", None, "model.optimizer is null"),
    ("model.lr_scheduler", SHELL, PYTHON),
    ("model.lr_scheduler", spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda="os.system"), PYTHON),
    ("model.lr_scheduler", spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda=SHELL), PYTHON),
    (
        "model.lr_scheduler",
        spec(
            "torch.optim.lr_scheduler.LambdaLR",
            lr_lambda=spec("torch.nn.Linear", in_features=1, out_features=1),
        ),
        "torch.nn.Linear is no class of a run's parts",
    ),
    ("model.lr_scheduler", spec("torch.optim.lr_scheduler.ReduceLROnPlateau"), "with init_args.monitor"),
    ("model.adapter", SHELL, PYTHON),
    ("model.adapter", spec("own_module.Mine"), FOREIGN),
    ("model.adapter", spec("peft.LoraConfig", loftq_config=SHELL), PYTHON),
    ("model.backbone", SHELL, PYTHON),
    ("data", spec("moka_pl.data.MixtureData", parts=[SHELL]), PYTHON),
    ("trainer.callbacks", [spec("own_module.Mine")], FOREIGN),
    ("trainer.callbacks", [spec("lightning.pytorch.callbacks.LambdaCallback", setup="os.system")], PYTHON),
    ("trainer.logger", SHELL, PYTHON),
    ("trainer.plugins", [SHELL], PYTHON),
    ("trainer.profiler", SHELL, PYTHON),
    ("trainer.strategy", spec("lightning.pytorch.strategies.DDPStrategy", ddp_comm_hook="os.system"), PYTHON),
    ("trust_config", True, "trust_config is no option"),
    ("trainer", True, "trainer must be a mapping of options, not True"),
    ("config", True, "the configuration cannot be read"),
]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the current folder that leaves a trace when it is imported."""
    (tmp_path / "own_module.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MOKA_PL_TRUST_CONFIG", raising=False)
    yield tmp_path
    sys.modules.pop("own_module", None)


@pytest.fixture
def write(tmp_path):
    """Writes a configuration with one value."""

    def write_config(option, value):
        config = {"data": DATA, "trainer": {"logger": False}}
        *path, last = option.split(".")
        place = config
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        return ["--config", tmp_path / "run.yaml"]

    return write_config


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [pytest.param(*a, marks=() if number in FEW else pytest.mark.slow) for number, a in enumerate(ATTACKS)],
)
def test_nothing_is_imported_or_called(own, build_cli, write, capsys, option, value, message):
    with pytest.raises(SystemExit) as end:
        build_cli("fit", *write(option, value))
    assert end.value.code == 2
    error = capsys.readouterr().err
    [line] = [line for line in error.splitlines() if "error:" in line]
    assert message in line
    assert "Traceback" not in error
    assert not (own / "imported").exists()
    assert not (own / "called").exists()


def test_only_classes_of_others_find_their_hyperparameters(own, build_cli):
    (own / "own_module.py").write_text(SAVING)
    given = ("--data.batch_size=5", "--trust_config", "true", "--trainer.logger=false")
    cli = build_cli("fit", "--data=own_module.Data", *given)
    assert {"path": "sample", "batch_size": 5}.items() <= cli.datamodule.hparams.items()
    assert build_cli("fit", "--data=moka_pl.data.InstructionData", *given).config_dump == {}


@pytest.mark.parametrize(
    ("named", "how"), [(spec("own_module.Mine", lr=0.5), "option"), ("own_module.made", "environment")]
)
def test_own_modules_with_the_users_word(own, build_cli, write, monkeypatch, named, how):
    if how == "environment":
        monkeypatch.setenv("MOKA_PL_TRUST_CONFIG", "1")
    trust = ["--trust_config", "true"] if how == "option" else []
    built = build_cli("fit", *write("model.optimizer", named), *trust).model.optimizer
    assert isinstance(built([torch.nn.Parameter(torch.ones(1))]), torch.optim.SGD)
    monkeypatch.delenv("MOKA_PL_TRUST_CONFIG", raising=False)
    with pytest.raises(SystemExit):  # the word holds for one run
        build_cli("fit", *write("model.optimizer", named))


def test_python_is_never_the_users_own(own, build_cli, write, capsys):
    with pytest.raises(SystemExit):
        build_cli("fit", *write("model.optimizer", SHELL), "--trust_config=true")
    assert PYTHON in capsys.readouterr().err
    assert not (own / "called").exists()


def test_packages_of_a_clusters_modules_are_installed(own, build_cli, write, monkeypatch):
    folder = own / "software/site-packages"
    folder.mkdir(parents=True)
    (own / "own_module.py").rename(folder / "own_module.py")
    monkeypatch.syspath_prepend(folder)
    built = build_cli("fit", *write("model.optimizer", spec("own_module.Mine", lr=0.5))).model.optimizer
    assert isinstance(built([torch.nn.Parameter(torch.ones(1))]), torch.optim.SGD)
    assert (folder / "imported").exists()


def test_entries_that_cannot_be_looked_at_are_no_modules(own, build_cli, write):
    (own / "loop").symlink_to(own / "loop")
    (own / "gone").symlink_to(own / "nowhere")
    assert build_cli("fit", *write("model.optimizer", "torch.optim.SGD")).model.optimizer


def test_trust_is_taken_out_of_the_command_line():
    assert split_trust(["fit", "--trust_config", "true", "-c", "a"]) == (["fit", "-c", "a"], True)
    assert split_trust(["fit", "--trust_config=false"]) == (["fit"], False)
    assert split_trust(["fit"]) == (["fit"], None)
    for given in (["--trust_config"], ["--trust_config=yes"], ["--trust_config", "--x"]):
        with pytest.raises(ConfigError, match="takes true or false"):
            split_trust(given)


def test_a_class_is_of_a_kind_by_its_bases_rather_than_its_name(own):
    from moka_pl.vision import VisionModule

    restrict_class_paths(False)
    for named in ("VisionModule", "moka_pl.VisionModule", "moka_pl.vision.module.VisionModule"):
        assert names_kind(named, VisionModule)
    for named in ("MokaModule", "moka_pl.MokaModule", "moka_pl.NoVisionModule", "os.VisionModule", "no.One"):
        assert not names_kind(named, VisionModule)
    assert not names_kind("own_module.Mine", torch.optim.SGD)  # without the user's word
    assert not (own / "imported").exists()


def test_an_own_model_of_images_takes_images(own, build_cli):
    (own / "own_module.py").write_text("import moka_pl\nclass Seeing(moka_pl.VisionModule): pass\n")
    named = ["--model", "own_module.Seeing", "--data", "moka_pl.DigitsData", "--trust_config", "true"]
    built = build_cli("fit", *named)
    assert type(built.model).__name__ == "Seeing"
    assert type(built.datamodule).__name__ == "DigitsData"
