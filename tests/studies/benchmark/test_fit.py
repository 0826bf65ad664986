import math

import pytest

from moka_pl.callbacks import AdapterCheckpoint, GateMonitor, GracefulInterrupt, RunSummary, Throughput
from moka_pl.studies.benchmark import fit
from moka_pl.studies.benchmark.probe import Probe, SyntheticData


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("TOKENIZERS_PARALLELISM", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # a run sets them; they shall not outlive the test
    return tmp_path


def test_fit_beside_a_bare_loop(preset, empty_folder, monkeypatch, capsys) -> None:
    probes, callbacks = [], []
    bare = Probe._bare

    def watched(self, trainer, pl_module):
        probes.append(self)
        callbacks.extend(type(callback) for callback in trainer.callbacks)
        return bare(self, trainer, pl_module)

    monkeypatch.setattr(Probe, "_bare", watched)
    (record,) = fit.measure_fit(preset, False, [])
    assert record.error is None
    assert (record.measure, record.row) == ("fit", "MoKA r10 fit")
    values = record.values
    assert all(math.isfinite(value) and value > 0 for value in values.values())
    assert values["ratio"] == pytest.approx(values["fit_ms"] / values["bare_ms"])
    assert values["mean_ratio"] == pytest.approx(values["fit_mean_ms"] / values["bare_mean_ms"])
    assert probes[0] is probes[1]  # before and after training
    assert (len(probes[0].fit_ms), len(probes[0].bare_ms)) == (4, 4)
    assert {GateMonitor, AdapterCheckpoint, GracefulInterrupt, RunSummary, Throughput} <= set(callbacks)
    assert list(empty_folder.iterdir()) == []  # logs and adapters went elsewhere
    assert capsys.readouterr().out == ""  # the table's place


def test_a_fit_that_fails_is_a_record(preset, monkeypatch) -> None:
    def fail(arguments) -> None:
        raise SystemExit(2)

    monkeypatch.setattr("moka_pl.cli.lightning.run", fail)
    (record,) = fit.measure_fit(preset, True, ["MoKA r10 fit"])
    assert (record.error, record.checkpointing, record.values) == ("SystemExit: 2", True, {})
    assert list(fit.measure_fit(preset, True, ["frozen base"])) == []


def test_synthetic_batches_have_the_shape_asked_for() -> None:
    from moka_pl.backbone.random_weights import byte_tokenizer

    data = SyntheticData(batch_size=3, length=16, batches=2)
    data.connect(byte_tokenizer())
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 16), (3, 16)]
    assert all((batch["labels"] == batch["input_ids"]).all() for batch in batches)
    assert data.val_dataloader() == []


def test_rows_differ_in_adapter_and_graphs(preset, monkeypatch) -> None:
    seen = []

    def run(arguments: list[str]) -> None:
        seen.append([argument for argument in arguments if "adapter" in argument or "graphs" in argument])
        raise SystemExit("enough")

    monkeypatch.setattr("moka_pl.cli.lightning.run", run)
    names = ["MoKA r10 fit", "MoKA r2 all linear fit, CUDA graph"]
    records = list(fit.measure_fit(preset, False, names))
    assert [record.row for record in records] == names
    assert all(record.error for record in records)
    assert seen == [
        [],
        [
            "--model.adapter.components=2",
            "--model.adapter.target_modules=all-linear",
            "--model.cuda_graphs=true",
        ],
    ]
