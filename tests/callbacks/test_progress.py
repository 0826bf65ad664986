from lightning.pytorch import Callback

from moka_pl.callbacks import ProgressBar, Throughput


def test_bar(make_module, make_data, make_trainer, capfd, monkeypatch):
    monkeypatch.setenv(
        "COLUMNS", "200"
    )  # a narrow bar would lose its last value where the speed has many digits
    bar, speed = ProgressBar(), Throughput()
    trainer = make_trainer(bar, speed, enable_progress_bar=True, num_sanity_val_steps=-1)
    trainer.fit(make_module(), make_data())
    output = "".join(capfd.readouterr())
    assert "Frozen base, before training" in output
    assert "7/7" in output
    for shown in (", loss=", "tok/s=", "val/loss="):
        assert shown in output
    metrics = bar.get_metrics(trainer, trainer.lightning_module)
    assert "v_num" not in metrics
    assert metrics["tok/s"].replace(",", "").isdigit()


def test_resumed_run_is_not_the_frozen_base(make_module, make_data, make_trainer, tmp_path, capfd):
    first = make_trainer()
    first.fit(make_module(), make_data())
    first.save_checkpoint(tmp_path / "run.ckpt")
    options = {"enable_progress_bar": True, "num_sanity_val_steps": -1, "max_epochs": 2}
    trainer = make_trainer(ProgressBar(), **options)
    trainer.fit(make_module(), make_data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    output = "".join(capfd.readouterr())
    assert "Frozen base" not in output
    assert "Before resuming" in output


def test_an_epoch_that_is_resumed_in_its_middle_shows_what_remains(
    make_module, make_data, make_trainer, tmp_path, capfd
):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *of_batch) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    make_trainer(Save()).fit(make_module(), make_data())
    capfd.readouterr()
    bar = ProgressBar()
    trainer = make_trainer(bar, enable_progress_bar=True)
    trainer.fit(make_module(), make_data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    output = "".join(capfd.readouterr())
    assert "3/7" in output
    assert "7/7" in output
    assert not any(f"{n}/?" in output for n in range(1, 8))
    assert bar.train_progress_bar.initial == 3  # the rate is of this run's batches
