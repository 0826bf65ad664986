"""The page on file formats names what is written."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter
from moka_pl.adapters.layer import MokaLinear
from moka_pl.training.checkpoint import StoredRun

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`\n]+)`", PAGE))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, config = nn.Sequential(nn.Linear(16, 16)), MokaConfig(components=2, target_modules="all-linear")
    inject_adapter(model, config)
    assert isinstance(model[0], MokaLinear)
    return save_adapter(tmp_path_factory.mktemp("run") / "best", model, config, BaseModel("base"))


def test_every_file_of_an_adapter_is_named(adapter: Path) -> None:
    assert {file.name for file in adapter.iterdir()} <= NAMED


def test_every_key_of_the_configuration_is_named(adapter: Path) -> None:
    keys = set(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))
    options = {field.name for field in fields(MokaConfig)}  # of which the page names the first ones only
    assert options <= keys
    assert keys - options <= NAMED


def test_every_tensor_is_named(adapter: Path) -> None:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    kinds = {re.sub(r"\d+$", "<i>", name.removeprefix("0.")) for name in names}
    assert {f"<layer>.{kind}" for kind in kinds} <= NAMED


def test_every_key_that_we_add_to_checkpoints_is_named() -> None:
    assert {f"moka_{field.name}" for field in fields(StoredRun)} <= NAMED


def test_every_tag_of_the_callbacks_is_named() -> None:
    tags = set()
    training = [ROOT / "moka_pl" / "training" / name for name in ("module.py", "steps.py")]
    for file in [*(ROOT / "moka_pl" / "callbacks").glob("*.py"), *training]:
        text = file.read_text(encoding="utf-8")
        tags |= set(re.findall(r"\"((?:train|speed|batch|data)/\w+)\"", text))
    assert len(tags) > 6
    assert tags <= NAMED
