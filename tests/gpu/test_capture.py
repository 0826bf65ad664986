"""Training steps replayed as CUDA graphs."""

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.graph_fit import fit

from moka_pl.adapters import FullFineTuning, MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data import TextData
from moka_pl.data.batching.collate import collate_packs
from moka_pl.lm.attention import PackedAttention
from moka_pl.lm.checkpointing import checkpoint_layers
from moka_pl.lm.cuda_graphs import PATIENCE, WIDTH, FixedBatch, StepCapture, fix_size
from moka_pl.lm.scoring import score_tokens
from moka_pl.studies.architectures.families import FAMILIES, tiny_model

pytestmark = pytest.mark.gpu


def _adapters() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    lora = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    return {
        "MoKA": MokaConfig(),
        "MoKA structured": MokaConfig(backend="structured"),
        "MoKA_s": MokaConfig(filters="prime"),
        "ungated": MokaConfig(gating="none"),
        "LoRA": peft.LoraConfig(**lora),
        "DoRA": peft.LoraConfig(**lora, use_dora=True),
    }


def _model(adapter: Any, quantization: str = "nf4", dtype: str = "bfloat16"):
    torch.manual_seed(0)
    config = BackboneConfig("smollm2-135m", weights="random", quantization=quantization, compute_dtype=dtype)
    model = load_backbone(config, "cuda").model
    model.is_loaded_in_4bit = quantization == "nf4"
    inject_adapter(model, deepcopy(adapter))
    model.train()
    generator = torch.Generator("cuda").manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and quantization == "nf4":
                parameter += 0.02 * torch.randn(parameter.shape, device="cuda", generator=generator)
    return model


def _batch(seed: int, rows: int = 4, length: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(49152, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    labels[0, -5:] = -100
    return {"input_ids": ids.cuda(), "labels": labels.cuda()}


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-3), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("name", ["MoKA", "MoKA structured", "MoKA_s", "ungated", "LoRA", "DoRA"])
def test_a_replayed_step_has_the_loss_and_gradients_of_a_launched_one(
    name: str, dtype: str, bound: float
) -> None:
    model = _model(_adapters()[name], dtype=dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    capture = StepCapture(model)
    for seed in range(PATIENCE + 3):
        batch = _batch(seed, length=(40, 64, 33)[seed % 3])  # one size after padding
        loss = capture(fix_size(batch))
        found = torch.autograd.grad(3 * loss, params)
        expected_loss = score_tokens(model, batch["input_ids"], batch["labels"]).nll.sum()
        expected = torch.autograd.grad(3 * expected_loss, params)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=bound / 10)
        error = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
        assert error < bound * torch.stack([b.norm() for b in expected]).norm()
        with torch.no_grad():  # the graph reads the parameters anew
            torch._foreach_add_(params, [1e-3 * torch.randn_like(p) for p in params])
    assert capture.graphs == 1
    assert capture.unsupported_reason is None


def test_rows_within_a_sliding_window_are_recorded() -> None:
    family = next(family for family in FAMILIES if family.name == "Gemma 3")
    model: Any = tiny_model(family).cuda()
    inject_adapter(model, MokaConfig(components=2, target_modules="all-linear"))
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    window, tokens = model.config.sliding_window, model.config.vocab_size
    assert window % WIDTH == 0
    capture = StepCapture(model)
    for length, graphs in ((window, 1), (2 * window, 1)):  # the wider ones are launched
        ids = torch.randint(tokens, (2, length), device="cuda")
        for _ in range(PATIENCE + 2):
            loss = capture(fix_size({"input_ids": ids, "labels": ids}))
            found = torch.autograd.grad(loss, params)
        expected = score_tokens(model, ids, ids).nll.sum()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        for one, other in zip(found, torch.autograd.grad(expected, params), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert capture.graphs == graphs


def test_sizes_share_their_memory_and_gradients() -> None:
    model = _model(MokaConfig())
    params = [p for p in model.parameters() if p.requires_grad]
    capture = StepCapture(model)
    for length in [40, 90] * (PATIENCE + 1) + [40, 40, 90]:
        batch = _batch(length, length=length)
        found = torch.autograd.grad(capture(fix_size(batch)), params)
        expected = torch.autograd.grad(
            score_tokens(model, batch["input_ids"], batch["labels"]).nll.sum(), params
        )
        error = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
        assert error < 5e-2 * torch.stack([b.norm() for b in expected]).norm()
    assert capture.graphs == 2


def test_every_replay_drops_out_anew() -> None:
    model = _model(MokaConfig(dropout=0.5))
    capture = StepCapture(model)
    batch = fix_size(_batch(0))
    losses = [capture(batch).item() for _ in range(PATIENCE + 4)]
    assert capture.graphs == 1
    assert len(set(losses[PATIENCE:])) == 4


def test_a_replay_is_lost_with_the_next() -> None:
    model = _model(MokaConfig())
    capture = StepCapture(model)
    batch = fix_size(_batch(0))
    for _ in range(PATIENCE):
        capture(batch)
    first = capture(batch)
    capture(batch)
    with pytest.raises(RuntimeError, match="before this batch's backward"):
        first.backward()


def test_full_training_of_the_base_is_recorded() -> None:
    model = _model(FullFineTuning(), quantization="none")
    params = [p for p in model.parameters() if p.requires_grad]
    capture = StepCapture(model)
    batch = _batch(0)
    for _ in range(PATIENCE + 2):
        found = torch.autograd.grad(capture(fix_size(batch)), params)
    expected = torch.autograd.grad(score_tokens(model, batch["input_ids"], batch["labels"]).nll.sum(), params)
    error = torch.stack([(a.float() - b.float()).norm() for a, b in zip(found, expected, strict=True)]).norm()
    assert capture.graphs == 1
    assert error < 5e-2 * torch.stack([b.float().norm() for b in expected]).norm()


@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpointed_step_is_replayed(offload: bool) -> None:
    model, batch = _model(MokaConfig()), fix_size(_batch(0))
    params = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(StepCapture(model)(batch), params)
    checkpoint_layers(model, offload)
    capture = StepCapture(model)
    for _ in range(PATIENCE + 3):
        found = torch.autograd.grad(capture(batch), params)
    assert capture.graphs == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * float(other.abs().max()))


def _pack(seed: int) -> dict[str, Any]:
    """Four packed rows of three to five examples."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(4):
        parts = int(torch.randint(3, 6, (), generator=generator))
        lengths = (60 // parts - torch.randint(3, (parts,), generator=generator)).tolist()
        ids = [torch.randint(1, 49152, (n,), generator=generator).tolist() for n in lengths]
        rows.append([{"input_ids": row, "labels": row} for row in ids])
    return dict(collate_packs(rows, [False] * 4, 0))


def _on_gpu(values: Any) -> Any:
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in values]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_step_is_replayed(checkpointing: bool) -> None:
    model = _model(MokaConfig())
    if checkpointing:
        checkpoint_layers(model)
    params = [p for p in model.parameters() if p.requires_grad]
    packed = PackedAttention(model)
    assert packed.unsupported_reason is None
    capture = StepCapture(model)
    for seed in range(PATIENCE + 3):
        batch = _pack(seed)
        loss = capture(FixedBatch(*_on_gpu(fix_size(batch))))
        found = torch.autograd.grad(loss, params)
        batch = dict(zip(batch, _on_gpu(batch.values()), strict=True))
        scores = score_tokens(model, batch["input_ids"], batch["labels"], **packed.inputs(batch))
        expected = torch.autograd.grad(scores.nll.sum(), params)
        assert loss.item() == pytest.approx(scores.nll.sum().item(), rel=5e-3)
        error = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
        assert error < 5e-2 * torch.stack([b.norm() for b in expected]).norm()
    assert capture.unsupported_reason is None
    assert capture.graphs == 1


def test_dropout_and_a_failure_go_on_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(MokaConfig(dropout=0.1))
    checkpoint_layers(model)
    assert "checkpointing" in (StepCapture(model).unsupported_reason or "")
    model = _model(MokaConfig())
    capture = StepCapture(model)
    batch = fix_size(_batch(0))
    for _ in range(PATIENCE):
        expected = capture(batch).item()
    compute = StepCapture._compute

    def looking(self: StepCapture, *tensors: torch.Tensor) -> torch.Tensor:
        loss = compute(self, *tensors)
        if torch.cuda.is_current_stream_capturing():
            loss.item()
        return loss

    monkeypatch.setattr(StepCapture, "_compute", looking)
    with pytest.warns(UserWarning, match="cannot capture"):
        assert capture(batch).item() == pytest.approx(expected, rel=1e-3)
    assert capture.graphs == 0
    assert capture(batch).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_with_graphs_follows_fit_without(accumulate: int) -> None:
    curves = []
    for graphs in (False, True):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            _, _, keep = fit(
                graphs,
                max_steps=24,
                accumulate_grad_batches=accumulate,
                val_check_interval=8,
                limit_val_batches=2,
                check_val_every_n_epoch=None,
            )
        curves.append(keep.losses)
        assert keep.graphs >= graphs
    without, replayed = (torch.tensor(curve) for curve in curves)
    assert len(without) == 24
    assert without[-4:].mean() < without[:4].mean()
    torch.testing.assert_close(replayed, without, rtol=2e-3, atol=0)


def test_a_packed_fit_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = (" ".join(str(7 * n + k) for k in range(200)) for n in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    curves = []
    for graphs in (False, True):
        data = TextData(path, batch_size=4, max_length=128)
        _, _, keep = fit(graphs, data=data, dtype="bfloat16", max_steps=24, limit_val_batches=0)
        assert bool(keep.graphs) == graphs
        curves.append(torch.tensor(keep.losses))
    torch.testing.assert_close(curves[1], curves[0], rtol=3e-2, atol=0)
