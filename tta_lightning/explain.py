"""Turning what an argument parser says into a sentence that a person can act on."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from yaml import YAMLError

from tta_lightning import callbacks, data, meta, methods, rules
from tta_lightning.errors import InputError, unknown_name
from tta_lightning.usage import VERBS, options_of

_OPTION = re.compile(
    r"Option '(?P<a>[\w.]+)' is not accepted"
    r"|[Uu]nrecognized arguments: --?(?P<b>[\w.-]+)"
    r"|Key '(?P<c>[\w.]+)' is not expected"
    r"|does not accept (?:option|nested key) '(?P<d>[\w.]+)'"
)
_BEFORE_VERB = re.compile(r"Option '[\w.]+' is not accepted before subcommand")
_WORD = re.compile(r"[Uu]nrecognized arguments: (?P<word>[^-\s]\S*)")
_REQUIRED = re.compile(
    r"the following arguments are required: (?P<names>(?P<verb>\w+)\.(?:data|model)\b.*)"
)
_FILE = re.compile(
    r"File does not exist: '(?P<a>[^\n]+)'"
    r"|Unable to load config '(?P<b>[^\n]+)'"
    r"|Expected a path but (?P<c>\S+\.(?:ya?ml|json)) either not accessible"
)
_FOLDER = re.compile(r"Path is not a file: '(?P<path>[^\n]+)'")
_CHOICE = re.compile(
    r'Parser key "(?P<key>[\w.]+)"(?P<types>.*?Literal\[.*?)'
    r"(?:Got value|Given value): (?P<given>\S+)",
    re.DOTALL,
)
_NUMBER_BY_NAME = re.compile(  # an argument that holds numbers by name: scenario_options
    r'Parser key "(?P<key>[\w.]+)".*dict\[str, float\].*Got value: (?P<given>[^\n]*)\n'
    r".*Given value: (?:NestedArg\(key='(?P<a>\w+)'|\{.*?'(?P<b>\w+)': '?(?P=given)['},])",
    re.DOTALL,
)
_SECTIONS = ("seed_everything", "trainer", "model", "data")  # of every verb
_SETTING = ("scenario", "scenario_options")  # what files hold that go after a stream
MOST_VALUES = 100_000  # of a YAML file
MOST_SUGGESTIONS = 2
_VERB = re.compile(r"invalid choice: '(?P<name>[^']*)'")
_LISTED = ", ".join(VERBS)
_NO_VERB = 'expected "subcommand" to be one of'
_CHOSEN_BY = {  # what stands for a class that is not chosen yet: the options of that class
    "LightningModule": "model",
    "LightningDataModule": "data",
    "Callback": "trainer.callbacks",
}
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
    verb = _VERB.search(message) if "subcommand" in message else None
    if _BEFORE_VERB.search(message) or (verb and _starts_with_option(parser)):
        return "Options go after the verb: tta adapt -c FILE --model.help. See tta --help."
    if verb:
        name = verb["name"]
        return f"Unknown verb {name!r}.{_nearest(name, VERBS)} There are {_LISTED}. See tta --help."
    if _NO_VERB in message:
        return f"There is no verb. Expected tta {{{','.join(VERBS)}}} .... See tta --help."
    option = _OPTION.search(message)
    if option:
        name = next(value for value in option.groupdict().values() if value is not None)
        return _explain_option(_NESTING.split(name)[0], parser)
    word = _WORD.search(message)
    if word:
        return _explain_word(word["word"])
    required = _REQUIRED.search(message)
    if required:
        names = re.findall(r"\.(data|model)\b", required["names"])
        return _explain_missing(required["verb"], sorted(names, reverse=True))
    file = _FILE.search(message)
    path = next((value for value in file.groupdict().values() if value), "") if file else ""
    if path and not Path(path).exists():
        shown = _shown(path)
        return f"{shown} does not exist.{_nearest_file(shown)} Expected a configuration in YAML."
    folder = _FOLDER.search(message)
    if folder:
        return f"{_shown(folder['path'])} is a folder. Expected a configuration in YAML."
    found = _CLASS.search(message)
    if found:
        name = found["name"]
        nearest = _nearest(name, set(_classes()) - {name})  # it may be one of another kind
        return f"Unknown class {name!r}.{nearest} Give a class or a full path."
    choice = _CHOICE.search(message)
    literals = re.findall(r"Literal\[([^\]]*)\]", choice["types"]) if choice else []
    choices = dict.fromkeys(re.findall(r"'([^']*)'", " ".join(literals)))
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


def unknown_option(name: str, known: Iterable[str]) -> str:
    """Say that an option is unknown, and which is nearest.

    Args:
        name: What was given.
        known: The names that exist; one that is dotted is also found by its last part.

    Returns:
        The sentence.
    """
    return f"Unknown option {name!r}.{_nearest(name, known)} See --help."


def _explain_option(name: str, parser: LightningArgumentParser) -> str:
    if name.partition(".")[0] in _SETTING:
        return (
            f"Option {name!r} has no stream to belong to. A setting goes after a stream: "
            "-c configs/stream/digits.yaml -c configs/stream/gradual.yaml, or --data Stream "
            "... --data.scenario gradual."
        )
    own = [action.dest for action in parser._actions if action.help != argparse.SUPPRESS]
    if "config" in own:  # the parser of a verb, or the one before it
        verb = getattr(parser, "subcommand", None)
        return unknown_option(name, {*own, *_SECTIONS, *options_of(verb)} - {name})
    place = _CHOSEN_BY.get(next(iter(parser.groups or {}), ""))
    if place is None:  # the parser of one class, which is known: only what it takes can be meant
        return unknown_option(name, {*own} - {name})
    known = [option for option in options_of(None) if option.startswith(f"{place}.")]
    full = f"{place}.{name}"
    hint = "" if full in known else _nearest(full, known)
    choose = f"--{place}+=CLASS" if place == "trainer.callbacks" else f"--{place} CLASS"
    return (
        f"Option {full!r} comes before the class that it belongs to.{hint} Options go after what "
        f"chooses the class: -c FILE or {choose}."
    )


def _explain_word(word: str) -> str:
    """Say what is wrong with an argument that is no option."""
    if Path(word).is_file():
        return f"Unexpected {word!r}. A configuration goes after -c: -c {word}."
    return f"Unexpected {word!r}. Options start with --. See --help."


def _explain_missing(verb: str, names: list[str]) -> str:
    """Say how a verb is given a model or data."""
    files = dict.fromkeys(names, "configs/fit/digits_bn.yaml")
    if verb == "adapt":
        files = {"model": "configs/adapt/tent.yaml", "data": "configs/stream/digits.yaml"}
    given = " ".join(dict.fromkeys(f"-c {files[name]}" for name in names))
    return (
        f"Nothing chooses what is required: {' and '.join(names)}. Give a configuration, such as "
        f"{given}, or {' '.join(f'--{name} CLASS' for name in names)}. See tta {verb} --help."
    )


def _starts_with_option(parser: LightningArgumentParser) -> bool:
    arguments = getattr(parser, "args", None) or [""]
    return str(arguments[0]).startswith("-")


def _shown(path: str) -> str:
    """Shorten a path that lies below the working folder."""
    short = os.path.relpath(path)
    return path if short.startswith(os.pardir) else short


def _nearest_file(path: str) -> str:
    """Name the nearest configuration: among its neighbours, and those in the folder configs."""
    found = [*Path(path).parent.glob("*.y*ml"), *Path("configs").rglob("*.y*ml")]
    names = [str(file) for file in sorted(found, key=lambda file: (len(file.parts), file))]
    close = []
    if Path(path).parent.name:
        close = difflib.get_close_matches(path, names, n=1, cutoff=0.6)
    if not close:  # it may lie in another folder
        stems = {Path(name).stem: name for name in reversed(names)}
        stem = difflib.get_close_matches(Path(path).stem, stems, n=1, cutoff=0.6)
        close = [stems[stem[0]]] if stem else []
    return f" Did you mean {close[0]!r}?" if close else ""


def _nearest(name: str, known: Iterable[str]) -> str:
    """Suggest names: those that end alike, else the nearest in full, else by their ends."""
    names = sorted(set(known))
    last = name.rpartition(".")[2].lower()
    by_end: dict[str, list[str]] = {}
    for other in names:
        by_end.setdefault(other.rpartition(".")[2].lower(), []).append(other)
    close = [other for other in names if other.startswith(f"{name}_")] + by_end.get(last, [])
    if not close and "." in name:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:
        ends = difflib.get_close_matches(last, by_end, n=1, cutoff=0.6)
        close = by_end[ends[0]] if ends else []
    at_top = [other for other in close if "." not in other]
    shown = " or ".join(map(repr, (at_top or sorted(close, key=len))[:MOST_SUGGESTIONS]))
    return f" Did you mean {shown}?" if close else ""


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
