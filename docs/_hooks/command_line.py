"""The reference of the command line, made from the parsers that read it."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

from jsonargparse import ArgumentParser, capture_parser
from restructured import to_code

from tta_lightning import callbacks, cli, data, meta, methods, models, rules
from tta_lightning.data.scenarios import SCENARIOS
from tta_lightning.usage import EXAMPLES

_CODE = re.compile(r"``?([^`\n]+)``?")
_LIBRARY = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])")  # of a class in a type
_OF_CLASSES = (".help", ".class_path")
_PARTS = {  # what the options of a part start with, and its heading
    "": "Run and configuration",
    "model": "Model",
    "data": "Data",
    "trainer": "Trainer",
}


class _StoppedError(Exception):
    """Carries a parser out of the function that made it."""


def verb_reference() -> str:
    """Make the page of all verbs."""
    verbs = capture_parser(cli.main, ["adapt"])._subcommands_action._name_parser_map
    lines = ["# Command line", "", _INTRODUCTION, ""]
    for verb, text in EXAMPLES.items():
        about, *_ = text.partition("\n")
        lines += [f"## tta {verb}", "", _text(about), "", *_examples(text)]
        if verb in verbs:
            lines += _parts(verb, verbs[verb])
        else:
            lines += _options(_shown(_plain_parser(cli.PLAIN[verb])._actions))
    return "\n".join([*lines, *_trainer_section(verbs)]) + "\n"


def class_reference() -> str:
    """Make the page of the classes that options name, each with its own options."""
    lines = ["# Classes and their options", "", _CLASSES, ""]
    for title, what, prefix, classes in _class_sections():
        lines += [f"## {title}", "", what, ""]
        for item in classes:
            lines += [f"### {item.__name__} {{ #{_anchor(title, item)} }}", "", _summary(item), ""]
            options = _options(_shown(_parser_of(item)._actions), prefix)
            lines += options or ["No options.", ""]
    lines += ["## Scenarios", "", _SCENARIOS, ""]
    for name, scenario in SCENARIOS.items():
        lines += [f"### {name}", "", _summary(scenario), "", *_scenario_options(scenario)]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
Made from the program's own parsers when this site is built. Every option may also stand in a YAML
file, which `-c FILE` reads; of two files, and of a file and the command line, the last one counts.
`--print_config` shows what came of it and runs nothing. A class is named by its name alone
(`--model Tent`) and its options follow it (`--model.rule Adam --model.rule.lr 0.001`);
[Classes and their options](classes.md) has them all."""

_CLASSES = """\
Made from the program's own parsers when this site is built. In YAML a class is
`{class_path: Tent, init_args: {network: ..., rule: ...}}`; on the command line `--model Tent
--model.network ...`. Options without a default must be given. A class of your own is named by its
full path, `package.module.Class`."""

_SCENARIOS = """\
Values of `--data.scenario`; their options go under `--data.scenario_options`. What each is for, and
which resets it has, is in [the methods' page](../methods.md#settings)."""


def _class_sections() -> Iterator[tuple[str, str, str, list[type]]]:
    """Yield heading, introduction, start of the options and classes of each part of the page."""
    found = list(_classes_of(methods))
    yield "Methods", "Values of `--model` for `tta adapt`.", "--model.", found
    found = list(_classes_of(meta))
    yield "Trainings", "Values of `--model` for `tta fit`.", "--model.", found
    found = list(_classes_of(rules, rules.UpdateRule))
    yield "Rules", "Values of `--model.rule`.", "--model.rule.", found
    found = list(_classes_of(callbacks, callbacks.AdaptCallback))
    yield "Callbacks", "Added with `--trainer.callbacks+=NAME`.", "--trainer.callbacks.", found
    found = [data.Stream, data.LabelledImages, data.LabelledTasks, data.ShiftedImages]
    yield "Data modules", "Values of `--data`.", "--data.", found
    found = list(_classes_of(data, data.ImageSource))
    what = "Values of `--data.source`, and of `train`, `test` and `clean` where there are such."
    yield "Sources", what, "--data.source.", found
    found = [models.SmallConvNet, models.CIFARResNet, models.ResNet26GN, models.BYOLHeads]
    what = "Class paths for a `network`: `{class_path: tta_lightning.models.NAME, init_args: {}}`."
    yield "Networks of this package", what, "", found


def _classes_of(package: Any, base: type = object) -> Iterator[type]:
    """Yield the public classes of a package below a base class, without the base."""
    for name in package.__all__:
        item = getattr(package, name)
        if inspect.isclass(item) and issubclass(item, base) and item is not base:
            yield item


def _anchor(title: str, item: type) -> str:
    """Name a class on the page: MT3 is both a method and a training."""
    return f"{title.lower().split()[0]}-{item.__name__.lower()}"


def _parser_of(item: type) -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_class_arguments(item)
    return parser


def _plain_parser(verb: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    """Return the parser that a verb makes for itself."""

    def hand_over(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        raise _StoppedError(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", hand_over):
        try:
            verb([])
        except _StoppedError as found:
            parser: argparse.ArgumentParser = found.args[0]
            return parser
    raise RuntimeError("the verb has no parser of argparse")


def _examples(text: str) -> list[str]:
    """Show the command lines that a help text has."""
    found = [line.strip() for line in text.splitlines() if line.startswith("  tta ")]
    return ["```bash", *found, "```", ""]


def _parts(verb: str, parser: Any) -> list[str]:
    """List a verb's options by what they belong to."""
    lines = []
    actions = list(_shown(parser._actions))
    for prefix, title in _PARTS.items():
        found = [action for action in actions if _part(action) == prefix]
        if prefix == "trainer":
            options = f"{len(found)} options, [the same for every verb](#options-of-the-trainer)."
            lines += [f"### {title} {{ #{verb}-trainer }}", "", options, ""]
        elif found:
            lines += [f"### {title} {{ #{verb}-{prefix or 'run'} }}", "", *_options(found)]
    return lines


def _trainer_section(verbs: dict[str, Any]) -> list[str]:
    """List the trainer's options once.

    Raises:
        RuntimeError: They differ between the verbs, so that one list would be wrong.
    """
    each = [
        _options(action for action in _shown(parser._actions) if _part(action) == "trainer")
        for parser in verbs.values()
    ]
    if any(lines != each[0] for lines in each):
        raise RuntimeError("the verbs have different options of the trainer: list them by verb")
    return ["## Options of the trainer", "", *each[0]]


def _part(action: Any) -> str:
    """Return the first name of an option, where it is one of those with options of their own."""
    first = str(action.dest).partition(".")[0]
    return first if first in ("model", "data", "trainer") else ""


def _shown(actions: Iterable[Any]) -> Iterator[Any]:
    """Leave out what only prints help on another option."""
    for action in actions:
        is_more_help = str(action.dest).endswith(_OF_CLASSES)
        if not is_more_help and action.dest != "help" and action.help is not argparse.SUPPRESS:
            yield action


def _options(actions: Iterable[Any], prefix: str = "--") -> list[str]:
    """List options: how each is written, its type and default, what it is."""
    lines: list[str] = []
    for action in actions:
        written = [name for name in action.option_strings if not name.endswith("+")]
        written = [re.sub("^--", prefix, name) for name in written]
        names = ", ".join(f"`{name}`" for name in written or [_positional(action)])
        facts = "; ".join(filter(None, (_type(action), _default(action))))
        said = [f"{facts}.  "] if facts else []
        said.append(_text(action.help or ""))
        lines += [names, f":   {said[0]}", *(f"    {line}" for line in said[1:]), ""]
    return lines


def _positional(action: Any) -> str:
    name = action.metavar or (" | ".join(action.choices) if action.choices else action.dest)
    return f"{name}..." if action.nargs in ("+", "*") else str(name)


def _scenario_options(scenario: Callable[..., Any]) -> list[str]:
    """List the options of a scenario, which its function takes by name alone."""
    found = [
        parameter
        for parameter in inspect.signature(scenario).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    # a scenario that is two at once leaves it to them to say what an option is
    everything = "\n".join(
        [*(one.__doc__ or "" for one in SCENARIOS.values()), scenario.__doc__ or ""]
    )
    described = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", everything, re.MULTILINE))
    lines = []
    for parameter in found:
        facts = f"number; default `{parameter.default:,}`."
        lines += [
            f"`{parameter.name}`",
            f":   {facts}  ",
            f"    {_text(described.get(parameter.name, ''))}",
        ]
    return [*lines, ""] if lines else []


def _summary(item: Any) -> str:
    return _text(inspect.cleandoc(item.__doc__ or "").split("\n\n")[0])


def _default(action: Any) -> str:
    default = action.default
    if getattr(action, "required", False):
        return "must be given"
    if default is argparse.SUPPRESS or (default is None and not hasattr(action, "_typehint")):
        return ""
    return f"default `{_value(default)}`"


def _value(default: Any) -> str:
    """Write a default as in YAML."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(list(default)) if isinstance(default, tuple) else str(default)


def _type(action: Any) -> str:
    """Write a type without the modules of its classes."""
    hint = getattr(action, "_typehint", None)
    if hint is None:
        return ""
    text = hint.__name__ if inspect.isclass(hint) else str(hint)
    text = re.sub(r"(?:typing\.)?Literal\[([^]]*)\]", lambda found: _choices(found[1]), text)
    text = re.sub(r"(?:typing\.)?Optional\[(.*)\]$", r"\1 | None", text)
    text = re.sub(r"^(?:typing\.)?Union\[(.*)\]$", lambda found: _alternatives(found[1]), text)
    for noise in ("collections.abc.", "typing.", "pathlib.", "datetime.", " | Untyped"):
        text = text.replace(noise, "")
    text = _LIBRARY.sub("", text).replace("NoneType", "None")
    return f"`{text.replace('None', 'null')}`"


def _choices(inside: str) -> str:
    """Write what may be chosen as in YAML."""
    return " | ".join(value.strip().strip("'") for value in inside.split(","))


def _alternatives(inside: str) -> str:
    """Join the members of a union, leaving the commas inside their own brackets alone."""
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "[(") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return " | ".join(part.strip() for part in parts)


def _text(help_text: str) -> str:
    """Make one paragraph of Markdown of a help text, with nothing in it taken for a mark."""
    text = to_code(re.sub(r"\s+", " ", help_text).strip())
    pieces, end = [], 0
    for code in _CODE.finditer(text):
        pieces += [_escaped(text[end : code.start()]), f"`{code[1]}`"]
        end = code.end()
    return "".join([*pieces, _escaped(text[end:])])


def _escaped(text: str) -> str:
    escaped = re.sub(r"([*_$\[\]])", r"\\\1", text)
    return escaped.replace("<", "&lt;").replace(">", "&gt;")
