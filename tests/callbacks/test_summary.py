import re
import shlex
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.program import TensorBoard

from moka_pl.adapters import adapters_disabled
from moka_pl.callbacks import AdapterCheckpoint, RunSummary, Throughput
from moka_pl.callbacks.summary import base_size
from moka_pl.cli.main import FUNCTIONS, function_parser
from moka_pl.data import MixtureData


@pytest.fixture
def mixture(make_data, make_commonsense):
    return MixtureData([make_data(), make_commonsense()], batch_size=4, eval_batch_size=4)


def rows(output):
    """Name and columns of the table's lines."""
    found = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {parts[0]: parts[1:] for parts in found if len(parts) > 1}


def test_table(make_module, mixture, make_trainer, tmp_path, capsys):
    module = make_module(lr=3e-2)
    summary = RunSummary()
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    callbacks = [AdapterCheckpoint(), Throughput(), summary]
    trainer = make_trainer(*callbacks, num_sanity_val_steps=-1, logger=logger)
    trainer.fit(module, mixture)
    table = rows(capsys.readouterr().out)
    after = dict(module.eval_values)
    with adapters_disabled(module.causal_lm):
        make_trainer().validate(module, mixture, verbose=False)
    base = module.eval_values
    assert base != after
    assert summary.before == pytest.approx(base)

    assert table["held-out"] == ["before", "after", "change"]
    change = 100 * (after["val/loss"] / base["val/loss"] - 1)
    assert change < -1
    assert table["loss"] == [f"{base['val/loss']:.4f}", f"{after['val/loss']:.4f}", f"{change:+.1f}%"]
    accuracy = [base["val/accuracy"], after["val/accuracy"]]
    points = 100 * (accuracy[1] - accuracy[0])
    assert table["accuracy"] == [*(f"{100 * value:.1f}%" for value in accuracy), f"{points:+.1f} pt"]
    assert set(table) >= {"instruction/loss", "commonsense/loss", "accuracy/odd", "accuracy/even"}
    assert list(table)[:2] == ["held-out", "loss"]
    # Short: what is finer stands in TensorBoard.
    assert "val/nll/odd" in after
    assert "val/acc_norm/odd" in after
    assert "val/accuracy/odd_stderr" in after
    assert not [name for name in table if "nll" in name or "stderr" in name or name.startswith("acc_norm/")]

    assert table["trainable parameters"][0].startswith("1,356 (")
    assert re.fullmatch(r"[\d,]+ tokens/s over 1 process\(es\)", table["training speed"][0])
    assert table["best adapter"] == [str(tmp_path / "run" / "version_0" / "adapters" / "best")]
    assert table["TensorBoard logs"] == [logger.log_dir]

    # The base's values are the curve's point at step 0.
    found = EventAccumulator(logger.log_dir)
    found.Reload()
    points = {event.step: event.value for event in found.Scalars("val/loss")}
    assert points[0] == pytest.approx(base["val/loss"])
    assert points[max(points)] == pytest.approx(after["val/loss"])
    assert len(points) == 2


def test_partial_look_at_the_base_is_not_compared(make_module, make_data, make_trainer, capsys):
    summary = RunSummary()
    make_trainer(summary, num_sanity_val_steps=1).fit(make_module(), make_data())
    assert summary.before == {}
    table = rows(capsys.readouterr().out)
    assert len(table["loss"]) == 1


@pytest.mark.parametrize(("steps", "title"), [(1, None), (3, "step 2"), (4, "after")])
def test_an_old_validation_is_not_shown_as_the_end(
    steps, title, make_module, make_data, make_trainer, capsys
):
    options = {"max_steps": steps, "max_epochs": -1, "num_sanity_val_steps": -1}
    make_trainer(RunSummary(), **options, val_check_interval=2, check_val_every_n_epoch=None).fit(
        make_module(lr=3e-2), make_data()
    )
    printed = capsys.readouterr().out
    assert rows(printed).get("held-out") == (None if title is None else ["before", title, "change"])
    assert (f"no validation after the last of {steps} steps" in printed) == (title != "after")


def test_base_is_remembered_over_a_resume(make_module, make_data, make_trainer, tmp_path, capsys):
    first = RunSummary()
    trainer = make_trainer(first, num_sanity_val_steps=-1)
    trainer.fit(make_module(), make_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    capsys.readouterr()
    second = RunSummary()
    resumed = make_trainer(second, num_sanity_val_steps=-1, max_epochs=2)
    resumed.fit(make_module(), make_data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert second.before == first.before != {}
    assert rows(capsys.readouterr().out)["loss"][0] == f"{first.before['val/loss']:.4f}"


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_epochs": 5, "max_steps": 1}])
def test_a_run_that_has_ended_says_so_when_it_is_resumed(
    limit, make_module, make_data, make_trainer, tmp_path, capsys
):
    trainer = make_trainer(RunSummary(), num_sanity_val_steps=-1)
    trainer.fit(make_module(), make_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    capsys.readouterr()
    again = make_trainer(RunSummary(), num_sanity_val_steps=-1, **limit)
    again.fit(make_module(), make_data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    printed = capsys.readouterr().out
    assert (
        f"nothing was trained: the checkpoint is at step {trainer.global_step}, where the run ends" in printed
    )
    assert "Next:" not in printed
    assert "no validation" not in printed


def test_without_validation(make_module, make_data, make_trainer, capsys):
    make_trainer(RunSummary()).fit(make_module(), make_data(validation_path=None, validation_share=0))
    table = rows(capsys.readouterr().out)
    assert "held-out" not in table
    assert "trainable parameters" in table


@pytest.mark.parametrize("validated", [True, False])
def test_printed_commands_parse(make_module, make_data, make_trainer, tmp_path, capsys, validated):
    logger = TensorBoardLogger(tmp_path / "it's mine", name="run", default_hp_metric=False)
    saved = AdapterCheckpoint()
    trainer = make_trainer(saved, RunSummary(), logger=logger, limit_val_batches=1 if validated else 0)
    trainer.fit(make_module(), make_data())
    output = capsys.readouterr().out
    assert "None" not in output
    commands = [shlex.split(line) for line in output.partition("Next:\n")[2].splitlines()[:-1]]
    adapter = logger.log_dir + ("/adapters/best" if validated else "/adapters/last")
    seen = {}
    for program, *arguments in commands:
        if program == "tensorboard":
            board = TensorBoard()
            board.configure([program, *arguments])
            seen[program] = board.flags.logdir
            continue
        assert program.startswith("python")
        assert arguments[:2] == ["-m", "moka_pl"]
        name = arguments[2]
        assert name in FUNCTIONS
        seen[name] = function_parser(name).parse_args(arguments[3:])
        assert str(seen[name].adapter) == adapter
        assert Path(adapter, "adapter_config.json").is_file()
    assert seen.keys() == {"tensorboard", "inspect", "generate"}
    assert seen["tensorboard"] == str(tmp_path / "it's mine" / "run")
    assert seen["generate"].prompt == ["Why does bread rise?"]


def test_trial_prints_no_table(make_module, make_data, make_trainer, capsys):
    make_trainer(RunSummary(), fast_dev_run=1).fit(make_module(), make_data())
    assert "trainable parameters" not in capsys.readouterr().out


def test_base_size_counts_packed_weights(make_module):
    packed = make_module()
    packed.configure_model()
    sizes = sum(p.numel() for p in packed.parameters() if not p.requires_grad)
    # tiny: 2 layers of q, k, v, o (64 x 64, 32 x 64 twice, 64 x 64) and three of 128 x 64; embedding and head
    # of 320 x 64; five norms of 64.
    assert base_size(packed) == 2 * (64 * 64 * 3 + 128 * 64 * 3) + 2 * 320 * 64 + 5 * 64
    assert base_size(packed) > sizes
