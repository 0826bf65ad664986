"""New tokens from a run's options to its adapter, and from there to everything that loads it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moka_pl import load_model
from moka_pl.adapters import FullFineTuning, MokaConfig, adapter_state, save_adapter
from moka_pl.adapters.vocabulary.token_rows import token_rows
from moka_pl.backbone import BackboneConfig, load_backbone, load_tokenizer
from moka_pl.backbone.random_weights import SHAPES, byte_tokenizer
from moka_pl.cli.main import main
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.prompts.new_tokens import new_token_pieces
from moka_pl.training.learning_rates import LearningRateRatios
from moka_pl.training.module import MokaModule

TOKENS = ["alpha", " beta", "<|im_start|>user"]


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A tied model with room for one token more than its tokenizer has."""
    folder = tmp_path / "base"
    folder.mkdir()
    sizes = SHAPES["tiny"] | {"vocab_size": 261, "tie_word_embeddings": True, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(sizes))
    return str(folder)


@pytest.fixture
def module(base: str, make_module: Callable) -> Callable[..., MokaModule]:
    def make(tokens: list[str] | None = None, **options: object) -> MokaModule:
        backbone = BackboneConfig(base, weights="random", new_tokens=TOKENS if tokens is None else tokens)
        return make_module(**({"backbone": backbone, "adapter": {"components": 2}} | options))

    return make


def save(module: MokaModule, path: Path) -> Path:
    return save_adapter(path, module.causal_lm, module.adapter, module.base, {"prompt": "alpaca"})


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_they_are_trained_resumed_loaded_and_exported(
    module, base, make_data, make_trainer, tmp_path, capsys, no_weights
) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_top_k=-1, every_n_train_steps=1)
    run = module()
    make_trainer(keep, enable_checkpointing=True, max_steps=2).fit(run, make_data())
    tokenizer, model = run.tokenizer, run.causal_lm
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [260, 261, 262]
    assert run.adapter.trainable_token_indices == [260, 261, 262]
    (embedding, head) = token_rows(model).values()
    assert (embedding.inside, head.out_features, model.config.vocab_size) == (1, 263, 263)
    moved = (embedding.trainable_tokens - embedding.start).abs().amax(1)
    assert bool((moved > 0).all())  # each has a logit in every step
    frozen = load_backbone(BackboneConfig(base, weights="random")).model
    assert torch.equal(embedding.base_layer.weight, frozen.model.embed_tokens.weight)
    # Started at the mean of the pieces, here bytes.
    pieces = byte_tokenizer()("alpha").input_ids
    expected = frozen.model.embed_tokens.weight[pieces].mean(0)
    torch.testing.assert_close(embedding.start[0], expected)
    # Resumed bit for bit.
    again = module()
    (checkpoint,) = (tmp_path / "kept").glob("*step=1.ckpt")
    make_trainer(max_steps=2).fit(again, make_data(), ckpt_path=checkpoint, weights_only=True)
    whole, resumed = adapter_state(model), adapter_state(again.causal_lm)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    other, told = module(["gamma", "b1", "b2"]), r"the new tokens 'alpha', ' beta', .*; this run has 'gamma'"
    with pytest.raises(AdapterError, match=told):
        make_trainer(max_steps=2).fit(other, make_data(), ckpt_path=checkpoint, weights_only=True)
    # Stored: three rows, once for both ends.
    path = save(run, tmp_path / "adapter")
    rows = {
        name: t.shape
        for name, t in load_file(path / "adapter_model.safetensors").items()
        if "moka" not in name
    }
    assert rows == {"model.embed_tokens.trainable_tokens": (3, 64)}
    stored = json.loads((path / "adapter_config.json").read_text())
    assert (stored["format_version"], stored["base_options"]["new_tokens"]) == (5, TOKENS)
    # Loaded with its tokenizer, and exported as a plain model with its own.
    loaded, own = load_model(path)
    ids = own(" beta alpha, beta", return_tensors="pt").input_ids
    assert {260, 261} < set(ids[0].tolist())
    with torch.no_grad():
        logits = loaded(ids).logits
    torch.testing.assert_close(logits, model.eval()(ids).logits.detach())
    assert torch.equal(token_rows(loaded)["model.embed_tokens"].start, embedding.start)
    main(["export", str(path), "--to", "merged", "--dtype", "float32"])
    out = tmp_path / "adapter-merged"
    plain, tokens = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert torch.equal(tokens(" beta alpha, beta", return_tensors="pt").input_ids, ids)
    assert (plain.config.vocab_size, len(tokens), plain.config.tie_word_embeddings) == (263, 263, True)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, logits, atol=1e-3, rtol=1e-3)
    main(["generate", str(path), "alpha beta", "--max_new_tokens", "2", "--compare"])
    for form in ("lora", "gguf", "mlx"):
        with pytest.raises(SystemExit):
            main(["export", str(path), "--to", form])
        if form != "mlx":
            assert "has rows of 3 tokens, which a LoRA does not hold; export" in capsys.readouterr().err
    # Gone on from, without naming the tokens again.
    further = module([], adapter_path=str(path))
    assert further.backbone.new_tokens == TOKENS
    further.configure_model()
    assert all(torch.equal(adapter_state(further.causal_lm)[name], tensor) for name, tensor in whole.items())
    with pytest.raises(
        ConfigError, match=r"backbone.new_tokens is \['x'\], but the adapter in .* has \['alpha'"
    ):
        module(["x"], adapter_path=str(path))
    # A tokenizer that gives them other numbers is refused before weights are loaded.
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((Path(base) / "config.json").read_text())
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["before"])
    tokenizer.save_pretrained(other)
    no_weights()
    with pytest.raises(
        AdapterError,
        match=r"another vocabulary: '<.im_start.>user' is token 263 of this tokenizer, of which it has no",
    ):
        load_model(path, base=str(other))


REFUSED = {
    "known": (
        ["<|end|>"],
        r"'<\|end\|>' is token 1 already; leave it out, and if its row is to be trained set",
    ),
    "a byte": (["a"], r"'a' is token \d+ already"),
    "empty": (["alpha", " "], "' ' is no token; give texts that are not empty"),
    "twice": (["x1", "x1"], "'x1' is there twice; name each token once"),
}


@pytest.mark.parametrize(("tokens", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_new_token_is_refused(tokens: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"backbone.new_tokens: {reason}"):
        load_tokenizer(BackboneConfig("tiny", weights="random", new_tokens=tokens))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"adapter": FullFineTuning()}, "trained beside MoKA, not by FullFineTuning"),
        ({"adapter": MokaConfig(filters="auto")}, "set other filters than auto"),
    ],
)
def test_adapters_that_cannot_have_them_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"backbone.new_tokens .*{reason}"):
        MokaModule(BackboneConfig("tiny", weights="random", new_tokens=["x1"]), **options)


def test_those_of_the_chat_template_are_special() -> None:
    tokenizer = load_tokenizer(BackboneConfig("tiny", weights="random", new_tokens=["assistant", "x1"]))
    ids = tokenizer("assistant x1").input_ids
    assert ids[0] == 260
    assert ids[-1] == 261
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "x1"
    assert new_token_pieces(tokenizer) == {
        260: byte_tokenizer()("assistant").input_ids,
        261: byte_tokenizer()("x1").input_ids,
    }


def test_their_rate_is_the_optimizers_own(module) -> None:
    run = module(learning_rate_ratios=LearningRateRatios(right=4.0))
    run.configure_model()
    groups = {group["name"]: group for group in run.configure_optimizers()["optimizer"].param_groups}
    assert groups["tokens"]["lr"] == pytest.approx(groups["right"]["lr"] / 4)
    assert [tuple(p.shape) for p in groups["tokens"]["params"]] == [(3, 64)]
