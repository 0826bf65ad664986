from dataclasses import replace
from pathlib import Path

import pytest

from moka_pl.evaluation.results import Share
from moka_pl.studies.compare.across import families
from moka_pl.studies.compare.across.write import write_across
from moka_pl.studies.compare.report import Entry, Report, Row
from moka_pl.studies.compare.statistics import Comparison, Difference, Forgotten
from moka_pl.studies.compare.suite import read_suite

FOLDER = Path(__file__).parents[4] / "scripts" / "suites"


def row(name, parameters, accuracy, nll, rank=None, edge=False):
    outcome = {"trained": {"device": "this", "lora_rank": rank}}
    entry = Entry(name, 0.1 if parameters else None, edge, (), {0: outcome}, {}, {}, ())
    mean = None if accuracy is None else Share(accuracy, 0.01)
    return Row(entry, parameters, {}, mean, Share(nll, 0.02), [], [], None, None)


@pytest.fixture
def reports():
    suite = replace(read_suite(FOLDER / "servable-smollm2.yaml"), seeds=(0,))
    nll = Difference(0.03, 0.01, 0.05, 0.01)
    found = []
    for name, answered in (("questions", True), ("texts", False)):
        rows = [
            row("frozen base", 0, 0.3 if answered else None, 5.0),
            row("servable 16", 1000, 0.5 if answered else None, 2.5, rank=16),
            row("LoRA r1", 1000, 0.4 if answered else None, 2.53, rank=1, edge=True),
            row("LoRA r16", 16000, 0.5 if answered else None, 2.4, rank=16),
        ]
        accuracy = Difference(-0.1, -0.2, 0.05, 0.1) if answered else None
        pairs = [Comparison("LoRA r1", "servable 16", (0,), accuracy, nll, 1, 2, 0.5)]
        found.append(Report(replace(suite, name=name, family=f"the {name}"), rows, pairs))
    return found


def test_sizes_end_names():
    names = [
        "LoRA r16",
        "servable 16",
        "servable 16 x4",
        "LoKr r4, unquantised base",
        "servable 16, left zero",
    ]
    told = [(families.series_of(name), families.size_of(name)) for name in names]
    assert told == [
        ("LoRA", "r16"),
        ("servable 16", ""),
        ("servable 16", "x4"),
        ("LoKr, unquantised base", "r4"),
        ("servable 16, left zero", ""),
    ]


def test_what_the_reference_gains_is_told_by_family(reports):
    text = families.markdown(reports)
    questions, texts = text.split("## the ")[1:]
    gain = "**-0.0300** (-0.0500 to -0.0100)"  # the reference minus the other: better
    assert (
        f"| LoRA r1 \\* | 1,000 | 1 | 40.0 ± 1.0 | +10.00 (-5.00 to +20.00) | 2.530 ± 0.020 | {gain} |"
        in questions
    )
    assert f"| LoRA r1 \\* | 1,000 | 1 |  |  | 2.530 ± 0.020 | {gain} |" in texts
    assert "| servable 16 | 1,000 | 16 | 50.0 ± 1.0 |  | 2.500 ± 0.020 |  |" in questions
    assert "frozen" not in text
    assert "plain text |" not in text


def test_missing_seeds_are_told(reports):
    report = replace(reports[0], suite=replace(reports[0].suite, seeds=(0, 1, 2)))
    assert "| LoRA r1 (1 of 3 seeds) \\* | 1,000 |" in families.markdown([report])
    assert families.as_json([report])["scores"][0]["seeds"] == [0]


def test_what_is_forgotten_is_told_beside(reports):
    first, rows = reports[0], reports[0].rows
    share = Share(3.0, 0.01)
    rows[1] = replace(rows[1], forgotten=Forgotten(share, share, Share(0.25, 0.0123), None))
    lines = families.markdown([first]).splitlines()
    assert any(line.endswith("| NLL | servable 16 minus it | plain text |") for line in lines)
    assert any(line.startswith("| servable 16 |") and line.endswith("| +0.250 ± 0.012 |") for line in lines)
    assert families.as_json([first])["scores"][0]["forgotten"]["difference"]["value"] == 0.25


def test_the_files_are_those_of_suites_with_a_family(reports, tmp_path):
    assert (
        write_across([replace(one, suite=replace(one.suite, family="")) for one in reports], tmp_path) == []
    )
    files = write_across(reports, tmp_path)
    assert [file.name for file in files] == ["families.md", "families.json", "families.png"]
    assert all(file.stat().st_size > 500 for file in files)


def test_methods_with_as_many_parameters_are_beside_each_other(reports):
    places = families._places(families.shown_rows(reports[0]))
    assert places["servable 16"] == 1000
    assert places["LoRA r1"] == pytest.approx(1035)
    assert places["LoRA r16"] == 16000
