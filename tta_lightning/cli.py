"""The command line: ``tta fit, validate, test, adapt, compare, report, completion``."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter, capture_parser, get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from yaml import YAMLError

from tta_lightning import __version__
from tta_lightning.adapter import Adapter
from tta_lightning.errors import InputError, unknown_name
from tta_lightning.explain import explain, input_error_behind, safely, unknown_option
from tta_lightning.meta import MT3, SourceTraining
from tta_lightning.models import describe
from tta_lightning.report.command import report
from tta_lightning.report.compare import Run, compare, summarise
from tta_lightning.runs import run_folder, write_atomically
from tta_lightning.trainer import Trainer
from tta_lightning.usage import (
    DESCRIPTION,
    EXAMPLES,
    SHELLS,
    completion_script,
    options_in,
    short_help,
)

_LIBRARIES = ("tta_lightning", "lightning", "jsonargparse", "torch", "torchvision", "timm", "numpy")
MOST_SEED = 2**32 - 1  # of numpy's global generator


set_loader("yaml", safely(get_loader("yaml")), (YAMLError,))


class _SaveConfig(SaveConfigCallback):
    """Write the configuration of a run into its folder, as ``config.yaml``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        is_resumed = getattr(trainer.test_loop, "resumed", None) is not None
        if folder is not None and not is_resumed:  # then it stays as it was
            text = self.parser.dump(self.config, skip_none=False)
            write_atomically(folder / self.config_filename, text)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description, so that commands can be copied from it."""


class _HelpAll(argparse.Action):
    """Show every option and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        nothing = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "nargs": 0}
        super().__init__(option_strings, **{**kwargs, **nothing})

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        assert isinstance(parser, _Parser)
        parser.short_options = ""
        parser.print_help()
        parser.exit()


class _Parser(LightningArgumentParser):
    """Says what is wrong in a sentence, takes no abbreviated options, and has two helps.

    Args:
        args: As in the base class.
        short_options: The options that ``--help`` shows below the description; if empty, it shows
            all.
        kwargs: As in the base class.
    """

    def __init__(self, *args: Any, short_options: str = "", **kwargs: Any) -> None:
        chosen = {"allow_abbrev": False, "formatter_class": _HelpFormatter, **kwargs}
        super().__init__(*args, **chosen)
        self.short_options = short_options

    def format_help(self, *args: Any) -> str:
        """Begin with what one would type: there is no line that lists every option."""
        if self.short_options:
            return f"{self.description}\n{self.short_options}"
        self.usage = argparse.SUPPRESS
        return super().format_help(*args)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise input_error_behind(ex) or InputError(explain(message, self))


class TTACLI(LightningCLI):
    """LightningCLI with the verb ``adapt``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Name the verbs, and for each the arguments that come from model and data."""
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
            "adapt": {"model", "dataloaders", "datamodule"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add an option to every verb: the help is short without it."""
        parser.add_argument("--help_all", action=_HelpAll, help="show every option and exit")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse arguments, given here or those of the process."""
        try:
            self.config = parser.parse_args(args)
        except UnicodeDecodeError as error:
            raise InputError(
                f"A configuration file is not text: {error}. Expected YAML in UTF-8."
            ) from error
        seed = self.config[self.config.subcommand].seed_everything
        if not 0 <= (seed or 0) <= MOST_SEED:
            raise InputError(f"seed_everything = {seed}: expected 0 to {MOST_SEED:,}.")

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what one of them says of its arguments is a sentence."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            if isinstance(error, TypeError) and not _is_of_a_library(error):
                raise  # a mistake in a class of the user's own, who wants to see where
            message = explain(str(error), self.parser)
            raise input_error_behind(error) or InputError(message) from error

    def after_fit(self) -> None:
        """Say where the checkpoint is, which `tta adapt` takes as a network."""
        path = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if path and self.trainer.is_global_zero:
            Console(markup=False).print(f"checkpoint: {path}", soft_wrap=True)

    def after_adapt(self) -> None:
        """Say how it went and where the results are."""
        folder = run_folder(self.trainer)
        if folder is not None:
            Console(markup=False).print(summarise(Run.load(folder)), soft_wrap=True)

    def before_test(self) -> None:
        """Refuse to test an adapter before anything runs."""
        self._refuse_adapter()

    def before_validate(self) -> None:
        """Refuse to validate an adapter before anything runs."""
        self._refuse_adapter()

    def before_fit(self) -> None:
        """Refuse an adapter, and a training whose checkpoints nobody could use."""
        self._refuse_adapter()
        trains = isinstance(self.model, SourceTraining | MT3)
        if trains and describe(self.model.network).spec is None:
            raise InputError(
                "Checkpoints of this training could not be used: the network was made from a "
                "`class_path` inside another one, which leaves no trace of its arguments. Name the "
                "inner one as {spec: package.module.Class, argument: value} instead."
            )

    def _refuse_adapter(self) -> None:
        if isinstance(self.model, Adapter):
            raise InputError(
                f"{type(self.model).__name__} is a test-time adaptation method: `tta "
                f"{self.subcommand}` is not for it. Use `tta adapt` with the same options."
            )


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0; 2 when something given was wrong; 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    _hide_advertisements()
    try:
        if arguments and arguments[0] in PLAIN:
            return _run_plain(arguments[0], arguments[1:])
        TTACLI(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            save_config_callback=_SaveConfig,
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={
                "description": DESCRIPTION,
                "short_options": short_help(None),
                "version": __version__,
                **{
                    verb: {"description": EXAMPLES[verb], "short_options": short_help(verb)}
                    for verb in TTACLI.subcommands()
                },
            },
            auto_configure_optimizers=False,
            args=arguments,
        )
    except SIGTERMException:
        sys.stderr.write("error: stopped by SIGTERM; what was done until then is kept\n")
        return 143
    except Exception as error:
        known = input_error_behind(error)
        if known is None:
            raise
        sys.stderr.write(f"error: {_without_worker(known)}\n")
        return 2
    return 0


def completion(arguments: Sequence[str]) -> int:
    """Run ``tta completion``: print the script that completes commands in a shell.

    Args:
        arguments: What follows ``tta completion``.

    Returns:
        Exit code.

    Raises:
        InputError: The shell is unknown, or the package shtab is missing.
    """
    parser = argparse.ArgumentParser("tta completion")
    parser.add_argument("shell", metavar="SHELL", help=", ".join(SHELLS))
    shell = parser.parse_args(list(arguments)).shell
    if shell not in SHELLS:
        raise unknown_name("shell", shell, SHELLS)
    (verbs,) = (
        action.choices
        for action in capture_parser(main, ())._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    sys.stdout.write(completion_script(shell, verbs, {verb: _help_of(verb) for verb in PLAIN}))
    return 0


# The verbs that parse their arguments themselves.
PLAIN: dict[str, Callable[[Sequence[str]], int]] = {
    "compare": compare,
    "report": report,
    "completion": completion,
}


def _run_plain(verb: str, arguments: Sequence[str]) -> int:
    """Run a verb that parses its arguments itself; an option that it does not have ends here."""
    text = _help_of(verb)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(f"{EXAMPLES[verb]}\n{text}")
        return 0
    known = options_in(text)
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--")
        if argument.startswith("--") and name not in known:
            raise InputError(unknown_option(name, known))
    return PLAIN[verb](arguments)


def _help_of(verb: str) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        PLAIN[verb](["--help"])
    return text.getvalue()


def _is_of_a_library(error: Exception) -> bool:
    """Whether an error was raised by code that checks arguments, and not by the user's own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return name.partition(".")[0] in _LIBRARIES


def _without_worker(error: InputError) -> str:
    """Drop what a worker process wraps around the message of an error."""
    text = str(error)
    return text.rsplit("InputError: ", 1)[-1].strip() if "DataLoader worker" in text else text


def _hide_advertisements() -> None:
    """Drop Lightning's tips on other products from its log."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
