"""What the tests of quantised weights share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from shared.quantised_checkpoints import CONFIGS, Checkpoint, write_checkpoint
from shared.quantisers import KINDS, PACKAGES


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind whose package is there."""
    if (package := PACKAGES.get(request.param)) is not None:
        pytest.importorskip(package)
    return request.param


@pytest.fixture(params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, make_llama: Callable, tmp_path: Path) -> Checkpoint:
    """A tiny model with layers of each kind that checkpoints are read in."""
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128}
    dense = make_llama(**sizes, num_hidden_layers=1, tie_word_embeddings=True)
    return write_checkpoint(request.param, dense, tmp_path / "model")
