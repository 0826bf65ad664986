import os
from multiprocessing import connection, resource_sharer

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from moka_pl.data.batching.loader import ResumableDataLoader, watched
from moka_pl.data.batching.samplers import TrainSampler
from moka_pl.errors import DataError

ROWS, BATCH = 14, 2  # 7 batches an epoch


class Rows(Dataset):
    def __init__(self):
        self.loaded = []

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.loaded.append(index)
        return torch.tensor(index)


def make_loader(workers=0, epoch_batches=None):
    sampler = TrainSampler([1] * ROWS, BATCH, seed=3)
    return ResumableDataLoader(
        Rows(), batch_size=None, sampler=sampler, num_workers=workers, epoch_batches=epoch_batches
    )


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.tolist()))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, workers=0, limit=None, ckpt_path=None, validate=False, **options):
    model = Model()
    saving = ModelCheckpoint(
        dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", auto_insert_metric_name=False
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[] if ckpt_path else [saving],
        enable_checkpointing=not ckpt_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=limit,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **options,
    )
    loader = make_loader(workers, epoch_batches=limit)
    trainer.fit(model, loader, [torch.zeros(1)] if validate else None, ckpt_path=ckpt_path, weights_only=True)
    return model.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("length", "limit"),
    [({"max_epochs": 3}, None), ({"max_steps": 20}, None), ({"max_epochs": 3}, 5), ({"max_steps": 14}, 5)],
)
def test_resumed_run_sees_the_remaining_batches(tmp_path, length, limit, validate):
    whole = fit(tmp_path, limit=limit, validate=validate, **length)
    assert len({str(batch) for epoch, _, batch in whole if epoch == 0}) == (limit or 7)
    assert [batch for epoch, _, batch in whole if epoch == 0] != [
        batch for epoch, _, batch in whole if epoch == 1
    ]
    for step in (1, 3, limit or 7, 10, 12):
        resumed = fit(tmp_path, limit=limit, validate=validate, ckpt_path=tmp_path / f"{step}.ckpt", **length)
        assert resumed == whole[step:], step


@pytest.mark.filterwarnings("ignore")
def test_resumed_run_with_workers(tmp_path):
    whole = fit(tmp_path, workers=2, max_epochs=3)
    assert whole == fit(tmp_path / "other", max_epochs=3)
    resumed = fit(tmp_path, workers=2, max_epochs=3, ckpt_path=tmp_path / "9.ckpt")
    assert resumed == whole[9:]


def test_skipped_batches_are_not_loaded():
    loader = make_loader()
    everything = [batch.tolist() for batch in loader]
    assert loader.state_dict() == {"served": 7}
    resumed = make_loader()
    resumed.load_state_dict({"served": 5})
    assert resumed.state_dict() == {"served": 5}
    assert [batch.tolist() for batch in resumed] == everything[5:]
    assert resumed.dataset.loaded == everything[5:]
    assert [batch.tolist() for batch in resumed] == everything


def test_served_counts_while_iterating():
    loader = make_loader()
    for number, _ in enumerate(loader, start=1):
        assert loader.state_dict() == {"served": number}
    next(iter(loader))
    assert loader.state_dict() == {"served": 1}


@pytest.mark.parametrize(("epoch_batches", "served"), [(None, 7), (5, 5)])
def test_finished_epoch_starts_anew(epoch_batches, served):
    loader = make_loader(epoch_batches=epoch_batches)
    loader.load_state_dict({"served": served})
    assert len(list(loader)) == 7


def test_state_of_other_data_is_refused():
    with pytest.raises(DataError, match="after 8 batches of an epoch, but this run's epochs have 7"):
        make_loader().load_state_dict({"served": 8})


def test_epoch_set_after_iter_counts():
    # Lightning calls iter() first and tells the sampler the epoch afterwards.
    early, late = make_loader(), make_loader()
    iterator = iter(early)
    early.sampler.set_epoch(2)
    late.sampler.set_epoch(2)
    assert [batch.tolist() for batch in iterator] == [batch.tolist() for batch in late]


def test_sampler_of_another_kind():
    loader = ResumableDataLoader(Rows(), batch_size=None, sampler=list(range(5)))
    loader.load_state_dict({"served": 2})
    assert [batch.item() for batch in loader] == [2, 3, 4]


def test_global_random_state_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(make_loader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [ConnectionResetError, ConnectionRefusedError, EOFError])
def test_a_worker_that_died_after_its_batch_is_told_from_data_that_cannot_be_reached(kind, monkeypatch):
    def no_answer(*args, **kwargs):
        raise kind("no answer")

    reading, writing = os.pipe()
    memory = resource_sharer.DupFd(reading)
    with monkeypatch.context() as patched:
        patched.setattr(connection, "Client", no_answer)
        with pytest.raises(DataError, match=r"^a worker that loads data was killed .*Lower num_workers"):
            list(watched(memory.detach() for _ in range(1)))
    resource_sharer.stop()
    os.close(reading)
    os.close(writing)
    with pytest.raises(kind, match="no answer"):
        list(watched(no_answer() for _ in range(1)))
