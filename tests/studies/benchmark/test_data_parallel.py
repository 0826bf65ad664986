"""Speed over numbers of devices, with the trainings replaced."""

import json
from pathlib import Path
from types import SimpleNamespace

from torch.utils.tensorboard import SummaryWriter

from moka_pl.studies.benchmark import data_parallel


def test_the_median_after_the_first_steps(monkeypatch, capsys) -> None:
    commands = []

    def run(command, check) -> None:
        commands.append(command)
        options = dict(option.removeprefix("--").split("=") for option in command if "=" in option)
        speed = 100 * int(options["trainer.devices"])
        folder = Path(options["trainer.logger.init_args.save_dir"]) / "run" / "version_0"
        with SummaryWriter(str(folder)) as writer:
            for step, share in ((5, 0.1), (25, 0.9), (30, 1.0), (35, 1.1)):
                writer.add_scalar("train/tokens_per_second", share * speed, step)
                writer.add_scalar("train/peak_memory_gib", step / 10, step)

    monkeypatch.setattr(data_parallel.subprocess, "run", run)
    data_parallel.main(["--devices", "1", "2", "--steps", "40"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["1", "100", "1.00", "3.50"],
        ["2", "200", "2.00", "3.50"],
    ]
    assert [row["devices"] for row in json.loads(lines[-1])] == [1, 2]
    assert all("--trainer.max_steps=40" in command for command in commands)


def test_a_limit_is_set_on_each_rank_before_the_command_line_runs(monkeypatch) -> None:
    done = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30)
    )
    monkeypatch.setattr(
        "torch.cuda.set_per_process_memory_fraction", lambda share, device: done.append((share, device))
    )
    monkeypatch.setattr("moka_pl.cli.main.main", done.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    data_parallel.run_limited(["24", "fit", "--config", "x.yaml"])
    assert done == [(0.3, 1), ["fit", "--config", "x.yaml"]]
    data_parallel.run_limited(["100", "fit"])  # more than there is
    assert done[2] == (1.0, 1)
