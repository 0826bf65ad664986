"""Jobs of SLURM put back in the queue, which go on. Run as a script, this file is each process of one."""

import os
import signal
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from shared.environment import own_environment

from moka_pl.adapters.reading import read_adapter_state
from moka_pl.cli.checkpoint_path import find_restarted
from moka_pl.cli.main import main
from moka_pl.training.accidents import requeue

#: The step at which ranks are told to end, and the one by which they have agreed to.
TOLD, AGREED, STEPS = 4, 10, 14


def command(folder, ranks):
    """A run of some steps."""
    several = ["--trainer.strategy", "ddp", "--trainer.devices", str(ranks)] if ranks > 1 else []
    options = {
        "--model.backbone.name": "tiny",
        "--model.backbone.weights": "random",
        "--data": "moka_pl.data.InstructionData",
        "--data.path": "sample",
        "--data.batch_size": "2",
        "--data.max_length": "64",
        "--trainer.max_epochs": "9",
        "--trainer.max_steps": str(STEPS),
        "--trainer.accelerator": "cpu",
        "--trainer.limit_val_batches": "0",
        "--trainer.logger.init_args.save_dir": str(folder / "logs"),
    }
    return ["fit", *(word for pair in options.items() for word in pair), *several]


def start(folder, ranks, restarts, told):
    """Runs the processes of a job; returns what they printed."""
    tools = folder / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.txt\n')
    (tools / "scontrol").chmod(0o755)
    environment = own_environment(folder / "cache") | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "71",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(ranks),
        "SLURM_NTASKS_PER_NODE": str(ranks),
        "SLURM_RESTART_COUNT": str(restarts),
        "GLOO_SOCKET_IFNAME": "lo",
        "TOLD": str(TOLD if told else 0),
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *command(folder, ranks)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"},
            cwd=folder,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return printed, [process.returncode for process in started]


def trained(folder, version):
    return read_adapter_state(folder / f"logs/moka/version_{version}/adapters/last")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_is_requeued_between_steps_and_goes_on_bit_for_bit(ranks, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    printed, statuses = start(whole, ranks, restarts=0, told=False)
    assert statuses == [0] * ranks, printed
    assert not (whole / "scontrol.txt").exists()

    printed, statuses = start(parts, ranks, restarts=0, told=True)
    assert statuses == [130] * ranks, printed
    last = parts / "logs/moka/version_0/checkpoints/last.ckpt"
    saved = torch.load(last, weights_only=True)["global_step"]
    assert saved == (TOLD if ranks == 1 else AGREED)
    assert (parts / "scontrol.txt").read_text() == "requeue 71\n"  # by one rank
    text = "".join(printed)
    assert text.count(f"Interrupted after step {saved}; checkpoint saved in {last}\n") == 1
    assert text.count("Job 71 is back in the queue; it goes on from there") == 1
    assert text.count("Stopping after this step") == 1
    assert "--ckpt_path" not in text
    assert not list(parts.glob("hpc_ckpt*"))  # Lightning's

    printed, statuses = start(parts, ranks, restarts=1, told=False)
    assert statuses == [0] * ranks, printed
    assert "".join(printed).count(f"job 71 is started again, and goes on from {last}") == 1
    assert [path.name for path in (parts / "logs/moka").iterdir()] == ["version_0"]
    expected, found = trained(whole, 0), trained(parts, 0)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture
def job(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    monkeypatch.setattr(sys, "argv", ["moka_pl", "fit", "--data.path", "a"])


def test_a_job_of_an_array_is_named_as_scontrol_takes_it(job, monkeypatch):
    assert requeue.job() == "71"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue.job() == "70_2"
    assert not requeue.restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert not requeue.restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert requeue.restarted()


def test_a_run_belongs_to_its_job_and_command(job, monkeypatch, tmp_path):
    requeue.sign(tmp_path / "checkpoints")
    assert requeue.is_ours(tmp_path / "checkpoints")
    assert not requeue.is_ours(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moka_pl", "fit", "--data.path", "b"])
    assert not requeue.is_ours(tmp_path / "checkpoints")  # another one in the same job
    monkeypatch.setattr(sys, "argv", ["moka_pl", "fit", "--data.path", "a"])
    monkeypatch.setenv("SLURM_JOB_ID", "72")
    assert not requeue.is_ours(tmp_path / "checkpoints")
    (tmp_path / "checkpoints/slurm_job.json").write_text("{")
    assert not requeue.is_ours(tmp_path / "checkpoints")


def test_a_restarted_job_finds_its_own_run_among_newer_ones(job, monkeypatch, tmp_path):
    def checkpoint(folder):
        requeue.sign(folder)
        torch.save({"global_step": 3, "state_dict": {}, "callbacks": {}}, folder / "last.ckpt")

    logger = Namespace(
        class_path="lightning.pytorch.loggers.TensorBoardLogger",
        init_args=Namespace(save_dir=str(tmp_path), name="n", version=None),
    )
    assert find_restarted(logger) is None
    for version in (8, 9):
        checkpoint(tmp_path / f"n/version_{version}/checkpoints")
    requeue.sign(tmp_path / "n/version_10/checkpoints")  # ended before it had saved anything
    monkeypatch.setenv("SLURM_JOB_ID", "72")
    checkpoint(tmp_path / "n/version_11/checkpoints")
    checkpoint(tmp_path / "others")
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    assert find_restarted(logger) == (tmp_path / "n/version_9/checkpoints/last.ckpt", 9)
    assert find_restarted(logger, str(tmp_path / "others")) is None
    checkpoint(tmp_path / "own")
    assert find_restarted(None, str(tmp_path / "own")) == (tmp_path / "own/last.ckpt", None)


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("#!/bin/sh\nexit 0", "Job 71 is back in the queue; it goes on from there"),
        (
            "#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1",
            "Job 71 cannot be put back in the queue (Requested operation is presently disabled). "
            "To resume, add --ckpt_path last to the same command",
        ),
        (None, "Job 71 cannot be put back in the queue ([Errno 2] No such file or directory: 'scontrol')."),
    ],
)
def test_tells_whether_a_job_is_requeued(job, program, told, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    if program is not None:
        (tmp_path / "scontrol").write_text(program)
        (tmp_path / "scontrol").chmod(0o755)
    assert requeue.requeue().startswith(told)


def test_takes_over_from_lightning_unless_it_is_not_to_requeue(job, monkeypatch):
    environment = SLURMEnvironment()
    trainer = Trainer(plugins=environment, logger=False, accelerator="cpu", devices=1)
    assert requeue.take_over(trainer) == signal.SIGUSR1
    assert not environment.auto_requeue  # so that Lightning does not
    assert requeue.take_over(trainer) is None
    other = SLURMEnvironment(requeue_signal=signal.SIGUSR2)
    trainer = Trainer(plugins=other, logger=False, accelerator="cpu", devices=1)
    assert requeue.take_over(trainer) == signal.SIGUSR2
    trainer = Trainer(plugins=LightningEnvironment(), logger=False, accelerator="cpu", devices=1)
    assert requeue.take_over(trainer) is None


def as_one_process():
    """Sends the job's signal to each rank at another moment of a step."""
    from moka_pl.callbacks import Throughput

    told, begin, end = int(os.environ["TOLD"]), Throughput.on_train_batch_start, Throughput.on_train_batch_end
    rank = int(os.environ["SLURM_PROCID"])

    def tell():
        os.kill(os.getpid(), signal.SIGUSR1)

    def on_start(self, trainer, pl_module, *args):
        begin(self, trainer, pl_module, *args)
        if told and trainer.global_step == told - 1 and rank == 1:
            norm = pl_module.causal_lm.model.norm
            norm.register_full_backward_hook(lambda *_: tell())

    def on_end(self, trainer, *args):
        end(self, trainer, *args)
        if told and trainer.global_step == told and rank == 0:
            tell()

    Throughput.on_train_batch_start, Throughput.on_train_batch_end = on_start, on_end
    main(sys.argv[1:])


if __name__ == "__main__":
    as_one_process()
