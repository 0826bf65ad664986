"""Mutated configurations end in one line, or are taken; never in a traceback."""

import copy
import random

import pytest
import yaml

from moka_pl.cli.lightning import run
from moka_pl.errors import MokaError, system_failure

CONFIG = {
    "seed_everything": 0,
    "model": {
        "backbone": {"name": "tiny", "weights": "random", "quantization": "nf4"},
        "adapter": {"components": 3, "filters": "diverse", "target_modules": ["q_proj"], "dropout": 0.1},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "betas": [0.9, 0.99]}},
        "lr_scheduler": {"class_path": "moka_pl.WarmupDecay", "init_args": {"warmup": 0.1}},
        "learning_rate_ratios": {"left": 1.0},
    },
    "data": {
        "class_path": "moka_pl.data.InstructionData",
        "init_args": {"path": "sample", "batch_size": 2, "max_length": 64, "packing": False},
    },
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 1,
        "callbacks": [{"class_path": "moka_pl.callbacks.Throughput", "init_args": {"window": 3}}],
    },
    "gates": {"every_n_steps": 10},
    "adapters": {"monitor": "val/loss", "mode": "min"},
    "checkpoint": {"save_last": True},
}
VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        7,
        1.5,
        -0.5,
        10**20,
        float("nan"),
        float("inf"),
        "",
        "x",
        "1e-4",
        "é",
        "null",
    ),
    *(
        [],
        [1],
        ["a", 2],
        [[]],
        [None],
        {},
        {"a": 1},
        {"class_path": "os.system"},
        {"init_args": {}},
        "\n",
        "a" * 5000,
    ),
    *(
        "os.system",
        "/",
        ".",
        "..",
        "/dev/null",
        "~",
        "${HOME}",
        "%s",
        "{}",
        "[",
        "a.b",
        "s3:/",
        "-",
        "--help",
        "@x",
    ),
    *(
        {"class_path": 3},
        {"class_path": "torch.nn.Linear"},
        {"__path__": "x"},
        {"": 1},
        {"a.b": 1},
        {1: 2},
        {None: 1},
    ),
]


def places(node, path=()):
    """Yields the path of every value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(pick):
    """Changes, removes, renames or moves one to three values."""
    config = copy.deepcopy(CONFIG)
    for _ in range(pick.choice([1, 1, 2, 3])):
        path = pick.choice(list(places(config)))
        node = config
        for key in path[:-1]:
            node = node[key]
        action = pick.random()
        if action < 0.75:
            node[path[-1]] = copy.deepcopy(pick.choice(VALUES))
        elif action < 0.85:
            del node[path[-1]]
        elif isinstance(node, dict):
            node[pick.choice(["x", "class_path", "init_args", "config", "dict_kwargs", "subcommand", 5])] = (
                node.pop(path[-1])
            )
    return config


def attempt(file, config, capsys):
    """Builds what a configuration says; returns the lines of its refusal, none if it was taken."""
    file.write_text(yaml.safe_dump(config))
    try:
        run(["--config", str(file)], only_build=True)
    except SystemExit as end:
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        return lines if end.code == 2 else [f"status {end.code}", *lines]
    except (MokaError, OSError) as error:
        return (system_failure(error) or str(error)).split("\n")
    return []


FOUND = [
    ("seed_everything", -5),
    ("model", True),
    ("trainer", "x"),
    ("gates", 1),
    ("config", 1),
    ("config", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), FOUND)
def test_what_was_found(tmp_path, monkeypatch, capsys, key, value):
    monkeypatch.chdir(tmp_path)
    assert len(attempt(tmp_path / "c.yaml", CONFIG | {key: value}, capsys)) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mutations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    pick = random.Random(0)
    refusals = [attempt(tmp_path / "c.yaml", mutated(pick), capsys) for _ in range(12)]
    assert {len(lines) for lines in refusals} == {0, 1}
    assert attempt(tmp_path / "c.yaml", CONFIG, capsys) == []
