"""Fused kernels in one model: what is put in, and what stays as it is.

Plain PyTorch stands in for Liger's Triton kernels, which ``tests/gpu`` runs.
"""

import pickle
import sys
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from shared.tiny import SIZES, build
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.lm.kernels import fuse_kernels, fused_modules

pytest.importorskip("liger_kernel")

CONFIGS = {
    "llama": (T.LlamaConfig, SIZES),
    "norms of queries and keys": (T.Qwen3Config, SIZES | {"head_dim": 8}),
    "scaled logits": (T.GraniteConfig, SIZES | {"logits_scaling": 4.0}),
    "capped logits, GELU": (T.Gemma2Config, SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "joined projections": (T.Phi3Config, SIZES),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each of Liger's functions was called, which PyTorch computes here."""
    counts = dict.fromkeys(("norm", "silu", "gelu", "rope"), 0)

    def norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *_: Any) -> Tensor:
        counts["norm"] += 1
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight)

    def silu(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
        counts["silu"] += 1
        return F.silu(gate) * up

    def gelu(gate: Tensor, up: Tensor) -> Tensor:
        counts["gelu"] += 1
        return F.gelu(gate, approximate="tanh") * up

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        counts["rope"] += 1
        halves = [(x, *x.chunk(2, dim=-1)) for x in (q, k)]
        return tuple(
            x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
            for x, first, second in halves
        )

    for path, function in (
        ("liger_kernel.transformers.rms_norm.LigerRMSNormFunction", norm),
        ("liger_kernel.transformers.swiglu.LigerSiLUMulFunction", silu),
        ("liger_kernel.transformers.geglu.LigerGELUMulFunction", gelu),
        ("liger_kernel.ops.LigerRopeFunction", rope),
    ):
        monkeypatch.setattr(path, SimpleNamespace(apply=function))
    return counts


def batch() -> dict[str, Tensor]:
    """Two rows, each of two packed examples."""
    ids = torch.arange(3, 21).view(2, 9)
    return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_model_computes_the_same_and_changes_no_other(name: str, calls: dict[str, int]) -> None:
    kind, options = CONFIGS[name]
    model, other = build(kind(**options)), build(kind(**options))
    modelling = sys.modules[type(model).__module__]
    before = dict(vars(modelling)), vars(type(model)).copy()
    expected = model(**batch()).logits
    assert fuse_kernels(model).startswith("fused kernels: Liger ")
    assert (dict(vars(modelling)), vars(type(model)).copy()) == before
    calls.update(dict.fromkeys(calls, 0))
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=1e-4, atol=1e-5)
    layers = len(model.model.layers)
    gated = "gelu" if "GELU" in name else "silu"
    assert calls["rope"] == calls[gated] == layers
    assert calls["norm"] >= 2 * layers + 1
    calls.update(dict.fromkeys(calls, 0))
    assert torch.equal(other(**batch()).logits, expected)
    assert not any(calls.values())
    assert not fused_modules(other)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_with_its_own_weights(copied: Any, calls: dict[str, int]) -> None:
    model = build(T.LlamaConfig(**SIZES))
    fuse_kernels(model)
    copy = copied(model)
    expected = model(**batch()).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    calls.update(dict.fromkeys(calls, 0))
    assert torch.equal(copy(**batch()).logits, expected)
    assert fused_modules(copy) == fused_modules(model)
    assert min(calls["norm"], calls["silu"], calls["rope"]) >= len(copy.model.layers)


def assert_untouched(model: nn.Module, reason: str) -> None:
    expected = model(**batch()).logits
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    assert fuse_kernels(model) == f"no fused kernels: {reason}"
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
    assert torch.equal(model(**batch()).logits, expected)


def test_what_differs_from_the_model_is_taken_out(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = SimpleNamespace(apply=lambda gate, up, *_: 1.1 * F.silu(gate) * up)
    monkeypatch.setattr("liger_kernel.transformers.swiglu.LigerSiLUMulFunction", wrong)
    model = build(T.LlamaConfig(**SIZES))
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    assert "differ from the model's own computation by" in fuse_kernels(model)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


def test_what_fails_is_taken_out(calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("liger_kernel.ops.LigerRopeFunction", SimpleNamespace(apply=fail))
    model = build(T.LlamaConfig(**SIZES))
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    note = fuse_kernels(model)
    assert note.startswith("no fused kernels: Liger ")
    assert note.endswith(" fails: RuntimeError: no compiler")
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


def test_another_activation_is_not_replaced(calls: Any) -> None:
    model = build(T.LlamaConfig(**SIZES | {"hidden_act": "gelu"}))
    assert_untouched(model, "Liger's gated MLP has another activation than GELUActivation")


def test_an_architecture_without_kernels_is_left_alone(calls: Any) -> None:
    model = build(T.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    assert_untouched(model, "Liger has none for the architecture gpt2")


def test_without_liger_a_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moka_pl.lm.kernels.find_spec", lambda name: None if name == "liger_kernel" else 1)
    assert_untouched(build(T.LlamaConfig(**SIZES)), "liger_kernel is not installed")


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_nothing_is_fused_on_a_cpu(kernels: Any) -> None:
    loaded = load_backbone(BackboneConfig("tiny", weights="random", quantization="none", kernels=kernels))
    assert not fused_modules(loaded.model)
    assert not loaded.notes
