"""A merged export, as transformers reads it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.export.merged import merged_parts, write_description, write_weights


@pytest.fixture
def exported(tmp_path: Path) -> Callable[[PreTrainedModel], PreTrainedModel]:
    """Writes an adapted model as a merged folder, and returns what transformers alone reads there."""

    def export(model: PreTrainedModel) -> PreTrainedModel:
        out = tmp_path / "merged"
        out.mkdir()
        write_weights(out, merged_parts(model), torch.float32)
        write_description(out, model, byte_tokenizer(), torch.float32)
        return AutoModelForCausalLM.from_pretrained(out)

    return export
