"""Fixtures that several test folders share; ``conftest.py`` has pytest load them where tests run."""

import atexit
import gc
import json
import os
import random
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for each of pytest's processes, and for what it starts: more threads than cores are slow.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter; Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from shared.interpreter import quicken
from shared.tiny import SHAPE, VOCABULARY
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.adapters import MokaConfig, adapter_state, moka_layers
from moka_pl.backbone import BackboneConfig
from moka_pl.data import CommonsenseData, InstructionData
from moka_pl.training import launches
from moka_pl.training.module import MokaModule

quicken()
# The garbage collector need not look through half a million objects of the modules above again and again,
# nor through all others after each 10 MB of new ones.
gc.freeze()
gc.set_threshold(*gc.get_threshold()[:2], 50)
atexit.register(gc.unfreeze)  # else nanobind complains of what is left


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds tiny random LLaMA models (evaluating, float32); options go to ``LlamaConfig``."""

    def make(seed: int = 0, **options: object) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(SHAPE | options))).float().eval()

    return make


@pytest.fixture
def tiny_llama(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A tiny random LLaMA: 2 layers, hidden 32, 4 heads on 2 key-value heads, vocabulary 96, float32."""
    return make_llama()


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Two sequences for ``tiny_llama``, (2, 7)."""
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def randomize() -> Callable[..., None]:
    """Gives all factors and gates of a model or layer random non-zero values: nothing is tested at ΔW = 0."""

    def fill(module: nn.Module, seed: int = 1, std: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        layers = list(moka_layers(module).values())
        assert layers
        with torch.no_grad():
            for layer in layers:
                for name, parameter in layer.named_parameters():
                    if name.startswith("moka_"):
                        spread = 1.0 if name == "moka_gate" else std
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
                assert layer.get_delta_weight().abs().max() > 0.01

    return fill


# Training: real runs of a model with random NF4 weights (2 layers, byte tokenizer) on 13 short examples.

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
EXAMPLES = 13  # odd: batches of two and windows of several batches end unevenly


def write_lines(path: Path, records: list[dict]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder with train.jsonl and heldout.jsonl: completions of one word or of many."""
    folder = tmp_path_factory.mktemp("corpus")
    pick = random.Random(0)
    for name, count in (("train", EXAMPLES), ("heldout", 5)):
        records = [
            {
                "instruction": f"{name} {number}: {pick.choice(WORDS)}?",
                "output": " ".join(pick.choice(WORDS) for _ in range(1 if number % 3 else 6 + number)),
            }
            for number in range(count)
        ]
        write_lines(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture(scope="session")
def dataset_cache(tmp_path_factory) -> Path:
    """One cache of encoded data for all runs of the session, away from the user's home."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def make_data(corpus, dataset_cache, monkeypatch) -> Callable[..., InstructionData]:
    """Builds data modules on `corpus`; options go to ``InstructionData``."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)

    def make(**options: object) -> InstructionData:
        defaults = {
            "path": corpus / "train.jsonl",
            "validation_path": corpus / "heldout.jsonl",
            "prompt": "alpaca",
            "max_length": 320,
            "batch_size": 2,
        }
        return InstructionData(**(defaults | options))

    return make


@pytest.fixture(scope="session")
def question_file(tmp_path_factory) -> Path:
    """A file of 9 questions of two tasks, with two to four options."""
    pick = random.Random(1)
    records = [
        {
            "task": "odd" if number % 3 else "even",
            "question": f"Which word is number {number}?",
            "choices": [" ".join(pick.sample(WORDS, 1 + number % 3)) for _ in range(2 + number % 3)],
            "answer": number % 2,
        }
        for number in range(9)
    ]
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_lines(path, records)
    return path


@pytest.fixture
def make_commonsense(question_file, dataset_cache, monkeypatch) -> Callable[..., CommonsenseData]:
    """Builds data modules of 9 questions."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)

    def make(**options: object) -> CommonsenseData:
        paths = {"path": question_file, "validation_path": question_file}
        defaults = {**paths, "batch_size": 2, "max_length": 128}
        return CommonsenseData(**(defaults | options))

    return make


@pytest.fixture
def no_weights(monkeypatch) -> Callable[[], None]:
    """From the call on, fails the test where the weights of a base are loaded or drawn."""

    def forbid() -> None:
        for loader in ("_pretrained", "random_model"):
            monkeypatch.setattr(
                f"moka_pl.backbone.load.{loader}", lambda *_: pytest.fail("weights were loaded")
            )

    return forbid


@pytest.fixture
def free_space(monkeypatch) -> Callable[[int], None]:
    """From the call on, every disk says that it has so many bytes free."""
    usage = shutil.disk_usage("/")

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))

    return leave


@pytest.fixture(autouse=True)
def kept_scores(tmp_path_factory, monkeypatch) -> Path:
    """Where validations before training are kept: for each test another folder, not there yet."""
    folder = tmp_path_factory.getbasetemp() / f"kept-{uuid.uuid4().hex}"
    monkeypatch.setattr("moka_pl.callbacks.base_scores.cache_root", lambda override=None: folder)
    return folder / "base_scores"


@pytest.fixture(autouse=True)
def hub_answers(monkeypatch) -> Callable[..., object]:
    """No test asks the hub: unless it is to be offline, it answers. Returns what would ask it."""
    import huggingface_hub

    def answer(url: str, **_: object) -> None:
        if huggingface_hub.constants.is_offline_mode():
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline")

    ask = huggingface_hub.get_hf_file_metadata
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    monkeypatch.setattr("moka_pl.hub._silence", None)
    return ask


@pytest.fixture
def no_network(hub_answers, monkeypatch) -> None:
    """Whatever opens a connection fails at once, and whoever waits to try again fails the test."""
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError("the tests have no network")

    def wait(seconds: float) -> None:
        pytest.fail("the hub's client waits to try again")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", hub_answers)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=wait))


@pytest.fixture(autouse=True)
def uncollected(monkeypatch) -> None:
    """Has runs not look through all objects, and lay aside none: those of the modules are (see above)."""
    monkeypatch.setattr(launches, "gc", SimpleNamespace(collect=int, freeze=int, unfreeze=int))


@pytest.fixture
def one_thread():
    """Computes on one thread: so small a model gains nothing from more, and waits long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_module(one_thread) -> Callable[..., MokaModule]:
    """Builds modules on the NF4 ``tiny`` backbone; the rest goes to ``MokaModule`` or ``MokaConfig``."""

    def make(lr: float = 1e-2, seed: int = 0, adapter: dict | None = None, **options: object) -> MokaModule:
        defaults = {
            "backbone": BackboneConfig(name="tiny", weights="random", seed=seed),
            "adapter": MokaConfig(**({"components": 3} | (adapter or {}))),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        }
        return MokaModule(**(defaults | options))

    return make


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """Builds quiet CPU trainers without a logger; options go to ``Trainer``."""

    def make(*callbacks: Callback, **options: object) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "callbacks": list(callbacks),
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        torch.manual_seed(0)  # the adapters are drawn when the trainer builds the model
        return Trainer(**(defaults | options))

    return make


class StepLog(Callback):
    """Keeps ``train/loss`` and the learning rate of every optimizer step, by step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.rates: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step not in self.losses and "train/loss" in trainer.callback_metrics:
            self.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])
            self.rates[trainer.global_step] = float(trainer.callback_metrics["train/lr"])


@pytest.fixture
def step_log() -> type[StepLog]:
    """The callback class that keeps every step's loss."""
    return StepLog


class Validations(Callback):
    """Keeps the validation loss by the step at which it was computed."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_validation_end(self, trainer, pl_module) -> None:
        self.values[trainer.global_step] = pl_module.eval_values["val/loss"]


@pytest.fixture
def train(make_module, make_data, make_trainer) -> Callable[..., SimpleNamespace]:
    """Runs two epochs of four steps (two batches each, the last has one), with dropout.

    Returns losses and learning rates by step, validation losses by step, and the final adapter.
    """

    def run(
        *callbacks: Callback,
        ckpt_path: Path | None = None,
        adapter: dict | None = None,
        backbone: BackboneConfig | None = None,
        **options: object,
    ) -> SimpleNamespace:
        steps, validations = StepLog(), Validations()
        own = {} if backbone is None else {"backbone": backbone}
        module = make_module(lr=1e-2, adapter={"dropout": 0.1} if adapter is None else adapter, **own)
        keeping = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        defaults = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": keeping}
        trainer = make_trainer(steps, validations, *callbacks, **(defaults | options))
        trainer.fit(module, make_data(), ckpt_path=ckpt_path, weights_only=True)
        return SimpleNamespace(
            losses=steps.losses,
            rates=steps.rates,
            validations=validations.values,
            state=adapter_state(module.causal_lm),
            module=module,
            trainer=trainer,
        )

    return run


@pytest.fixture
def assert_continues() -> Callable[[SimpleNamespace, SimpleNamespace, int], None]:
    """Checks that a run resumed after ``step`` did exactly what the uninterrupted run did from there on."""

    def check(resumed: SimpleNamespace, whole: SimpleNamespace, step: int) -> None:
        assert whole.losses
        assert len(set(whole.losses.values())) == len(whole.losses)
        assert resumed.losses == {k: v for k, v in whole.losses.items() if k > step}
        assert resumed.rates == {k: v for k, v in whole.rates.items() if k > step}
        assert all(torch.equal(whole.state[name], tensor) for name, tensor in resumed.state.items())

    return check


@pytest.fixture
def build_cli(monkeypatch):
    """Parses and instantiates everything of a Lightning command without running it; returns the MokaCLI.

    No model, tokenizer or data are loaded.
    """
    from moka_pl.cli import lightning as lightning_cli
    from moka_pl.cli.main import main

    def never(*args: object) -> None:
        pytest.fail("something was loaded")

    built = []
    monkeypatch.setattr(lightning_cli.MokaCLI, "_run_subcommand", lambda self, name: built.append(self))
    monkeypatch.setattr("moka_pl.training.module.load_backbone", never)
    monkeypatch.setattr("moka_pl.training.module.load_tokenizer", never)
    monkeypatch.setattr("sys.argv", ["moka_pl"])
    for name in ("TOKENIZERS_PARALLELISM", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # a run sets them; they shall not outlive the test

    def build(*arguments: object) -> lightning_cli.MokaCLI:
        main([str(argument) for argument in arguments])
        return built.pop()

    return build


@pytest.fixture
def float8_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Triton's interpreter round to 8-bit floats as GPUs do; it rounds up to powers of two wrongly."""
    language = pytest.importorskip("triton.language")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    others = interpreter._convert_float

    def convert(numbers: np.ndarray, kind: object, wanted: object, rounding: object) -> np.ndarray:
        if (kind, wanted) != (language.float32, language.float8e4nv):
            return others(numbers, kind, wanted, rounding)
        exact = torch.from_numpy(np.ascontiguousarray(numbers))
        return exact.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
