"""What one would type: the help of each verb, the names of options, completion in a shell."""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch
from lightning.pytorch.callbacks import Callback

from tta_lightning import callbacks, data, meta, methods, rules
from tta_lightning.data.scenarios import SCENARIOS
from tta_lightning.errors import InputError

EXAMPLES = {  # of each verb: what it does, and what one would type
    "fit": """Train a model, or a learned update rule, on source data.

  tta fit -c configs/fit/digits_bn.yaml --trainer.run_dir runs/digits_bn
  tta fit -c configs/fit/digits_bn.yaml --model.lr 0.01 --trainer.max_epochs 2
  tta fit -c configs/fit/mgg.yaml --model.method.network runs/digits_gn/checkpoints/best.ckpt
""",
    "validate": """Measure a trained model on labelled validation images.

  tta validate -c configs/fit/digits_bn.yaml --model.network runs/digits_bn/checkpoints/best.ckpt
  tta validate -c configs/fit/digits_gn.yaml --model.network runs/digits_gn/checkpoints/best.ckpt
""",
    "test": """Measure a trained model on labelled test images.

  tta test -c configs/fit/digits_bn.yaml --model.network runs/digits_bn/checkpoints/best.ckpt
  tta test -c configs/fit/digits_gn.yaml --model.network runs/digits_gn/checkpoints/best.ckpt
""",
    "adapt": """Adapt a classifier online: predict each batch of a stream, then learn from it.

  tta adapt -c configs/adapt/tent.yaml -c configs/stream/digits.yaml --trainer.run_dir runs/tent
  tta adapt -c configs/adapt/tent.yaml -c configs/stream/digits.yaml --data.severity 5
  tta adapt -c configs/adapt/image_folder.yaml --data.source.root FOLDER --model.network timm:NAME
  tta adapt -c runs/tent/config.yaml --resume_from runs/tent
""",
    "compare": """Put finished runs into one table.

  tta compare runs/source runs/tent
  tta compare runs/source runs/tent -o runs
""",
    "report": """Put finished runs into one HTML page that needs no network.

  tta report runs/source runs/tent -o report.html
  tta report runs/demo
  tta report 'tent=runs/seed*/tent' 'source=runs/seed*/source'
  tta report runs/source runs/tent --figures figures
""",
    "completion": """Print the script that completes tta commands in a shell.

  tta completion bash > ~/.local/share/bash-completion/completions/tta
  tta completion fish > ~/.config/fish/completions/tta.fish
""",
}
VERBS = tuple(EXAMPLES)
SHELLS = ("bash", "zsh", "fish")
DESCRIPTION = """Train models to adapt, and adapt them online.

  tta fit     -c configs/fit/digits_bn.yaml --trainer.run_dir runs/digits_bn
  tta adapt   -c configs/adapt/tent.yaml -c configs/stream/digits.yaml --trainer.run_dir runs/tent
  tta compare runs/source runs/tent
  tta report  runs/source runs/tent -o report.html
"""
_FIRST = """\
  -c FILE                      a configuration, any number of times; what comes last counts
  --model CLASS                {models}
  --model.help CLASS           list the options of one: --model.OPTION VALUE
  --model.network NETWORK      the classifier: a checkpoint of tta fit, timm:NAME,
                               torchvision:NAME or a class path
  --data CLASS                 {data}
  --data.help CLASS            list the options of one: --data.OPTION VALUE
"""
_LAST = """\
  --trainer.run_dir DIR        the run folder, a new one; otherwise one is made under runs/
  --trainer.accelerator NAME   cpu, gpu or auto
  --seed_everything N          seed of all random numbers (0)
  --print_config               print what it all comes to, and run nothing
  --help                       show this
  --help_all                   show every option, those of Lightning's trainer too
"""
_OF_VERB = {
    "fit": """\
  --trainer.max_epochs N       passes over the training images
  --ckpt_path FILE             go on with a training from its checkpoint
""",
    "adapt": """\
  --data.severity N            strength of the corruptions, 1 to 5
  --trainer.callbacks+=CLASS   add to a method or watch it: STAG, CollapseGuard
  --resume_from RUN            go on with a run that was interrupted: its folder, or last
""",
}
_COLUMN = 31  # where the help of an option starts
_FILES = ("config", "ckpt_path", "model.network", "model.method.network", "model.rule.checkpoint")
_FOLDERS = ("trainer.run_dir", "resume_from", "data.source.root", "data.train.root")


def short_help(verb: str | None) -> str:
    """List what matters of a verb, to be shown below its examples.

    Args:
        verb: A verb of Lightning's; None for the list of verbs.

    Returns:
        Lines of text.
    """
    if verb is None:
        lines = [f"  {name:<12}{EXAMPLES[name].splitlines()[0]}" for name in VERBS]
        last = "`tta VERB --help` says more of each, `tta --version` which version this is."
        return "\n".join(["verbs:", *lines, "", last, ""])
    models, streams = (", ".join(classes_of(verb, kind)) for kind in ("model", "data"))
    first = _FIRST.format(models=_folded(models), data=_folded(streams))
    return f"options:\n{first}{_OF_VERB.get(verb, '')}{_LAST}"


def options_in(text: str) -> list[str]:
    """Return the long options that the help of a verb shows, without dashes."""
    return sorted(set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)))


def options_of(verb: str | None) -> list[str]:
    """Name the options that classes of ours and the trainer bring, as one types them.

    Args:
        verb: The verb; None for all verbs.

    Returns:
        Names such as ``model.rule.lr`` and ``data.severity``, each once.
    """
    adapts, trains = verb in (None, "adapt"), verb != "adapt"
    places = (
        (adapts, "model", _made_by(methods, lightning.pytorch.LightningModule)),
        (trains, "model", _made_by(meta, lightning.pytorch.LightningModule)),
        (adapts, "model.rule", _made_by(rules, rules.UpdateRule)),
        (adapts, "data", [data.Stream]),
        (trains, "data", _made_by(data, lightning.pytorch.LightningDataModule)),
        (adapts, "data.source", _made_by(data, data.ImageSource)),
        (trains, "data.train", _made_by(data, data.ImageSource)),
        (True, "trainer", [lightning.pytorch.Trainer]),
        (True, "trainer.callbacks", _made_by(callbacks, Callback)),
    )
    names = (
        f"{place}.{parameter.name}"
        for is_taken, place, classes in places
        if is_taken
        for cls in classes
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )
    return list(dict.fromkeys(names))


def classes_of(verb: str, kind: str) -> list[str]:
    """Name the classes of ours that a verb takes as a model or as data.

    Args:
        verb: A verb of Lightning's.
        kind: ``model`` or ``data``.

    Returns:
        Their names, sorted.
    """
    adapts = verb == "adapt"
    if kind == "data":
        found = _made_by(data, lightning.pytorch.LightningDataModule)
        return _names(cls for cls in found if (cls is data.Stream) == adapts)
    package = methods if adapts else meta
    return _names(_made_by(package, lightning.pytorch.LightningModule))


def completion_script(
    shell: str, parsers: Mapping[str, argparse.ArgumentParser], plain: Mapping[str, str]
) -> str:
    """Write the script that completes ``tta`` in a shell.

    jsonargparse would write one too, but follows the type of every option of Lightning's trainer,
    which takes minutes. This one knows the classes of ours.

    Args:
        shell: ``bash``, ``zsh`` or another one that shtab knows.
        parsers: The parsers of Lightning's verbs.
        plain: The help of each of the other verbs.

    Returns:
        The script.

    Raises:
        InputError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise InputError(
            "Completion needs the package shtab: pip install 'tta_lightning[completion]'."
        ) from error
    kinds = {**dict.fromkeys(_FILES, shtab.FILE), **dict.fromkeys(_FOLDERS, shtab.DIRECTORY)}
    tta = argparse.ArgumentParser("tta")
    tta.add_argument("--version", action="store_true")
    verbs = tta.add_subparsers()
    for verb in VERBS:
        completed = verbs.add_parser(verb, help=EXAMPLES[verb].splitlines()[0])
        if verb in parsers:
            _add_options(completed, verb, parsers[verb], kinds)
            continue
        for name in options_in(plain[verb]):
            if name != "help":
                completed.add_argument(f"--{name}")
        if verb == "completion":
            completed.add_argument("shell", choices=SHELLS)
        else:
            completed.add_argument("runs", nargs="*").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(tta, shell))


def _add_options(
    completed: argparse.ArgumentParser,
    verb: str,
    parser: argparse.ArgumentParser,
    kinds: Mapping[str, Any],
) -> None:
    """Add the options of a verb of Lightning's, with the values that they take."""
    values = _values(verb)
    own = (option for action in parser._actions for option in action.option_strings)
    shown = [option for option in own if option.startswith("--") and not option.endswith("+")]
    names = dict.fromkeys([option[2:] for option in shown] + options_of(verb) + list(values))
    for name in names:
        if name in ("help", "print_shtab"):
            continue
        short = ("-c",) if name == "config" else ()
        added = completed.add_argument(*short, f"--{name}", choices=values.get(name))
        if name in kinds:
            added.complete = kinds[name]  # type: ignore[attr-defined]


def _values(verb: str) -> dict[str, list[str]]:
    models, streams = classes_of(verb, "model"), classes_of(verb, "data")
    sources = _names(_made_by(data, data.ImageSource))
    values = {
        **{"model": models, "model.help": models, "data": streams, "data.help": streams},
        "trainer.callbacks+": _names(_made_by(callbacks, callbacks.AdaptCallback)),
        "trainer.accelerator": ["auto", "cpu", "gpu"],
    }
    if verb != "adapt":
        return {**values, "data.train": sources}
    return {
        **values,
        "model.rule": _names(_made_by(rules, rules.UpdateRule)),
        "data.source": sources,
        "data.clean": sources,
        "data.scenario": sorted(SCENARIOS),
    }


def _names(classes: Iterable[type]) -> list[str]:
    return sorted(cls.__name__ for cls in classes)


def _made_by(package: Any, base: type) -> list[type]:
    """Return the public classes of a package that can be given where `base` is expected."""
    found = (getattr(package, name) for name in package.__all__)
    return [
        value
        for value in found
        if inspect.isclass(value) and issubclass(value, base) and value is not base
    ]


def _folded(text: str) -> str:
    """Break a text into lines that start in the column of the help."""
    return textwrap.fill(text, 96 - _COLUMN).replace("\n", "\n" + " " * _COLUMN)
