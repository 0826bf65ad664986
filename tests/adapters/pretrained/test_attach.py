"""Adapters attached to a transformers model: what its own saving, trainers and pipelines make of them."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments, pipeline
from transformers.utils import logging

import moka_pl
from moka_pl.adapters import (
    BaseModel,
    MokaConfig,
    MokaServable,
    adapted_layers,
    adapter_state,
    load_adapter,
    merge,
    moka_layers,
    read_adapter,
    save_adapter,
    unload,
)
from moka_pl.adapters.reading import read_adapter_shapes
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import AdapterError, ConfigError

IDS = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(4))
ROWS = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    config = BackboneConfig("tiny", weights="random", quantization="none")
    load_backbone(config).model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def plain(base: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def four_bit(base: Path) -> LlamaForCausalLM:
    return load_backbone(BackboneConfig(str(base))).model


def arguments(out: Path, **options: object) -> TrainingArguments:
    defaults = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(out), **(defaults | options))


@pytest.mark.parametrize("kind", ["plain", "four_bit"])
def test_what_it_saves_is_what_load_model_loads(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, randomize: Callable
) -> None:
    model = request.getfixturevalue(kind)
    assert moka_pl.attach(model, MokaConfig(components=3, gating="sigmoid")) is model
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "moka_A",
        "moka_B",
        "moka_gate",
    }
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded, _ = moka_pl.load_model(tmp_path / "adapter", device="cpu")
    assert torch.equal(logits(loaded), logits(model))
    assert read_adapter(tmp_path / "adapter").base.options["quantization"] == (
        "nf4" if kind == "four_bit" else "none"
    )
    # The same again from what was loaded.
    loaded.save_pretrained(tmp_path / "again")
    again = moka_pl.load_model(tmp_path / "again", device="cpu")[0]
    assert torch.equal(logits(again), logits(model))


def test_a_pipeline_generates_with_the_adapter(
    tmp_path: Path, plain: LlamaForCausalLM, randomize: Callable
) -> None:
    moka_pl.attach(plain, MokaConfig(components=3))
    randomize(plain, std=1.0)
    plain.save_pretrained(tmp_path / "adapter")
    model, tokenizer = moka_pl.load_model(tmp_path / "adapter", device="cpu")
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    texts = [answer[0]["generated_text"] for answer in write(["snow is", "rain"], batch_size=2, **options)]
    for prompt, text in zip(["snow is", "rain"], texts, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**tokens, max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True) == text
    unload(model)
    model.generation_config.use_cache = True
    assert [answer[0]["generated_text"] for answer in write(["snow is", "rain"], **options)] != texts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "four_bit"])
def test_transformers_trainer_trains_saves_and_resumes(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = request.getfixturevalue(kind)
    torch.manual_seed(0)
    moka_pl.attach(model, MokaConfig(components=3))
    start = copy.deepcopy({n: p for n, p in model.named_parameters() if p.requires_grad})
    before = logits(model)
    options = {"gradient_checkpointing": True}
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=ROWS)
    first = trainer.train().training_loss
    assert not torch.allclose(logits(model), before, atol=0.01)
    whole = logits(model)
    checkpoint = tmp_path / "checkpoint-2"
    assert sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) < 100_000  # no frozen weight
    halfway = moka_pl.load_model(checkpoint, device="cpu")[0]
    assert not torch.equal(logits(halfway), whole)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.copy_(start[name])
    resumed = Trainer(model, arguments(tmp_path, **options), train_dataset=ROWS)
    warned: list[str] = []
    monkeypatch.setattr(logging.get_logger("transformers.trainer"), "warning", warned.append)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not [message for message in warned if "missing keys" in message]
    torch.testing.assert_close(logits(model), whole, atol=1e-6, rtol=1e-6)
    assert first > 0
    resumed.save_model(str(tmp_path))  # among the checkpoints
    assert torch.equal(logits(moka_pl.load_model(tmp_path, device="cpu")[0]), logits(model.eval()))
    assert checkpoint.is_dir()


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path, plain: LlamaForCausalLM) -> None:
    moka_pl.attach(plain, MokaConfig(components=2))
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 100.0,
    }
    trainer = Trainer(plain, arguments(tmp_path, **options), train_dataset=ROWS, eval_dataset=ROWS[:2])
    trainer.train()  # so high a rate makes it worse
    best = moka_pl.load_model(trainer.state.best_model_checkpoint, device="cpu")[0]
    assert torch.equal(logits(plain.eval()), logits(best))


def test_a_trained_adapter_is_attached_to_go_on_with(
    tmp_path: Path, base: Path, plain: LlamaForCausalLM, randomize: Callable
) -> None:
    moka_pl.attach(plain, MokaServable(rank=4), base="owner/base")
    randomize(plain)
    plain.save_pretrained(tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(base).eval()
    moka_pl.attach(other, tmp_path / "adapter", dtype=torch.bfloat16)
    assert {p.dtype for p in other.parameters() if p.requires_grad} == {torch.bfloat16}
    torch.testing.assert_close(logits(other), logits(plain), atol=0.3, rtol=0.05)
    other.save_pretrained(tmp_path / "more")
    assert read_adapter(tmp_path / "more").base.name == "owner/base"
    another = LlamaForCausalLM(plain.config)
    with pytest.raises(AdapterError, match="was trained on another base"):
        moka_pl.attach(another, tmp_path / "adapter")
    assert not adapted_layers(another)


def test_a_model_without_its_adapters_saves_as_before(tmp_path: Path, plain: LlamaForCausalLM) -> None:
    moka_pl.attach(plain, MokaConfig(components=2))
    merge(plain)
    unload(plain, merge=True)
    plain.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()
    assert "save_pretrained" not in vars(plain)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(plain))


def test_a_users_files_stay_beside_the_adapter(tmp_path: Path, plain: LlamaForCausalLM) -> None:
    moka_pl.attach(plain, MokaConfig(components=2))
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "data.csv").write_text("1,2")
    plain.save_pretrained(tmp_path, is_main_process=False)
    assert len(list(tmp_path.iterdir())) == 2
    plain.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert len(moka_layers(moka_pl.load_model(tmp_path, device="cpu")[0])) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "data.csv",
    ]


def test_an_adapter_of_a_nameless_base_wants_one(tmp_path: Path, plain: LlamaForCausalLM, base: Path) -> None:
    model = LlamaForCausalLM(plain.config)
    model.load_state_dict(plain.state_dict())
    model.config.name_or_path = ""
    model.name_or_path = ""
    moka_pl.attach(model, MokaConfig(components=2))
    model.save_pretrained(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").base.name == ""
    with pytest.raises(AdapterError, match="does not name its base model; give base"):
        moka_pl.load_model(tmp_path / "adapter", device="cpu")
    assert moka_pl.load_model(tmp_path / "adapter", device="cpu", base=str(base))[0].name_or_path == str(base)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_model_is_adapted_and_saved_under_its_own_names(
    compiled_first: bool, plain: LlamaForCausalLM, tmp_path: Path, randomize: Callable
) -> None:
    model = torch.compile(plain, backend="eager") if compiled_first else plain
    assert moka_pl.attach(model, MokaConfig(components=2)) is model
    randomize(plain)
    compiled = model if compiled_first else torch.compile(plain, backend="eager")
    assert list(moka_layers(compiled)) == list(moka_layers(plain))
    compiled.save_pretrained(tmp_path / "saved")
    save_adapter(tmp_path / "again", compiled, MokaConfig(components=2), BaseModel(plain.name_or_path))
    named = moka_pl.MokaAdapters(compiled)
    named.save_pretrained(tmp_path / "named")
    for name in ("saved", "again", "named"):
        assert adapter_state(plain).keys() == read_adapter_shapes(tmp_path / name).keys()
    loaded, _ = moka_pl.load_model(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(loaded), logits(plain))

    fresh = torch.compile(AutoModelForCausalLM.from_pretrained(plain.name_or_path), backend="eager")
    load_adapter(fresh, tmp_path / "saved", fingerprint(fresh))
    assert torch.equal(logits(fresh), logits(compiled))
    unload(fresh)
    assert not moka_layers(fresh)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_in_which_nothing_trains_is_refused(dtype, plain: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="dtype must be a floating-point dtype"):
        moka_pl.attach(plain, MokaConfig(components=2), dtype=dtype)
    assert not moka_layers(plain)
