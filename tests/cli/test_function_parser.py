"""Mistakes in the arguments of plain commands."""

import pytest

from moka_pl.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("export DIR --to onnx", "to is 'onnx'; choose one of merged, lora, gguf, mlx"),
        ("export DIR --to lora --rank two", "rank is 'two'; give a whole number"),
        ("export DIR --to lora --energy nan", "energy is 'nan'; give a number"),
        ("generate DIR hi --temperature warm", "temperature is 'warm'; give a number"),
        ("inspect", "the following arguments are required: adapter"),
        ("generate", "the following arguments are required: adapter"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    command = arguments.split()[0]
    assert capsys.readouterr().err == f"moka_pl: error: {told}; all options: moka_pl {command} --help\n"


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "DIR", "--colour", "red"])
    error = capsys.readouterr().err
    assert "--colour" in error
    assert error.count("\n") == 1
