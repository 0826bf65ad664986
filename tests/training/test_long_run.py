"""What a long run may not do: take more and more of something."""

import gc
import json
import threading

import numpy
import psutil
import pytest
from lightning.pytorch import Callback

from moka_pl.cli import lightning as lightning_cli
from moka_pl.cli.main import main

STEPS, WARMUP, EVERY = 2000, 500, 100


class Watch(Callback):
    """Memory (MiB), objects of Python's, open files and threads of this process between steps."""

    def __init__(self):
        self.rows, self.process = [], psutil.Process()

    def on_train_batch_end(self, trainer, pl_module, *args):
        step = trainer.global_step
        if step >= WARMUP and step % EVERY == 0:
            gc.collect()  # figures are garbage in circles
            memory, files = self.process.memory_info().rss / 2**20, self.process.num_fds()
            self.rows.append((step, memory, len(gc.get_objects()), files, threading.active_count()))


@pytest.fixture
def watch(monkeypatch):
    """Put among the callbacks of the command that is run."""
    watch, instantiate = Watch(), lightning_cli.MokaCLI.instantiate_trainer

    def with_watch(self, **options):
        trainer = instantiate(self, **options)
        trainer.callbacks.append(watch)
        return trainer

    monkeypatch.setattr(lightning_cli.MokaCLI, "instantiate_trainer", with_watch)
    for name in ("TOKENIZERS_PARALLELISM", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # a run sets them; they shall not outlive the test
    return watch


@pytest.mark.slow
def test_memory_files_and_threads_stay_what_they_are(watch, tmp_path, monkeypatch, dataset_cache, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(dataset_cache))
    monkeypatch.setattr("sys.argv", ["moka_pl"])
    rows = [{"instruction": f"{n}?", "output": "word " * (1 + n % 4)} for n in range(100)]
    for name, some in (("train", rows), ("heldout", rows[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    options = {
        "model.backbone.name": "tiny",
        "model.backbone.weights": "random",
        "model.backbone.quantization": "none",
        "model.adapter.components": 2,
        "data": "InstructionData",
        "data.path": "train.jsonl",
        "data.validation_path": "heldout.jsonl",
        "data.prompt": "chat",
        "data.batch_size": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": STEPS,
        "trainer.max_epochs": -1,
        "trainer.check_val_every_n_epoch": 4,
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_train_steps": 100,
    }
    main(["fit", *(f"--{name}={value}" for name, value in options.items())])
    steps, *taken = numpy.array(watch.rows, dtype=float).T
    assert len(steps) == (STEPS - WARMUP) // EVERY + 1
    memory, objects, files, threads = (numpy.polyfit(steps, counted, 1)[0] * 1000 for counted in taken)
    # In 1,000 steps. Of the smallest tensor of each step alone, 1,000 objects would be left.
    assert memory < 2.0
    assert objects < 300
    assert abs(files) < 0.5
    assert abs(threads) < 0.5
