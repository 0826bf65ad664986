# ruff: noqa: E501  # the messages are as long as jsonargparse makes them
"""Messages of jsonargparse in the words of this package."""

import pytest

from moka_pl.cli.main import main
from moka_pl.cli.parsing.messages import told

UNION = (
    "Does not validate against any of the Union subtypes\n  Subtypes: [{subtypes}]\n  Errors:\n{errors}"
    "\n  Given value type: <class 'str'>\n  Given value: {value}"
)


def union(value, *errors, subtypes="<class 'int'>, <class 'NoneType'>"):
    return UNION.format(subtypes=subtypes, value=value, errors="\n".join(f"    - {one}" for one in errors))


LITERAL = "Expected a typing.Literal['chat', 'alpaca']"
PATH = "\n- Expected a path but adamw either not accessible or invalid\n- "


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            'Parser key "trainer.max_epochs":\n'
            + union("1e3", "Expected a <class 'int'>", "Expected a <class 'NoneType'>"),
            "trainer.max_epochs must be a whole number or null, not 1e3",
        ),
        (
            union(
                "Namespace(class_path='lightning.pytorch.loggers.WandbLogger')",
                "Problem with given class_path 'lightning.pytorch.loggers.WandbLogger':\n  Requirement "
                "'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`",
                "Expected a <class 'bool'>",
            ),
            "lightning.pytorch.loggers.WandbLogger needs wandb>=0.12.10: pip install 'wandb>=0.12.10'",
        ),
        (
            'Parser key "data":\nProblem with given class_path \'moka_pl.Nothing\':\n  Parser key "path":\n  '
            "Expected a <class 'str'>\n  - Not of type Path: expected str, bytes or os.PathLike object, not list",
            "data.path must be one path or name, not a list",
        ),
        (
            'Parser key "data":\n'
            + union(
                "NestedArg(key='prompt', val='chatt')",
                "Problem with given class_path 'moka_pl.Nothing':\n Parser key \"prompt\":\n"
                + union("chatt", LITERAL, "Expected a <class 'NoneType'>"),
                "Expected a <class 'NoneType'>",
            ),
            "data.prompt must be chat, alpaca or null, not 'chatt'",
        ),
        (
            'Parser key "model.gradient_checkpointing":\n'
            + union("maybe", "Expected a <class 'bool'>", "Expected a typing.Literal['offload']"),
            "model.gradient_checkpointing must be true, false or offload, not 'maybe'",
        ),
        (
            'Parser key "model.adapter":\n Problem with given class_path \'moka_pl.MokaConfig\':\n Parser key "filters":\n'
            + union("[[1.5]]", "Expected a <class 'str'>", "Expected a <class 'int'>. Got value: 1.5"),
            "model.adapter.filters: 1.5 in [[1.5]] must be a whole number",
        ),
        (
            'Parser key "lr":\n' + union("true", "Expected a <class 'float'>. Got value: True"),
            "lr must be a number, not 'true'",
        ),
        (
            'Parser key "trainer.logger":\n'
            + union("foo", "Expected a dot import path string: foo", "Expected a <class 'bool'>"),
            "trainer.logger must be a class path, true or false, not 'foo'",
        ),
        (
            'Parser key "data":\n'
            + union("Foo", "Expected a dot import path string: Foo", "Expected a <class 'NoneType'>"),
            "data: 'Foo' names no class; give its path, such as package.module.Class",
        ),
        (
            'Parser key "data":\n'
            + union(
                "moka_pl.DigitsData",
                "Import path does not correspond to a subclass of MokaDataModule",
                "Expected a <class 'NoneType'>",
            ),
            "data: moka_pl.DigitsData is no MokaDataModule; name a class of that kind",
        ),
        (
            f'Parser key "model.optimizer":\n{PATH}Expected a dot import path string: adamw',
            "model.optimizer: 'adamw' names no class; give its path, such as package.module.Class",
        ),
        (
            'Parser key "model.optimizer": Type typing.Callable[[collections.abc.Iterable], torch.optim.optimizer.'
            "Optimizer] expects a function or a callable class: Parser key \"betas\":\n  Expected a <class 'tuple'>. "
            "Got value: 3. Got value: Namespace(class_path='torch.optim.AdamW', init_args=Namespace(betas='3'))",
            "model.optimizer.betas must be a list, not 3",
        ),
        (
            "Parser key \"model.adapter\":\n Not a valid subclass of AdapterConfig. Got value: ['a', 5]\n "
            "Subclass types expect one of:\n - a class path (str)\n - a dict with class_path entry",
            "model.adapter must be a class path, or a mapping with class_path and init_args",
        ),
        (
            "Parser key \"trainer.callbacks\":\n Problem with given class_path 'x.EarlyStopping':\n "
            "the following arguments are required: monitor",
            "trainer.callbacks: x.EarlyStopping needs monitor",
        ),
        (
            'Parser key "model.backbone":\nUnable to load config \'tiny\'\n- Parser key "model.backbone": Unable',
            "model.backbone must be a mapping of options, not 'tiny'",
        ),
        ("Key must be a string, got: None.", "a key of the configuration is None; keys are texts"),
        ("argument -c/--config: expected one argument", "--config needs a value"),
        ("the following arguments are required: fit.data", "no data are named; give --config"),
        ("something else\n altogether", "something else altogether"),
    ],
)
def test_a_message_names_option_value_and_kind(message, expected):
    assert told(message).startswith(expected)
    assert "\n" not in told(message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "unrecognized arguments: --trainer.max_step=3 x",
            "--trainer.max_step is no option; did you mean --trainer.max_steps?",
        ),
        ("unrecognized arguments: --fooo 3", "--fooo is no option"),
        ("Option 'componens' is not accepted", "componens is no option"),
        ("unrecognized arguments: word", "unrecognized arguments: word"),
        (
            "Subcommand 'fit' does not accept option 'modle.name'",
            "modle.name is no option; did you mean model.name?",
        ),
        (
            "Parser key \"model.adapter\":\n Problem with given class_path 'moka_pl.MokaConfig':\n Option 'componens' is not accepted",
            "model.adapter.componens is no option of moka_pl.MokaConfig; did you mean components?",
        ),
        (
            "Parser key \"model.optimizer\":\n module 'torch.optim' has no attribute 'Adamw'. Got value: torch.optim.Adamw",
            "model.optimizer: torch.optim has no Adamw; did you mean AdamW?",
        ),
    ],
)
def test_what_is_meant_is_named_where_something_is_near(message, expected):
    assert told(message, ["trainer.max_steps", "model.name"]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "moka_pl: error: no data are named; give --config"),
        (["plan", "--jsn"], "moka_pl plan: error: --jsn is no option; did you mean --json?"),
        (
            ["plan", "--config", "smollm2", "--tokens_per_second", "x"],
            "moka_pl plan: error: tokens_per_second must be a number",
        ),
        (
            ["fit", "--config", "smollm2", "--data.init_args.weights", "x"],
            "moka_pl fit: error: data.weights must be a list or null, not 'x'",
        ),
    ],
)
def test_commands_use_these_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_the_usage_of_a_command_is_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    usage, empty, *_ = capsys.readouterr().out.splitlines()
    assert usage == "usage: moka_pl plan [--config NAME_OR_FILE] [OPTION VALUE ...]"
    assert not empty
