"""Mistakes in the arguments of plain commands."""

from pathlib import Path

import pytest

from moka_pl.cli.main import main, parse_function
from moka_pl.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("export DIR --to onnx", "to must be merged, lora, gguf or mlx, not 'onnx'"),
        ("export DIR --to lora --rank two", "rank must be a whole number, not 'two'"),
        ("export DIR --to lora --energy nan", "energy must be a number, not nan"),
        ("generate DIR hi --temperature warm", "temperature must be a number, not 'warm'"),
        ("export DIR --to gguf --gguf_type q4", "gguf_type must be lora, f32, f16 or q8_0, not 'q4'"),
        ("generate DIR hi --do_sample x", "do_sample must be true or false, not 'x'"),
        ("generate DIR hi --batch_sise 4", "--batch_sise is no option; did you mean --batch_size?"),
        (
            "generate ~no_such/x hi",
            "adapter ~no_such/x: there is no user no_such; correct the path",
        ),
        ("generate DIR hi --seed", "--seed needs a value"),
        ("generate DIR hi --sede", "--sede is no option; did you mean --seed?"),
        ("inspect", "the following arguments are required: adapter"),
        ("generate", "the following arguments are required: adapter"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    command = arguments.split()[0]
    hint = "" if "correct the path" in told else f" (all options: moka_pl {command} --help)"
    assert capsys.readouterr().err == f"moka_pl: error: {told}{hint}\n"


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "DIR", "--colour", "red"])
    error = capsys.readouterr().err
    assert "--colour" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "merge"),
    [
        (["--merge", "true"], True),
        (["--merge", "FALSE"], False),
        (["--merge=true"], True),
        (["--merge=False"], False),
        (["--no_merge"], False),
        (["--merge"], True),
    ],
)
def test_a_flag_may_have_a_value_which_is_no_prompt(words: list[str], *, merge: bool) -> None:
    for arguments in (["DIR", "hi", *words], ["DIR", *words, "hi"], [*words, "DIR", "hi"]):
        parsed = parse_function("generate", arguments)
        assert (parsed["merge"], parsed["prompt"]) == (merge, ["hi"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "DIR", "hi", "--merge=perhaps"], "--merge must be true or false, not 'perhaps'"),
        (["export", "DIR", "--to", "lora", "--out", ""], "out is empty; give a path"),
        (["export", "DIR", "--to", "lora", "--out="], "out is empty; give a path"),
        (["export", "", "--to", "lora"], "adapter is empty; give a path"),
    ],
)
def test_flags_and_paths_are_checked(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_function(arguments[0], arguments[1:])
    assert parse_function("export", [".", "--to", "lora", "--out", "."])["out"] == Path()
