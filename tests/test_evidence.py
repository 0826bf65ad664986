import json
import math
import sys

import pytest

from moka_pl import evidence
from moka_pl.errors import ConfigError
from moka_pl.evidence import Study, changes, markdown, run_study


def scores(value, error=0.01):
    return {"accuracy": value / 2, "accuracy_stderr": error, "acc_norm": value, "acc_norm_stderr": error}


def found(one, other):
    return {
        "tasks": {"one": scores(one), "other": scores(other)},
        "groups": {"all": scores(one)},
        "mean": scores((one + other) / 2, 0.02),
    }


RESULTS = {"before": found(0.4, 0.5), "after": [found(0.6, 0.5), found(0.64, 0.52), found(0.62, 0.48)]}


def test_changes_average_the_seeds_and_add_their_scatter_to_the_items():
    one, other, mean = changes(RESULTS, "acc_norm")
    assert (one.name, other.name, mean.name) == ("one", "other", "mean of the tasks")
    assert one.after == pytest.approx(0.62)
    assert one.difference == pytest.approx(0.22)
    assert one.after_error == pytest.approx(math.sqrt(0.01**2 + 0.02**2 / 3))
    assert one.error == pytest.approx(math.hypot(0.01, one.after_error))
    assert other.difference == pytest.approx(0.0)
    assert mean.before == pytest.approx(0.45)
    assert [c.name for c in changes(RESULTS, "accuracy", "groups")] == ["all", "mean of the tasks"]


def test_one_seed_has_the_scatter_of_the_items_only():
    one, *_ = changes({"before": RESULTS["before"], "after": RESULTS["after"][:1]}, "acc_norm")
    assert one.after_error == pytest.approx(0.01)


def test_only_large_differences_are_bold():
    lines = markdown(changes(RESULTS, "acc_norm"), 3).splitlines()
    assert lines[0] == "| | before | after (mean of 3 seeds) | difference |"
    assert lines[2] == "| one | 40.0 ± 1.0 | 62.0 ± 1.5 | **+22.0 ± 1.8** |"
    assert lines[3].endswith("| +0.0 ± 1.8 |")


@pytest.fixture
def commands(monkeypatch):
    """Runs that only write what a run would leave."""
    seen = []

    def run(command, log):
        options = dict(part.removeprefix("--").split("=", 1) for part in command if "=" in part)
        seen.append((command[3], options))
        name = options["trainer.logger.init_args.name"]
        folder = log.parent / "study" / name / "version_0"
        (folder / "adapters" / "last").mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps({"run": name}))

    monkeypatch.setattr(evidence, "_run", run)
    monkeypatch.setattr(evidence, "held_out_losses", lambda run: [3.0, 2.0])
    return seen


STUDY = Study("study", "some.yaml", {"data.path": "train"}, {"data.path": "test"})


def test_a_study_tests_trains_and_tests_again(commands, tmp_path):
    results = run_study(STUDY, tmp_path, [3, 4], jobs=1)
    assert results["before"] == {"run": "frozen"}
    assert results["after"] == [{"run": "seed_3_test"}, {"run": "seed_4_test"}]
    assert results["losses"] == [[3.0, 2.0]] * 2
    by_name = {options["trainer.logger.init_args.name"]: (what, options) for what, options in commands}
    assert by_name["seed_3"][0] == "fit"
    assert by_name["seed_3"][1]["data.path"] == "train"
    assert by_name["seed_3"][1]["seed_everything"] == "3"
    what, options = by_name["seed_4_test"]
    assert (what, options["data.path"]) == ("test", "test")
    assert options["model.adapter_path"] == str(tmp_path / "study/seed_4/version_0/adapters/last")
    count = len(commands)
    assert run_study(STUDY, tmp_path, [3, 4], jobs=1) == results
    assert len(commands) == count  # nothing is run twice


def test_a_failing_run_is_named_with_its_log(tmp_path):
    with pytest.raises(ConfigError, match=r"status 3; see .*x\.log"):
        evidence._run([sys.executable, "-c", "import sys; print('why'); sys.exit(3)"], tmp_path / "x.log")
    assert (tmp_path / "x.log").read_text() == "why\n"
