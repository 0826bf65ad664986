"""Compiled decoder layers with MoKA on a CUDA device; run with ``pytest -m gpu``."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import reset
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from moka_pl.adapters import MokaConfig, adapter_state, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.quantization import dense_weight
from moka_pl.lm.compiled import compile_layers
from moka_pl.lm.cuda_graphs import PATIENCE, StepCapture, fix_size
from moka_pl.lm.scoring import score_tokens

pytestmark = pytest.mark.gpu

ADAPTERS = {
    "10 on q and v": {"components": 10, "target_modules": ["q_proj", "v_proj"]},
    "servable on all": {"filters": "servable", "components": 2, "rank": 4, "target_modules": "all-linear"},
}


def models(**options: Any) -> tuple[Any, Any]:
    """A 4-bit model of two layers in bfloat16, and the same in float64, with equal adapters."""
    torch.manual_seed(0)
    config = BackboneConfig("tiny", weights="random", compute_dtype="bfloat16", kernels="none")
    low = load_backbone(config, "cuda").model
    high = AutoModelForCausalLM.from_config(low.config).to("cuda").double().requires_grad_(False)
    with torch.no_grad():
        for name, module in high.named_modules():
            own = low.get_submodule(name)
            if isinstance(module, nn.Linear):
                module.weight.copy_(dense_weight(own))
            else:
                for parameter, value in zip(
                    module.parameters(recurse=False), own.parameters(recurse=False), strict=True
                ):
                    parameter.copy_(value)
    for model in (low, high):
        inject_adapter(model, MokaConfig(**options))
        model.train()
        model.enable_input_require_grads()  # both layers then share a graph
    high.double()
    for mine, exact in zip(trained(low), trained(high), strict=True):
        with torch.no_grad():
            exact.copy_(mine.normal_(std=0.1))
    assert adapter_state(low).keys() == adapter_state(high).keys()
    return low, high


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(0)).cuda()
    return {"input_ids": ids, "labels": ids}


def step(model: Any, data: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients."""
    loss = score_tokens(model, data["input_ids"], data["labels"]).nll.sum()
    return [loss, *torch.autograd.grad(loss, trained(model))]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative error of the loss, and of all gradients together."""
    found, exact = [x.detach().double() for x in found], [x.detach() for x in exact]
    gradients = torch.stack([(a - b).norm() for a, b in zip(found[1:], exact[1:], strict=True)]).norm()
    size = torch.stack([b.norm() for b in exact[1:]]).norm()
    return max(float(gradients / size), float((found[0] - exact[0]).abs() / exact[0]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_compiled_step_is_as_near_to_float64_as_a_plain_one(name: str) -> None:
    reset()
    counters.clear()
    (low, high), data = models(**ADAPTERS[name]), batch()
    exact, plain = step(high, data), step(low, data)
    assert compile_layers(low) == 2
    compiled = step(low, data)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert error(compiled, exact) < 1.5 * error(plain, exact) < 0.1


def test_a_compiled_step_is_replayed_as_a_cuda_graph() -> None:
    reset()
    low, high = models(**ADAPTERS["servable on all"])
    data = batch()
    exact, plain = step(high, data), step(low, data)
    compile_layers(low)
    capture = StepCapture(low)
    for _ in range(PATIENCE + 2):
        loss = capture(fix_size(data))
        found = [loss, *torch.autograd.grad(loss, trained(low))]
    assert capture.unsupported_reason is None
    assert capture.graphs == 1
    assert error(found, exact) < 1.5 * error(plain, exact)
