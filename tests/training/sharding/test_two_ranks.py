"""A base sharded over two processes. Run as a script, this file is what each of the two processes does."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from peft import LoraConfig
from safetensors.torch import load_file
from shared.environment import own_environment
from torch.optim.lr_scheduler import LambdaLR

from moka_pl.adapters import MokaConfig, adapter_state
from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.quantization import is_quantised, weight_count
from moka_pl.backbone.random_weights import SHAPES
from moka_pl.callbacks import AdapterCheckpoint
from moka_pl.data import CommonsenseData, InstructionData, MixtureData
from moka_pl.training.module import MokaModule
from moka_pl.training.sharding.strategy import ShardedStrategy

pytestmark = pytest.mark.slow

GLOBAL_BATCH = 4
#: Adapters of embedding and head, and heads that are tied.
ENDS = ("ends", "tied", "tied_ends_checkpointed", "rows", "tied_rows")


class Watch(Callback):
    """Losses, metrics and the bytes of the base that this rank holds between steps."""

    def __init__(self, folder: Path, fails_at: int | None) -> None:
        self.steps, self.validations, self.held = [], [], []
        self.folder, self.fails_at = folder, fails_at

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.fails_at and trainer.global_rank == 1:
            (self.folder / "failed.txt").write_text(str(time.time()))
            raise ValueError("rank 1 fails on purpose")
        if trainer.global_step > len(self.steps):
            names = ("train/loss", "train/grad_norm")
            self.steps.append([float(trainer.callback_metrics[name]) for name in names])
            blocks = getattr(trainer.strategy, "blocks", None)
            self.held.append(0 if blocks is None else blocks.held)

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_rank == 1 and len(self.validations) == 1:
            run_out_of_memory_once(pl_module.causal_lm.model.layers[1].mlp)
        if trainer.global_rank == 1 and len(self.validations) == 2 and self.held[-1]:
            pl_module._rows.most = None  # as many rows at a time as before the lack in the validation before
            lack_memory_once(trainer.strategy.blocks)

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(pl_module.eval_values)


def run_out_of_memory_once(module):
    """Has a module's next call fail in the middle of a pass, which one rank then begins again in parts."""

    def fail(module, inputs):
        handle.remove()
        raise RuntimeError("out of memory on purpose")

    handle = module.register_forward_pre_hook(fail)


def lack_memory_once(blocks):
    """Has a rank find no memory for a block that it asks for, while another rank goes on."""
    shard, ask = blocks._shards[1], blocks._ask_for

    def fail():
        del shard.reserve
        raise torch.OutOfMemoryError("out of memory on purpose")

    def ask_and_fail(index):
        if index == 1:
            del blocks._ask_for
            shard.reserve = fail
        ask(index)

    blocks._ask_for = ask_and_fail


def strategy_of(name):
    if name.startswith("sharded"):
        return ShardedStrategy(process_group_backend="gloo", offload="offload" in name)
    return DDPStrategy(process_group_backend="gloo") if name.startswith("ddp") else "auto"


def quantization_of(name):
    return "none" if "dense" in name else "int8" if "int8" in name else "nf4"


def adapter_of(name):
    """LoRA; an adapted head, and one that is tied to the adapted embedding; rows of new tokens."""
    if "lora" in name:
        return LoraConfig(r=2, target_modules="all-linear")
    targets = ["q_proj", "embed_tokens"] if "tied" in name else ["up_proj", "lm_head"]
    if "ends" in name:
        return MokaConfig(components=2, target_modules=targets, ensure_weight_tying="tied" in name)
    tokens = [7, SHAPES["tiny"]["vocab_size"]] if "rows" in name else None
    return MokaConfig(components=3, target_modules="all-linear", trainable_token_indices=tokens)


def fit(folder, name):
    """Two epochs, or what is left of them, and a record of each step.

    The name says how: strategy, what is stored, whether it stops after one epoch, fails or resumes.
    """
    devices = 1 if name.startswith("single") else 2
    resumed = folder / f"{name.partition('_of_')[2]}.ckpt" if "_of_" in name else None
    torch.set_num_threads(1)
    torch.manual_seed(5)
    data = MixtureData(
        [
            InstructionData(
                folder / "train.jsonl", folder / "heldout.jsonl", max_length=160, prompt="alpaca"
            ),
            CommonsenseData(folder / "questions.jsonl", folder / "questions.jsonl", max_length=96),
        ],
        batch_size=GLOBAL_BATCH // devices,
        eval_batch_size=2,
        seed=1,
    )
    watch = Watch(folder, 2 if "fails" in name else None)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy_of(name),
        max_epochs=1 if "half" in name and resumed is None else 2,
        accumulate_grad_batches=1,
        logger=False,
        callbacks=[watch, AdapterCheckpoint(dirpath=folder / name)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    SHAPES["tied"] = SHAPES["tiny"] | {"tie_word_embeddings": True}
    shape = "tied" if "tied" in name else "tiny"
    module = MokaModule(
        BackboneConfig(shape, weights="random", quantization=quantization_of(name)),
        adapter_of(name),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
        gradient_checkpointing="checkpointed" in name,
        allow_changes=["ranks", "batch_size"] if resumed and devices == 1 else None,
    )
    trainer.fit(module, data, ckpt_path=resumed)
    if resumed is None:
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    layers = [layer.weight for layer in module.modules() if is_quantised(layer)]
    model = module.causal_lm
    ends = {end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    ends = ends if len(ends) == 2 else set()  # a tied one stays whole
    record = {
        "steps": watch.steps,
        "validations": watch.validations,
        "held": watch.held,
        "base": module.base.samples,
        "bytes": sum(map(weight_count, layers)) // 2 + 4 * sum(map(weight_count, ends)),
        "sums": {k: float(v.double().sum()) for k, v in adapter_state(module.causal_lm).items()},
    }
    (folder / f"{name}-{trainer.global_rank}.json").write_text(json.dumps(record))
    return trainer


def write_data(folder):
    """10 examples of different lengths, 5 held-out ones, and 3 questions for both."""

    def rows(count):
        return [{"instruction": f"{n}?", "output": "word " * (1 + 3 * (n % 4))} for n in range(count)]

    questions = [
        {"task": "t", "question": f"{n}?", "choices": ["a b", "c d e"], "answer": n % 2} for n in range(3)
    ]
    for name, records in (("train", rows(10)), ("heldout", rows(5)), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def start(folder, *runs, timeout=300):
    """Runs this file with the names of runs, in two processes if Lightning starts a second one."""
    environment = own_environment(folder / "cache") | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, str(folder), *runs]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def read(folder, name, rank=0):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    write_data(folder)
    ended = start(folder, "ddp", "sharded")
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def test_losses_metrics_and_adapters_are_those_of_ddp(folder):
    ddp, sharded = read(folder, "ddp"), read(folder, "sharded")
    assert len({loss for loss, _ in ddp["steps"]}) == len(ddp["steps"]) >= 6
    for name in ("steps", "sums", "base"):
        assert sharded[name] == ddp[name]
    assert len(ddp["validations"]) >= 3
    # One rank has begun batches of the second and third validation again, in smaller parts.
    for mine, theirs in zip(sharded["validations"], ddp["validations"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert read(folder, "sharded", 1)["steps"] == sharded["steps"]
    assert read(folder, "sharded", 1)["validations"] == sharded["validations"]
    assert load_file(folder / "sharded/last/adapter_model.safetensors").keys()


def test_each_rank_holds_its_part_between_steps(folder):
    for rank in range(2):
        run = read(folder, "sharded", rank)
        assert run["bytes"] / 2 < min(run["held"]) <= max(run["held"]) < 0.6 * run["bytes"] + 8 * 2 * 256


@pytest.fixture(scope="module")
def variants(folder):
    """Other ways to store and to compute, and runs that go on from others' checkpoints."""
    names = ["ddp_checkpointed_half", "sharded_checkpointed_half", "sharded_offload_half", "sharded_half"]
    names += ["ddp_dense_half", "sharded_dense_half", "ddp_lora_half", "sharded_lora_half"]
    names += ["ddp_int8_half", "sharded_int8_half"]
    ended = start(folder, *names, "ddp_of_sharded_half", "sharded_of_ddp_checkpointed_half")
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["checkpointed", "dense", "lora", "int8"])
def test_so_are_those_of_other_bases_and_methods(variants, kind):
    ddp, sharded = read(variants, f"ddp_{kind}_half"), read(variants, f"sharded_{kind}_half")
    assert sharded["steps"] == ddp["steps"]
    assert sharded["sums"] == ddp["sums"]


@pytest.fixture(scope="module")
def ends(folder):
    """Runs whose embedding and head are adapted, or tied."""
    ended = start(folder, *(f"{strategy}_{kind}_half" for kind in ENDS for strategy in ("ddp", "sharded")))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", ENDS)
def test_so_are_those_of_embeddings_and_heads_of_which_each_rank_holds_its_part(ends, kind):
    ddp, sharded = read(ends, f"ddp_{kind}_half"), read(ends, f"sharded_{kind}_half")
    for name in ("steps", "sums", "base"):
        assert sharded[name] == ddp[name]
    for mine, theirs in zip(sharded["validations"], ddp["validations"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    for rank in range(2):
        run = read(ends, f"sharded_{kind}_half", rank)
        assert run["bytes"] / 2 < min(run["held"]) <= max(run["held"]) < 0.6 * run["bytes"] + 8 * 2 * 256


def test_parts_in_host_memory_are_the_same(variants):
    assert read(variants, "sharded_offload_half")["steps"] == read(variants, "sharded_half")["steps"]


def test_runs_go_on_under_another_strategy(variants):
    whole = read(variants, "sharded")["steps"]
    gone_on = read(variants, "ddp_of_sharded_half")
    assert read(variants, "sharded_half")["steps"] + gone_on["steps"] == whole
    assert gone_on["sums"] == read(variants, "sharded")["sums"]


def test_runs_go_on_in_one_process(variants):
    ended = start(variants, "single_of_sharded_half")
    assert ended.returncode == 0, ended.stderr[-3000:]
    one, two = (
        read(variants, "single_of_sharded_half"),
        read(variants, "ddp_of_sharded_half"),
    )
    for mine, theirs in zip(one["steps"], two["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_rank_that_fails_ends_all_of_them(folder):
    ended = start(folder, "sharded_fails", timeout=200)
    stopped = time.time()
    assert ended.returncode != 0
    assert stopped - float((folder / "failed.txt").read_text()) < 30
    assert ended.stderr.count("ValueError: rank 1 fails on purpose") == 1


if __name__ == "__main__":
    place, names = Path(sys.argv[1]), sys.argv[2:]
    for run in names:
        fit(place, run)
