"""Two nodes of two processes each, by torchrun and as by SLURM's srun.

Run as a script, this file is each of the four processes.
"""

import json
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
import yaml
from shared.environment import own_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.adapters.reading import read_adapter_state
from moka_pl.cli.main import main

pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "sharded")
GLOBAL_BATCH = 8
EXAMPLES = 20  # and seven questions: batches of 8, 8, 8 and 3


def write_data(folder):
    """Examples of different lengths, held-out ones that four ranks do not share evenly, and questions."""
    questions = [
        {"task": f"t{n % 2}", "question": f"{n}?", "choices": ["a b", "c d e"], "answer": n % 2}
        for n in range(7)
    ]

    def rows(kind, count):
        words = [1 if n % 3 else 3 + n for n in range(count)]
        return [{"instruction": f"{kind} {n}?", "output": "word " * some} for n, some in enumerate(words)]

    files = {"train": rows("a", EXAMPLES), "heldout": rows("b", 5), "questions": questions}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def arguments(folder, name, ranks):
    """The command of a run of two epochs of four steps, with its configuration."""
    several = {"strategy": name, "devices": 2, "num_nodes": ranks // 2}
    data = [
        {
            "class_path": "moka_pl.data.InstructionData",
            "init_args": {
                "path": str(folder / "train.jsonl"),
                "validation_path": str(folder / "heldout.jsonl"),
                "prompt": "alpaca",
                "max_length": 320,
            },
        },
        {
            "class_path": "moka_pl.data.CommonsenseData",
            "init_args": {
                "path": str(folder / "questions.jsonl"),
                "validation_path": str(folder / "questions.jsonl"),
                "max_length": 128,
            },
        },
    ]
    config = {
        "seed_everything": 3,
        "model": {
            "backbone": {"name": "tiny", "weights": "random"},
            "adapter": {"components": 3},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}},
        },
        "data": {
            "class_path": "moka_pl.data.MixtureData",
            "init_args": {"parts": data, "batch_size": GLOBAL_BATCH // ranks, "eval_batch_size": 2},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "moka_pl.callbacks.BoardLogger",
                "init_args": {"save_dir": str(folder / "logs"), "name": name},
            },
            **(several if ranks > 1 else {"devices": 1}),
        },
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(file)]


def torchrun(port):
    """The commands of both nodes, which start two processes each, and what is added to their environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", port]
    return [([*command, "--node-rank", str(node)], {}) for node in range(2)]


def srun(port):
    """The commands of all processes, and the environment that SLURM gives them."""
    shared = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
    shared |= {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "MASTER_PORT": port}
    return [
        (
            [sys.executable],
            shared | {"SLURM_PROCID": str(n), "SLURM_NODEID": str(n // 2), "SLURM_LOCALID": str(n % 2)},
        )
        for n in range(4)
    ]


LAUNCHERS = {"torchrun": torchrun, "srun": srun}


@pytest.fixture(scope="module", params=LAUNCHERS)
def folder(request, tmp_path_factory):
    """The logs of both strategies on two nodes."""
    folder = tmp_path_factory.mktemp(request.param)
    write_data(folder)
    commands = [arguments(folder, name, 4) for name in STRATEGIES]
    environment = own_environment(folder / "cache")
    environment |= {"TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with ExitStack() as stack:
        started = []
        for number, (command, added) in enumerate(LAUNCHERS[request.param](port)):
            output = stack.enter_context((folder / f"output-{number}.txt").open("w"))
            process = subprocess.Popen(
                [*command, __file__, json.dumps(commands)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment | added,
                cwd=folder,
            )
            stack.callback(process.kill)  # which does nothing to one that has ended
            started.append(process)
        codes = [process.wait(timeout=250) for process in started]
    told = "\n".join(output.read_text() for output in sorted(folder.glob("output-*.txt")))
    assert not any(codes), told[-6000:]
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The folder of the same run in one process."""
    folder = tmp_path_factory.mktemp("single")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(sys, "argv", ["moka_pl"])
        patch.chdir(folder)
        for name in ("TOKENIZERS_PARALLELISM", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        main(arguments(folder, "single", 1))
    return folder / "logs/single/version_0"


def scalars(run):
    """All logged values, by tag and step."""
    (events,) = run.rglob("events.out.*")
    found = EventAccumulator(str(events), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_and_metrics_are_those_of_one_process(folder, single, strategy):
    mine, theirs = scalars(folder / "logs" / strategy / "version_0"), scalars(single)
    compared = {tag for tag in theirs if tag in ("train/loss", "train/grad_norm")}
    compared |= {tag for tag in theirs if tag.startswith(("val", "α"))}
    assert compared >= {"val/loss", "val/accuracy", "val_tasks/accuracy/t0", "α/entropy"}
    assert sum(tag.startswith("α") for tag in compared) == 19  # of 12 gates, 4 layers, 2 projections, and all
    assert len(theirs["train/loss"]) == len({loss for _, loss in theirs["train/loss"]}) == 8
    for tag in compared:
        assert [step for step, _ in mine[tag]] == [step for step, _ in theirs[tag]]
        values = [[value for _, value in side[tag]] for side in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_adapter_is_that_of_one_process(folder, single, strategy):
    mine = read_adapter_state(folder / "logs" / strategy / "version_0/adapters/last")
    theirs = read_adapter_state(single / "adapters/last")
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=2e-6)
    assert max(float(tensor.abs().max()) for name, tensor in theirs.items() if "moka_B" in name) > 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_log_and_one_checkpoint(folder, strategy):
    (run,) = (folder / "logs" / strategy).iterdir()
    assert run.name == "version_0"
    assert len(list(run.rglob("last.ckpt"))) == 1
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert stored["global_step"] == 8
    for name in stored["state_dict"]:
        assert "moka_" in name
    told = [output.read_text() for output in sorted(folder.glob("output-*.txt"))]
    assert len(told) > 1
    first, *others = [output.count("held-out") for output in told]
    assert (first, sum(others)) == (2, 0)  # a table for each strategy


if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        main(command)
