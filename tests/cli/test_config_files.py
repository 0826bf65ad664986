"""Configuration files that are none: one line, within bounds of time and memory."""

import pytest
import yaml

from moka_pl.cli.config_files import MAX_BYTES, MAX_VALUES, check_yaml, load_yaml, named_model, read_config
from moka_pl.errors import ConfigError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))

FILES = {
    "bomb": (BOMB, "more than 1,000 values, aliases (*name) written out"),
    "wide": ("a: [" + "1," * MAX_VALUES + "]", "more than 1,000 values"),
    "deep": ("[" * 900, "more than 40 deep"),
    "deep mapping": ("{a: " * 50 + "1" + "}" * 50, "more than 40 deep"),
    "itself": ("a: &x [*x]", "no complete value before *x is named &x"),
    "twice": ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5: key 'c' stands in line 3 already"),
    "twice inline": ("a: {b: 1, 'b': 2}", "key 'b' stands in line 1 already"),
    "digits": ("a: " + "9" * 5_000, "a number has 5,000 digits; at most"),
    "large": ("a: " + "x" * MAX_BYTES, "are too many for a configuration"),
    "empty": (" \n", "the file is empty"),
    "comment": ("# only", "a mapping of options, not NoneType"),
    "list": ("- a", "a mapping of options, not list"),
    "word": ("a word", "a mapping of options, not str"),
    "two documents": ("a: 1\n---\nb: 1", "expected a single document"),
    "tab": ("a:\n\tb: 1", "cannot start any token"),
    "nul": ("\0", "control characters are not allowed"),
    "tag": ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
    "not a number": ("a: !!int x", "a value cannot be read"),
    "not a date": ("a: !!timestamp x", "a value cannot be read"),
    "list as key": ("? [a]\n: b", "unhashable key"),
    "binary": (bytes(range(256)), "not a text in UTF-8 (byte 129)"),
    "utf-16": ("a: 1".encode("utf-16"), "not a text in UTF-8 (byte 1)"),
    "latin-1": ("a: é".encode("latin-1"), "not a text in UTF-8 (byte 4)"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_no_configuration(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        read_config(file, "--config")
    assert message in str(error.value)
    assert str(error.value).startswith(f"--config {file}")
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    for file in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config(file, "--config")


def test_what_is_allowed():
    text = "a: &a {lr: 1, b: [1, 2]}\nc:\n  <<: *a\n  lr: 2\nd: *a\n"
    check_yaml(text)
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("9") == 9
    check_yaml("﻿a: 1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed_everything=-5"], "seed_everything must be from 0 to 4294967295, not -5"),
        (["--seed_everything=99999999999"], "not 99999999999"),
        (["--seed_everything=" + "x" * 100_000], " … "),
        (["--trainer.strategy=foo"], "You selected an invalid strategy name"),
        (["--data=own.yaml"], "data: own.yaml: no such file"),
    ],
)
def test_hostile_options(build_cli, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        build_cli("fit", "--data=moka_pl.data.InstructionData", *options)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 10_000
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], None),
        (["--model.backbone.name", "--model"], None),
        (["--model", "moka_pl.VisionModule"], "moka_pl.VisionModule"),
        (["--model=VisionModule", "--data", "moka_pl.TextData"], "VisionModule"),
        (["--config", "named.yaml"], "a.B"),
        (["-c=plain.yaml"], None),
        (["--config", "named.yaml", "--model", "c.D"], "c.D"),
        (["--config", "vit_digits"], "moka_pl.VisionModule"),
    ],
)
def test_the_model_that_is_named(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named.yaml").write_text("model: {class_path: a.B, init_args: {}}")
    (tmp_path / "plain.yaml").write_text("model: {backbone: {name: tiny}}")
    assert named_model(arguments) == named
