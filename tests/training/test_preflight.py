import warnings

import peft
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer

from moka_pl.adapters import FullFineTuning, MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint, RunCheckpoint
from moka_pl.errors import ConfigError, MokaWarning
from moka_pl.training.module import MokaModule
from moka_pl.training.preflight import Kept, check_accelerator, check_launcher, check_options, check_room


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches must be 1 or more, not 0"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch must be 1"),
        ({"val_check_interval": 0}, "val_check_interval is 0: nothing"),
        ({"val_check_interval": -3}, "val_check_interval must be 0 or more, not -3"),
        ({"max_steps": 0}, "max_steps is 0: nothing would be trained"),
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"max_epochs": -7}, "max_epochs must be -1 or more"),
        ({"num_nodes": 0}, "num_nodes must be 1"),
        ({"num_sanity_val_steps": -2}, "num_sanity_val_steps must be -1"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val must be 0 or more, not nan"),
        ({"limit_train_batches": 0.0}, "limit_train_batches is 0"),
        ({"devices": 100_000}, "trainer.devices is 100000"),
        ({"devices": "100000"}, "trainer.devices is 100000"),
        ({"devices": 0}, "trainer.devices is 0; give at least one"),
        ({"devices": "0"}, "trainer.devices is 0; give at least one"),
        ({"barebones": True}, "trainer.barebones is true: it forbids logs"),
        ({"strategy": "fsdp"}, "trainer.strategy fsdp is not supported; choose ddp, or sharded"),
        ({"strategy": "deepspeed_stage_2"}, "strategy deepspeed_stage_2 is not"),
        ({"strategy": "lightning.pytorch.strategies.FSDPStrategy"}, "strategy FSDPStrategy is not"),
        ({"strategy": Namespace(class_path="pl.ModelParallelStrategy")}, "ModelParallelStrategy is not"),
    ],
    ids=str,
)
def test_numbers_that_train_nothing(options, message):
    with pytest.raises(ConfigError, match=message):
        check_options(options)


@pytest.mark.parametrize("name", ["gpu", "cuda"])
def test_an_accelerator_that_is_not_here(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"accelerator is {name}, but PyTorch .* finds no GPU; set cpu"):
        check_accelerator(name)
    check_accelerator("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    check_accelerator(name)


def test_common_options():
    check_options({"max_steps": -1, "max_epochs": -1, "devices": "auto", "val_check_interval": "00:15:00"})
    for strategy in (
        "auto",
        "ddp",
        "sharded_offload",
        {"class_path": "moka_pl.training.sharding.ShardedStrategy"},
    ):
        check_options({"strategy": strategy})
    check_options({"max_epochs": None, "val_check_interval": 0.5, "gradient_clip_val": None, "devices": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_check_interval": 100}, "val_check_interval is 100, but an epoch has 7 batches"),
        pytest.param(
            {"val_check_interval": 3, "limit_train_batches": 2},
            "is 3, but an epoch has 2 batches",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"limit_train_batches": 0.01},
            "limit_train_batches 0.01 of an epoch is less than one batch",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_intervals_that_no_epoch_reaches(make_module, make_data, make_trainer, monkeypatch, options, message):
    module = make_module()
    monkeypatch.setattr(type(module), "load_base", lambda self: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=message):
        make_trainer(**options).fit(module, make_data())


def test_validations_after_a_time(train):
    run = train(val_check_interval="00:00:00:00", max_epochs=1)  # days to seconds: after every batch
    assert list(run.validations) == [0, 1, 2, 3, 4]
    assert run.trainer.global_step == 4


class LoadedError(Exception):
    """The model would be loaded now."""


@pytest.fixture
def unloaded(make_module, monkeypatch) -> MokaModule:
    """A module whose fit ends where it would load its model."""

    def load(self):
        raise LoadedError

    module = make_module()
    monkeypatch.setattr(type(module), "load_base", load)
    return module


@pytest.mark.parametrize(
    ("options", "batches", "told"),
    [
        (
            {},
            {},
            "only 7 optimizer steps an epoch, 7 in the whole run, .*: lower data.init_args.batch_size",
        ),
        (
            {"accumulate_grad_batches": 4, "max_epochs": 3},
            {},
            r"only 2 .* epoch, 6 in .*: lower trainer.accumulate_grad_batches \(4\), lower data.init",
        ),
        (
            {"max_epochs": 9},
            {"packing": True, "batch_size": 16},
            "only 1 optimizer step an epoch, 9 in .*batch_size or max_tokens, which packing fills",
        ),
    ],
    ids=str,
)
def test_few_steps_are_told_before_the_model_is_loaded(
    unloaded, make_data, make_trainer, options, batches, told
):
    with pytest.warns(MokaWarning, match=told), pytest.raises(LoadedError):
        make_trainer(**options).fit(unloaded, make_data(**batches))


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_steps": 3, "max_epochs": -1},
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5},
        {"fast_dev_run": 2},
        {"max_epochs": -1},
    ],
    ids=str,
)
def test_few_steps_that_were_chosen_are_not_told(unloaded, make_data, make_trainer, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", MokaWarning)
        with pytest.raises(LoadedError):
            make_trainer(**options).fit(unloaded, make_data())


@pytest.mark.parametrize(
    "adapter", [MokaConfig(), FullFineTuning(), peft.LoraConfig()], ids=["moka", "full", "peft"]
)
def test_a_run_that_would_fill_the_disk_is_refused(
    make_data, make_trainer, no_weights, free_space, tmp_path, adapter
):
    ours = not isinstance(adapter, peft.LoraConfig)  # PEFT's methods may need weights to be put in
    quantization = "none" if isinstance(adapter, FullFineTuning) else "nf4"
    kept = RunCheckpoint(tmp_path / "kept", save_last=True)
    trainer = make_trainer(AdapterCheckpoint(), kept, enable_checkpointing=True)
    module = MokaModule(BackboneConfig("tiny", weights="random", quantization=quantization), adapter)
    if ours:
        no_weights()
    free_space(1000)
    state = torch.get_rng_state()
    with pytest.raises(ConfigError) as refused:
        trainer.fit(module, make_data())
    told = str(refused.value)
    assert told.startswith(
        f"adapters.dirpath {tmp_path / 'adapters'} and checkpoint.dirpath {kept.dirpath}: "
    )
    assert "1,000 bytes free for the adapters and checkpoints of" in told
    assert "\n" not in told
    assert torch.equal(state, torch.get_rng_state()) or not ours
    assert not kept_files(tmp_path)


def test_what_is_there_already_is_room(tmp_path, free_space):
    class Keeping(Callback):
        def keeps(self):
            return Kept("checkpoint.dirpath", tmp_path, adapters=1, checkpoints=2)

    trainer = Trainer(callbacks=[Keeping()], logger=False, accelerator="cpu")
    numbers, needed = 100, 100 * (4 + 2 * 12)
    free_space(needed)
    check_room(trainer, numbers, state=8)
    free_space(needed - 1)
    with pytest.raises(ConfigError, match="about 2,800 bytes needed, 2,799 bytes free"):
        check_room(trainer, numbers, state=8)
    (tmp_path / "last.ckpt").write_bytes(b"1")
    check_room(trainer, numbers, state=8)
    (tmp_path / "best.ckpt").hardlink_to(tmp_path / "last.ckpt")
    free_space(needed - 2)
    with pytest.raises(ConfigError, match="about 2,799 bytes needed, 2,798 bytes free"):
        check_room(trainer, numbers, state=8)


def kept_files(folder):
    return [file for file in folder.rglob("*") if file.is_file() and file.suffix in (".ckpt", ".safetensors")]


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "message"),
    [
        (TORCHRUN | {"WORLD_SIZE": "4"}, 2, 2, None),
        (
            TORCHRUN | {"WORLD_SIZE": "4"},
            2,
            1,
            "trainer.devices 2 and trainer.num_nodes 1 make 2 processes, but 4",
        ),
        (
            TORCHRUN | {"WORLD_SIZE": "2"},
            1,
            1,
            "trainer.devices 1 and trainer.num_nodes 1 make 1 processes, but 2",
        ),
        (SLURM | {"SLURM_NTASKS": "4"}, 2, 2, None),
        (SLURM | {"SLURM_NTASKS": "4"}, 4, 2, "make 8 processes, but 4 were started"),
        ({"MASTER_ADDR": "node0", "NODE_RANK": "1"}, 2, 2, None),
        ({}, 2, 2, "num_nodes is 2, but no launcher has started"),
        ({}, 2, 1, None),
        ({}, 1, 1, None),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_what_a_launcher_has_started(environment, devices, nodes, message, monkeypatch):
    for name in {*TORCHRUN, *SLURM, "WORLD_SIZE", "SLURM_NTASKS", "MASTER_ADDR", "NODE_RANK"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = {"accelerator": "cpu", "devices": devices, "num_nodes": nodes, "logger": False}
    trainer = Trainer(**options, strategy="auto" if devices * nodes == 1 else "ddp")
    if message is None:
        check_launcher(trainer)
    else:
        with pytest.raises(ConfigError, match=message):
            check_launcher(trainer)
