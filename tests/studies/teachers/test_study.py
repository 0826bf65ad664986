"""The study of teachers: what its tables tell is what its runs did."""

import json

import pytest

from moka_pl.studies.teachers.command import main
from moka_pl.studies.teachers.model import HARDER, TEACHERS
from moka_pl.studies.teachers.study import PAIRS, TeacherStudy, _geometric_mean, run_chosen, run_offered

KRONECKER = next(iter(TEACHERS))
SHORT = ["--seeds", "3", "--steps", "40", "--tokens", "16", "--first-tokens", "64", "--trained", "2"]


def test_a_kronecker_teacher_is_found_by_energy() -> None:
    study = TeacherStudy(rates=(1e-3, 3e-2), seeds=3, steps=60, tokens=16, first_tokens=64)
    rows, runs = run_offered(KRONECKER, "random", study)
    slow, fast = rows
    assert [row["lr"] for row in rows] == [1e-3, 3e-2]
    assert fast["found_by_energy"] == 3
    assert fast["error"] < 0.1 < slow["error"]
    assert runs.gates.shape[1] == 2 * 3
    # The rows are means over their own rate's runs.
    assert slow["error"] == pytest.approx(float(runs.error[:3].mean()))
    assert fast["error"] == pytest.approx(float(runs.error[3:].mean()))


def test_the_first_gradient_names_a_kronecker_teacher() -> None:
    study = TeacherStudy(rates=(3e-3, 1e-2), seeds=3, steps=20, tokens=16, first_tokens=128, trained=2)
    found = run_chosen(KRONECKER, False, study)
    assert found["first_is_right"] == 3
    assert found["parameters"] <= found["budget"]
    assert found["wins"].keys() == {f"{one} over {other}" for one, other in PAIRS}
    for kind, errors in found["errors"].items():
        assert len(errors) == 2
        at = study.rates.index(found["best_rate"][kind])
        means = [_geometric_mean(errors, rate) for rate in range(2)]
        assert found["error"][kind] == means[at] == min(means)


def test_geometric_mean() -> None:
    assert _geometric_mean([[1e-4, 1.0], [1e-2, 4.0]], 0) == pytest.approx(1e-3)
    assert _geometric_mean([[1e-4, 1.0], [1e-2, 4.0]], 1) == pytest.approx(2.0)


@pytest.mark.slow
def test_tables_json_and_figures(tmp_path, capsys) -> None:
    files = [tmp_path / name for name in ("all.json", "gates.png", "choices.png")]
    options = ["--json", files[0], "--figure", files[1], "--choices-figure", files[2]]
    main([*SHORT, "--rates", "1e-2", "--teachers", KRONECKER, *map(str, options)])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(f"| {KRONECKER} |")]
    assert len(rows) == 2 + 2  # two starts; white and correlated inputs
    stored = json.loads(files[0].read_text())
    assert [row["start"] for row in stored["gates"]] == ["random", "gradient"]
    assert [found["teacher"] for found in stored["choice"]] == 2 * [KRONECKER, *HARDER]
    assert f"{stored['gates'][0]['error']:.1e}" in rows[0]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files[1:])


def test_a_rate_to_show_must_be_one_that_is_tried(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--rates", "1e-2", "--shown", "3e-2"])
    assert "--shown 0.03 is not among --rates" in capsys.readouterr().err
