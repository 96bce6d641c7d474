"""What the command line says of itself: its help, the nearest name in its errors, completion."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import capture_parser

from tests.conftest import CONFIGS
from tta_lightning import data, meta, methods
from tta_lightning.cli import main
from tta_lightning.data.scenarios import SCENARIOS

ROOT = CONFIGS.parent
LIGHTNING = ("fit", "validate", "test", "adapt")
VERBS = (*LIGHTNING, "compare", "report", "completion")


def examples(text):
    """The commands that a help begins with, after a sentence: all lines before the next text."""
    _, _, rest = text.partition("\n\n")
    shown, _, _ = rest.partition("\n\n")
    return shown.splitlines()


@pytest.fixture(scope="module")
def helps(tta):
    """What ``--help`` of each verb says; that of None is ``tta --help``."""
    outcomes = {verb: tta(ROOT, verb, "--help") for verb in VERBS}
    outcomes[None] = tta(ROOT, "--help")
    assert {(outcome.code, outcome.err) for outcome in outcomes.values()} == {(0, "")}
    return {verb: outcome.out for verb, outcome in outcomes.items()}


# Help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_help_begins_with_what_one_would_type(helps, verb):
    lines = examples(helps[verb])
    assert 2 <= len(lines) <= 4
    assert {tuple(line.split()[:2]) for line in lines} == {("tta", verb)}
    assert helps[verb].splitlines()[0].endswith(".")
    assert max(map(len, helps[verb].splitlines())) <= 100


def test_help_lists_every_verb_after_four_commands(helps):
    verbs = [line.split()[1] for line in examples(helps[None])]
    assert verbs == ["fit", "adapt", "compare", "report"]
    listed = re.findall(r"^  (\w+) +[A-Z]", helps[None], flags=re.MULTILINE)
    assert tuple(listed) == VERBS


@pytest.mark.parametrize("verb", LIGHTNING)
def test_help_is_a_screen_long(helps, verb):
    assert len(helps[verb].splitlines()) <= 30
    assert "usage:" not in helps[verb]


def chosen(text, option):
    """The names that a help lists beside an option."""
    (listed,) = re.findall(rf"--{option} CLASS +(.*?)\n +--", text, flags=re.DOTALL)
    return {name.strip() for name in listed.split(",")}


def test_help_names_every_method_and_training(helps):
    assert chosen(helps["adapt"], "model") == set(methods.__all__)
    assert chosen(helps["adapt"], "data") == {"Stream"}
    assert chosen(helps["fit"], "model") == set(meta.__all__)
    assert chosen(helps["fit"], "data") == {"LabelledImages", "LabelledTasks", "ShiftedImages"}


@pytest.mark.parametrize("verb", LIGHTNING)
def test_options_of_the_short_help_exist(helps, verb):
    parser = capture_parser(main, [])._subcommands_action.choices[verb]
    there = {option for action in parser._actions for option in action.option_strings}
    shown = set(re.findall(r"^  (--?[\w.+]+)", helps[verb], flags=re.MULTILINE))
    of_classes = {"--model.network", "--data.severity"}  # the commands of the help use them
    assert {"-c", "--print_config", "--help_all", "--trainer.run_dir"} <= shown
    assert shown - of_classes <= there


@pytest.fixture
def workplace(tmp_path, tta):
    """A folder with the shipped configurations, and that of a run."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    (tmp_path / "runs" / "tent").mkdir(parents=True)
    files = ("-c", "configs/adapt/tent.yaml", "-c", "configs/stream/digits.yaml")
    printed = tta(tmp_path, "adapt", *files, "--print_config")
    (tmp_path / "runs" / "tent" / "config.yaml").write_text(printed.out)
    return tmp_path


@pytest.mark.parametrize("verb", LIGHTNING)
def test_commands_of_the_help_are_understood(helps, tta, workplace, verb):
    first = [line for line in examples(helps[None]) if line.split()[1] == verb]
    for line in examples(helps[verb]) + first:
        outcome = tta(workplace, *shlex.split(line)[1:], "--print_config")
        assert (outcome.code, outcome.err) == (0, ""), line
        for file in re.findall(r"configs/(?:fit|adapt)/\S+", line):
            (name,) = re.findall(r"class_path: (\w+)", (workplace / file).read_text())[:1]
            assert f".{name}\n" in outcome.out


@pytest.mark.parametrize("verb", ["compare", "report"])
def test_commands_that_read_runs_are_understood(helps, tta, tmp_path, verb):
    first = [line for line in examples(helps[None]) if line.split()[1] == verb]
    for line in examples(helps[verb]) + first:
        outcome = tta(tmp_path, *shlex.split(line)[1:])
        assert outcome.code == 2
        # it was understood: what lacks are the runs
        assert re.match(r"error: \S*runs/.*(cannot be read|there is no run)", outcome.err)


def test_help_all_adds_the_options_of_the_trainer(helps, tta):
    outcome = tta(ROOT, "adapt", "--help_all")
    assert outcome.code == 0
    assert examples(outcome.out) == examples(helps["adapt"])
    for word in ("--trainer.gradient_clip_val", "--resume_from", "tta_lightning.methods.Tent"):
        assert word in outcome.out
    assert "--trainer.gradient_clip_val" not in helps["adapt"]
    assert "usage:" not in outcome.out


def test_help_of_a_class_lists_its_options(tta):
    outcome = tta(ROOT, "adapt", "--model.help", "MGTTA")
    assert outcome.code == 0
    assert "--model.statistics_weight" in outcome.out
    outcome = tta(ROOT, "adapt", "-c", "configs/adapt/tent.yaml", "--model.rule.help", "SGD")
    assert outcome.code == 0
    assert "--rule.momentum" in outcome.out


# The nearest name ---------------------------------------------------------------------------------

TENT = ("adapt", "-c", "configs/adapt/tent.yaml", "-c", "configs/stream/digits.yaml")
NEAREST = {  # what is given: the words that the sentence must hold
    "verb": (("adpat",), ["Unknown verb 'adpat'", "mean 'adapt'?", "report"]),
    "verb of its own": (("comapre", "runs"), ["mean 'compare'?"]),
    "last verb": (("reprot", "runs"), ["mean 'report'?"]),
    "no verb": ((), ["There is no verb", "fit,validate", "tta --help"]),
    "only a file": (("-c", "configs/trainer/cpu.yaml"), ["There is no verb"]),
    "file before the verb": (
        ("-c", "configs/adapt/tent.yaml", "adapt"),
        ["after the verb: tta adapt -c"],
    ),
    "help before the verb": (("--model.help", "Tent"), ["after the verb: tta adapt"]),
    "first option": (("--verison",), ["'verison'", "mean 'version'?"]),
    "help": (("adapt", "--hlep"), ["'hlep'", "mean 'help'?"]),
    "nothing": (
        ("adapt",),
        ["required: model and data", "-c configs/adapt/tent.yaml -c configs/stream/digits.yaml,"],
    ),
    "no data": (
        TENT[:3],
        ["Nothing chooses what is required: data.", "--data CLASS", "tta adapt --help"],
    ),
    "nothing to fit": (("fit",), ["-c configs/fit/digits_bn.yaml,", "tta fit --help"]),
    "no -c": (("adapt", TENT[2]), ["goes after -c: -c configs/adapt/tent.yaml"]),
    "a word": ((*TENT, "extra"), ["Unexpected 'extra'", "start with --"]),
    "file": (("adapt", "-c", "configs/adapt/tnet.yaml"), ["mean 'configs/adapt/tent.yaml'?"]),
    "folder of a file": (
        ("adapt", "-c", "configs/adpat/rotta.yaml"),
        ["configs/adpat/rotta.yaml does not exist", "mean 'configs/adapt/rotta.yaml'?"],
    ),
    "ending of a file": (("fit", "-c", "configs/fit/mgg.yml"), ["mean 'configs/fit/mgg.yaml'?"]),
    "file without folder": (("adapt", "-c", "tent.yaml"), ["mean 'configs/adapt/tent.yaml'?"]),
    "file without folder, misspelt": (
        ("adapt", "-c", "contiual.yaml"),
        ["mean 'configs/stream/continual.yaml'?"],
    ),
    "file in another folder": (
        ("adapt", "-c", "configs/adapt/recurring.yaml"),
        ["mean 'configs/stream/recurring.yaml'?"],
    ),
    "file of the trainer": (
        (*TENT, "--trainer", "configs/trainer/cpuu.yaml"),
        ["mean 'configs/trainer/cpu.yaml'?"],
    ),
    "file of the model": ((*TENT, "--model", "sourc.yaml"), ["mean 'configs/adapt/source.yaml'?"]),
    "folder for a file": (("adapt", "-c", "configs/adapt"), ["configs/adapt is a folder"]),
    "option before the file": (
        ("adapt", "--model.network", "x", *TENT[1:]),
        ["Option 'model.network' comes before", "-c FILE or --model CLASS"],
    ),
    "misspelt option before the file": (
        ("fit", "--model.netwrok", "x", "-c", "configs/fit/digits_bn.yaml"),
        ["Option 'model.netwrok' comes before", "mean 'model.network'?"],
    ),
    "option of a rule before the file": (
        ("adapt", "--model.rule.lr", "1", *TENT[1:]),
        ["Option 'model.rule.lr' comes before", "--model CLASS"],
    ),
    "option of the data before the file": (
        ("adapt", "--data.severity", "1", *TENT[1:]),
        ["Option 'data.severity' comes before", "--data CLASS"],
    ),
    "option before the callback": (
        (*TENT, "--trainer.callbacks.weigth", "1", "--trainer.callbacks+=STAG"),
        ["mean 'trainer.callbacks.weight'?", "--trainer.callbacks+=CLASS"],
    ),
    "option of the model": ((*TENT, "--model.netwrok", "x"), ["mean 'network'?"]),
    "option of the rule": ((*TENT, "--model.rule.beta", "x"), ["mean 'betas'?"]),
    "option that another class has": (
        (*TENT, "--model", "Source", "--model.rule.lr", "1"),
        ["Unknown option 'rule.lr'. See --help."],
    ),
    "hyphen": ((*TENT, "--resume-from", "x"), ["'resume-from'", "mean 'resume_from'?"]),
    "hyphen in the trainer": ((*TENT, "--trainer.run-dir", "x"), ["mean 'trainer.run_dir'?"]),
    "rate": ((*TENT, "--lr", "1"), ["mean 'model.lr' or 'model.rule.lr'?"]),
    "severity": ((*TENT, "--severity", "1"), ["mean 'data.severity'?"]),
    "seed": ((*TENT, "--seed", "1"), ["mean 'seed_everything'?"]),
    "class in lower case": ((*TENT, "--model", "eata"), ["'eata'", "mean 'EATA'?"]),
    "precision": ((*TENT, "--trainer.precision", "bf16mixed"), ["mean 'bf16-mixed'?"]),
    "help of a class": ((*TENT, "--model.help", "Tnet"), ["mean 'Tent'?"]),
    "option of compare": (("compare", "--forse", "a"), ["'forse'", "mean 'force'?"]),
    "option of report": (("report", "a", "--figure=b"), ["'figure'", "mean 'figures'?"]),
    "shell": (("completion", "bahs"), ["Unknown shell 'bahs'", "mean 'bash'?"]),
}


@pytest.mark.parametrize(("arguments", "words"), NEAREST.values(), ids=NEAREST.keys())
def test_an_error_names_the_nearest(tta, arguments, words):
    outcome = tta(ROOT, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


def test_what_is_like_nothing_gets_no_suggestion(tta, tmp_path):
    for arguments in (("quux",), (*TENT[:1], "--zzzz"), ("adapt", "-c", "zzzz.yaml")):
        outcome = tta(tmp_path, *arguments)
        assert outcome.code == 2
        assert "mean" not in outcome.err


def test_the_nearest_file_may_be_a_neighbour_anywhere(tta, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tent_digits.yaml").write_text("seed_everything: 1\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    wanted = tmp_path / "mine" / "tnet_digits.yaml"
    outcome = tta(folder, "adapt", "-c", wanted)
    assert f"{wanted} does not exist. Did you mean '{tmp_path}/mine/tent_digits.yaml'?" in (
        outcome.err
    )


# Completion ---------------------------------------------------------------------------------------

COMPLETIONS = {  # what is typed: what may follow, exactly or among others
    "ad": {"adapt"},
    "comp": {"compare", "completion"},
    "adapt -c configs/adapt/ten": {"configs/adapt/tent.yaml"},
    "adapt -c configs/adapt/tent.yaml -c configs/stream/conti": {"configs/stream/continual.yaml"},
    "adapt --model Te": {"Tent"},
    "fit --model So": {"SourceTraining"},
    "adapt --model.rule.mom": {"--model.rule.momentum"},
    "adapt --data.scenario single": {"single_sample"},
    "adapt --data.source Ima": {"ImageFolder", "ImageNetC", "ImageNetVariant"},
    "adapt --trainer.callbacks+ ST": {"STAG"},
    "adapt --resume": {"--resume_from"},
    "report conf": {"configs"},
    "report --fig": {"--figures"},
    "compare --fo": {"--force"},
    "completion z": {"zsh"},
}
ASK = """
source "$1"
complete -p tta >&2
function=$(complete -p tta | sed -E 's/.* -F ([^ ]+) .*/\\1/')
while IFS= read -r line; do
  COMP_WORDS=(tta $line) COMPREPLY=()
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE="tta $line" COMP_POINT=$((${#line} + 4))
  $function tta "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
  echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def script(tta, tmp_path_factory):
    """The script that bash sources."""
    pytest.importorskip("shtab")
    outcome = tta(ROOT, "completion", "bash")
    assert (outcome.code, outcome.err) == (0, "")
    path = tmp_path_factory.mktemp("completion") / "tta"
    path.write_text(outcome.out)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_files_classes_and_options(script):
    process = subprocess.run(
        ["bash", "-c", ASK, "ask", script],
        input="\n".join(COMPLETIONS) + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.match(r"complete .*-F \w+ tta\n$", process.stderr)
    answers = [set(line.split()) for line in process.stdout.splitlines()]
    assert dict(zip(COMPLETIONS, answers, strict=True)) == COMPLETIONS


def test_completion_knows_all_scenarios_and_sources(script):
    words = set(re.findall(r"\w+", script.read_text()))
    sources = {name for name in data.__all__ if name.startswith(("CIFAR", "Image"))}
    assert sources >= {"CIFAR10C", "ImageFolder", "ImageNetC", "ImageSource"}
    assert words >= set(SCENARIOS) | (sources - {"ImageSource"})
    assert "ImageSource" not in words  # it is only a base class


@pytest.mark.parametrize(("shell", "start"), [("zsh", "#compdef tta"), ("fish", None)])
def test_other_shells_have_a_script(tta, shell, start):
    pytest.importorskip("shtab")
    outcome = tta(ROOT, "completion", shell)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(start or "")
    assert "resume_from" in outcome.out
    assert "single_sample" in outcome.out


def test_completion_says_what_it_needs(tta, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)  # as where it is not installed
    outcome = tta(ROOT, "completion", "bash")
    assert (outcome.code, outcome.out) == (2, "")
    assert "needs the package shtab: pip install 'tta_lightning[completion]'" in outcome.err


def test_the_page_on_completion_shows_commands_that_exist(helps):
    page = Path(ROOT, "docs", "shell_completion.md").read_text()
    shells = set(re.findall(r"tta completion (\w+)", page))
    assert shells == {"bash", "zsh", "fish", "SHELL"}
    for line in examples(helps["completion"]):
        assert line.strip() in page
