"""Versions and folders of runs that begin at once, resume, or may not write."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from moka_pl.callbacks import AdapterCheckpoint, RunCheckpoint
from moka_pl.cli.run_folders import RunFolders
from moka_pl.errors import ConfigError


@pytest.fixture
def trainer(tmp_path):
    """Makes what is asked of a trainer; without loggers it logs to TensorBoard below the test's folder."""

    def make(*loggers, rank=0, callbacks=(), **options):
        loggers = loggers or (TensorBoardLogger(tmp_path / "logs", name="moka"),)
        return SimpleNamespace(
            loggers=[logger for logger in loggers if logger],
            is_global_zero=rank == 0,
            callbacks=list(callbacks),
            default_root_dir=str(tmp_path),
            profiler=None,
            **options,
        )

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_runs_begun_at_once_get_a_version_each(trainer, tmp_path):
    folders = [RunFolders() for _ in range(24)]

    def begin(number):
        run = trainer()
        folders[number].prepare(run, training=True, resumed=False)
        return run.loggers[0].log_dir

    with ThreadPoolExecutor(12) as pool:
        claimed = list(pool.map(begin, range(24)))
    assert sorted(claimed) == sorted(str(tmp_path / f"logs/moka/version_{i}") for i in range(24))
    kept = Path(claimed[7], "events")
    kept.touch()
    for held in folders:
        held.__exit__(None, None, None)
    assert names(tmp_path / "logs/moka") == [kept.parent.name]  # what stayed empty is gone


def test_a_refused_run_leaves_no_folder(trainer, tmp_path):
    with RunFolders() as folders:
        folders.prepare(trainer(), training=True, resumed=False)
    assert names(tmp_path) == []


def test_loggers_of_one_folder_share_a_version(trainer, tmp_path):
    (tmp_path / "logs/moka/version_3").mkdir(parents=True)
    run = trainer(TensorBoardLogger(tmp_path / "logs", "moka"), CSVLogger(tmp_path / "logs", "moka"))
    with RunFolders() as folders:
        folders.prepare(run, training=False, resumed=False)
        assert [logger.version for logger in run.loggers] == [4, 4]


def test_other_ranks_take_the_first_ones_version(trainer, monkeypatch):
    first, other = trainer(), trainer(rank=1)
    with RunFolders() as folders:
        folders.prepare(first, training=True, resumed=False)
        RunFolders().prepare(other, training=True, resumed=False)
        assert other.loggers[0].version == first.loggers[0].version == 0
        third = trainer()  # a run of its own, not started by the first
        with RunFolders() as more:
            more.prepare(third, training=True, resumed=False)
            assert third.loggers[0].version == 1


def test_a_given_version_that_exists(trainer, tmp_path):
    run = trainer(TensorBoardLogger(tmp_path, "moka", version=5))
    folder = tmp_path / "moka/version_5"
    with RunFolders() as folders:
        folders.prepare(run, training=True, resumed=False)
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"version 5: .*version_5 holds a run already"):
        RunFolders().prepare(run, training=True, resumed=False)
    for training, resumed in ((True, True), (False, False)):
        with RunFolders() as folders:
            folders.prepare(run, training=training, resumed=resumed)
    assert run.loggers[0].version == 5


def hold(folder, ready):
    run = SimpleNamespace(
        loggers=[TensorBoardLogger(folder, "moka", version=0)],
        is_global_zero=True,
        callbacks=[],
        profiler=None,
    )
    held = RunFolders()
    held.prepare(run, training=True, resumed=True)
    if worker := os.fork():  # as a loader's, which may outlive the run for seconds
        (folder / "worker").write_text(str(worker))
        ready.set()
    time.sleep(100)


def test_a_run_is_resumed_by_one_process_at_a_time(trainer, tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(20)
    run = trainer(TensorBoardLogger(tmp_path, "moka", version=0))
    with RunFolders() as folders, pytest.raises(ConfigError, match="another process trains there"):
        folders.prepare(run, training=True, resumed=True)
    with RunFolders() as folders:
        folders.prepare(run, training=False, resumed=True)  # reading does no harm
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with RunFolders() as folders:
        folders.prepare(run, training=True, resumed=True)  # the lock has died with its process
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("kind", [AdapterCheckpoint, RunCheckpoint])
def test_two_runs_do_not_save_to_one_folder(trainer, tmp_path, kind):
    def make():
        return trainer(callbacks=[kind(dirpath=str(tmp_path / "kept"))])

    with RunFolders() as folders:
        folders.prepare(make(), training=True, resumed=False)
        with (
            RunFolders() as more,
            pytest.raises(ConfigError, match=r"--(adapters|checkpoint)\.dirpath .*kept"),
        ):
            more.prepare(make(), training=True, resumed=False)


def test_unwritable_folders(trainer, tmp_path):
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file/a", Path("/proc/nope/a"), tmp_path / ("x" * 300)):
        given = {
            "--adapters.dirpath": {"callbacks": [AdapterCheckpoint(dirpath=str(bad))]},
            "--checkpoint.dirpath": {"callbacks": [RunCheckpoint(dirpath=str(bad))]},
        }
        for option, options in given.items():
            with RunFolders() as folders, pytest.raises(ConfigError, match=f"{option} .* cannot write there"):
                folders.prepare(trainer(**options), training=True, resumed=False)
        run = trainer(TensorBoardLogger(bad, "moka"))
        with RunFolders() as folders, pytest.raises(ConfigError, match=r"save_dir .* cannot write there"):
            folders.prepare(run, training=False, resumed=False)
        run = trainer(None, callbacks=[AdapterCheckpoint(), RunCheckpoint()])
        run.default_root_dir = str(bad)
        with RunFolders() as folders, pytest.raises(ConfigError, match="cannot write there"):
            folders.prepare(run, training=True, resumed=False)
    assert names(tmp_path) == ["file"]


@pytest.mark.slow
def test_two_fits_at_once(tmp_path, corpus):
    """Each of two processes keeps its own configuration, logs and adapters."""
    command = [
        *(sys.executable, "-m", "moka_pl", "fit", "--data=moka_pl.data.InstructionData"),
        *(f"--data.path={corpus / 'train.jsonl'}", "--data.prompt=alpaca", "--data.batch_size=4"),
        *("--model.backbone.name=tiny", "--model.backbone.weights=random", "--trainer.accelerator=cpu"),
        *("--trainer.max_steps=2", "--trainer.enable_progress_bar=false"),
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    runs = [
        subprocess.Popen(
            [*command, f"--model.adapter.components={n}"],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
        )
        for n in (2, 3)
    ]
    for run in runs:
        _, error = run.communicate(timeout=200)
        assert run.returncode == 0, error.decode()[-2000:]
    folder = tmp_path / "lightning_logs/moka"
    assert names(folder) == ["version_0", "version_1"]
    stored = [folder / f"version_{i}/adapters/last/adapter_config.json" for i in (0, 1)]
    assert {json.loads(file.read_text())["components"] for file in stored} == {2, 3}
