"""Local data in the known forms, and a small model with an adapter that does something."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.data.samples import sample_path

SUBJECTS = ("world_religions", "astronomy")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, dataset_cache: Path) -> None:
    """Nothing asks a hub, and nothing is written into the user's home."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)


def _write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A folder of three tasks, 12 questions each: two of the sample's, and one in the LLM-Adapters form."""
    folder = tmp_path / "questions"
    lines = sample_path("commonsense_train").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for task in ("science_easy", "physical"):
        own = [
            {k: v for k, v in record.items() if k != "task"} for record in records if record["task"] == task
        ]
        _write(folder / task / "test.json", own[:12])
        _write(folder / task / "train.json", own[12:20])
    boolean = [record for record in records if record["task"] == "boolean"][:12]
    _write(
        folder / "boolean" / "test.json",
        [
            {
                "instruction": "Please answer the following question with true or false, question: "
                f"{record['question']}\n\nAnswer format: true/false",
                "answer": ("true", "false")[record["answer"]],
            }
            for record in boolean
        ],
    )
    return folder


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    """Two subjects with five worked examples and four questions each."""
    folder = tmp_path / "mmlu"
    for part, count in (("dev", 5), ("test", 4)):
        (folder / part).mkdir(parents=True)
        for subject in SUBJECTS:
            with (folder / part / f"{subject}_{part}.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                for number in range(count):
                    writer.writerow(
                        [
                            f' {part}, "{number}": how many {subject}? ',
                            "one, or",
                            "two",
                            "3",
                            "four",
                            number % 4,
                        ]
                    )
    return folder


@pytest.fixture
def adapter(tmp_path: Path, randomize: Callable) -> Path:
    """A random adapter over the tiny random model in NF4."""
    base = BackboneConfig("tiny", weights="random")
    model = load_backbone(base).model
    config = MokaConfig(components=3)
    inject_adapter(model, config)
    randomize(model)
    remembered = BaseModel(base.name, None, fingerprint(model), base.options())
    return save_adapter(tmp_path / "adapter", model, config, remembered)


@pytest.fixture
def beginning_tokenizer() -> object:
    """Byte-level BPE that puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["Question: What is the answer to the question?\nAnswer: the one"] * 2, trainer
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
