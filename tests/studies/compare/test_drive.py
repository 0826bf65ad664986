import json
from dataclasses import asdict, replace

import pytest

from moka_pl.studies.compare import drive
from moka_pl.studies.compare.across.write import write_across
from moka_pl.studies.compare.drive import run_suites
from moka_pl.studies.compare.report import collect, make_report
from moka_pl.studies.compare.runs import Store, frozen_run, run_of
from moka_pl.studies.compare.schedule import Clock
from moka_pl.studies.compare.suite import Suite, read_suite
from moka_pl.studies.compare.tables import markdown
from moka_pl.studies.compare.write import as_json, write_report

SUITE = """
data: {class_path: moka_pl.data.CommonsenseData}
seeds: [0, 1]
reference: good
methods:
  - {name: good, learning_rates: [0.1, 0.2, 0.4], adapter: {components: 2}}
  - {name: bad, learning_rates: [0.1], adapter: {components: 3}}
"""


@pytest.fixture
def read(tmp_path):
    def read(text=SUITE, changes=(), name="mine"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        return read_suite(file, changes)

    return read


class Fake:
    """Runs that only write what a run would leave: the loss is lowest at the rate 0.2."""

    def __init__(self, store):
        self.store, self.calls, self.stop, self.fails = store, [], None, set()
        self.extra = {}

    def __call__(self, run, test):
        self.calls.append((run.method, run.rate, run.seed, test))
        if self.stop is not None and len(self.calls) > self.stop:
            raise SystemExit(1)  # what Lightning makes of Ctrl-C
        outcome = {k: v for k, v in self.store.read(run).items() if k in ("trained", "tested")}
        if (run.method, run.rate) in self.fails:
            outcome = {"error": "OutOfMemory: too much"}
            self.store.write(run, outcome)
            return outcome
        loss = abs((run.rate or 1.0) - 0.2)
        trained = {"parameters": 10 * len(run.method), "validation_loss": loss, "batches": f"of {run.seed}"}
        losses = [] if run.rate is None else [[1, 3.0], [2, 2.0]]
        trained |= {
            "seconds": 1.0,
            "losses": losses,
            "device": "this",
            "versions": {"torch": "2"},
        } | self.extra
        outcome.setdefault("trained", trained)
        if test:
            right = [1, 1, 0, 1] if run.method == "good" else [1, 0, 0, run.seed]
            score = {"acc_norm": sum(right) / 4, "acc_norm_stderr": 0.1}
            columns = {"task": ["t"] * 4, "correct": right, "correct_norm": right, "tokens": [1] * 4}
            items = columns | {"nll": [1.0, 2.0, 3.0, 4.0 + loss]}
            found = {"tasks": {"t": score}, "mean": score, "seconds": 0.5}
            outcome["tested"] = {"key": run.test_key, **found}
        self.store.write(run, outcome, items if test else None)
        return outcome


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "out")


@pytest.fixture
def fake(store, monkeypatch):
    runs = Fake(store)
    monkeypatch.setattr(drive, "_executor", lambda store: runs)
    return runs


def run_suite(suite, store):
    run_suites([suite], store)
    return collect(suite, store)


def test_rates_are_picked_with_one_seed_and_only_the_picked_one_is_tested(read, store, fake, capsys):
    entries = run_suite(read(), store)
    assert fake.calls == [
        ("frozen base", None, 0, True),
        *(("good", rate, 0, False) for rate in (0.1, 0.2, 0.4)),
        *(("good", 0.2, seed, True) for seed in (0, 1)),
        *(("bad", 0.1, seed, True) for seed in (0, 1)),
    ]
    good = entries[1]
    assert (good.rate, good.edge, sorted(good.outcomes)) == (0.2, False, [0, 1])
    assert [trial.loss for trial in good.trials] == pytest.approx([0.1, 0.0, 0.2])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[1/8] frozen base")
    assert "left" in lines[1]
    assert lines[-2].startswith("[8/8] bad, lr 0.1, seed 1")
    assert lines[-1] == "8 runs in 0 s, 1 at a time"


def test_reports_and_plans_know_the_rates_beyond(read, store, fake):
    suite = read(changes=["widen=1"])
    edge = replace(suite, methods=(replace(suite.methods[0], learning_rates=(0.05, 0.1)),))
    entry = run_suite(edge, store)[1]
    assert ([trial.rate for trial in entry.trials], entry.rate, entry.edge) == ([0.05, 0.1, 0.2], 0.2, True)
    text = markdown(make_report(edge, [entry]))
    assert "0.05: 0.1500, 0.1: 0.1000, 0.2: **0.0000**" in text
    assert "| good | 40 | 0.2 * |" in text
    stored = Suite.from_dict(json.loads(json.dumps(asdict(replace(edge, widen=2)))))
    entry = collect(stored, store)[1]  # one that may be widened further waits for its next rate
    assert entry.missing[0] == "good, lr 0.4, seed 0"
    fake.calls.clear()
    entry = run_suite(stored, store)[1]
    assert fake.calls == [("good", 0.4, 0, False)]
    assert (entry.rate, entry.edge, entry.missing) == (0.2, False, ())


def test_all_seeds_pick_where_that_is_asked_for(read, store, fake):
    run_suite(read(changes=["pick=all"]), store)
    assert [call for call in fake.calls if not call[3]] == [
        ("good", rate, seed, False) for rate in (0.1, 0.2, 0.4) for seed in (0, 1)
    ]


def test_what_is_done_is_not_done_again_and_a_change_runs_what_it_changes(read, store, fake):
    run_suite(read(), store)
    fake.calls.clear()
    run_suite(read(), store)
    assert fake.calls == []
    run_suite(read(SUITE.replace("components: 3", "components: 4").replace("bad", "other")), store)
    assert fake.calls == [("other", 0.1, seed, True) for seed in (0, 1)]
    fake.calls.clear()
    run_suite(read(changes=["seeds=[0, 1, 5]"]), store)
    assert fake.calls == [("good", 0.2, 5, True), ("bad", 0.1, 5, True)]


def test_ctrl_c_keeps_what_is_done(read, store, fake):
    fake.stop = 3
    with pytest.raises(KeyboardInterrupt):
        run_suite(read(), store)
    done = list(fake.calls[:3])
    fake.calls.clear()
    fake.stop = None
    run_suite(read(), store)
    assert not set(done) & set(fake.calls)
    assert len(fake.calls) == 5


def test_a_failed_run_is_in_the_table_and_is_tried_again(read, store, fake):
    fake.fails = {("bad", 0.1), ("good", 0.2)}
    suite = read()
    entries = run_suite(suite, store)
    assert entries[1].rate == 0.1
    assert entries[1].edge
    text = markdown(make_report(suite, entries))
    assert "| bad | failed: OutOfMemory: too much |" in text
    assert "- good, lr 0.2, seed 0: OutOfMemory: too much" in text
    assert "| good (some runs failed) | 40 | 0.1 * | 75.0 ± 10.0 |" in text
    fake.fails, fake.calls = set(), []
    assert run_suite(suite, store)[2].errors == {}
    assert ("good", 0.2, 0, False) in fake.calls


def test_a_run_that_diverged_is_not_picked(read, store, fake):
    suite = read()
    run = run_of(suite, suite.methods[0], 0.2, 0)
    store.write(run, {"trained": {"validation_loss": None, "seconds": 1.0}})
    assert run_suite(suite, store)[1].rate == 0.1


def test_a_damaged_result_is_no_result(read, store):
    suite = read()
    run = frozen_run(suite)
    store.write(run, {"trained": {}})
    assert store.read(run)
    (store.path(run) / "result.json").write_text('{"trained": {', encoding="utf-8")
    assert not store.read(run)
    assert [file.name for file in store.path(run).iterdir()] == ["result.json"]  # nothing half written


def test_other_batches_are_warned_of(read, store, fake, capsys):
    suite = read()
    run_suite(suite, store)
    run = run_of(suite, suite.methods[1], 0.1, 1)
    outcome = store.read(run)
    outcome["trained"]["batches"] = "others"
    store.write(run, outcome)
    run_suite(suite, store)
    assert "bad was trained on other batches" in capsys.readouterr().err


def test_the_report_is_written_with_figures(read, store, fake, tmp_path):
    suite = read()
    report = make_report(suite, run_suite(suite, store))
    names = {file.name for file in write_report(report, tmp_path / "report")}
    assert names == {"report.md", "report.json", "scores.png", "losses.png"}
    assert all((tmp_path / "report" / name).stat().st_size > 500 for name in names)
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found == json.loads(json.dumps(as_json(report)))
    assert found["devices"] == ["this"]
    assert found["versions"] == {"torch": ["2"]}
    (pair,) = found["differences"]
    assert (pair["one"], pair["other"], pair["seeds"]) == ("bad", "good", [0, 1])
    assert pair["acc_norm"]["value"] == pytest.approx(0.375 - 0.75)
    assert (pair["wins"], pair["losses"]) == (0, 2)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| bad | 30 | 0.1 | 37.5 ± 16.0 |" in text
    assert "| bad − good | -37.50 |" in text
    assert "| bad | 1 |  |  |" in text.partition("## Time and memory")[2]


def test_time_that_is_up_leaves_an_honest_report(read, store, fake, capsys):
    suite = read()
    # A second at least; these runs tell that they take 1.0, and tests 0.5.
    run_suites([suite], store, clock=Clock(minutes=0))
    assert f"time is up with {8 - len(fake.calls)} runs left" in capsys.readouterr().err
    report = make_report(suite, collect(suite, store))
    assert 0 < len(fake.calls) < 8
    assert "- bad, lr 0.1, seed 1" in markdown(report).partition("## Not done yet")[2].splitlines()


def test_ranks_are_set_side_by_side(read, store, fake, tmp_path):
    spectra = {
        "layers": ["l.0.q", "l.0.v"],
        "stable_rank": [2.0, 4.0],
        "entropy_rank": [3.0, 5.0],
        "norm": [1.0, 1.0],
        "kinds": {"q": {"index": [1.0, 2.0], "size": [1.0, 0.5]}},
    }
    fake.extra = {"spectra": spectra}
    suites = [read(name=name) for name in ("rank-one", "rank-two", "other")]
    run_suites(suites, store)
    reports = [make_report(suite, collect(suite, store)) for suite in suites]
    assert write_across(reports[:1], tmp_path) == []
    names = {file.name for file in write_across(reports, tmp_path / "across")}
    assert names == {"ranks.md", "ranks.json", "ranks.png"}
    text = (tmp_path / "across" / "ranks.md").read_text()
    assert "| | rank-one | rank-two |" in text
    assert "| good | 3.00, 4.00, 1.00 | 3.00, 4.00, 1.00 |" in text
