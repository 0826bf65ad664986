"""How a plan reads the options of a run, and what it says of one micro-batch."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moka_pl.backbone import BackboneConfig
from moka_pl.planning.estimator import _setup, describe_batch
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


def test_describes_a_batch_that_did_not_fit(make_module) -> None:
    def described(rows: int, **options: Any) -> str:
        return describe_batch(make_module(**options), {"accelerator": "cuda"}, rows, 4096, rows * 2048)

    said = described(2048)
    pattern = (
        r"plan estimates ([\d.]+) GiB for a rank with such a batch \(([\d.]+) with half of the rows, "
        r"([\d.]+) with gradient checkpointing\)"
    )
    match = re.match(pattern, said)
    assert match is not None, said
    whole, half, checkpointed = map(float, match.groups())
    assert checkpointed < whole
    assert half == pytest.approx(whole / 2, rel=0.1)
    assert "offloaded checkpointing" in described(1, gradient_checkpointing=True)
    assert "(" not in described(1, gradient_checkpointing="offload")
