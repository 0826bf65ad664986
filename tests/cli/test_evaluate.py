"""``moka-pl evaluate``."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.quantization import Quantization
from moka_pl.cli import main as cli
from moka_pl.cli.evaluate import evaluate
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.evaluation.lm_eval.results import weights_fingerprint
from moka_pl.inference import load_model
from moka_pl.lm.scoring import row_sums, score_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = [
    {"question": "Which word is red?", "choices": ["red", "blue sky"], "answer": 0},
    {"question": "And which one is longer?", "choices": ["short", "longer", "no"], "answer": 1},
    {"question": "Is this the last?", "choices": ["yes", "no"], "answer": 0},
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, dataset_cache: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One task, as a folder of local data."""
    for name in ("test", "train"):
        file = tmp_path / "data" / "words" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(TASK), encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a model and a tokenizer."""
    loaded = load_backbone(BackboneConfig("tiny", weights="random", quantization="none", seed=1))
    loaded.model.save_pretrained(tmp_path / "base model")
    loaded.tokenizer.save_pretrained(tmp_path / "base model")
    return tmp_path / "base model"


def scores(model: object, tokenizer: object, question: str, options: list[str]) -> list[float]:
    """Log-likelihoods of the options, one after another."""
    import torch

    found = []
    prompt = tokenizer(f"Question: {question}\nAnswer:").input_ids
    for option in options:
        ids = torch.tensor([prompt + tokenizer(f" {option}").input_ids])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        with torch.no_grad():
            found.append(-float(row_sums(score_tokens(model, ids, labels), 1)))
    return found


def test_an_adapter(adapter: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["evaluate", f"--adapter={adapter}", "--tasks=words", f"--data={data}", "--log_samples"])
    output = capsys.readouterr()
    (file,) = adapter.glob("results_*.json")
    assert f"Results saved in {file}" in output.err
    assert "Running loglikelihood requests" in output.err  # progress
    results = json.loads(file.read_text(encoding="utf-8"))
    model, tokenizer = load_model(adapter)
    right = []
    for sample, asked in zip(results["samples"]["words"], TASK, strict=True):
        expected = scores(model, tokenizer, asked["question"], asked["choices"])
        found = [score for score, _ in sample["filtered_resps"]]
        assert found == pytest.approx(expected, abs=1e-3)
        assert sample["target"] == asked["answer"]
        right.append(expected.index(max(expected)) == asked["answer"])
    assert results["results"]["words"]["acc,none"] == pytest.approx(sum(right) / 3)
    assert "|words|" in output.out
    assert "|acc_norm|" in output.out
    about = results["moka_pl"]
    assert about["adapter"]["fingerprint"] == weights_fingerprint(adapter)
    assert about["adapter"]["config"]["components"] == 3
    assert about["base"]["name"] == results["config"]["model"] == "tiny"
    assert about["base"]["fingerprint"] == fingerprint(model)
    assert about["base"]["options"]["quantization"] == "nf4"
    assert about["tasks"] == ["words"]
    assert about["data"] == str(data)
    assert about["versions"].keys() >= {"moka_pl", "lm_eval", "torch", "transformers"}


def test_a_base_alone(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--tasks", "words", "--data", "data", "--limit", "2", "--num_fewshot", "1"]
    cli.main(["evaluate", "--base", str(base), *options, "--quantization", "none", "--log_samples"])
    (file,) = (tmp_path / "lightning_logs" / "evaluate").glob("*base_model/results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["n-samples"]["words"]["effective"] == 2
    assert results["n-shot"]["words"] == 1
    (context, _), *_ = results["samples"]["words"][0]["arguments"]
    assert context.count("Question:") == 2
    assert context.endswith("Question: Which word is red?\nAnswer:")
    assert results["moka_pl"]["adapter"] is None
    assert results["moka_pl"]["base"]["options"]["quantization"] == "none"
    assert results["config"]["model_dtype"] == "torch.float32"


def test_output_and_samples_are_optional(adapter: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "mine.json"
    evaluate(adapter, "words", data=data, output=file, limit=1)
    assert "samples" not in json.loads(file.read_text(encoding="utf-8"))
    assert not list(adapter.glob("results_*"))


def test_an_adapter_on_another_base_is_refused(adapter: Path, data: Path, base: Path) -> None:
    with pytest.raises(AdapterError, match="another base model"):
        evaluate(adapter, "words", str(base), data)
    assert not list(adapter.glob("results_*"))


def test_the_chat_template_is_put_around(adapter: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    evaluate(adapter, "words", data=data, output=file, limit=1, apply_chat_template=True, log_samples=True)
    (sample,) = json.loads(file.read_text(encoding="utf-8"))["samples"]["words"]
    assert sample["arguments"][0][0].startswith("<|im_start|>user\nQuestion: Which word is red?")


def test_a_missing_library_is_one_message(
    adapter: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", f"--adapter={adapter}", "--tasks=words", f"--data={data}"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'moka_pl[eval]'" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate; give --adapter DIR, or --base NAME"),
        ({"adapter": Path("x"), "quantization": "none"}, "--quantization cannot be combined with --adapter"),
        ({"base": "x", "limit": 0}, "limit must be at least 1, not 0"),
        ({"base": "x", "num_fewshot": -1}, "num_fewshot must be at least 0, not -1"),
        ({"base": "x", "batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(**({"tasks": "words"} | options))


def test_problems_show_before_a_model_is_loaded(
    make_adapter: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    monkeypatch.setattr(
        "moka_pl.inference.load_model", lambda *args, **options: pytest.fail("a model was loaded")
    )
    with pytest.raises(ConfigError, match="unknown task 'word'; did you mean words"):
        evaluate(adapter, "word", data=data)
    with pytest.raises(ConfigError, match="no tasks given"):
        evaluate(adapter, " , ", data=data)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write results"):
        evaluate(adapter, "words", data=data, output=tmp_path / "file" / "x.json")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match="is there already, and holds no results"):
        evaluate(adapter, "words", data=data, output=tmp_path / "notes.json")
    with pytest.raises(AdapterError, match="is not an adapter directory"):
        evaluate(tmp_path, "words", data=data)


@pytest.mark.parametrize("alone", [False, True], ids=["adapter", "base"])
def test_a_missing_chat_template_is_refused_before_weights_are_loaded(
    alone: bool, saved: Path, base: Path, data: Path, no_weights: Callable[[], None]
) -> None:
    # The weights that the adapter was trained on.
    load_backbone(BackboneConfig("tiny", weights="random", quantization="none")).model.save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    no_weights()
    with pytest.raises(ConfigError, match="tokenizer has no chat template; remove it"):
        evaluate(
            None if alone else saved,
            "words",
            str(base),
            data,
            output=data / "out.json",
            apply_chat_template=True,
        )


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "--help"])
    assert caught.value.code == 0
    assert "--num_fewshot" in capsys.readouterr().out


def test_a_base_can_be_stored_in_every_way_that_training_knows() -> None:
    chosen = get_type_hints(evaluate)["quantization"]
    known = {value for part in get_args(chosen) for value in get_args(part)}
    assert known == set(get_args(Quantization))


def test_a_damaged_adapter_is_refused_before_the_harness_is_imported(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moka_pl.evaluation.lm_eval.tasks.require_lm_eval", lambda: pytest.fail("imported"))
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError, match="truncated or damaged"):
        evaluate(adapter, "arc_easy")
