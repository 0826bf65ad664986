"""Where a written model is read to."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moka_pl.export.memory.placement import largest_layer, placement

GB = 10**9


def test_a_layer_is_all_of_its_tensors() -> None:
    sizes = {"model.embed_tokens.weight": 5, "model.layers.0.q.weight": 3, "model.layers.0.k.0.weight": 3}
    assert largest_layer([*sizes.items(), ("model.layers.1.q.weight", 3)]) == 6
    assert largest_layer([*sizes.items(), ("lm_head.weight", 7)]) == 7


@pytest.mark.parametrize(
    ("size", "layer", "available", "held"),
    [
        (GB, GB // 10, 20 * GB, None),
        (GB, GB // 10, GB, GB // 2),
        (27 * GB, 8 * GB // 10, 20 * GB, 2**31),
        (32 * GB, 21 * GB // 10, 20 * GB, 42 * GB // 10),  # an embedding of 128,256 tokens
    ],
)
def test_a_part_of_a_large_model_is_held(
    size: int, layer: int, available: int, held: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    placed = placement(Path("out"), torch.device("cpu"), size, layer)
    assert placed.get("max_memory") == (held and {"cpu": held})
