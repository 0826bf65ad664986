"""A trained classifier for other tools, and its predictions, by the command line."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ViTForImageClassification

from moka_pl.cli.main import main
from moka_pl.errors import AdapterError
from moka_pl.inference import load_model
from moka_pl.vision import load_classifier
from moka_pl.vision.predict import find_images

PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def logits_of(folder):
    return load_classifier(folder)[0](PIXELS).logits


def test_a_merged_folder_is_a_plain_classifier(adapter, tmp_path, capsys):
    out = tmp_path / "merged"
    main(["export", str(adapter), "--to", "merged", "--out", str(out)])
    read = AutoModelForImageClassification.from_pretrained(out)
    assert type(read) is ViTForImageClassification
    assert read.config.id2label == {0: "blue", 1: "red"}
    torch.testing.assert_close(read(PIXELS).logits, logits_of(adapter))
    assert logits_of(adapter).abs().max() > 0
    assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"height": 8, "width": 8}
    assert ", 8 images: largest logit difference" in capsys.readouterr().out


def test_norms_are_relative_to_the_classifier(adapter, vit, capsys):
    main(["inspect", str(adapter), "--base", "stored", "--json"])
    layers = json.loads(capsys.readouterr().out)["layers"]
    weights = dict(ViTForImageClassification.from_pretrained(vit).named_parameters())
    assert layers
    for name, layer in layers.items():
        norm = float(weights[f"{name}.weight"].detach().norm())
        assert layer["relative_norm"] == pytest.approx(layer["norm"] / norm, rel=1e-4)


def test_a_classifier_scores_no_texts(adapter, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--tasks", "arc_easy", "--adapter", str(adapter)])
    assert "classifies images, and answers or scores no text" in capsys.readouterr().err


def test_a_lora_is_read_by_peft_with_the_head(adapter, vit, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    out = tmp_path / "lora"
    main(["export", str(adapter), "--to", "lora", "--out", str(out)])
    base = ViTForImageClassification.from_pretrained(vit, num_labels=2, ignore_mismatched_sizes=True)
    served = peft.PeftModel.from_pretrained(base, str(out)).eval()
    torch.testing.assert_close(served(PIXELS).logits, logits_of(adapter), rtol=1e-4, atol=1e-5)
    main(["export", str(adapter), "--to", "lora", "--out", str(out), "--rank", "1", "--overwrite"])
    assert "share of a layer's energy lost" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["merged", "lora"])
def test_what_does_not_fit_on_the_disk_is_refused(to, adapter, tmp_path, free_space, monkeypatch, capsys):
    monkeypatch.setattr("moka_pl.vision.export.import_peft", lambda: "")  # perhaps not installed
    free_space(200)
    with pytest.raises(SystemExit):
        main(["export", str(adapter), "--to", to, "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert "needed, 200 bytes free; free some space" in told
    assert not (tmp_path / "out").exists()


def test_predict_names_the_likeliest_class_of_each_image(adapter, squares, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    main(["predict", str(adapter), "--file", str(squares), "--output", str(output), "--batch_size", "5"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 18
    assert [row["image"] for row in rows] == sorted(row["image"] for row in rows)
    model, processor = load_classifier(adapter)
    for row in rows[::7]:
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        image = Image.open(squares / row["image"]).convert("RGB")
        logits = model(processor(image, return_tensors="pt")["pixel_values"]).logits[0]
        assert row["probability"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-5)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.png").write_text("no image")
    image = squares / "red/1.png"
    for given, error in (
        (["--file", str(tmp_path / "nothing")], "holds no images"),
        (["--file", str(squares), "--system", "be kind"], "options of prompts and answers are for texts"),
        (
            ["--file", str(tmp_path / "text.png")],
            "text.png is no image of a format that Pillow knows; repair",
        ),
        (
            ["--file", str(squares), "--output", str(image), "--overwrite"],
            "red/1.png is read for the answers",
        ),
    ):
        with pytest.raises(SystemExit):
            main(["predict", str(adapter), "--output", str(tmp_path / "none.jsonl"), *given])
        assert error in capsys.readouterr().err
    assert not list(tmp_path.glob("*none*"))
    Image.open(image)


def test_predict_takes_no_hidden_files(tmp_path):
    for name in ("b.png", "._b.png", ".DS_Store", "notes.txt"):
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "b.png"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["export", "--to", "gguf"], "--to gguf is for language models, and "),
        (["export", "--to", "merged", "--onto", "original"], "--onto original is for language models, and "),
        (["generate"], "classifies images, and answers or scores no text; validate or test it with "),
    ],
)
def test_other_commands_refuse_in_one_line(arguments, error, adapter, capsys):
    command, *options = arguments
    texts = ["hello"] if command == "generate" else []
    with pytest.raises(SystemExit) as end:
        main([command, str(adapter), *texts, *options])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("moka_pl: error: ")
    assert error in told
    assert told.count("\n") == 1


def test_inspect_shows_the_layers_of_moka(adapter, capsys):
    main(["inspect", str(adapter)])
    shown = capsys.readouterr().out
    assert "q_proj" in shown
    assert "classifier.trained" not in shown


def test_load_model_names_the_way_for_images(adapter):
    with pytest.raises(AdapterError, match=r"load it by moka_pl\.vision.load_classifier"):
        load_model(adapter)
