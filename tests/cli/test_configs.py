import re
import shlex
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from shared.launchers import without_launcher
from torch import nn

from moka_pl import callbacks
from moka_pl.cli.main import main
from moka_pl.data import MokaDataModule
from moka_pl.training.module import MokaModule
from moka_pl.training.schedule import WarmupDecay
from moka_pl.vision import ImageData

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ON_CPU = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
]


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request, monkeypatch):
    """A configuration, seen from the project's folder as the README's commands are."""
    monkeypatch.chdir(ROOT)
    return request.param.relative_to(ROOT)


def commands(path):
    """The commands in the comment at the head of a file."""
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("# "))
    starts = ("python -m moka_pl ", "srun ", "torchrun ")
    return [without_launcher(shlex.split(line)) for line in head if line.startswith(starts)]


def test_there_are_some():
    assert {"smollm2", "llama2", "llama3"} <= {path.stem for path in CONFIGS}


def test_its_first_line_is_whole(path):
    """``moka_pl configs`` shows that line alone."""
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first.endswith(":")
    assert second == "#"


def test_builds_by_the_command_in_its_comment(path, build_cli):
    found = commands(path)
    assert found
    for command in found:
        assert command[:4] == ["python", "-m", "moka_pl", "fit"]
        assert command[command.index("--config") + 1] == path.as_posix()
        built = build_cli(*command[3:], *ON_CPU)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(built.model, MokaModule)
    model = written["model"].get("init_args", written["model"])
    assert isinstance(built.datamodule, ImageData if "class_path" in written["model"] else MokaDataModule)
    assert built.model.backbone.name == model["backbone"]["name"]
    adapter = model["adapter"].get("init_args", model["adapter"])
    # PEFT keeps them as a set.
    assert set(built.model.adapter.target_modules) == set(adapter["target_modules"])
    assert built.trainer.max_epochs == written["trainer"]["max_epochs"]
    kinds = [type(callback) for callback in built.trainer.callbacks]
    # RunCheckpoint: a run's end is in last.ckpt, whatever every_n_train_steps is.
    for kind in ("AdapterCheckpoint", "GateMonitor", "RunCheckpoint", "RunSummary"):
        assert kinds.count(getattr(callbacks, kind)) == 1
    logger = built.trainer.logger
    assert isinstance(logger, TensorBoardLogger)
    assert (logger.save_dir, logger.name) == ("lightning_logs", path.stem)
    # The optimizer and its schedule can be built, with the file's learning rate.
    optimizer = built.model.optimizer([nn.Parameter(nn.Linear(1, 1).weight)])
    assert optimizer.param_groups[0]["lr"] == model["optimizer"]["init_args"]["lr"]
    assert isinstance(built.model.lr_scheduler(optimizer), WarmupDecay)


def test_rates_are_numbers(path):
    # YAML reads 4e-3 as text; every rate must be written with a point.
    for value in re.findall(r"^\s+lr:\s+(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        assert isinstance(yaml.safe_load(value), float)


# The shipped files


@pytest.mark.parametrize("given", ["llama2", "configs/llama2.yaml", "llama2.yaml"])
def test_a_shipped_file_is_found_where_none_is_here(given, build_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build_cli("fit", "--config", given, *ON_CPU).model.backbone.name == "meta-llama/Llama-2-7b-hf"
    file = tmp_path / given
    file.parent.mkdir(exist_ok=True)
    file.write_text("model: {backbone: {name: mine}}")
    if given != "llama2":
        given = f"--config={given}"
        assert build_cli("fit", given, "--data=InstructionData").model.backbone.name == "mine"


def test_an_unknown_name_is_told_with_those_there_are(build_cli, capsys):
    with pytest.raises(SystemExit) as end:
        build_cli("fit", "--config", "lama2")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("moka_pl: error: --config lama2: no such file; give a file, or one of llama2, ")
    assert error.count("\n") == 1


def test_the_command_lists_and_copies(tmp_path, capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [path.stem for path in CONFIGS]
    assert lines[0].endswith("LLaMA2-7B on instructions with the paper's recipe, on one GPU of 16 GB or more")

    folder = tmp_path / "new/mine"
    main(["configs", "--copy", str(folder)])
    assert capsys.readouterr().out.split() == [str(folder / path.name) for path in CONFIGS]
    assert all((folder / path.name).read_text() == path.read_text() for path in CONFIGS)

    (folder / "llama3.yaml").write_text("mine")
    with pytest.raises(SystemExit):
        main(["configs", "--copy", str(folder)])
    assert "llama3.yaml" in (error := capsys.readouterr().err)
    assert "add --overwrite" in error
    assert (folder / "llama3.yaml").read_text() == "mine"
    main(["configs", "--copy", str(folder), "--overwrite"])
    assert (folder / "llama3.yaml").read_text() == (ROOT / "configs/llama3.yaml").read_text()

    with pytest.raises(SystemExit):
        main(["configs", "--copy", str(folder / "llama3.yaml")])
    assert "is a file); choose another folder" in capsys.readouterr().err
