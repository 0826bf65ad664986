"""The section on several GPUs, from results."""

import json

import pytest

from moka_pl.studies.ranks.cases import Case
from moka_pl.studies.ranks.page import BEGIN, END, logging_share, main


def measured(case: Case, speed: float, **more):
    values = {"device": "H", "tokens_per_second": speed, "peak_gib": 5.0, "first_step_seconds": 20.0}
    values |= {"checkpoint_mb": 63.2, "checkpoint_seconds": 0.36, "begun_at": 0, "ended_at": 9}
    return case.as_dict() | values | {"losses": [11.0, 5.0]} | more


def test_rows_become_a_table_and_a_sentence(tmp_path):
    before = measured(Case(), 1.0)
    rows = [
        measured(Case(devices=1), 90.0),
        measured(Case(devices=1), 100.0),  # measured again
        measured(Case(devices=2), 190.0),
        Case(devices=4).as_dict() | {"error": "status 1"},
        measured(Case(strategy="sharded", devices=2), 171.0, peak_gib=3.0),
        measured(Case(devices=2, resumes=("sharded", 4)), 1.0, losses=[5.01, 4.0], begun_at=9, before=before),
        measured(Case(shape="llama2-70b"), 7.0, device="J"),
    ]
    file, page = tmp_path / "rows.json", tmp_path / "page.md"
    file.write_text(json.dumps({"versions": {"torch": "2.11"}, "rows": rows}))
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main([str(file), "--page", str(page)])
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "| llama2-7b | ddp | 2 | 8 | 190 | 1.90 | 5.00 |  | 20.0 | 63.2 | 0.36 |" in text
    assert "| llama2-7b | sharded | 2 | 8 | 171 |  | 3.00 | 0.90, 0.60 | 20.0 | 63.2 | 0.36 |" in text
    assert "status 1" not in text
    first, second = text.split("On J:\n")
    assert "On H:\n" in first
    assert "llama2-70b" not in first
    assert "llama2-7b" not in second
    assert "stopped after step 9, went on there (from step 9 to 9)" in text
    assert "11.000 at first, 5.000 before and 5.010 after" in text


def test_results_without_a_training_that_succeeded_are_refused(tmp_path, capsys):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"versions": {}, "rows": [{**Case().as_dict(), "error": "x"}]}))
    with pytest.raises(SystemExit):
        main([str(file), "--page", str(file)])
    assert "no training succeeded" in capsys.readouterr().err


def test_what_a_log_costs_a_step():
    case = Case(cuda_graphs=True, warmup=3, blocks=2)
    # First steps and the one behind the last block do not count.
    after_log = [True] * 3 + [True, False, False, False, False] * 2 + [True]
    whole = [900.0] * 3 + [101.0, 100.0, 100.0, 100.0, 100.0] * 2 + [900.0]
    steps = {"after_log": after_log, "gpu_ms": {"forward": whole, "backward": [0.0] * len(whole)}}
    assert logging_share(measured(case, 1.0, steps=[steps])) == pytest.approx(0.01)
    assert logging_share(measured(case, 1.0)) is None
    assert logging_share(measured(case, 1.0, steps=[{"after_log": after_log, "gpu_ms": None}])) is None


def test_files_of_something_else_are_refused(tmp_path, capsys):
    file = tmp_path / "rows.json"
    for contents, message in (
        ("{", f"{file} is not JSON"),
        ('{"a": 1}', f"{file} has no trainings; write it with"),
        ('{"versions": {}, "rows": [{"device": 1}]}', "a training lacks what the page says of it"),
    ):
        file.write_text(contents)
        with pytest.raises(SystemExit):
            main([str(file), "--page", str(file)])
        assert f"ranks_page: error: {file}" in (told := capsys.readouterr().err)
        assert message in told
        assert file.read_text() == contents
