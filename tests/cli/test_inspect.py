"""``moka-pl inspect``."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moka_pl.adapters import MokaConfig
from moka_pl.adapters.reading import CONFIG_NAME, WEIGHTS_NAME, read_adapter, read_adapter_state
from moka_pl.cli.inspect import inspect
from moka_pl.cli.main import FUNCTIONS, main
from moka_pl.errors import AdapterError
from moka_pl.inspection.layers import by_number


def facts(output: str) -> dict[str, str]:
    return {line[:30].strip(): line[30:] for line in output.partition("\n\n")[0].splitlines()}


def test_it_prints_the_facts(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(adapter)
    count = sum(tensor.numel() for tensor in read_adapter_state(adapter).values())
    assert facts(capsys.readouterr().out) == {
        "base model": f"tiny (fingerprint {read_adapter(adapter).base.fingerprint})",
        "quantization": "nf4",
        "components": "3",
        "filters": "diverse",
        "gating": "softmax",
        "scaling": "3.0",
        "target modules": "q_proj, v_proj",
        "exact LoRA rank": "32 to 64",
        "parameters": f"{count:,}",
    }


def section(output: str, title: str) -> list[str]:
    """The lines of a table, its head first."""
    (found,) = [part for part in output.split("\n\n") if part.startswith(title)]
    return found.splitlines()


def test_it_prints_the_metrics_as_one_table(
    make_adapter: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = {
        "val/loss": 1.23456,
        "val/accuracy": 0.5,
        "val/accuracy_stderr": 0.125,
        "val/accuracy/easy": 0.25,
    }
    inspect(make_adapter(more={"metrics": metrics}))
    head, *rows = section(capsys.readouterr().out, "metrics")
    assert head.split() == ["metrics", "val", "loss", "accuracy"]
    assert [row.split() for row in rows] == [["mean", "1.2346", "50.0%", "±", "12.5"], ["easy", "25.0%"]]


@pytest.mark.parametrize(("found_at", "shown"), [(7, None), (4, "4 (weights: step 7)")])
def test_it_says_of_which_step_the_metrics_are(
    make_adapter: Callable, capsys: pytest.CaptureFixture[str], found_at: int, shown: str | None
) -> None:
    inspect(make_adapter(more={"metrics_step": found_at}))
    assert facts(capsys.readouterr().out).get("metrics measured at step") == shown


def test_layers_are_in_the_order_of_the_model() -> None:
    names = [f"model.layers.{n}.self_attn.{kind}" for n in (0, 1, 2, 10, 11) for kind in ("k_proj", "q_proj")]
    assert sorted(sorted(names), key=by_number) == names != sorted(names)


def test_it_prints_the_gates(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(adapter)
    header, *rows = section(capsys.readouterr().out, "gates by layer")
    assert header.split()[:4] == ["gates", "by", "layer", "entropy"]
    assert len(rows) == 4
    state = read_adapter_state(adapter)
    for row in rows:
        name, entropy, *alpha = row.split()
        expected = torch.softmax(state[f"{name}.moka_gate"], 0)
        assert [float(a) for a in alpha] == pytest.approx(expected.tolist(), abs=6e-4)
        expected_entropy = float(-(expected * expected.log()).sum() / math.log(3))
        assert float(entropy) == pytest.approx(expected_entropy, abs=6e-5)


def test_it_prints_sigmoid_gates(make_adapter: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_adapter(gating="sigmoid")
    inspect(path)
    output = capsys.readouterr().out
    assert facts(output)["gating"] == "sigmoid"
    state = read_adapter_state(path)
    for row in section(output, "gates by layer")[1:]:
        name, entropy, *alpha = row.split()
        expected = 2 / 3 * torch.sigmoid(state[f"{name}.moka_gate"])
        assert [float(a) for a in alpha] == pytest.approx(expected.tolist(), abs=6e-4)
        shares = expected / expected.sum()
        assert float(entropy) == pytest.approx(float(-(shares * shares.log()).sum() / math.log(3)), abs=6e-5)


def test_a_single_component_has_full_entropy(make_adapter: Callable, capsys: pytest.CaptureFixture) -> None:
    path = make_adapter(components=1, gating="sigmoid")
    inspect(path)
    *_, row = section(capsys.readouterr().out, "gates by layer")
    name, *values = row.split()
    alpha = 2 * float(torch.sigmoid(read_adapter_state(path)[f"{name}.moka_gate"]))
    assert values == ["1.0000", f"{alpha:.3f}"]


def test_a_servable_adapter_tells_its_ranks_and_no_gate_that_is_always_1(
    make_adapter: Callable, capsys: pytest.CaptureFixture
) -> None:
    inspect(make_adapter(components=1, filters="servable", rank=9, target_modules="all-linear"))
    output = capsys.readouterr().out
    found = facts(output)
    assert (found["filters"], found["exact LoRA rank"]) == ("servable, rank 9", "9")
    assert "gates by layer" not in output


def test_json_holds_the_same(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(adapter), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["options"] == MokaConfig(components=3).to_dict()
    assert (found["exact_lora_rank"], found["metrics"]) == (
        [32, 64],
        {"val/loss": 1.23456, "val/accuracy": 0.5},
    )
    assert found["step"] == found["metrics_step"] == 7
    state = read_adapter_state(adapter)
    assert found["parameters"] == sum(tensor.numel() for tensor in state.values())
    gates = {name: state[f"{name}.moka_gate"].softmax(0).tolist() for name in found["gates"]}
    assert len(gates) == 4
    assert found["gates"] == gates


def test_without_gates(make_adapter: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(make_adapter(gating="none", target_modules=r".*\.0\..*q_proj"))
    output = capsys.readouterr().out
    assert facts(output)["gating"] == "none"
    assert facts(output)["target modules"] == r".*\.0\..*q_proj"
    assert "gates by layer" not in output


def test_on_the_command_line(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(adapter)
    expected = capsys.readouterr().out
    main(["inspect", str(adapter)])
    assert capsys.readouterr().out == expected


def damage_config(adapter: Path) -> None:
    (adapter / CONFIG_NAME).write_text("{")


def damage_weights(adapter: Path) -> None:
    file = adapter / WEIGHTS_NAME
    file.write_bytes(file.read_bytes()[:100])


def remove_weights(adapter: Path) -> None:
    (adapter / WEIGHTS_NAME).unlink()


def remove_all(adapter: Path) -> None:
    adapter.rename(adapter.with_name("elsewhere"))


@pytest.mark.parametrize("command", [["inspect"], ["generate", "Hello"]], ids=lambda c: c[0])
@pytest.mark.parametrize("damage", [damage_config, damage_weights, remove_weights, remove_all])
def test_a_damaged_directory_is_one_line_and_status_2(
    command: list[str], damage: Callable[[Path], None], adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(adapter)
    name, *options = command
    arguments = [name, str(adapter), *options]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"moka_pl: error: {adapter}")


@pytest.mark.skipif(os.name != "posix", reason="no pipes of this kind")
@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [(["configs"], ""), (["configs"], "1"), (["inspect", "--help"], "")],
    ids=["at the end", "at once", "help"],
)
def test_a_reader_that_has_gone_ends_it_in_silence(command: list[str], unbuffered: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "moka_pl", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout is not None
    process.stdout.close()  # as `| head -0` does, long before the first line is written
    _, error = process.communicate()
    assert (process.returncode, error) == (141, b"")


def test_another_broken_pipe_is_no_silent_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(adapter: Path) -> None:
        """Talks to a worker."""
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setitem(FUNCTIONS, "inspect", fail)
    with pytest.raises(BrokenPipeError, match="a worker"):
        main(["inspect", "somewhere"])


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "An adapter directory." in capsys.readouterr().out


def test_a_missing_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect"])
    assert caught.value.code == 2
    assert "adapter" in capsys.readouterr().err


def test_two_adapters_are_compared_and_drawn(
    make_adapter: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, page = make_adapter(), tmp_path / "page.html"
    second = first.rename(tmp_path / "other")
    first = make_adapter()
    main(["inspect", str(first), str(second), "--html", str(page)])
    text = capsys.readouterr().out
    assert [text.splitlines().count(str(path)) for path in (first, second)] == [1, 1]  # whose tables follow
    assert "‖ΔW‖/‖W‖" not in text  # no base is loaded
    head, *rows = section(text, "compared by layer")
    assert head.split()[3:] == ["‖ΔW‖", "‖ΔW'‖", "cosine", "distance", "gates"]
    for row in rows:  # both are the same
        name, one, other, cosine, _, gates = row.split()
        assert (one, float(cosine), float(gates)) == (other, pytest.approx(1), 0), name
    assert "Comparison" in page.read_text(encoding="utf-8")
    main(["inspect", str(first), str(second), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["compared"]["with"] == str(second)
    assert found["compared"]["layers"].keys() == found["layers"].keys() == found["other"]["layers"].keys()


def test_three_adapters_are_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "a", "b", "c"])
    assert capsys.readouterr().err == "moka_pl: error: inspect compares two adapters, not 3; leave out c\n"


def test_a_damaged_second_adapter_is_refused_before_the_base_of_the_first_is_loaded(
    saved: Path, tmp_path: Path, no_weights: Callable[[], None]
) -> None:
    other = shutil.copytree(saved, tmp_path / "other")
    (other / WEIGHTS_NAME).write_bytes(b"{}")
    no_weights()
    with pytest.raises(AdapterError, match="other"):
        inspect(saved, str(other), base="stored")
