import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from lightning.pytorch import callbacks as lightning_callbacks
from shared.runs import instruction_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl import callbacks
from moka_pl.adapters import read_adapter
from moka_pl.adapters.reading import read_adapter_state
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.cli.main import main
from moka_pl.training.module import MokaModule
from moka_pl.training.schedule import WarmupDecay

RUN = Path("lightning_logs/moka/version_0")


@pytest.fixture
def config(corpus):
    """The configuration of a run of 2 epochs of 4 steps; a test may change it before it calls `cli`."""
    run = instruction_run(corpus, max_length=320)
    run["model"]["adapter"]["dropout"] = 0.1
    run["trainer"]["accumulate_grad_batches"] = 2
    return run


@pytest.fixture
def cli(config, tmp_path, monkeypatch, dataset_cache, one_thread):
    """Runs a command in a folder of the test's own; `fit` and its like are given the configuration."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
    for name in ("TOKENIZERS_PARALLELISM", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # a run sets them; they shall not outlive the test
    monkeypatch.setattr(sys, "argv", ["moka_pl"])
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        given = []
        if command in ("fit", "validate", "test"):
            Path("config.yaml").write_text(yaml.safe_dump(config))
            given = ["--config", "config.yaml"]
        main([command, *given, *map(str, arguments)])

    return run


def scalars(folder, tag):
    """Values by step, over all event files of a run."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {event.step: event.value for event in found.Scalars(tag)}


def version(number):
    return RUN.with_name(f"version_{number}")


# Help and mistakes


def test_help_lists_all_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moka_pl"])
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    listed = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed[:6] == ["fit", "validate", "test", "predict", "inspect", "generate"]


def test_help_of_fit_explains_the_options(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["moka_pl"])
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    for words in (
        "--model.backbone.quantization {nf4,fp4,int8,int4,float8,hqq,gptq,awq,none}",
        "--model.adapter.components COMPONENTS Number r of Kronecker components",
        "--model.adapter.scaling",
        "--gates.every_n_steps",
        "--adapters.monitor",
        "--checkpoint.every_n_train_steps",
        "--trainer.max_epochs",
    ):
        assert words in output


PROCESS = """
import runpy, sys
from moka_pl.cli.main import function_parser

def command(*arguments):
    status, sys.argv = 0, ["moka_pl", *arguments]
    try:
        runpy.run_module("moka_pl", run_name="__main__")
    except SystemExit as end:
        status = end.code
    done(status)

def done(status):
    print(status, *sorted(name for name in sys.modules if "." not in name), flush=True)
    print("--", file=sys.stderr, flush=True)

adapter, elsewhere = sys.argv[1:]
command("--help")
function_parser("evaluate").parse_args(["--base=x", "--tasks=y", "--limit=3"])
done(0)
command("inspect", adapter)
command("inspect", elsewhere)
command("generate", adapter, "Hello", "--max_new_tokens=1")
command("fit", "--model.adapter.component=3")
sys.argv = ["moka_pl", "inspect", elsewhere]
runpy.run_module("moka_pl", run_name="__main__")
"""


def test_real_process(make_adapter, tmp_path):
    """Commands and mistakes as the shell sees them, in the order of what they may load."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROCESS, make_adapter(prompt="alpaca"), tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
    )
    lines = run.stdout.splitlines()
    ends = [line.split() for line in lines if re.match(r"\d .*\bsys\b", line)]
    errors = [text.lstrip("\n") for text in run.stderr.split("--\n")]
    assert [int(status) for status, *_ in ends] == [0, 0, 0, 2, 0, 2], run.stderr
    assert run.returncode == 2
    help_, parsed, inspected, mistaken, generated, fitted = (set(modules) for _, *modules in ends)

    heavy = {
        "numpy",
        "torch",
        "lightning",
        "transformers",
        "bitsandbytes",
        "datasets",
        "tensorboard",
        "lm_eval",
    }
    assert not heavy & (help_ | parsed)
    commands = "{fit,validate,test,predict,inspect,generate,evaluate,export,configs,plan}"
    assert any(commands in line for line in lines)
    assert not {"lightning", "transformers", "bitsandbytes", "datasets"} & (inspected | mistaken)
    assert any("gates by layer" in line for line in lines)
    assert not {"lightning", "datasets"} & generated
    assert "lightning" in fitted
    assert "peft" not in fitted

    assert errors[:3] == ["", "", ""]
    no_adapter = f"moka_pl: error: {tmp_path} is not an adapter directory: it has no adapter_config.json; "
    assert errors[3] == errors[6] == f"{no_adapter}give a folder in it, such as {tmp_path}/adapter\n"
    wrong = "model.adapter.component is no option of moka_pl.MokaConfig; did you mean components?"
    assert errors[5].startswith(f"moka_pl fit: error: {wrong} (all options")
    assert "Traceback" not in run.stderr


@pytest.fixture
def refused(cli, capsys, monkeypatch):
    """Runs a command that must end with status 2 before any model is loaded; returns the message."""

    def never(*args):
        pytest.fail("the model was loaded")

    def run(*arguments):
        monkeypatch.setattr("moka_pl.training.module.load_backbone", never)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli(*arguments)
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert "Traceback" not in error
        assert "usage:" not in error  # a page of it hides the message
        return error

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.adapter.component", "3"], "model.adapter.component is no option of moka_pl.MokaConfig"),
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch"),  # no guessing from a beginning
        (
            ["--model.adapter.components", "many"],
            "components must be a whole number, not 'many'",
        ),
        (
            ["--model.backbone.quantization", "int3"],
            "model.backbone.quantization must be nf4, fp4, int8,",
        ),
        (
            ["--data", "moka_pl.data.InstructonData"],
            "did you mean InstructionData?",
        ),
        (["--data.init_args.batchsize", "3"], "data.batchsize is no option of"),
        (["--model.optimizer", "torch.optim.AdamX"], "torch.optim has no AdamX"),
    ],
)
def test_wrong_options(refused, arguments, message):
    error = refused("fit", *arguments)
    assert message in error
    assert error.startswith("moka_pl fit: error: ")
    assert error.endswith(" (all options: moka_pl fit --help)\n")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.adapter.componets", 3, "componets"),
        ("trainer.max_epoch", 3, "max_epoch"),
        ("data.init_args.pth", "x", "pth"),
        ("modl", {"adapter": {}, "name": "x"}, "modl"),
        ("model.lr_scheduler", {"class_path": "moka_pl.Warmup"}, "moka_pl has no Warmup"),
    ],
)
def test_wrong_keys_in_a_file(refused, config, key, value, message):
    *path, last = key.split(".")
    place = config
    for part in path:
        place = place[part]
    place[last] = value
    assert message in refused("fit")


@pytest.mark.parametrize("given", ["run", "run/checkpoints", "run/adapters", "run/adapters/best"])
def test_a_folder_is_no_checkpoint(refused, given):
    Path("run/adapters/best").mkdir(parents=True)
    Path("run/checkpoints").mkdir()
    told = f"--ckpt_path {given}: it is a folder; give a .ckpt file, or last"
    assert refused("fit", "--ckpt_path", given).endswith(f"{told}\n")
    Path("run/checkpoints/last.ckpt").touch()
    assert refused("fit", "--ckpt_path", given).endswith(f"{told}, or run/checkpoints/last.ckpt\n")


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_logger_that_is_not_installed(refused):
    error = refused("fit", "--trainer.logger", "WandbLogger")
    needs = r"error: lightning\.pytorch\.loggers\.WandbLogger needs wandb\S+: pip install \S+\n$"
    assert re.search(needs, error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.adapter.filters", "divers"], "unknown filters 'divers'; choose one of diverse, square"),
        (["--model.adapter.components", "0"], "components must be at least 1, not 0"),
        (["--data.init_args.batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--model.adapter_path", "nowhere"], "nowhere is not an adapter directory: no such folder"),
        (["--model.adapter_path", ""], "the path of the adapter (adapter_path) is empty; give an adapter"),
        (["--ckpt_path", "last"], "no run below lightning_logs/moka has a checkpoints/last.ckpt"),
        (["--ckpt_path", "none.ckpt"], "--ckpt_path none.ckpt: no such file"),
        (["--data.init_args.path", "absent.jsonl"], "absent.jsonl does not exist"),
        (["--data.init_args.path", "null"], "a source of data is None"),
        (["--data.init_args.path", ""], "a source of data is ''"),
        (["--trainer.accelerator", "mps"], "MPS"),
        (
            ["--trainer.logger.init_args.save_dir", "config.yaml/x"],
            "config.yaml/x: cannot write there",
        ),
    ],
)
def test_refused_in_one_line(refused, arguments, message):
    error = refused("fit", *arguments)
    assert message in error
    assert error.startswith("moka_pl: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize("path", ["best", "hpc", "", "registry:x", "nowhere://x"])
def test_other_words_than_last_are_no_checkpoint(refused, command, path):
    error = refused(command, "--ckpt_path", path)
    assert re.fullmatch(f"moka_pl: error: --ckpt_path {path}.* a .ckpt file, or last.*\n", error)


@pytest.mark.parametrize(("command", "option"), [("validate", "val"), ("test", "test")])
def test_an_evaluation_of_no_batches(refused, command, option):
    given = [f"--trainer.limit_{option}_batches", "0", "--data.init_args.path", "absent.jsonl"]
    last = refused(command, *given).splitlines()[-1]  # before the data are looked for
    told = f"trainer.limit_{option}_batches is 0: nothing would be evaluated; raise it, or leave it out"
    assert last == f"moka_pl: error: {told}"


def test_malformed_line_of_the_data(refused, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "outpt": "b"}\n')
    error = refused("fit", "--data.init_args.path", path)
    assert f"{path}, line 2: field 'output' is missing; found: instruction, outpt." in error
    assert error.count("\n") == 1


class Payload:
    """Unpickled, it leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_damaged_or_evil_checkpoint(refused, tmp_path):
    torch.save({"state_dict": {}, "evil": Payload()}, tmp_path / "evil.ckpt")
    torch.save({"state_dict": {"a": torch.ones(1000)}}, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:2000])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").touch()
    for name in ("evil", "cut", "text", "empty"):
        error = refused("fit", "--ckpt_path", f"{name}.ckpt")
        assert f"--ckpt_path {name}.ckpt is damaged or not a checkpoint (" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "unpickled").exists()


# What is built


def test_seed_is_the_datas_too(build_cli, make_data):
    def seed(*arguments):
        return build_cli("fit", "--data", "InstructionData", *arguments).datamodule.seed

    assert seed() == 0
    assert seed("--seed_everything", "3") == 3
    assert seed("--seed_everything", "false") == 0

    def order(number):
        data = make_data(seed=number)
        data.connect(byte_tokenizer())
        data.setup("fit")
        return list(data.train_dataloader().sampler)

    assert order(0) == order(0)
    assert order(3) != order(0)


def test_default_callbacks_and_logger(build_cli):
    trainer = build_cli("fit", "--data", "InstructionData").trainer
    kinds = [type(callback) for callback in trainer.callbacks]
    for kind in (
        callbacks.AdapterCheckpoint,
        callbacks.GateMonitor,
        callbacks.GracefulInterrupt,
        callbacks.ProgressBar,
        callbacks.RunCheckpoint,
        callbacks.RunSummary,
        callbacks.Throughput,
    ):
        assert kinds.count(kind) == 1
    # What stops a run must come after what keeps its adapter.
    assert kinds.index(callbacks.AdapterCheckpoint) < kinds.index(callbacks.GracefulInterrupt)
    assert trainer.logger.log_dir == "lightning_logs/moka/version_0"
    assert trainer.num_sanity_val_steps == float("inf")


def test_callbacks_switched_off_or_replaced(build_cli):
    trainer = build_cli(
        "fit",
        "--data=InstructionData",
        "--trainer.enable_checkpointing=false",
        "--trainer.callbacks=TQDMProgressBar",
        "--trainer.callbacks+=moka_pl.callbacks.Throughput",
        "--trainer.callbacks.window=3",
    ).trainer
    kinds = [type(callback) for callback in trainer.callbacks]
    assert lightning_callbacks.TQDMProgressBar in kinds
    assert callbacks.ProgressBar not in kinds
    assert not any(issubclass(kind, lightning_callbacks.ModelCheckpoint) for kind in kinds)
    assert [c.window for c in trainer.callbacks if isinstance(c, callbacks.Throughput)] == [3]
    assert callbacks.RunSummary in kinds


# Runs


def test_fit_then_everything_else(cli, capsys):
    cli("fit")
    output = capsys.readouterr().out
    assert "before" in output
    assert f"moka_pl inspect {RUN}/adapters/best" in output
    assert {path.name for path in RUN.iterdir()} >= {"adapters", "checkpoints", "config.yaml"}
    best = read_adapter(RUN / "adapters/best")
    logged = scalars(RUN, "val/loss")
    assert list(logged) == [0, 3, 7]  # Lightning counts steps from 0
    assert numpy.float32(best.extra["metrics"]["val/loss"]) == numpy.float32(min(logged.values()))
    assert scalars(RUN, "α v_proj/layer01/2: 8×4 ⊗ 4×16")
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8

    # The adapter alone gives the same metrics again, whatever the configuration says of adapters.
    cli("validate", "--model.adapter_path", RUN / "adapters/best", "--model.adapter.components", 7)
    [again] = scalars(version(1), "val/loss").values()
    assert again == numpy.float32(best.extra["metrics"]["val/loss"])
    cli("test", "--ckpt_path", RUN / "checkpoints/last.ckpt")
    last = read_adapter(RUN / "adapters/last").extra["metrics"]["val/loss"]
    assert list(scalars(version(2), "test/loss").values()) == [numpy.float32(last)]
    Path("prompts.txt").write_text("alpha?\nbeta?\n")
    cli(
        "predict", RUN / "adapters/best", "--file=prompts.txt", "--output=answers.jsonl", "--max_new_tokens=2"
    )
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == ["alpha?", "beta?"]

    capsys.readouterr()
    cli("inspect", RUN / "adapters/best")
    output = capsys.readouterr().out
    assert "tiny" in output
    assert "model.layers.1.self_attn.v_proj" in output


def test_ctrl_c_outside_of_training_ends_in_one_line(cli, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("moka_pl.cli.lightning.run", stop)
    with pytest.raises(SystemExit) as end:
        cli("fit")
    assert end.value.code == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_what_the_system_refuses_ends_in_one_line(cli, capsys, monkeypatch, command):
    def fail(*arguments, **options):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "some/file")

    monkeypatch.setattr("moka_pl.cli.lightning.run", fail)
    monkeypatch.setattr("moka_pl.inspection.report.read_adapter", fail)
    with pytest.raises(SystemExit) as end:
        cli(command, *(["adapter"] if command == "inspect" else []))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("moka_pl: error: some/file: Disk quota exceeded; free some of your quota, or ")
    assert error.count("\n") == 1


def test_without_a_logger_the_users_config_here_stays(cli, config):
    cli("validate", "--trainer.logger", "false")
    assert Path("config.yaml").read_text() == yaml.safe_dump(config)


def test_saved_config_repeats_the_run(cli, tmp_path):
    cli("fit", "--trainer.max_epochs", 1)
    main(["fit", "--config", str(RUN / "config.yaml")])
    first, second = (read_adapter_state(version(i) / "adapters/last") for i in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert scalars(version(0), "train/loss") == scalars(version(1), "train/loss")


def test_trial_leaves_no_run(cli, capsys):
    cli("fit", "--trainer.fast_dev_run", 2)
    assert [path.name for path in Path().iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "rates"),
    [
        (
            {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.5}},
            {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2, "gamma": 0.1}},
            [0.5, 0.5, 0.05, 0.05],
        ),
        (
            {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.25, "weight_decay": 0.1}},
            {
                "class_path": "moka_pl.WarmupDecay",
                "init_args": {"warmup": 2, "decay": "constant", "min_lr_ratio": 0.5},
            },
            [0.125, 0.25, 0.25, 0.25],
        ),
    ],
)
def test_optimizer_and_scheduler_from_a_file(cli, config, monkeypatch, optimizer, scheduler, rates):
    built = []
    original = MokaModule.configure_optimizers

    def spy(self):
        built.append(original(self))
        return built[-1]

    monkeypatch.setattr(MokaModule, "configure_optimizers", spy)
    config["model"] |= {"optimizer": optimizer, "lr_scheduler": scheduler}
    config["trainer"] |= {"max_epochs": 1, "num_sanity_val_steps": 0}
    cli("fit")
    assert type(built[0]["optimizer"]).__name__ in optimizer["class_path"]
    group = built[0]["optimizer"].param_groups[0]
    for key, value in optimizer["init_args"].items():
        assert group["initial_lr" if key == "lr" else key] == value
    assert isinstance(built[0]["lr_scheduler"]["scheduler"], WarmupDecay) == ("Warmup" in str(scheduler))
    assert list(scalars(RUN, "train/lr").values()) == pytest.approx(rates)


@pytest.fixture
def interrupt(monkeypatch):
    """Sends a signal in the n-th training batch of the runs that follow, once."""
    original = MokaModule.training_step
    before = signal.getsignal(signal.SIGINT)  # ignored already where the tests run in the background

    def arm(batch, number):
        calls = []

        def step(self, *args):
            calls.append(0)
            if len(calls) == batch:
                os.kill(os.getpid(), number)
            return original(self, *args)

        monkeypatch.setattr(MokaModule, "training_step", step)

    yield arm
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="module")
def made():
    return []


@pytest.fixture
def whole(cli, made):
    """The folder of the run that nothing stopped, the same for all tests."""
    if not made:
        cli("fit", "--trainer.logger.init_args.name", "whole")
        made.append(Path("lightning_logs/whole/version_0").absolute())
    return made[0]


@pytest.mark.filterwarnings("error:.*not empty", "error:checkpoint.dirpath")
@pytest.mark.parametrize(
    ("batch", "number", "stopped"),
    [
        (3, signal.SIGINT, 2),  # in the middle of an accumulated batch, before any validation
        (7, signal.SIGTERM, 4),  # the last batch of an epoch
        (8, signal.SIGINT, 5),
    ],
)
def test_interrupted_and_resumed(cli, whole, interrupt, caplog, batch, number, stopped):
    interrupt(batch, number)
    with pytest.raises(SystemExit) as end, caplog.at_level("INFO"):
        cli("fit")
    assert end.value.code == 130
    assert f"Interrupted after step {stopped}; checkpoint saved in" in caplog.text
    assert "add --ckpt_path last to the same command" in caplog.text
    assert read_adapter(RUN / "adapters/last").extra["step"] == stopped
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == stopped
    described = (RUN / "config.yaml").read_text()

    cli("fit", "--ckpt_path", "last")
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    for name in ("best", "last"):
        one, other = (read_adapter_state(run / "adapters" / name) for run in (RUN, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        first, second = (read_adapter(run / "adapters" / name).extra for run in (RUN, whole))
        assert first == second
    for tag in ("train/loss", "train/lr", "train/grad_norm", "val/loss", "α q_proj/layer00/1: 4×16 ⊗ 16×4"):
        resumed, uninterrupted = scalars(RUN, tag), scalars(whole, tag)
        assert resumed == uninterrupted, tag
    kept = sorted(path.name for path in (RUN / "checkpoints").iterdir())
    assert len(kept) == 2
    assert "last.ckpt" in kept
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    # The run's own configuration still starts it from its beginning.
    assert (RUN / "config.yaml").read_text() == described
    assert "last.ckpt" in (RUN / "config_resumed.yaml").read_text()


@pytest.mark.filterwarnings("error:.*not empty", "error:checkpoint.dirpath")
def test_interrupted_and_resumed_with_a_folder_of_the_users(cli, interrupt):
    saving = ("--checkpoint.dirpath", "mine")
    interrupt(3, signal.SIGINT)
    with pytest.raises(SystemExit):
        cli("fit", *saving)
    assert torch.load("mine/last.ckpt", weights_only=True)["global_step"] == 2
    cli("validate", *saving)  # has a log folder of its own, in which the run is not to go on
    cli("fit", *saving, "--ckpt_path", "last")
    assert torch.load("mine/last.ckpt", weights_only=True)["global_step"] == 8
    assert list(scalars(RUN, "train/loss")) == list(range(8))
    assert (RUN / "config_resumed.yaml").is_file()
    assert not (RUN / "checkpoints").exists()


@pytest.mark.filterwarnings("error:.*not empty", "error:checkpoint.dirpath")
def test_finished_run_goes_on_from_its_end(cli):
    saving = ("--checkpoint.every_n_train_steps", 3)
    cli("fit", *saving, "--trainer.max_epochs", 1)
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    cli("fit", *saving, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 8
    assert list(scalars(RUN, "train/loss")) == list(range(8))


def test_an_evaluation_leaves_what_the_run_wrote(cli, caplog):
    """Where its logs go to the run's folder, by ``last`` or by a version that is given."""
    cli("fit", "--trainer.max_epochs", 1)
    kept = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    checkpoint = RUN / "checkpoints/last.ckpt"
    cli("validate", "--ckpt_path", "last")
    cli("test", "--ckpt_path", "last")
    cli("test", "--ckpt_path", checkpoint, "--trainer.logger.init_args.version", 0)
    assert all(path.read_bytes() == contents for path, contents in kept.items())
    added = {path.name for path in RUN.rglob("*") if path.is_file() and path not in kept}
    assert {name for name in added if "tfevents" not in name} == {"validate.json", "test.json", "test_2.json"}
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    caplog.set_level("INFO")
    cli("test", "--ckpt_path", checkpoint, "--model.adapter_path", RUN / "adapters/last")
    assert f"its weights are those of --ckpt_path {checkpoint}." in caplog.text
    assert {"config.yaml", "test.json"} <= {path.name for path in version(1).iterdir()}
    cli("fit", "--ckpt_path", checkpoint, "--trainer.logger.init_args.version", 0)
    assert (RUN / "config.yaml").read_bytes() == kept[RUN / "config.yaml"]
    assert "last.ckpt" in (RUN / "config_resumed.yaml").read_text()


@pytest.mark.parametrize("crash", ["out of memory", pytest.param("broken", marks=pytest.mark.slow)])
def test_crash_leaves_a_checkpoint_of_the_last_step(cli, monkeypatch, capsys, crash):
    original = MokaModule.token_scores
    calls = []

    def step(self, *args):
        calls.append(0)
        if len(calls) == 10:
            raise RuntimeError(crash)
        return original(self, *args)

    monkeypatch.setattr(MokaModule, "token_scores", step)
    with pytest.raises(RuntimeError if crash == "broken" else SystemExit) as end:
        cli("fit")
    if crash == "out of memory":
        assert end.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(said) == 1
        assert "out of memory in the forward pass of step 6, with a micro-batch of 2 x " in said[0]
        assert "plan estimates " in said[0]
    assert torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    monkeypatch.setattr(MokaModule, "token_scores", original)
    cli("fit", "--ckpt_path", "last")
    assert json.loads((RUN / "adapters/last/adapter_config.json").read_text())["extra"]["step"] == 8
    assert max(scalars(RUN, "train/lr")) >= 7


def test_a_run_of_several_loggers_is_resumed_where_it_logged(cli, config):
    """As ``--ckpt_path last`` is what an interrupted run names, whatever its loggers; its rows are kept."""
    options = {"save_dir": "lightning_logs", "name": "moka"}
    config["trainer"]["logger"] = [
        {"class_path": kind, "init_args": options} for kind in ("TensorBoardLogger", "CSVLogger")
    ]
    cli("fit", "--trainer.max_epochs", 1)
    table = RUN / "metrics.csv"
    before = list(csv.DictReader(table.open(newline="")))
    cli("fit", "--ckpt_path", "last")
    assert [path.name for path in RUN.parent.iterdir()] == ["version_0"]
    after = list(csv.DictReader(table.open(newline="")))
    assert len(before) < len(after)
    assert [{name: row[name] for name in before[0]} for row in after[: len(before)]] == before
    assert max(scalars(RUN, "train/loss")) == max(int(row["step"]) for row in after if row["train/loss"])
    assert {"version": None}.items() <= yaml.safe_load((RUN / "config_resumed.yaml").read_text())["trainer"][
        "logger"
    ][1]["init_args"].items()
