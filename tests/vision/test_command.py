"""A whole run of an image classifier by the command line: gates in TensorBoard, and resuming."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moka_pl.cli.main import main


@pytest.mark.slow
def test_fits_resumes_and_tests(vit, squares, tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["moka_pl"])
    options = [
        *("--model", "moka_pl.VisionModule", f"--model.backbone.name={vit}"),
        *("--model.backbone.quantization=none", "--model.adapter.components=2"),
        *("--model.optimizer.lr=0.01", "--data=moka_pl.ImageFolderData", f"--data.path={squares}"),
        *("--data.batch_size=4", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        *("--trainer.log_every_n_steps=1", "--gates.heatmap=false"),
    ]
    main(["fit", *options])
    run = tmp_path / "lightning_logs/moka/version_0"
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "val/loss", "val/accuracy", "train/images_per_second"} <= set(tags)
    assert sum(tag.startswith("α q_proj/") for tag in tags) == 2
    assert "class_path: moka_pl.VisionModule" in (run / "config.yaml").read_text()
    shown = capsys.readouterr().out
    assert "accuracy/images" in shown
    assert f"export {run.relative_to(tmp_path)}/adapters/best --to merged" in shown
    # The saved configuration names the model: nothing else is needed.
    main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert len(EventAccumulator(str(run)).Reload().Scalars("train/loss")) == 8
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", "last"])
    assert "images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(run / "config.yaml")])
    assert "plan is for language models, and VisionModule classifies images" in capsys.readouterr().err
