import contextlib
import hashlib
import math
from dataclasses import fields

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from moka_pl.adapters import MokaConfig, adapters_disabled
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint
from moka_pl.data import MixtureData
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.lm.checkpointing import is_checkpointed
from moka_pl.training.checkpoint import StoredRun, check_run
from moka_pl.training.module import MokaModule
from moka_pl.training.schedule import WarmupDecay


class RecordingSGD(torch.optim.SGD):
    """SGD that keeps the gradients it steps with."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.seen = []

    def step(self, closure=None):
        loss = closure()
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        super().step()
        return loss


class Batches(Callback):
    """Keeps the training batches."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch)


def constant(optimizer):
    return WarmupDecay(optimizer, warmup=0, decay="constant")


def mean_loss(model, batches):
    """Cross entropy of the whole model, row after row, over all completion tokens of all batches."""
    total, count = 0.0, 0
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
            total = total + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
            count += int((labels[1:] != -100).sum())
    return total / count


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def frozen_digest(module):
    """Hash of every frozen byte, quantisation states included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if "moka_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# The loss


@pytest.mark.parametrize(
    ("accumulate", "windows"),
    [(1, [1] * 7), (3, [3, 3, 1]), (4, [4, 3]), (16, [7])],
)
def test_steps_use_the_mean_over_all_tokens(
    make_module, make_data, make_trainer, step_log, randomize, accumulate, windows
):
    optimizers = []

    def build(parameters):
        optimizers.append(RecordingSGD(parameters, lr=0.0))
        return optimizers[-1]

    module = make_module(optimizer=build, lr_scheduler=constant, adapter={"scaling": 1.7})
    module.configure_model()
    randomize(module)
    batches, log = Batches(), step_log()
    make_trainer(batches, log, accumulate_grad_batches=accumulate).fit(module, make_data(bucket=False))
    tokens = [int((b["labels"] != -100).sum()) for b in batches.seen]
    assert max(tokens) > 3 * min(tokens)  # the mean over batches would be something else

    assert len(optimizers[0].seen) == len(windows) == len(log.losses)
    start = 0
    for step, (size, gradients) in enumerate(zip(windows, optimizers[0].seen, strict=True), start=1):
        expected = mean_loss(module.causal_lm, batches.seen[start : start + size])
        start += size
        assert log.losses[step] == pytest.approx(expected.item(), rel=1e-5)
        for mine, theirs in zip(gradients, torch.autograd.grad(expected, trainable(module)), strict=True):
            assert (mine - theirs).norm() < 1e-3 * theirs.norm()


def test_clipping_acts_on_the_mean_gradient(make_module, make_data, make_trainer, randomize):
    def norms(**options):
        built = []

        def build(parameters):
            built.append(RecordingSGD(parameters, lr=0.0))
            return built[-1]

        module = make_module(optimizer=build, lr_scheduler=constant)
        module.configure_model()
        randomize(module)
        trainer = make_trainer(accumulate_grad_batches=4, **options)
        trainer.fit(module, make_data(bucket=False))
        last = trainer.callback_metrics["train/grad_norm"].item()
        return [torch.cat([g.flatten() for g in step]).norm().item() for step in built[0].seen], last

    free, logged = norms()
    assert logged == pytest.approx(free[-1], rel=1e-5)
    assert len(free) == 2
    low, high = sorted(free)
    limit = (low + high) / 2  # clips one of both steps
    clipped, logged = norms(gradient_clip_val=limit)
    assert clipped == pytest.approx([min(norm, limit) for norm in free], rel=1e-4)
    assert logged == pytest.approx(free[-1], rel=1e-5)  # what is logged is the norm before clipping


def test_memorises_a_small_data_set(make_module, make_data, make_trainer, step_log):
    log = step_log()
    module = make_module(lr=3e-2, adapter={"components": 6, "target_modules": "all-linear"})
    module.configure_model()
    with torch.no_grad():  # a head with weights of 0.02 is never sure of anything
        module.causal_lm.get_output_embeddings().weight.mul_(10)
    data = make_data(batch_size=13, validation_path=None, validation_share=0)
    make_trainer(log, max_epochs=12, limit_val_batches=0).fit(module, data)
    assert log.losses[1] > 5.5  # about ln 320, the vocabulary
    assert log.losses[12] < 4


def test_learning_rates_follow_the_schedule(make_module, make_data, make_trainer, step_log):
    log = step_log()
    module = make_module(
        lr=0.5, lr_scheduler=lambda optimizer: WarmupDecay(optimizer, warmup=2, decay="linear")
    )
    make_trainer(log, max_epochs=2, accumulate_grad_batches=3).fit(module, make_data())
    # Two epochs of three windows: two steps of warm-up, then from 1 to 0 over the four that are left.
    assert list(log.rates.values()) == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125])


# What trains


def test_only_adapters_change(make_module, make_data, make_trainer):
    module = make_module(lr=1e-2)
    module.configure_model()
    before, start = frozen_digest(module), [p.detach().clone() for p in trainable(module)]
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        name for name, _ in module.named_parameters() if "moka_" in name
    }
    make_trainer(max_epochs=2).fit(module, make_data())
    assert frozen_digest(module) == before
    assert all(not torch.equal(a, b) for a, b in zip(start, trainable(module), strict=True))


def test_validation_before_the_first_step_is_the_frozen_bases(make_module, make_data, make_trainer):
    class First(Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.sanity_checking:
                self.values = dict(pl_module.eval_values)

    first = First()
    module = make_module()
    trainer = make_trainer(first, num_sanity_val_steps=-1)
    trainer.fit(module, make_data(eval_batch_size=2))
    after = dict(module.eval_values)
    assert after["val/loss"] != first.values["val/loss"]
    with adapters_disabled(module.causal_lm):
        base = trainer.validate(module, make_data(eval_batch_size=2), verbose=False)[0]
    assert first.values == module.eval_values
    assert base["val/loss"] == pytest.approx(first.values["val/loss"])


def test_validation_loss_is_the_mean_over_tokens(make_module, make_data, make_trainer, randomize):
    module, data = make_module(), make_data(eval_batch_size=2)
    module.configure_model()
    randomize(module)
    value = make_trainer().validate(module, data, verbose=False)[0]["val/loss"]
    with torch.no_grad():
        assert value == pytest.approx(mean_loss(module.causal_lm, data.val_dataloader()).item(), rel=1e-5)
    other = make_trainer().validate(module, make_data(eval_batch_size=5), verbose=False)[0]["val/loss"]
    assert value == pytest.approx(other, rel=1e-6)
    tested = make_trainer().test(module, data, verbose=False)[0]
    assert tested == {"test/loss": pytest.approx(value)}


def test_multiple_choice_metrics_and_prediction(
    make_module, make_commonsense, make_data, make_trainer, randomize
):
    module = make_module()
    module.configure_model()
    randomize(module)
    questions = make_commonsense(eval_batch_size=3)
    data = MixtureData([questions, make_data()], eval_batch_size=3)
    values = make_trainer().validate(module, data, verbose=False)[0]

    right: dict[int, list[bool]] = {}
    answers_nll, answer_tokens = 0.0, 0
    for batch in questions.val_dataloader():
        scores = []
        for ids, labels, is_answer in zip(
            batch["input_ids"], batch["labels"], batch["is_answer"], strict=True
        ):
            row = [{"input_ids": ids[None], "labels": labels[None]}]
            count = int((labels[1:] != -100).sum())
            with torch.no_grad():
                nll = mean_loss(module.causal_lm, row).item() * count
            scores.append(-nll)
            if is_answer:
                answers_nll, answer_tokens = answers_nll + nll, answer_tokens + count
        for item in range(int(batch["item"].max()) + 1):
            rows = [i for i in range(len(scores)) if batch["item"][i] == item]
            best = max(rows, key=lambda i: scores[i])
            right.setdefault(int(batch["task"][rows[0]]), []).append(bool(batch["is_answer"][best]))
    accuracy = {questions.tasks[task]: sum(found) / len(found) for task, found in right.items()}
    assert len(accuracy) == 2
    for task, value in accuracy.items():
        assert values[f"val/accuracy/{task}"] == pytest.approx(value)
    assert values["val/accuracy"] == pytest.approx(sum(accuracy.values()) / 2)
    assert values["val/commonsense/loss"] == pytest.approx(answers_nll / answer_tokens, rel=1e-5)
    assert values["val/loss"] == pytest.approx(
        (values["val/commonsense/loss"] + values["val/instruction/loss"]) / 2
    )

    predicted = make_trainer().predict(module, questions)
    rows = sum(len(batch["log_likelihood"]) for batch in predicted)
    assert rows == sum(len(batch["input_ids"]) for batch in questions.test_dataloader())
    total = -sum(float((b["log_likelihood"] * b["is_answer"]).sum()) for b in predicted)
    assert total / answer_tokens == pytest.approx(values["val/commonsense/loss"], rel=1e-5)


def test_one_module_is_evaluated_on_one_data_set_after_another(
    make_module, make_commonsense, make_data, make_trainer
):
    module = make_module()

    def validated(data):
        return make_trainer().validate(module, data, verbose=False)[0]

    text = validated(make_data())
    questions = validated(make_commonsense())
    both = validated(MixtureData([make_commonsense(), make_data()]))
    assert "val/accuracy" not in text
    assert {"val/accuracy/even", "val/accuracy/odd"} <= questions.keys()
    assert both["val/instruction/loss"] == pytest.approx(text["val/loss"], rel=1e-5)
    assert both["val/commonsense/loss"] == pytest.approx(questions["val/loss"], rel=1e-5)
    assert both["val/accuracy"] == questions["val/accuracy"]
    assert validated(make_data()) == text


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(make_module, make_data, make_trainer, randomize, dropout):
    def gradients(checkpointing):
        built = []

        def build(parameters):
            built.append(RecordingSGD(parameters, lr=0.0))
            return built[-1]

        module = make_module(
            optimizer=build, gradient_checkpointing=checkpointing, adapter={"dropout": dropout}
        )
        module.configure_model()
        assert is_checkpointed(module.causal_lm) == checkpointing
        randomize(module)
        make_trainer(limit_train_batches=2).fit(module, make_data())
        return built[0].seen

    plain, checkpointed = gradients(False), gradients(True)
    for one, other in zip(plain, checkpointed, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine.abs().max() > 0
            torch.testing.assert_close(mine, theirs)


def test_an_unknown_kind_of_checkpointing_is_refused(make_module):
    with pytest.raises(
        ConfigError, match="gradient_checkpointing is 'cpu'; choose one of true, false, offload"
    ):
        make_module(gradient_checkpointing="cpu")


@pytest.mark.parametrize("checkpointing", [False, True, "offload"])
def test_checkpointing_computes_activations_again(make_module, make_data, make_trainer, checkpointing):
    module = make_module(gradient_checkpointing=checkpointing)
    module.configure_model()
    calls = []
    attention = module.causal_lm.get_decoder().layers[0].self_attn
    attention.register_forward_hook(lambda *args: calls.append(0))
    make_trainer(limit_train_batches=3, limit_val_batches=0).fit(module, make_data())
    assert len(calls) == (6 if checkpointing else 3)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_drops_out_in_training_only(make_module, make_data, make_trainer, step_log, randomize, dropout):
    log, module = step_log(), make_module(lr=0.0, adapter={"dropout": dropout})
    module.configure_model()
    randomize(module)
    trainer = make_trainer(log, max_epochs=3, num_sanity_val_steps=-1)
    trainer.fit(module, make_data(batch_size=13))
    first = dict(module.eval_values)
    # Three times the same batch and the same weights.
    assert (len(set(log.losses.values())) == 1) == (dropout == 0)
    trainer.validate(module, make_data(), verbose=False)
    assert module.eval_values == pytest.approx(first, rel=1e-6)


def test_optimizer_gets_the_trainable_parameters_only(make_module):
    module = make_module()
    module.configure_model()
    module.lr_scheduler = constant
    optimizer = torch.optim.SGD(trainable(module), lr=0.1)
    seen = []
    module.optimizer = lambda parameters: seen.extend(parameters) or optimizer

    class FakeTrainer:
        estimated_stepping_batches = 10

    module._trainer = FakeTrainer()
    module.configure_optimizers()
    assert [id(p) for p in seen] == [id(p) for p in trainable(module)]


def test_plateau_scheduler_watches_the_metric(make_module, make_data, make_trainer):
    from lightning.pytorch.cli import ReduceLROnPlateau

    module = make_module(
        optimizer=lambda p: torch.optim.SGD(p, lr=0.25),
        lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss", mode="max", patience=0, factor=0.5),
    )
    trainer = make_trainer(max_epochs=3)
    trainer.fit(module, make_data())
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.25


@pytest.mark.parametrize(
    ("precision", "told"),
    [("bf16-true", "bf16-true rounds the adapters"), ("64-true", None)],
)
def test_a_trainer_of_another_precision(
    make_module, make_commonsense, make_data, make_trainer, precision, told
):
    module, trainer = make_module(), make_trainer(precision=precision, limit_train_batches=1)
    data = MixtureData([make_commonsense(), make_data()])
    with pytest.warns(UserWarning, match=told) if told else contextlib.nullcontext():
        trainer.fit(module, data)
    assert 0 <= float(trainer.callback_metrics["val/accuracy"]) <= 1
    kinds = {p.dtype for p in module.parameters() if p.requires_grad}
    assert kinds == {torch.bfloat16 if told else torch.float64}


def test_model_is_built_once_and_asked_for_too_early(make_module):
    module = make_module()
    assert module.tokenizer.pad_token_id is not None  # without the model
    with pytest.raises(ConfigError, match="not built yet"):
        _ = module.causal_lm
    module.configure_model()
    model = module.causal_lm
    module.configure_model()
    assert module.causal_lm is model


def test_damaged_adapter_path_shows_before_any_loading(make_module, make_data, make_trainer, tmp_path):
    missing = BackboneConfig(name="no/such/model")
    with pytest.raises(AdapterError, match="no such folder"):
        MokaModule(missing, adapter_path=str(tmp_path / "none"))
    saving = AdapterCheckpoint()
    make_trainer(saving, max_steps=1, limit_val_batches=0).fit(make_module(), make_data())
    weights = saving.last_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="truncated or damaged"):
        MokaModule(missing, adapter_path=str(saving.last_path))
    weights.unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors"):
        MokaModule(missing, adapter_path=str(saving.last_path))


# Checkpoints


@pytest.fixture
def trained(make_module, make_data, make_trainer, tmp_path):
    """A checkpoint after one epoch, with its module."""
    module = make_module(lr=3e-2)
    trainer = make_trainer(accumulate_grad_batches=2)
    trainer.fit(module, make_data())
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    return module, path


def test_checkpoint_holds_trainable_tensors_only(trained):
    module, path = trained
    content = torch.load(path, weights_only=True)
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(own) == 4 * 3  # left factors, right factors and gates of a layer
    assert set(content["state_dict"]) == set(own)
    for name, parameter in own.items():
        assert torch.equal(content["state_dict"][name], parameter)
    assert set(content) >= {"optimizer_states", "lr_schedulers", "loops"}
    added = {name for name in content if name.startswith("moka_")}
    assert added == {f"moka_{field.name}" for field in fields(StoredRun)}
    tensors = []

    def collect(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            [collect(v) for v in value.values()]
        elif isinstance(value, list | tuple):
            [collect(v) for v in value]

    collect({key: value for key, value in content.items() if key != "moka_rng"})
    # Three of each: the parameter, and AdamW's two moments (and its step counters).
    assert sum(t.numel() for t in tensors) == sum(3 * p.numel() + 1 for p in own.values())
    frozen = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
    assert path.stat().st_size < frozen


def test_checkpoint_restores_exactly(trained, make_module, make_data, make_trainer):
    module, path = trained
    other = make_module()
    values = make_trainer().validate(other, make_data(), ckpt_path=path, weights_only=True, verbose=False)[0]
    for mine, theirs in zip(trainable(other), trainable(module), strict=True):
        assert torch.equal(mine, theirs)
    assert values["val/loss"] == pytest.approx(module.eval_values["val/loss"], rel=1e-6)
    assert other.eval_values == module.eval_values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(next(iter(s))), "missing tensors: 1 "),
        (
            lambda s: s.update({"model.extra": torch.zeros(1)}),
            r"unexpected tensors: 1 \(first model\.extra\)",
        ),
        (
            lambda s: s.update({name: s[name][:2] for name in list(s)[:1]}),
            r"q_proj.moka_A is \(2,\), the model expects \(\d+,\)",
        ),
    ],
)
def test_unfit_checkpoint_is_refused(trained, make_module, make_data, make_trainer, change, message):
    _, path = trained
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)
    with pytest.raises(AdapterError, match=message):
        make_trainer(max_epochs=2).fit(make_module(), make_data(), ckpt_path=path, weights_only=True)


def test_checkpoint_of_another_base_is_refused(trained, make_module, make_data, make_trainer):
    _, path = trained
    with pytest.raises(AdapterError, match="trained on another base model"):
        make_trainer().validate(make_module(seed=1), make_data(), ckpt_path=path, weights_only=True)


def test_checkpoint_of_other_adapters_is_refused(trained, make_module, make_data, make_trainer):
    _, path = trained
    module = make_module(adapter={"components": 2})
    with pytest.raises(AdapterError, match=r"adapter.components is 3, this model's is 2"):
        make_trainer().validate(module, make_data(), ckpt_path=path, weights_only=True)


def test_another_number_of_components_is_told_before_what_may_be_allowed(trained, make_module):
    _, path = trained
    content, module = torch.load(path, weights_only=True), make_module(adapter={"components": 2})
    with pytest.raises(AdapterError, match=r"adapter.components is 3, this model's is 2"):
        check_run(content, module, {}, training=True)
    module = make_module(adapter={"scaling": 7.0})
    with pytest.raises(ConfigError, match=r"adapter: scaling 3.0, now 7.0.*allow_changes '\[adapter\]'"):
        check_run(content, module, {}, training=True)


def test_ungated_module_trains(make_module, make_data, make_trainer, step_log):
    log = step_log()
    module = make_module(adapter={"gating": "none"}, lr=3e-2)
    make_trainer(log, max_epochs=3).fit(module, make_data())
    assert not any("gate" in name for name, _ in module.named_parameters() if "moka" in name)
    assert all(math.isfinite(loss) for loss in log.losses.values())
    assert log.losses[max(log.losses)] < log.losses[1]
    assert isinstance(module.adapter, MokaConfig)


def test_the_exact_lora_rank_is_told_with_the_parameters(make_module, caplog) -> None:
    options = {"filters": "servable", "rank": 9, "target_modules": "all-linear"}
    for adapter, told in ((options, "exact LoRA rank: 27"), ({}, "exact LoRA rank: 32 to 64")):
        caplog.clear()
        with caplog.at_level("INFO", "lightning.pytorch"):
            make_module(adapter=adapter).configure_model()
        assert told in caplog.messages
