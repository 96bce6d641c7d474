"""Turning what an argument parser says into a sentence that a person can act on."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch
from lightning.pytorch.cli import LightningArgumentParser
from yaml import YAMLError

from tta_lightning import callbacks, data, meta, methods, rules
from tta_lightning.errors import InputError, unknown_name

_OPTION = re.compile(
    r"Option '(?P<a>[\w.]+)' is not accepted"
    r"|[Uu]nrecognized arguments: --?(?P<b>[\w.]+)"
    r"|Key '(?P<c>[\w.]+)' is not expected"
    r"|does not accept (?:option|nested key) '(?P<d>[\w.]+)'"
)
_CHOICE = re.compile(
    r'Parser key "(?P<key>[\w.]+)".*?Literal\[(?P<choices>[^\]]*)\]'
    r".*?(?:Got value|Given value): (?P<given>\S+)",
    re.DOTALL,
)
_NUMBER_BY_NAME = re.compile(  # an argument that holds numbers by name: scenario_options
    r'Parser key "(?P<key>[\w.]+)".*dict\[str, float\].*Got value: (?P<given>[^\n]*)\n'
    r".*Given value: (?:NestedArg\(key='(?P<a>\w+)'|\{.*?'(?P<b>\w+)': '?(?P=given)['},])",
    re.DOTALL,
)
_SETTING = ("scenario", "scenario_options")  # what files hold that go after a stream
MOST_VALUES = 100_000  # of a YAML file
_VERB = re.compile(r"invalid choice: '(?P<name>[^']*)'")
_VERBS = ("fit", "validate", "test", "adapt", "compare")
_NESTING = re.compile(r"\.(?:class_path|init_args)\b")  # what YAML puts between the names
_CLASS = re.compile(
    r"(?:Expected a dot import path string|Unable to import|No module named|Import path)"
    r":? '?\"?(?P<name>[\w.]+)"
)


def input_error_behind(error: BaseException | None) -> InputError | None:
    """Find the sentence of ours that a parser has wrapped into its own exceptions."""
    while error is not None:
        if isinstance(error, InputError):
            return error
        error = error.__cause__ or error.__context__
    return None


def explain(message: str, parser: LightningArgumentParser) -> str:
    """Shorten a parser's message, and name the nearest option or class where one is unknown.

    Args:
        message: What the parser says.
        parser: The parser, whose options are suggested.

    Returns:
        The message for the user.
    """
    option = _OPTION.search(message)
    if option:
        name = next(value for value in option.groupdict().values() if value is not None)
        name = _NESTING.split(name)[0]
        if name.partition(".")[0] in _SETTING:
            return (
                f"Option {name!r} has no stream to belong to. A setting goes after a stream: "
                "-c configs/stream/digits.yaml -c configs/stream/gradual.yaml, or --data Stream "
                "... --data.scenario gradual."
            )
        others = set(_options(parser)) - {name}  # a class that is not used here may have it
        return f"Unknown option {name!r}.{_nearest(name, others)} See --help."
    verb = _VERB.search(message) if "subcommand" in message else None
    if verb:
        name = verb["name"]
        return f"Unknown verb {name!r}.{_nearest(name, _VERBS)} There are {', '.join(_VERBS)}."
    found = _CLASS.search(message)
    if found:
        name = found["name"]
        nearest = _nearest(name, set(_classes()) - {name})  # it may be one of another kind
        return f"Unknown class {name!r}.{nearest} Give a class or a full path."
    choice = _CHOICE.search(message)
    choices = re.findall(r"'([^']*)'", choice["choices"]) if choice else []
    if choice and choices:  # there are none where they are numbers
        name = choice["key"].rpartition(".")[2]
        return str(unknown_name(name, choice["given"], choices))
    number = _NUMBER_BY_NAME.search(message)
    if number:
        name = f"{number['key']}.{number['a'] or number['b']}"
        return f"{name} = {number['given']}: expected a number."
    return _without_noise(message).replace("<class 'float'>", "number")


def safely(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make a function that reads YAML refuse what would be read without end.

    Args:
        load: From text to plain values.

    Returns:
        The same, which raises an `InputError` where aliases make a loop or a great many values of
        few lines, and a `YAMLError` for whatever else cannot be read.
    """

    def load_safely(text: str) -> Any:
        try:
            value = load(text)
        except YAMLError:
            raise
        except Exception as error:  # of a number that is none, say, or of brackets without end
            raise YAMLError(f"{type(error).__name__}: {error}") from error
        if _count(value, {}) > MOST_VALUES:
            raise InputError(
                f"The YAML holds more than {MOST_VALUES:,} values once its aliases (*name) are "
                "filled in. Expected a configuration of a few: leave the aliases out."
            )
        return value

    return load_safely


def _count(value: Any, counts: dict[int, int]) -> int:
    """Count values with those inside them; `counts` has those of lists and dicts seen before."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counts:
        counts[id(value)] = 0  # until it is counted
        inner = value.values() if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(_count(item, counts) for item in inner)
    elif not counts[id(value)]:
        raise InputError(
            "An alias (*name) in the YAML stands inside what it names, which has no end. Leave the "
            "alias out."
        )
    return counts[id(value)]


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:  # the last part of a dotted name
        close = difflib.get_close_matches(name.rpartition(".")[2], names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def _options(parser: LightningArgumentParser) -> Iterator[str]:
    yield from ("seed_everything", "trainer", "model", "data")
    for action in parser._actions:
        yield action.dest
        yield action.dest.rpartition(".")[2]
    for name in _classes():
        yield from inspect.signature(_find(name)).parameters
    yield from inspect.signature(lightning.pytorch.Trainer).parameters


def _classes() -> list[str]:
    names = (name for package in _PACKAGES for name in package.__all__)
    return [n for n in names if inspect.isclass(_find(n)) and not issubclass(_find(n), Exception)]


def _find(name: str) -> Any:
    return next(getattr(package, name) for package in _PACKAGES if name in package.__all__)


_PACKAGES = (methods, rules, data, meta, callbacks)


def _without_noise(message: str) -> str:
    """Drop the lines that only say how the parser tried."""
    noise = (
        "Does not validate",
        "Subtypes:",
        "Errors:",
        "Given value",
        "- Expected a <class 'None",
    )
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(
        line.removeprefix("- ") for line in lines if line and not line.startswith(noise)
    )
