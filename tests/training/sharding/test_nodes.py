"""Two nodes of two processes each, by torchrun. Run as a script, this file is each of the four processes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The logs of both strategies on two nodes."""
    folder = tmp_path_factory.mktemp("nodes")
    write_data(folder)
    commands = [arguments(folder, name, 4) for name in STRATEGIES]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "MASTER_", "LOCAL_", "WORLD_"))}
    environment = clean | {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    nodes = [
        subprocess.Popen(
            [*torchrun, "--node-rank", str(rank), __file__, json.dumps(commands)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=250)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-6000:]
    for rank, output in enumerate(outputs):
        (folder / f"output-{rank}.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """The folder of the same run in one process."""
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(sys, "argv", ["moka_pl"])
        patch.chdir(tmp_path_factory.mktemp("single"))
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
    compared = {tag for tag in theirs if tag in ("train/loss", "train/grad_norm") or tag.startswith("val")}
    assert compared >= {"val/loss", "val/accuracy", "val_tasks/accuracy/t0"}
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
    told = [(folder / f"output-{rank}.txt").read_text() for rank in range(2)]
    assert [output.count("held-out") for output in told] == [2, 0]  # a table for each strategy


if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        main(command)
