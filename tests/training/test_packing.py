"""Packed training from end to end."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from moka_pl.callbacks import BatchStatistics, Dashboard, RunSummary, Throughput
from moka_pl.data import CommonsenseData, DataError, MixtureData
from moka_pl.errors import ConfigError
from moka_pl.training.schedule import WarmupDecay


class Recorder(Callback):
    """Keeps the token ids of all batches, and the gradients of every step."""

    def __init__(self):
        self.batches, self.gradients, self.losses = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.requires_grad])

    def on_train_batch_end(self, trainer, pl_module, *args):
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(trainer.callback_metrics["train/loss"].item())


def ids(recorder):
    return [batch["input_ids"].tolist() for batch in recorder.batches]


@pytest.fixture
def fit(make_module, make_data, make_trainer, randomize):
    def run(*callbacks, data=None, ckpt_path=None, module=None, **options):
        recorder = Recorder()
        module = module or make_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        module.configure_model()
        randomize(module)
        trainer = make_trainer(recorder, *callbacks, **options)
        data = make_data(**({"packing": True} if data is None else data))
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return recorder, trainer, data

    return run


def test_a_step_is_that_of_padded_batches(fit):
    # All examples in one step: four packed batches against seven padded ones.
    packed, _, _ = fit(accumulate_grad_batches=16)
    padded, _, _ = fit(data={"bucket": False}, accumulate_grad_batches=16)
    assert len(packed.batches) < len(padded.batches)
    assert packed.losses[-1] == pytest.approx(padded.losses[-1], rel=1e-5)
    for mine, theirs in zip(packed.gradients[-1], padded.gradients[-1], strict=True):
        assert theirs.norm() > 0
        assert (mine - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("data", [{"packing": True}, {"max_tokens": 640}])
@pytest.mark.parametrize("limit", [None, 3])
def test_the_schedule_knows_the_number_of_steps(fit, make_module, data, limit):
    schedules = []

    def schedule(optimizer):
        schedules.append(WarmupDecay(optimizer, warmup=0, decay="linear"))
        return schedules[-1]

    module = make_module(lr_scheduler=schedule)
    recorder, trainer, data = fit(data=data, module=module, max_epochs=3, limit_train_batches=limit)
    batches = limit or len(data.train_dataloader())
    assert batches > 1
    assert trainer.global_step == schedules[0].total_steps == 3 * batches == len(recorder.batches)
    # The rate falls to zero exactly with the last step.
    assert schedules[0].get_last_lr() == [0.0]
    assert ids(recorder)[:batches] != ids(recorder)[batches : 2 * batches]


def test_resumed_run_sees_the_same_packs(fit, tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    options = {"data": {"packing": True, "batch_size": 1}, "max_epochs": 2, "limit_train_batches": 5}
    whole, _, _ = fit(saving, enable_checkpointing=True, **options)
    assert len(whole.batches) == 10
    for step in (3, 5, 7):
        resumed, _, _ = fit(ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert ids(resumed) == ids(whole)[step:]


def test_logs_how_full_batches_are(fit, tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="run")
    counts, speed = BatchStatistics(), Throughput()
    data = {"packing": True, "max_length": 200}
    recorder, _, data = fit(counts, speed, RunSummary(), Dashboard(), data=data, logger=logger)
    lengths = data._encoded["train"].rows["length"][:]
    assert counts.tokens == speed.total_tokens == sum(lengths)
    padded = [batch["input_ids"].numel() for batch in recorder.batches]
    assert counts.padding_share == pytest.approx(1 - sum(lengths) / sum(padded))
    share = f"{100 * counts.padding_share:.1f}%"
    assert share != "0.0%"
    assert f"padding               {share} of training batch tokens" in capsys.readouterr().out
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    shares = [event.value for event in found.Scalars("train/padding_share")]
    expected = [1 - batch["num_tokens"] / n for batch, n in zip(recorder.batches, padded, strict=True)]
    assert shares == pytest.approx(expected, abs=1e-6)
    values = [event.value for event in found.Scalars("train/examples")]
    assert sum(values) == len(lengths)
    assert [e.value for e in found.Scalars("train/rows")] == [len(b["input_ids"]) for b in recorder.batches]
    report = data.report["train"]
    assert report.truncated > 0
    start = found.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(start).hparams
    logged = {name: settings[name].number_value for name in ("examples", "truncated", "dropped")}
    assert logged == {"examples": report.kept, "truncated": report.truncated, "dropped": report.dropped}


def test_refuses_a_model_that_mixes_examples_before_training(fit, make_module, monkeypatch):
    module = make_module()
    module.configure_model()
    decoder = type(module.causal_lm.get_decoder())
    forward = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda self, input_ids, use_cache=False: forward(self, input_ids))
    with pytest.raises(ConfigError, match="takes no position ids"):
        fit(module=module)


def test_options(make_data, make_commonsense, build_cli):
    with pytest.raises(DataError, match="needs bucket: true or packing: true"):
        make_data(max_tokens=640, bucket=False)
    with pytest.raises(DataError, match="max_tokens must be at least 1"):
        make_data(max_tokens=0)
    data = make_data(max_tokens=200)
    with pytest.raises(DataError, match="max_tokens is 200, but an example may have 320 tokens"):
        data._train_sampler([5])
    # The rows of a mixture are as long as its longest part's.
    mixture = MixtureData([make_data(), make_commonsense()], packing=True, max_tokens=700)
    sampler = mixture._train_sampler([320, 100, 50])
    assert (sampler.batch_size, len(sampler)) == (2, 1)
    path = ["--data.init_args.path=sample", "--data.init_args.max_tokens=4096"]
    for name in ("InstructionData", "CommonsenseData"):
        built = build_cli("fit", f"--data={name}", "--data.init_args.packing=true", *path)
        assert (built.datamodule.packing, built.datamodule.max_tokens) == (True, 4096)
        assert isinstance(built.datamodule, CommonsenseData) == (name == "CommonsenseData")
