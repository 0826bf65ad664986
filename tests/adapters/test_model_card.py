"""The README.md of an adapter directory: readable tables of what was trained, found and learnt."""

from pathlib import Path

import pytest
import torch

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, moka_layers, save_adapter

TASKS = ("arc_easy", "boolq")


def card_of(folder: Path, model: torch.nn.Module, config: MokaConfig, extra: dict) -> str:
    path = save_adapter(folder / "adapter", model, config, BaseModel("owner/base", "v2"), extra)
    return (path / "README.md").read_text(encoding="utf-8")


def table(card: str, head: str) -> list[list[str]]:
    """The rows below a table's head."""
    lines = card[card.index(head) :].splitlines()
    end = lines.index("") if "" in lines else len(lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]


def test_a_task_is_one_row_with_its_errors(tmp_path: Path, tiny_llama) -> None:
    metrics = {"val/loss": 2.1, "val/accuracy": 0.5, "val/accuracy_stderr": 0.01}
    for i, task in enumerate(TASKS):
        metrics |= {f"val/accuracy/{task}": 0.6541 + i / 10, f"val/accuracy/{task}_stderr": 0.0123}
        metrics |= {f"val/acc_norm/{task}": 0.25, f"val/nll/{task}": 2.34567}
    metrics |= {"val/accuracy/both_macro": 0.7, "val/accuracy/both_macro_stderr": 0.02}
    inject_adapter(tiny_llama, MokaConfig(components=2))
    card = card_of(tmp_path, tiny_llama, MokaConfig(components=2), {"metrics": metrics})
    assert "stderr" not in card
    assert table(card, "| val | loss | accuracy | acc_norm | nll |") == [
        ["mean", "2.1000", "50.0% ± 1.0", "", ""],
        ["arc_easy", "", "65.4% ± 1.2", "25.0%", "2.3457"],
        ["boolq", "", "75.4% ± 1.2", "25.0%", "2.3457"],
        ["both, mean of its tasks", "", "70.0% ± 2.0", "", ""],
    ]


def test_of_several_sets_each_has_its_mean(tmp_path: Path, tiny_llama) -> None:
    metrics = {"val/a/accuracy": 0.25, "val/b/accuracy": 0.75, "val/accuracy/x": 0.25, "val/accuracy/y": 0.75}
    inject_adapter(tiny_llama, MokaConfig(components=2))
    card = card_of(tmp_path, tiny_llama, MokaConfig(components=2), {"metrics": metrics})
    rows = table(card, "| val | accuracy |")
    assert rows == [["a", "25.0%"], ["x", "25.0%"], ["y", "75.0%"], ["b", "75.0%"]]


def test_it_tells_data_and_settings(tmp_path: Path, tiny_llama) -> None:
    inject_adapter(tiny_llama, MokaConfig(components=2))
    extra = {
        "data": "TextData: a|b\nc",
        "training": {"learning rate": 0.002, "seed": 0},
        "step": 7,
        "prompt": None,
    }
    card = card_of(tmp_path, tiny_llama, MokaConfig(components=2), extra)
    assert table(card.replace("\\|", "¦"), "| training | value |") == [
        ["data", "TextData: a¦b c"],
        ["learning rate", "0.002"],
        ["seed", "0"],
        ["steps", "7"],
    ]
    assert "| base model | `owner/base` (v2) |" in card
    assert "prompt" not in card


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "none"])
def test_gates_are_summed_up_by_projection(gating: str, tmp_path: Path, tiny_llama) -> None:
    config = MokaConfig(components=2, gating=gating, filters="square")
    inject_adapter(tiny_llama, config)
    for name, layer in moka_layers(tiny_llama).items():
        if layer.moka_gate is not None and name.endswith("q_proj"):
            layer.moka_gate.data.copy_(torch.tensor([-1.0, 1.0]))
    card = card_of(tmp_path, tiny_llama, config, {})
    if gating == "none":
        assert "entropy" not in card
        return
    low, high = {"softmax": ("0.119", "0.881"), "sigmoid": ("0.269", "0.731")}[gating]
    q, v = table(card, "| layers | number | entropy | α | largest on average |")
    shape = next(iter(moka_layers(tiny_llama).values())).shapes[1]
    assert (q[0], q[1], q[3], q[4]) == ("q_proj", "2", f"{low} to {high}", f"2 ({shape}): {high}")
    assert v[:4] == ["v_proj", "2", "1.000 (least 1.000)", "0.500 to 0.500"]
