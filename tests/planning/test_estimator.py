"""How a plan reads the options of a run."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moka_pl.backbone import BackboneConfig
from moka_pl.planning.estimator import _setup
from moka_pl.planning.work import Run


@pytest.mark.parametrize(
    ("options", "on_gpu", "fused"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"kernels": "none"}, True, False),
        ({"compile": "layers"}, True, False),  # which loading puts no kernels into
    ],
)
def test_liger_s_kernels_are_counted_where_they_are_put_in(
    options: dict[str, Any], on_gpu: bool, fused: bool, tiny_llama
) -> None:
    module: Any = SimpleNamespace(gradient_checkpointing=False, optimizer=torch.optim.AdamW)
    config = BackboneConfig("tiny", weights="random", **options)
    setup = _setup(module, tiny_llama, config, Run(), on_gpu)(7, 5)
    assert (setup.tokens, setup.trained, setup.state, setup.fused) == (7, 5, 8, fused)
