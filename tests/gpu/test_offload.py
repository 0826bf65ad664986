"""Inputs of checkpointed layers in the host's memory; run with ``pytest -m gpu``."""

from typing import Any

import pytest
import torch

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.lm.checkpointing import checkpoint_layers
from moka_pl.lm.offload import offload_layer_inputs
from moka_pl.lm.scoring import score_tokens

pytestmark = pytest.mark.gpu

ROWS, LENGTH = 8, 256


def step(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """The gradients of the second step, and the bytes that it took."""
    params = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):  # the first compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(score_tokens(model, ids, ids).nll.sum(), params)
    return list(gradients), torch.cuda.max_memory_allocated() - before


def test_gradients_stay_and_memory_shrinks() -> None:
    config: Any = {"weights": "random", "compute_dtype": "bfloat16"}
    model = load_backbone(BackboneConfig("smollm2-135m", **config), "cuda").model
    inject_adapter(model, MokaConfig())
    model.train()
    checkpoint_layers(model)
    ids = torch.randint(3, 49152, (ROWS, LENGTH), device="cuda")
    expected, kept = step(model, ids)
    offload_layer_inputs(model)
    for _ in range(3):  # other timing each time
        found, taken = step(model, ids)
        error = torch.stack([(a - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
        assert error < 1e-3 * torch.stack([b.norm() for b in expected]).norm()
    inputs = 30 * 2 * 576 * ROWS * LENGTH
    assert taken < kept - 0.7 * inputs
