import json
from dataclasses import asdict
from pathlib import Path

import pytest
from shared.counts import factor_entries

from moka_pl.errors import ConfigError
from moka_pl.studies.compare import build
from moka_pl.studies.compare.build import build_data, build_module, check_suite
from moka_pl.studies.compare.runs import frozen_run, run_of
from moka_pl.studies.compare.suite import Suite, find_suite, keep_methods, merged, names_data, read_suite
from moka_pl.training.learning_rates import LearningRateRatios

FOLDER = Path(__file__).parents[3] / "scripts" / "suites"
SUITES = sorted(FOLDER.glob("*.yaml"))
_OPTIONS = ("max_steps=3", "limit_test_batches=2")
SMALL = """data: {class_path: moka_pl.data.CommonsenseData}
learning_rates: [1.0e-2]
methods: [{name: a}, {name: b}]
"""
SEPARATE = SMALL.replace("}", ", init_args: {path: sample, separate_test: true}}", 1)


def written(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_there_are_some():
    names = {file.stem for file in SUITES}
    assert {"commonsense-smollm2", "components", "one-layer", "rank-one-task", "tiny"} <= names


@pytest.fixture(scope="module")
def build_once():
    """Builds a module once for all suites that have it."""
    built = {}

    def build(run):
        training = {**run.settings["training"], "trainer": None}  # no part of the module, as the data
        key = json.dumps(
            {**run.settings, "training": training, "data": None, "rate": run.rate}, sort_keys=True
        )
        if key not in built:
            built[key] = build_module(run)
        return built[key]

    return build


@pytest.mark.parametrize("file", SUITES, ids=lambda file: file.stem)
def test_every_suite_builds_what_it_compares(file, build_once, monkeypatch):
    monkeypatch.setattr(build, "build_module", build_once)
    suite = read_suite(file)
    check_suite(suite)
    assert suite.name == file.stem
    data = build_data(suite.data)
    assert data.separate_test  # the rate is not picked on the test
    for method in suite.methods:
        module = build_once(run_of(suite, method, method.learning_rates[0], 0))
        for name, value in method.adapter.get("init_args", method.adapter).items():
            if name == "components":
                assert module.adapter.components == value
        if "class_path" in method.adapter:
            assert method.adapter["class_path"].endswith(type(module.adapter).__name__)
        assert module.backbone.name == method.backbone.get("name", suite.backbone["name"])


def test_the_budgets_of_components_are_alike():
    suite = read_suite(FOLDER / "components.yaml")
    layers = [(576, 576), (192, 576)]
    wanted = factor_entries(layers, "diverse", 20)
    methods = [method for method in suite.methods if "budget" in method.name]
    assert len(methods) == 4
    for method in methods:
        count = factor_entries(layers, method.adapter["filters"], method.adapter["components"])
        assert count == pytest.approx(wanted, rel=0.05)


def test_the_variants_that_are_to_beat_moka_have_its_size():
    layers = [(576, 576), (192, 576)]
    wanted = factor_entries(layers, "diverse", 10)
    for method in read_suite(FOLDER / "beat-smollm2.yaml").methods:
        filters = method.adapter.get("filters", "diverse")
        if "class_path" not in method.adapter and filters != "auto":
            assert factor_entries(layers, filters, 10) == pytest.approx(wanted, rel=0.06)


def test_suites_that_extend_another_share_its_runs():
    one = read_suite(FOLDER / "commonsense-smollm2.yaml")
    mine = {method.name: run_of(one, method, 0.01, 0).key for method in one.methods}
    for name in ("gates", "beat-smollm2"):
        other = read_suite(FOLDER / f"{name}.yaml")
        shared = {r.name: run_of(other, r, 0.01, 0).key for r in other.methods if r.name in mine}
        assert len(shared) >= 2
        assert shared.items() <= mine.items()
        assert frozen_run(other).key == frozen_run(one).key
        rates = {method.name: method.learning_rates for method in one.methods}
        assert all(r.learning_rates == rates[r.name] for r in other.methods if r.name in mine)


def test_a_suite_extends_another(tmp_path):
    (tmp_path / "base.yaml").write_text(SMALL + "reference: a\nabout: old\nseeds: [4]\n", encoding="utf-8")
    text = """extends: base
data: {init_args: {batch_size: 3}}
learning_rates: [0.5]
methods: [b, {name: c, learning_rate_ratios: {right: 4.0}}]
"""
    suite = read_suite(written(tmp_path, text))
    assert (suite.name, suite.about, suite.reference, suite.seeds) == ("mine", "", None, (4,))
    assert suite.data == {"class_path": "moka_pl.data.CommonsenseData", "init_args": {"batch_size": 3}}
    assert [(method.name, method.learning_rates) for method in suite.methods] == [
        ("b", (0.01,)),
        ("c", (0.5,)),
    ]
    assert run_of(suite, suite.methods[1], 0.5, 4).settings["learning_rate_ratios"] == {"right": 4.0}
    whole = read_suite(written(tmp_path, "extends: base\nseeds: [5]\n"))
    assert ([method.name for method in whole.methods], whole.reference) == (["a", "b"], "a")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("extends: base\nmethods: [z]\n", "no method 'z'"),
        ("extends: nowhere\n", "nowhere"),
        ("extends: mine\n", "extends it again"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path, text, named):
    (tmp_path / "base.yaml").write_text(SMALL, encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        read_suite(written(tmp_path, text))


def test_data_are_found_under_the_name_of_the_corpus(tmp_path):
    file = written(tmp_path, SMALL + "corpus: some/where\n")
    (tmp_path / "root" / "some" / "where").mkdir(parents=True)
    paths = [read_suite(file, (), str(tmp_path / name)).data["init_args"]["path"] for name in ("root", "x")]
    assert paths == [str(tmp_path / "root" / "some" / "where"), str(tmp_path / "x")]


def test_paths_may_lie_in_the_folder_of_the_data(tmp_path):
    text = SMALL.replace("}", ", init_args: {path: [$DATA/some/where, other]}}", 1) + "corpus: nowhere\n"
    text += "forgetting: {class_path: moka_pl.data.TextData, init_args: {path: $DATA/text.txt}}\n"
    file = written(tmp_path, text)
    assert names_data(read_suite(file).data)
    suite = read_suite(file, (), str(tmp_path))
    assert suite.data["init_args"]["path"] == [str(tmp_path / "some" / "where"), "other"]
    assert suite.forgetting["init_args"] == {"path": str(tmp_path / "text.txt")}
    assert not names_data([suite.data, suite.forgetting])


def test_what_a_test_does_beside_is_part_of_its_hash_alone(tmp_path):
    suite = read_suite(written(tmp_path, SMALL))
    other = read_suite(written(tmp_path, SMALL + "generate: {max_new_tokens: 4, tasks: [t]}\n"))
    one, two = (run_of(s, s.methods[0], 0.01, 0) for s in (suite, other))
    assert one.key == two.key
    assert one.test_key != two.test_key
    assert (suite.score_name, other.score_name) == ("acc_norm", "right answers")
    with pytest.raises(ConfigError, match="names 2 sets, but the test has 1"):
        check_suite(
            read_suite(written(tmp_path, SEPARATE + "generate: {max_new_tokens: 4, tasks: [t, u]}\n"))
        )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("generate: {max_new_tokens: 0}", "max_new_tokens must be a whole number from 1, not 0"),
        ("generate: {max_new_tokens: 4, tasks: t}", "tasks must be a list of names, not 't'"),
        ("generate: {temperature: 1.0}", "unknown key generate.temperature"),
        ("forgetting: {path: text.txt}", "forgetting must name a data module"),
    ],
)
def test_what_cannot_be_generated_or_forgotten_is_refused(tmp_path, text, named):
    with pytest.raises(ConfigError, match=named):
        read_suite(written(tmp_path, f"{SMALL}{text}\n"))


@pytest.mark.parametrize("name", ["commonsense-smollm2", "servable-reasoning"])
def test_a_suite_can_be_stored_and_read_back(name):
    suite = read_suite(FOLDER / f"{name}.yaml")
    assert Suite.from_dict(json.loads(json.dumps(asdict(suite)))) == suite


def test_the_budgets_of_one_layer_are_those_of_lora():
    for r in (1, 2, 4, 8, 16):
        assert factor_entries([(576, 576)], "diverse", r) == 2 * 576 * r


def test_a_suite_of_ones_own_with_options_over_it(tmp_path):
    file = written(tmp_path, SMALL)
    assert find_suite(str(file), FOLDER) == file
    assert find_suite("tiny", FOLDER) == FOLDER / "tiny.yaml"
    suite = read_suite(file, ["training.trainer.max_steps=3", "seeds=[4]", "reference=a"])
    (suite,) = keep_methods([suite], ["b"])
    assert suite.training == {"trainer": {"max_steps": 3}}
    assert suite.seeds == (4,)
    assert [method.name for method in suite.methods] == ["b"]
    assert suite.reference is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (SMALL + "sweeds: [0]\n", "sweeds"),
        (SMALL.replace("1.0e-2", "1e-2"), "1e-2"),
        (SMALL.replace("name: b", "name: a"), "'a'"),
        (SMALL + "seeds: [0, 0]\n", "twice"),
        (SMALL + "pick: test\n", "'test'"),
        (SMALL + "widen: -1\n", "widen must be a whole number from 0, not -1"),
        (SMALL + "reference: c\n", "'c'"),
        (SMALL + "name: a/b\n", "slashes"),
        (SMALL.replace("[1.0e-2]", "1.0e-2"), r"such as \[4.0e-3"),
        (SMALL.replace("{name: a}", "a: {}"), r"methods\[0\] must be a mapping with a name"),
        ("methods: [{name: a}]\n", "class_path"),
        ("[", "YAML"),
    ],
)
def test_wrong_suites_are_refused(tmp_path, text, named):
    file = written(tmp_path, text)
    with pytest.raises(ConfigError, match=named) as error:
        read_suite(file)
    assert str(file) in str(error.value)


def test_unknown_suites_methods_and_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="tiny"):
        find_suite("none", FOLDER)
    file = written(tmp_path, SMALL)
    with pytest.raises(ConfigError, match="unknown method 'c'"):
        keep_methods([read_suite(file)], ["c"])
    with pytest.raises(ConfigError, match="key=value"):
        read_suite(file, ["seeds"])


def test_a_suite_from_elsewhere_extends_a_known_one(tmp_path):
    file = written(tmp_path, "extends: tiny\nmethods: [MoKA]\nreference: MoKA\n")
    suite = read_suite(file, known=FOLDER)
    assert [method.name for method in suite.methods] == ["MoKA"]
    assert suite.backbone == read_suite(FOLDER / "tiny.yaml").backbone
    with pytest.raises(ConfigError, match=r"extends none: .*components, .*tiny"):
        read_suite(written(tmp_path, "extends: none\n"), known=FOLDER)


def test_merged_shares_nothing():
    below, above = {"a": {"b": [1], "c": 2}}, {"a": {"c": [3]}}
    both = merged(below, above)
    assert both == {"a": {"b": [1], "c": [3]}}
    changed = merged({"d": {"class_path": "x", "e": 1}}, {"d": {"class_path": "y"}})
    assert changed == {"d": {"class_path": "y"}}  # the options of one class are not another's
    both["a"]["b"].append(2)
    both["a"]["c"].append(2)
    assert (below["a"]["b"], above["a"]["c"]) == ([1], [3])


def test_runs_are_told_apart_by_their_settings_not_their_names(tmp_path):
    one = read_suite(written(tmp_path, SMALL))
    a, b = one.methods
    run = run_of(one, a, 0.01, 0)
    assert run.key == run_of(one, b, 0.01, 0).key  # the same adapter under another name
    others = [run_of(one, a, 0.02, 0), run_of(one, a, 0.01, 1)]
    changes = ("backbone.name=x", "training.trainer.max_steps=1", "data.init_args.path=p")
    others += [run_of(read_suite(written(tmp_path, SMALL), [change]), a, 0.01, 0) for change in changes]
    assert len({run.key, *(other.key for other in others)}) == 6
    # The frozen base heeds what concerns its test only.
    more = [frozen_run(read_suite(written(tmp_path, SMALL), [f"training.trainer.{x}"])) for x in _OPTIONS]
    assert [frozen.settings["training"] for frozen in more] == [{}, {"trainer": {"limit_test_batches": 2}}]
    tested = read_suite(written(tmp_path, SMALL), ["test={class_path: x}"])
    assert run_of(tested, a, 0.01, 0).key == run.key  # other tests need no other training
    assert run_of(tested, a, 0.01, 0).test_key != run.test_key


def test_a_method_may_have_rates_for_its_parts(tmp_path):
    text = SMALL.replace("{name: a}", "{name: a, learning_rate_ratios: {right: 4}}")
    a, b = read_suite(written(tmp_path, text)).methods
    suite = read_suite(written(tmp_path, text))
    with_ratios, without = (run_of(suite, method, 0.01, 0) for method in (a, b))
    assert build_module(with_ratios).learning_rate_ratios == LearningRateRatios(right=4)
    assert build_module(without).learning_rate_ratios == LearningRateRatios()
    assert with_ratios.key != without.key
    assert "learning_rate_ratios" not in without.settings  # its hash is what it was before there were any


@pytest.mark.parametrize(
    ("ratios", "named"),
    [("{right: -1}", r"method a: .*right.*-1"), ("{rihgt: 2}", "rihgt"), ("4", "must be a mapping")],
)
def test_wrong_ratios_of_a_method_are_refused_before_any_run(tmp_path, ratios, named):
    text = SMALL.replace("{name: a}", f"{{name: a, learning_rate_ratios: {ratios}}}")
    with pytest.raises(ConfigError, match=named):
        check_suite(read_suite(written(tmp_path, text)))


def test_ratios_of_a_method_of_another_kind_are_refused_before_any_run(tmp_path):
    method = "{name: a, learning_rate_ratios: {right: 2}, adapter: {class_path: peft.LoraConfig}}"
    with pytest.raises(ConfigError, match=r"method a: .*not to LoraConfig"):
        check_suite(read_suite(written(tmp_path, SMALL.replace("{name: a}", method))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\n" + SMALL + "about: *c", "no complete value before"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 9)),
            "values",
        ),
        (SMALL + "methods: []", "key 'methods' stands in line 3 already"),
        ("data: " + "x" * (5 << 20), "are too many for a configuration"),
    ],
)
def test_a_hostile_suite(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read_suite(written(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_suite_names_classes_of_installed_packages_only(tmp_path, monkeypatch):
    monkeypatch.delenv("MOKA_PL_TRUST_CONFIG", raising=False)
    shell = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path}/called"}}
    with pytest.raises(ConfigError, match="may not name what belongs to Python"):
        build_data(shell)
    suite = read_suite(written(tmp_path, SMALL), [f"training.optimizer={json.dumps(shell)}"])
    with pytest.raises(ConfigError, match="may not name what belongs to Python"):
        build_module(run_of(suite, suite.methods[0], 0.01, 0))
    assert not (tmp_path / "called").exists()
