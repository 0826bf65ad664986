"""Batches of few sizes, and the way without CUDA graphs."""

from collections.abc import Callable
from contextlib import contextmanager
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data.batching.collate import collate_packs
from moka_pl.lm import cuda_graphs
from moka_pl.lm.attention import VARLEN
from moka_pl.lm.causal import CAUSAL, causal
from moka_pl.lm.cuda_graphs import (
    StepCapture,
    _fresh_leaves,
    capture_unsupported_reason,
    fix_size,
)
from moka_pl.lm.scoring import score_tokens

Labels = list[list[bool]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return load_backbone(BackboneConfig("tiny", weights="random", quantization="none"), "cpu").model


def _batch(labelled: Labels) -> dict[str, torch.Tensor]:
    kept = torch.tensor(labelled)
    generator = torch.Generator().manual_seed(int(kept.sum()))
    ids = torch.randint(1, 200, kept.shape, generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(~kept, -100)}


def _rows(length: int) -> st.SearchStrategy[Labels]:
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return st.lists(row, min_size=1, max_size=4)


labels = st.integers(1, 70).flatmap(_rows)


@given(labels)
def test_a_fixed_batch_names_every_labelled_token_once(labelled: Labels) -> None:
    batch = _batch(labelled)
    fixed = fix_size(batch)
    rows, width, size = fixed.size
    assert (rows, width % 32, size & (size - 1)) == (len(labelled), 0, 0)
    assert width - 32 < len(labelled[0]) <= width
    assert size < 2 * max(fixed.tokens, 129)
    kept = batch["labels"][:, 1:] != -100
    assert fixed.tokens == kept.sum()
    positions = fixed.positions[: fixed.tokens]
    expected = [(b, t) for b, t in kept.nonzero().tolist()]
    assert [(p // width, p % width) for p in positions.tolist()] == expected
    assert fixed.targets[: fixed.tokens].tolist() == batch["labels"][:, 1:][kept].tolist()
    assert (fixed.targets[fixed.tokens :] == -100).all()
    assert torch.equal(fixed.ids[:, : batch["input_ids"].shape[1]], batch["input_ids"])


@given(st.lists(st.lists(st.integers(1, 24), min_size=1, max_size=4), min_size=1, max_size=5))
def test_a_fixed_packed_batch_keeps_every_segment(lengths: list[list[int]]) -> None:
    numbers = iter(range(1, 10_000))
    packs = [[[next(numbers) for _ in range(n)] for n in pack] for pack in lengths]
    examples = [[{"input_ids": ids, "labels": ids} for ids in pack] for pack in packs]
    batch = collate_packs(examples, [False] * len(packs), 0)
    fixed = fix_size(batch)
    assert fixed.starts is not None
    assert fixed.position_ids is not None
    rows, width, _, segments = fixed.size
    assert fixed.starts.dtype == torch.int32
    assert segments & (segments - 1) == 0
    starts = fixed.starts.tolist()
    assert starts == sorted(starts)
    assert (starts[0], starts[-1]) == (0, rows * width)
    found = [fixed.ids.flatten()[a:b].tolist() for a, b in pairwise(starts)]
    # Beside empty segments and padding there are the examples, in their order, each whole and alone.
    assert [ids for ids in found if any(ids)] == list(chain.from_iterable(packs))
    places = [fixed.position_ids.flatten()[a:b].tolist() for a, b in pairwise(starts)]
    assert all(place == list(range(len(place))) for place, ids in zip(places, found, strict=True) if any(ids))
    assert sorted(fixed.targets[: fixed.tokens].tolist()) == sorted(
        token for pack in packs for ids in pack for token in ids[1:]
    )
    assert torch.equal(
        fixed.ids.flatten()[fixed.positions + 1][: fixed.tokens], fixed.targets[: fixed.tokens]
    )


@pytest.mark.parametrize("attention", ["usual", "recorded"])
def test_padding_changes_no_loss(model, attention: str) -> None:
    batch = _batch([[True] * 21, [False] * 10 + [True] * 11])
    expected = score_tokens(model, batch["input_ids"], batch["labels"]).nll.sum()
    capture = StepCapture(model)
    fixed = fix_size(batch)
    if attention == "usual":
        found = capture(fixed)
    else:
        before = model.config._attn_implementation
        with causal(model):
            assert model.config._attn_implementation == CAUSAL
            found = capture(fixed)
        assert model.config._attn_implementation == before
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_not_recorded_does_not_wait_for_a_mask(model, monkeypatch: pytest.MonkeyPatch) -> None:
    within = []

    @contextmanager
    def note(model):
        within.append(True)
        yield
        within.pop()

    def scores(model, row, *args, **inputs):
        return torch.tensor([float(bool(within))])

    monkeypatch.setattr(cuda_graphs, "without_waiting", note)
    monkeypatch.setattr(cuda_graphs, "nll_at", scores)
    assert StepCapture(model)(fix_size(_batch([[True] * 9]))).item() == 1
    assert within == []


def test_gradients_of_fresh_leaves_are_those_of_the_parameters_that_come_back() -> None:
    torch.manual_seed(0)
    model = load_backbone(BackboneConfig("tiny", weights="random", quantization="none"), "cpu").model
    inject_adapter(model, MokaConfig(components=2))
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        torch._foreach_add_(params, [0.1 * torch.randn_like(p) for p in params])
    before = dict(model.named_parameters())
    capture, fixed = StepCapture(model), fix_size(_batch([[True] * 20]))
    expected = torch.autograd.grad(capture(fixed), params)
    with _fresh_leaves(model) as leaves:
        assert not {id(p) for p in params} & {id(p) for p in model.parameters()}
        capture._forward_backward(fixed.tensors, leaves)
    assert all(p is before[name] for name, p in model.named_parameters())
    loss, found = capture.result()
    assert loss.item() == capture(fixed).item()
    assert len(found) == len(params)
    # Only if all are of one dtype and dense do a few launches multiply them by the loss's gradient on a GPU.
    assert {(t.dtype, t.device) for t in (loss, *found)} == {(torch.float32, torch.device("cpu"))}
    assert all(t.is_contiguous() for t in found)
    assert loss.dim() == 0
    for one, other in zip(found, expected, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # A parameter under two names stays one.
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    with _fresh_leaves(tied) as leaves:
        assert tied["a"].weight is tied["b"].weight is leaves[0]
        assert len(leaves) == 3


def test_a_cpu_goes_without_graphs(model) -> None:
    assert "GPU" in (capture_unsupported_reason(model) or "")


def test_a_model_that_packed_data_have_prepared_is_recorded(model, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(model, "get_input_embeddings", lambda: on_gpu)
    assert capture_unsupported_reason(model) is None
    for implementation, reason in ((VARLEN, None), ("eager", "attention is eager")):
        monkeypatch.setattr(model.config, "_attn_implementation", implementation)
        assert capture_unsupported_reason(model) == reason


def test_fit_on_a_cpu_trains_as_ever(make_fit: Callable[..., list[float]]) -> None:
    assert make_fit(cuda_graphs=True) == make_fit(cuda_graphs=False)


@pytest.fixture
def make_fit(tmp_path) -> Callable[..., list[float]]:
    import lightning.pytorch as pl

    from moka_pl.data import CommonsenseData
    from moka_pl.training.module import MokaModule

    def fit(**options: bool) -> list[float]:
        pl.seed_everything(0, verbose=False)
        module = MokaModule(
            BackboneConfig("tiny", weights="random", quantization="none"), MokaConfig(components=2), **options
        )
        losses: list[float] = []

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
                losses.append(float(trainer.callback_metrics["train/loss"]))

        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=3,
            callbacks=[Keep()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=CommonsenseData("sample", batch_size=4))
        return losses

    return fit
