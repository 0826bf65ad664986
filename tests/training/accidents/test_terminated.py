"""A rank of two that alone is told to end, before there is a step to finish."""

import pytest
from lightning.pytorch import Trainer
from shared.failing_rank import LIMIT, FailingRun, write_run

from moka_pl.callbacks import GracefulInterrupt
from moka_pl.errors import INTERRUPTED, Terminated


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
@pytest.mark.parametrize("rank", [0, 1])
def test_both_ranks_end_on_a_signal_to_one_of_them(rank, strategy, tmp_path):
    write_run(tmp_path, steps=6, every=100, strategy=strategy)
    run = FailingRun(tmp_path, rank, "terminated", "--base_scores.reuse", "false")
    code, seconds, left, printed = run.finish(timeout=150)
    assert (tmp_path / "failed.txt").is_file(), printed  # it came so far
    assert not left
    assert 0 < seconds < LIMIT
    assert code == INTERRUPTED, printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("ranks", [1, 2])
def test_lightnings_handler_asks_nobody(ranks):
    trainer = Trainer(logger=False, accelerator="cpu", devices=ranks, strategy="ddp")
    connector = trainer._signal_connector
    lightnings = connector._sigterm_notifier_fn
    GracefulInterrupt().setup(trainer, None, "validate")
    if ranks == 1:
        assert connector._sigterm_notifier_fn == lightnings
    else:
        with pytest.raises(Terminated):
            connector._sigterm_notifier_fn(15, None)
