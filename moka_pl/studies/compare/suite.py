"""What is compared, methods × learning rates × seeds, and the YAML files that say it."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from moka_pl.cli.config_files import load_yaml, read_text
from moka_pl.errors import ConfigError

Settings = dict[str, Any]
Pick = Literal["first", "all"]

#: The row without training, in tables and as the start of every method.
FROZEN = "frozen base"


@dataclass(frozen=True)
class Method:
    """One of the things that are compared.

    Attributes:
        name: Its row in the table.
        adapter: What the module's option ``adapter`` takes.
        learning_rates: Rates that are tried.
        backbone: Options of the base for this method only, over the suite's.
        learning_rate_ratios: The module's option of that name; empty for one rate.
    """

    name: str
    adapter: Settings
    learning_rates: tuple[float, ...]
    backbone: Settings = field(default_factory=dict)
    learning_rate_ratios: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A comparison.

    Attributes:
        name: Name of its folder.
        about: A sentence for the report.
        backbone: Options of the base model.
        data: Data module (``class_path``, ``init_args``): its training data train, its validation data pick
            the learning rate.
        test: Data module whose test data are reported; None takes that of ``data``.
        training: ``trainer`` (options of Lightning's trainer), ``optimizer`` and ``lr_scheduler``
            (``class_path``, ``init_args``), ``gradient_checkpointing``, ``cuda_graphs``.
        seeds: Seeds of the order of the data and the start of the adapters.
        pick: The rate is picked by the validation loss of the ``first`` seed, or by its mean over ``all``.
        frozen: Test the base without training, too.
        reference: The method that the others are compared with; None compares every pair.
        methods: What is compared.
        widen: How often a sweep whose best rate is its lowest or highest is given one more beyond.
        spectra: Whether to keep the effective ranks of every update, which can take as long as to train it.
        family: What its tasks are called beside those of other suites with about the same methods; empty
            where nothing is set beside it.
        generate: How the test's instructions are answered, where an answer is right or wrong by a rule:
            ``max_new_tokens``, and the ``tasks``, a name for each of the test's sets (default: their own).
            Empty without.
        forgetting: Data module whose test data, plain text, are scored before and after every training that
            is tested; None scores none.
    """

    name: str
    about: str
    backbone: Settings
    data: Settings
    test: Settings | None
    training: Settings
    seeds: tuple[int, ...]
    pick: Pick
    frozen: bool
    reference: str | None
    methods: tuple[Method, ...]
    widen: int = 0
    spectra: bool = True
    family: str = ""
    generate: Settings = field(default_factory=dict)
    forgetting: Settings | None = None

    @property
    def score_name(self) -> str:
        """What the share of right items is called."""
        return "right answers" if self.generate else "acc_norm"

    @property
    def pick_seeds(self) -> tuple[int, ...]:
        """The seeds that the learning rate is picked with."""
        return self.seeds[:1] if self.pick == "first" else self.seeds

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Suite":
        """A suite of what :func:`dataclasses.asdict` made of it, and JSON perhaps kept."""
        methods = (Method(**{**r, "learning_rates": tuple(r["learning_rates"])}) for r in stored["methods"])
        return cls(**{**stored, "seeds": tuple(stored["seeds"]), "methods": tuple(methods)})


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Nested mappings laid over each other; the result shares nothing with them.

    A mapping of another ``class_path`` takes the other's place: the options of one class are not another's.
    """
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping) and not _other_class(old, value)
        result[key] = merged(cast(Settings, old), value) if both else copy.deepcopy(value)
    return result


def _other_class(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    return "class_path" in above and below.get("class_path") != above["class_path"]


_PICKS = ("first", "all")
_OWN_KEYS = {"name", "about", "family", "reference", "methods"}
_KEYS = {"extends", "corpus", "backbone", "data", "test", "training", "learning_rates", "seeds", "pick"}
_KEYS |= {"frozen", "widen", "spectra", "generate", "forgetting"} | _OWN_KEYS
#: Begins paths in the folder that ``--data`` names.
DATA = "$DATA"
_METHOD_KEYS = {"name", "adapter", "learning_rates", "learning_rate_ratios", "backbone"}
_TRAINING_KEYS = {"trainer", "optimizer", "lr_scheduler", "gradient_checkpointing", "cuda_graphs"}


def find_suite(name: str, *folders: Path) -> Path:
    """The file of a suite.

    Args:
        name: A path, or the name of a file in one of the folders without its ending.
        *folders: Where the named suites are.

    Raises:
        ConfigError: If there is none.
    """
    for file in (Path(name), *(folder / f"{name}.yaml" for folder in folders)):
        if file.is_file():
            return file
    known = ", ".join(sorted(file.stem for file in folders[-1].glob("*.yaml"))) or "none"
    raise ConfigError(f"{name}: no such file; give a file, or one of the known suites ({known})")


def read_suite(
    file: Path, changes: Sequence[str] = (), data: str | None = None, known: Path | None = None
) -> Suite:
    """Reads a suite.

    A suite that ``extends`` another one, a path, or the name of one beside it or among the known ones, takes
    all settings of that one that it does not change. Its methods are its own, or by their names those of the
    other.

    Args:
        file: A YAML file.
        changes: ``key.key=value`` with the value in YAML, put over what the file says.
        data: Where the data are: a path, or a folder that holds the suite's ``corpus`` under that name, and
            what the suite's paths call ``$DATA/...``.
        known: Folder of the suites that are known by name.

    Raises:
        ConfigError: Naming the file, the key and what it may be.
    """
    written = _load(file, known or file.parent)
    for change in changes:
        _put(written, change)
    if data is not None:
        if not names_data(written.get("data")):
            corpus = Path(data) / str(written.get("corpus", "."))
            _put(written, f"data.init_args.path={corpus if corpus.exists() else data}")
        written = _placed(written, data)
    try:
        return _suite(written, file.stem)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def names_data(written: object) -> bool:
    """Whether settings hold a path that begins with ``$DATA``."""
    if isinstance(written, Mapping):
        return any(names_data(value) for value in written.values())
    if isinstance(written, list | tuple):
        return any(names_data(value) for value in written)
    return isinstance(written, str) and Path(written).parts[:1] == (DATA,)


def _placed(written: Any, folder: str) -> Any:
    """The settings with that folder in the place of ``$DATA``."""
    if isinstance(written, dict):
        return {key: _placed(value, folder) for key, value in written.items()}
    if isinstance(written, list):
        return [_placed(value, folder) for value in written]
    return str(Path(folder, *Path(written).parts[1:])) if names_data(written) else written


def keep_methods(suites: Sequence[Suite], names: Sequence[str]) -> list[Suite]:
    """The suites with only those of their methods that are named; suites without any are left out.

    Raises:
        ConfigError: If none of the suites has a method of some name.
    """
    known = list(dict.fromkeys(method.name for suite in suites for method in suite.methods))
    unknown = set(names) - set(known)
    if unknown:
        raise ConfigError(f"unknown method {min(unknown)!r}; choose some of {', '.join(known)}")
    kept = []
    for suite in suites:
        methods = tuple(method for method in suite.methods if method.name in names)
        reference = suite.reference if suite.reference in names else None
        kept.append(replace(suite, methods=methods, reference=reference))
    return [suite for suite in kept if suite.methods]


def _load(file: Path, known: Path, extending: tuple[Path, ...] = ()) -> Settings:
    """A file's mapping, laid over that of the file that it extends."""
    try:
        written = load_yaml(read_text(file, "suite"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict):
        raise ConfigError(f"{file} is not a suite: it must be a mapping with data and methods")
    _refuse(written, _KEYS, f"{file}: ", "")
    if "extends" not in written:
        return written
    name = str(written.pop("extends"))
    try:
        other = find_suite(name, file.parent, known)
    except ConfigError as error:
        raise ConfigError(f"{file}: extends {error}") from None
    if other.resolve() in extending:
        raise ConfigError(f"{file} extends {name}, which extends it again")
    below = _load(other, known, (*extending, file.resolve()))
    if "methods" in written:
        written["methods"] = _borrowed(written["methods"], below, file)
        below = {key: value for key, value in below.items() if key not in _OWN_KEYS}
    return merged(
        {key: value for key, value in below.items() if key not in ("name", "about", "family")}, written
    )


def _borrowed(methods: Any, below: Settings, file: Path) -> Any:
    """The methods, with those in full that are only named."""
    rates = {"learning_rates": below["learning_rates"]} if "learning_rates" in below else {}
    known = {
        method.get("name"): rates | method for method in below.get("methods", []) if isinstance(method, dict)
    }
    if not isinstance(methods, list):
        return methods
    unknown = [method for method in methods if isinstance(method, str) and method not in known]
    if unknown:
        names = ", ".join(str(name) for name in known)
        raise ConfigError(f"{file}: the extended suite has no method {unknown[0]!r}; it has {names}")
    return [known[method] if isinstance(method, str) else method for method in methods]


def _suite(written: Settings, stem: str) -> Suite:
    _refuse(written, _KEYS, "", "")
    data, methods = written.get("data"), written.get("methods")
    if not isinstance(data, dict) or "class_path" not in data:
        raise ConfigError("data must name a data module by class_path, with its options as init_args")
    if not isinstance(methods, list) or not methods:
        raise ConfigError("methods must be a list with at least one method")
    training = _mapping(written, "training")
    _refuse(training, _TRAINING_KEYS, "", "training.")
    seeds = written.get("seeds", [0, 1, 2])
    if not isinstance(seeds, list) or not seeds or not all(_whole(s) for s in seeds):
        raise ConfigError(f"seeds must be a list of whole numbers from 0, not {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds holds a number twice: {seeds!r}")
    pick = written.get("pick", "first")
    if pick not in _PICKS:
        raise ConfigError(f"pick is {pick!r}; choose one of {', '.join(_PICKS)}")
    widen = written.get("widen", 0)
    if not _whole(widen):
        raise ConfigError(f"widen must be a whole number from 0, not {widen!r}")
    read = tuple(_method(method, written.get("learning_rates"), i) for i, method in enumerate(methods))
    name = str(written.get("name", stem))
    if name in ("runs", "logs"):
        raise ConfigError(f"name is {name!r}, the folder of all suites' {name}; choose another name")
    if name != Path(name).name:
        raise ConfigError(f"name is {name!r}; leave out slashes, as its reports' folder bears the name")
    names = [method.name for method in read]
    twice = {n for n in names if names.count(n) > 1} | ({FROZEN} & set(names))
    if twice:
        raise ConfigError(f"the name {min(twice)!r} of a method is taken; every row needs its own")
    reference = written.get("reference")
    if reference is not None and reference not in names:
        raise ConfigError(f"reference is {reference!r}, which is none of the methods: {', '.join(names)}")
    return Suite(
        name,
        str(written.get("about", "")),
        _mapping(written, "backbone"),
        data,
        _data_module(written, "test"),
        training,
        tuple(seeds),
        cast(Pick, pick),
        bool(written.get("frozen", True)),
        reference,
        read,
        widen,
        bool(written.get("spectra", True)),
        str(written.get("family", "")),
        _generate(written),
        _data_module(written, "forgetting"),
    )


def _data_module(written: Settings, key: str) -> Settings | None:
    value = written.get(key)
    if value is not None and (not isinstance(value, dict) or "class_path" not in value):
        raise ConfigError(f"{key} must name a data module by class_path, with its options as init_args")
    return value


def _generate(written: Settings) -> Settings:
    value = _mapping(written, "generate")
    _refuse(value, {"max_new_tokens", "tasks"}, "", "generate.")
    limit, tasks = value.get("max_new_tokens"), value.get("tasks", [])
    if value and not (_whole(limit) and limit):
        raise ConfigError(f"generate.max_new_tokens must be a whole number from 1, not {limit!r}")
    if not isinstance(tasks, list) or not all(isinstance(task, str) and task for task in tasks):
        raise ConfigError(f"generate.tasks must be a list of names, not {tasks!r}")
    return value


def _method(written: object, rates: object, index: int) -> Method:
    where = f"methods[{index}]"
    if not isinstance(written, dict) or not written.get("name"):
        raise ConfigError(f"{where} must be a mapping with a name; adapter, if it is not MoKA as it comes")
    _refuse(written, _METHOD_KEYS, "", f"{where}.")
    rates = written.get("learning_rates", rates)
    if not isinstance(rates, list) or not rates or not all(isinstance(r, float) and r > 0 for r in rates):
        text = isinstance(rates, list) and any(isinstance(rate, str) for rate in rates)
        hint = "YAML reads 4e-3 as text: write 4.0e-3" if text else "such as [4.0e-3, 8.0e-3]"
        raise ConfigError(
            f"learning_rates of {written['name']} must be a list of numbers above 0, not {rates!r} ({hint})"
        )
    return Method(
        str(written["name"]),
        _mapping(written, "adapter"),
        tuple(rates),
        _mapping(written, "backbone"),
        _mapping(written, "learning_rate_ratios"),
    )


def _put(written: Settings, change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {change}: write key.key=value")
    *path, last = key.split(".")
    options: Any = written
    for name in path:
        options = options.setdefault(name, {})
        if not isinstance(options, dict):
            raise ConfigError(f"--set {change}: {name} holds no options that could be set")
    try:
        options[last] = load_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: the value is not YAML") from error


def _mapping(written: Settings, key: str) -> Settings:
    value = written.get(key) or {}
    if not isinstance(value, dict):
        raise ConfigError(f"{key} must be a mapping, not {value!r}")
    return value


def _refuse(written: Settings, known: set[str], before: str, where: str) -> None:
    unknown = sorted(str(key) for key in written.keys() - known)
    if unknown:
        raise ConfigError(f"{before}unknown key {where}{unknown[0]}; the keys are {', '.join(sorted(known))}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
