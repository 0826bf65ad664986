"""What jsonargparse says of wrong options, in the words of this package: ``OPTION must be …, not …``.

Its messages lie in each other, one for each class on the way to the option and one for each of several types.
What is not recognised stays as it is.
"""

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from inspect import signature

from moka_pl.cli.class_paths import explain_denied, imported

#: A class may be given as a file, too, but nobody means one.
_PATH = re.compile(r"- Expected a path but \S+ either .*? invalid - ")
_KEY = re.compile(r'Parser key "([^"]+)": ?')
_CLASS = re.compile(r"Problem with given class_path '([^']+)': ")
_CALLABLE = re.compile(r"Type typing\.Callable\[.*?\] expects a function or a callable class: (.*)")
_CALLED = re.compile(r"\. Got value: Namespace\(class_path='([^']+)'.*$")
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - (.*) "
    r"Given value type: <class '[\w.]+'> Given value: (.*)"
)
#: Where errors of a union begin and end, and the next one begins.
_PARTS = re.compile(
    r"(?P<open>Does not validate against any)|(?P<close>Given value type: )|"
    r"(?P<next> - (?=Expected |Problem |Not a valid |Type |Parser key |Import path |Unable to |module ))"
)
_TYPE = re.compile(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal\[([^]]*)\])(?:\. Got value: (.*))?")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.*)")

_KIND_OF_CLASS = "{option} must be a class path, or a mapping with class_path and init_args"
#: Messages that tell all, and what they become.
_SIMPLE = {
    r"Import path (?P<value>\S+) does not correspond to a subclass of (?P<kind>\w+)": (
        "{option}: {value} is no {kind}; name a class of that kind"
    ),
    r"Not a valid subclass of \w+.* Subclass types expect one of: .*": _KIND_OF_CLASS,
    r"Expected an import path or a subclass spec, but got (?P<value>.*?)(?:\. Got value: .*)?": (
        f"{_KIND_OF_CLASS}, not {{value}}"
    ),
    r"Unable to load config '(?P<value>.*?)' - .*": "{option} must be a mapping of options, not '{value}'",
    r"'(?P<kind>\w+)' object has no attribute 'keys'": (
        "{option}.init_args must be a mapping of options, not a {kind}"
    ),
    r"Expected a <class 'str'> - Not of type Path: expected str, .* object, not (?P<kind>\w+)": (
        "{option} must be one path or name, not a {kind}"
    ),
    r"the following arguments are required: (\w+\.)?data": (
        "no data are named; give --config, a file or a name that 'moka_pl configs' lists, or --data, a class"
    ),
    r"Requirement '(?P<value>[^']+)' not met.*": "{where}{owner} needs {value}: pip install '{value}'",
    r"the following arguments are required: (?P<value>.*)": "{where}{owner} needs {value}",
    r"Key must be a string, got: (?P<value>.*)\.": (
        "a key of the configuration is {value}; keys are texts, so put it in quotation marks"
    ),
    r"argument (?:-\w/)?(?P<value>-[^/:]+).*: expected one argument": "{value} needs a value",
}

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "collections.abc.Iterable": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}


def told(message: str, options: Iterable[str] = ()) -> str:
    """Returns a message of jsonargparse's in one line that names the option, its value and what it may be.

    Args:
        message: The message.
        options: The options that there are, to tell which one is meant.
    """
    line = " ".join(message.split())
    if denied := explain_denied(line):
        return denied
    if (found := re.fullmatch(r"Subcommand '\w+' does not accept option '([^']+)'", line)) is not None:
        return f"{found[1]} is no option{_meant(found[1], options)}"
    if (found := re.fullmatch(r"unrecognized arguments: (.*)", line)) is not None:
        wrong = next((word.partition("=")[0] for word in found[1].split() if word.startswith("-")), "")
        names = [f"--{name}" for name in options]
        return f"{wrong} is no option{_meant(wrong, names)}" if wrong else line
    return _told(line, "", "")


def _told(line: str, option: str, owner: str) -> str:
    """A message on an option.

    Args:
        line: What is left of it.
        option: The option so far, such as ``model.adapter``.
        owner: The path of the class whose options follow; empty where there is none.
    """
    line = _PATH.sub("", line).removeprefix("- ")
    if (found := _KEY.match(line)) is not None:
        inner = option if found[1] == option else f"{option}.{found[1]}" if option else found[1]
        return _told(line[found.end() :], inner, owner)
    if (found := _CLASS.match(line)) is not None:
        return _told(line[found.end() :], option, found[1])
    if (found := _CALLABLE.fullmatch(line)) is not None:
        called = _CALLED.search(found[1])
        return _told(_CALLED.sub("", found[1]), option, called[1] if called else owner)
    if (found := _UNION.fullmatch(line)) is not None:
        return _of_several(_errors(found[1]), found[2], option, owner)
    if (found := re.fullmatch(r"Option '([^']+)' is not accepted", line)) is not None:
        hint = _meant(found[1], [*_parameters(owner), "init_args"])
        name = f"{option}.{found[1]}" if option else found[1]
        return f"{name} is no option{f' of {owner}' if owner else ''}{hint}"
    if (found := re.fullmatch(r"module '([\w.]+)' has no attribute '(\w+)'.*", line)) is not None:
        hint = _meant(found[2], dir(sys.modules.get(found[1])))
        return f"{option}: {found[1]} has no {found[2]}{hint}"
    if (found := _TYPE.fullmatch(line)) is not None and found[3] is not None:
        return f"{option} must be {_listed(_kinds(found))}, not {_shown(found[3])}"
    if (found := _NO_CLASS.fullmatch(line)) is not None:
        return f"{option}: {_shown(found[1])} names no class; give its path, such as package.module.Class"
    for pattern, words in _SIMPLE.items():
        if (found := re.fullmatch(pattern, line)) is not None:
            where = f"{option}: " if option else ""
            return words.format(**found.groupdict(), option=option, owner=owner or "the command", where=where)
    return f"{option}: {line}" if option else line


def _errors(text: str) -> list[str]:
    """Parts the errors of a union, which may hold unions."""
    depth, begin = 0, 0
    errors = []
    for found in _PARTS.finditer(text):
        depth += {"open": 1, "close": -1}.get(found.lastgroup or "", 0)
        if depth == 0 and found.lastgroup == "next":
            errors.append(text[begin : found.start()])
            begin = found.end()
    return [*errors, text[begin:]]


def _of_several(errors: list[str], value: str, option: str, owner: str) -> str:
    """A message on a value of none of several types: an error inside of one of them, or all the types."""
    inside = next((one for one in errors if _CLASS.match(one) or _KEY.match(one)), None)
    if inside is not None:
        return _told(inside, option, owner)
    kinds: list[str] = []
    others: list[str] = []
    for error in errors:
        found = _TYPE.fullmatch(error)
        if found is None:
            others.append(error)
        elif found[3] is not None and value[:1] in ("[", "{") and value != found[3]:
            return f"{option}: {_shown(found[3])} in {value} must be {_listed(_kinds(found))}"
        else:
            kinds += _kinds(found)
    if others and not set(kinds) - {"null"}:
        unnamed = _NO_CLASS.fullmatch(others[0])
        named = others[0].replace("Import path does", f"Import path {value} does")
        return _told(f"Expected a dot import path string: {value}" if unnamed else named, option, owner)
    return f"{option} must be {_listed(['a class path', *kinds] if others else kinds)}, not {_shown(value)}"


def _kinds(found: re.Match[str]) -> list[str]:
    """A type in words, or the texts or numbers that are listed."""
    if found[1]:
        return ["true", "false"] if found[1] == "bool" else [_WORDS.get(found[1], found[1])]
    return found[2].replace("'", "").split(", ")


def _listed(kinds: Iterable[str]) -> str:
    *most, last = dict.fromkeys(kinds)
    return f"{', '.join(most)} or {last}" if most else last


def _parameters(path: str) -> list[str]:
    """The names of a class's options, if it is imported already."""
    try:
        return list(signature(imported(path)).parameters)
    except (TypeError, ValueError):  # it is not, or is written in C
        return []


def _meant(name: str, names: Iterable[str]) -> str:
    """Which of some names is probably meant."""
    known = {each.lower(): each for each in names}
    near = [
        found
        for written in (name, name.partition(".")[0])
        for found in get_close_matches(written.lower(), known, 1, 0.75)
    ]
    return f"; did you mean {known[near[0]]}?" if near else ""


def _shown(value: str) -> str:
    """A value as it is written in a configuration; a text stands in quotation marks."""
    if (nested := re.fullmatch(r"NestedArg\(key='.*?', val='(.*)'\)", value)) is not None:
        value = nested[1]
    number = re.fullmatch(r"[-+]?(\d[\d_.]*(e[-+]?\d+)?|nan|inf)", value, re.IGNORECASE)
    return value if number or value[:1] in ("[", "{", "'", '"') else repr(value)
