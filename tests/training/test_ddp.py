"""Two processes against one. Run as a script, this file is what each of the two processes does."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from shared.environment import own_environment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.adapters import MokaConfig, adapter_state
from moka_pl.adapters.reading import read_adapter_state
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint, GateMonitor, GracefulInterrupt, RunSummary, Throughput
from moka_pl.data import CommonsenseData, InstructionData, MixtureData, MmluData
from moka_pl.lm import cuda_graphs
from moka_pl.training.module import MokaModule

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 4
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]


class Steps(Callback):
    """Every step's loss and gradient norm, and every validation's metrics."""

    def __init__(self):
        self.steps, self.validations = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.steps):
            names = ("train/loss", "train/grad_norm")
            self.steps.append([float(trainer.callback_metrics[name]) for name in names])

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(pl_module.eval_values)


def write_data(folder):
    """12 training examples of very different lengths, 5 held-out ones, and 7 questions for both."""
    pick = random.Random(2)

    def example(number):
        words = 1 if number % 3 else 6 + number
        return {
            "instruction": f"{number}: {pick.choice(WORDS)}?",
            "output": " ".join(pick.choices(WORDS, k=words)),
        }

    questions = [
        {
            "task": f"task{number % 2}",
            "question": f"Which is {number}?",
            "choices": [" ".join(pick.sample(WORDS, 1 + k)) for k in range(2 + number % 2)],
            "answer": number % 2,
        }
        for number in range(7)
    ]
    for name, records in (
        ("train", [example(n) for n in range(12)]),
        ("heldout", [example(n) for n in range(5)]),
        ("questions", questions),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for subject, part, count in (
        ("virology", "dev", 1),
        ("virology", "test", 5),
        ("astronomy", "dev", 1),
        ("astronomy", "test", 2),
    ):
        rows = [f"{subject} {n}?,{','.join(pick.sample(WORDS, 4))},{n % 4}" for n in range(count)]
        path = folder / "mmlu" / part / f"{subject}_{part}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["question,choice0,choice1,choice2,choice3,answer", *rows]) + "\n")


class Replay:
    """Stands in for a CUDA graph on a CPU: computes the step that was recorded again."""

    def __init__(self, capture, inputs):
        self.capture, self.inputs = capture, inputs

    def replay(self):
        with cuda_graphs._fresh_leaves(self.capture.model) as leaves:
            self.capture._forward_backward(self.inputs, leaves)


def record_anew(self, batch):
    inputs = (batch.ids.clone(), batch.positions.clone(), batch.targets.clone())
    self._graphs[batch.size] = cuda_graphs._Recorded(Replay(self, inputs), inputs)


def fit(folder, name, devices, packing=False, adapter=None, graphs=False):
    """Two epochs: four global batches of 4 examples and one of 3 in three steps, or one epoch of packs.

    Returns the adapter's configuration.
    """
    if graphs:
        cuda_graphs.StepCapture._record = record_anew
        cuda_graphs.capture_unsupported_reason = lambda model: None
        cuda_graphs.PATIENCE = 0
    torch.set_num_threads(1)
    torch.manual_seed(5)
    data = MixtureData(
        [
            InstructionData(
                folder / "train.jsonl",
                folder / "heldout.jsonl",
                prompt="alpaca",
                max_length=320,
            ),
            CommonsenseData(folder / "questions.jsonl", folder / "questions.jsonl", max_length=128),
            MmluData(folder / "mmlu", shots=1, scoring="text", max_length=200),
        ],
        batch_size=GLOBAL_BATCH // devices // (2 if packing else 1),
        eval_batch_size=2,
        packing=packing,
        seed=1,
    )
    module = MokaModule(
        BackboneConfig(name="tiny", weights="random"),
        adapter or MokaConfig(components=3),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        gradient_checkpointing=not graphs,
        cuda_graphs=graphs,
    )
    steps = Steps()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        max_epochs=1 if packing else 2,
        limit_val_batches=0 if packing else None,
        accumulate_grad_batches=2,
        gradient_clip_val=0.05,
        logger=TensorBoardLogger(folder / "logs", name=name),
        callbacks=[
            steps,
            AdapterCheckpoint(),
            GateMonitor(),
            Throughput(),
            RunSummary(),
            GracefulInterrupt(),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    record = {
        "steps": steps.steps,
        "validations": steps.validations,
        "world": trainer.world_size,
        "filters": module.adapter.filters,
        "ignored": len(module._ddp_params_and_buffers_to_ignore),
        "sums": {key: float(value.double().sum()) for key, value in adapter_state(module.causal_lm).items()},
    }
    (folder / f"{name}-rank{trainer.global_rank}.json").write_text(json.dumps(record))
    return module.adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The records of a run in two processes and of one in a single process."""
    folder = tmp_path_factory.mktemp("ddp")
    write_data(folder)
    environment = own_environment(folder / "cache") | {"TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(
        [sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (folder / "output.txt").write_text(run.stdout)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    names = ("two-rank0", "two-rank1", "one-rank0")
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def test_losses_of_every_step_are_those_of_the_joint_batch(runs):
    first, second, single = runs
    assert (first["world"], single["world"]) == (2, 1)
    assert len(single["steps"]) == 6
    assert len({loss for loss, _ in single["steps"]}) == 6
    for mine, theirs in zip(first["steps"], single["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert first["steps"] == second["steps"]


def test_replayed_steps_are_those_of_the_joint_batch(runs, folder):
    first, second = (json.loads((folder / f"graphs-two-rank{rank}.json").read_text()) for rank in range(2))
    for mine, theirs in zip(first["steps"], runs[2]["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert first["steps"] == second["steps"]
    assert first["sums"] == second["sums"] == pytest.approx(runs[2]["sums"], rel=1e-3, abs=1e-4)


def test_packed_steps_are_those_of_the_joint_batch(folder):
    names = ("packed-two-rank0", "packed-two-rank1", "packed-one-rank0")
    first, second, single = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    assert len(single["steps"]) >= 2
    for mine, theirs in zip(first["steps"], single["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert first["steps"] == second["steps"]
    assert first["sums"] == second["sums"] == pytest.approx(single["sums"], rel=1e-3, abs=1e-4)


def test_the_first_rank_chooses_filters_for_all(folder):
    first, second, explicit = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("auto-rank0", "auto-rank1", "explicit-rank0")
    )
    assert isinstance(first["filters"], dict)
    assert first["filters"] == second["filters"]
    assert first["sums"] == second["sums"] == explicit["sums"]
    assert first["steps"] == second["steps"] == explicit["steps"]


def test_final_adapter_is_the_same(runs, folder):
    two, one = (
        read_adapter_state(folder / "logs" / name / "version_0/adapters/last") for name in ("two", "one")
    )
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-6)
        if "moka_B" in name:  # B begins at zero: the two agree on more than their start
            assert one[name].abs().max() > 1e-4
    assert runs[0]["sums"] == runs[1]["sums"]  # both ranks hold the same adapter, bit for bit


def test_every_validation_item_counts_once(runs):
    first, second, single = runs
    assert len(single["validations"]) == 3
    assert first["validations"] == second["validations"]
    for mine, theirs in zip(first["validations"], single["validations"], strict=True):
        assert set(theirs) >= {"val/loss", "val/instruction/loss", "val/accuracy/task0", "val/accuracy/task1"}
        names = (
            "acc_norm/task0",
            "acc_norm",
            "accuracy/mmlu_virology",
            "accuracy/mmlu",
            "accuracy/mmlu_macro",
        )
        assert set(theirs) >= {f"val/{name}{end}" for name in names for end in ("", "_stderr")}
        p = theirs["val/accuracy/mmlu"]  # of 5 + 2 questions
        assert theirs["val/accuracy/mmlu_stderr"] == pytest.approx((p * (1 - p) / 6) ** 0.5)
        assert mine == pytest.approx(theirs, rel=1e-5)
    # Before the first step both are the frozen base.
    assert single["validations"][0] != single["validations"][-1]


def test_logged_and_saved_once(folder):
    events = list((folder / "logs/two").rglob("events.out.*"))
    assert len(events) == 1
    found = EventAccumulator(str(events[0].parent), size_guidance={"scalars": 0})
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == list(range(6))
    assert len(found.Scalars("val/loss")) == 3
    assert len(found.Images("α/heat map q_proj")) == 2
    assert [path.name for path in (folder / "logs/two").iterdir()] == ["version_0"]


def test_frozen_tensors_are_left_to_the_ranks(runs):
    assert runs[0]["ignored"] > 10


def test_one_table(folder):
    output = (folder / "output.txt").read_text()
    assert output.count("held-out") == 3  # one for each run that validates
    assert "over 2 process(es)" in output


if __name__ == "__main__":
    place = Path(sys.argv[1])
    fit(place, "two", 2)
    fit(place, "packed-two", 2, packing=True)
    chosen = fit(place, "auto", 2, packing=True, adapter=MokaConfig(components=3, filters="auto"))
    fit(place, "explicit", 2, packing=True, adapter=chosen)
    fit(place, "graphs-two", 2, graphs=True)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        torch.distributed.destroy_process_group()
        fit(place, "one", 1)
        fit(place, "packed-one", 1, packing=True)
