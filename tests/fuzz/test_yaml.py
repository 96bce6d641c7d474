"""Configurations of any kind through the command line: a run, or exit code 2 and one sentence."""

import copy
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import CONFIGS, CPU
from tests.fuzz.profiles import assert_whole, examples, time_limit, tried

NETWORK = {
    "class_path": "tta_lightning.models.SmallConvNet",
    "init_args": {"width": 8, "num_classes": 2},
}
STREAM = {
    "class_path": "Stream",
    "init_args": {
        "source": {"class_path": "ImageFolder", "init_args": {"root": "images"}},
        "corruptions": ["contrast"],
        "severity": 3,
        "batch_size": 2,
    },
}


def shipped(name):
    """A configuration of ours, on a small network and a small stream."""
    config = yaml.safe_load((CONFIGS / "adapt" / f"{name}.yaml").read_text())
    config["model"]["init_args"]["network"] = NETWORK
    return copy.deepcopy({**config, "data": STREAM})


NAMES = ("source", "tent", "bnstats", "sar", "deyo", "cotta", "rotta", "roid", "lame", "t3a")
# how often something is done: a large number is no mistake, it takes long
REPEATED = ("n_augmentations", "steps", "copies", "max_steps", "devices", "num_nodes")
CLASSES = st.sampled_from(
    [
        *(
            "Tent",
            "Tnet",
            "SGD",
            "Stream",
            "ImageFolder",
            "tta_lightning.methods.SAR",
            "",
            ".",
            "1",
        ),
        *("os.system", "builtins.print", "builtins.int", "torch.nn.Linear", "a..b", "é", "Tent "),
        *("lightning.pytorch.LightningModule", "tta_lightning.data", "tta_lightning.no.such"),
    ]
)
ODD = st.sampled_from(
    [0, -1, 1.5, 2**31, 2**63, 10**30, 1e308, math.nan, math.inf, -math.inf, "", " ", "no", "1e3"]
)
SMALL = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=6)
JUNK = st.recursive(
    SMALL | ODD,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=5,
)
TRAINER = st.sampled_from(
    [
        *("precision", "limit_test_batches", "max_epochs", "callbacks", "logger", "fast_dev_run"),
        *("profiler", "log_every_n_steps", "overfit_batches", "gradient_clip_val", "max_epoch"),
    ]
)


def places(value, path=()):
    """Every place in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))


@st.composite
def changed(draw):
    """A configuration of ours with one or two things changed."""
    config = shipped(draw(st.sampled_from(NAMES)))
    for _ in range(draw(st.integers(1, 2))):
        *parents, key = draw(st.sampled_from(list(places(config))))
        holder = config
        for parent in parents:
            holder = holder[parent]
        match draw(st.sampled_from(["drop", "value", "odd", "class", "new", "trainer", "swap"])):
            case "drop":
                del holder[key]
            case "value":
                holder[key] = draw(JUNK)
            case "odd":
                holder[key] = 2 if key in REPEATED else draw(ODD)
            case "class":
                holder[key] = draw(CLASSES)
            case "new" if isinstance(holder, dict):
                holder[draw(st.text(max_size=8) | CLASSES)] = draw(JUNK)
            case "trainer":
                config["trainer"] = {draw(TRAINER): draw(JUNK)}
            case "swap":
                holder[key] = shipped("tent")
        if not config:
            break
    return yaml.safe_dump(config)


LAUGHS = "a: &a [1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcde", "bcdef", strict=True)
)
WORDS = st.sampled_from(
    [
        *("\t", "\0", "\x07", "\ufeff", "\udcff", "&a [*a]\n", "<<: *a\n", "*a", "---\n", "...\n"),
        *("[" * 3_000, "{" * 500, "%YAML 9.9\n", "? ", ": ", "- ", "!!set {a}", "!!binary '='"),
        *("!!python/object/apply:os.mkdir [hacked]", "!!python/name:os.system", "'", '"', "#", "|"),
        *("x: !!python/object/apply:os.mkdir [hacked]\n", "${oc.env:HOME}", "9" * 5_000, LAUGHS),
        *("seed_everything: -1\n", "model: Tent\n", "data: Stream\n", "trainer: {devices: 2}\n"),
        *("2001-99-99", "0o9", "1_0", "!!int x", "!!float x", "!!timestamp x", "!a", "@", "`"),
    ]
)


@st.composite
def texts(draw):
    """The text of a configuration of ours, cut or with something put in, as bytes."""
    text = yaml.safe_dump(shipped(draw(st.sampled_from(NAMES))))
    lines = text.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines)))
    match draw(st.sampled_from(["cut", "line", "inside", "twice", "after"])):
        case "cut":
            text = text[: draw(st.integers(0, len(text)))]
        case "line":
            text = "".join([*lines[:place], draw(WORDS), *lines[place:]])
        case "inside":
            place = draw(st.integers(0, len(text)))
            text = text[:place] + draw(WORDS) + text[place:]
        case "twice":
            text = "".join([*lines[: place + 1], *lines[place:]])
        case "after":
            text += draw(WORDS)
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]))
    return text.encode(encoding, "surrogateescape" if encoding == "utf-8" else "replace")


@pytest.fixture(scope="module")
def images(tmp_path_factory, noise_images):
    return noise_images(tmp_path_factory.mktemp("yaml") / "images", "cat", "dog")


def of(**options):
    """Tent's configuration with other options of the stream."""
    config = shipped("tent")
    config["data"]["init_args"].update(options)
    return yaml.safe_dump(config)


@examples(0.5)
@given(changed().map(str.encode) | texts() | st.binary(max_size=30))
@example(b"")
@example(b"x: !!python/object/apply:os.mkdir [hacked]\n")
@example(LAUGHS.encode())
@example(b"&a [*a]")
@example(b"model: &a {class_path: Tent, init_args: *a}")
@example(b"[" * 3_000)
@example(of(seed=-1).encode())
@example(of(num_workers=10**9).encode())
@example(of(crop_pct=1e-300, image_size=16).encode())
@pytest.mark.filterwarnings("ignore")
def test_a_file_is_run_or_refused_in_a_sentence(tta, images, data):
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(images, Path(place, "images"))
        Path(place, "config.yaml").write_bytes(data)
        before = sorted(Path(place).rglob("*"))
        with time_limit():
            outcome = tta(
                Path(place),
                *("adapt", "-c", "config.yaml", *CPU, "--data.limit", "4"),
                *("--trainer.run_dir", "run", "--trainer.enable_progress_bar", "false"),
            )
        tried["taken" if outcome.code == 0 else "refused"] += 1
        assert "Traceback" not in outcome.err + outcome.out
        assert outcome.code in (0, 2)
        run = Path(place, "run")
        if outcome.code == 2:
            (line,) = [x for x in outcome.err.splitlines() if x.startswith("error: ")]
            assert outcome.err.rstrip("\n").endswith(line)
        assert_whole(run)
        others = [
            path for path in sorted(Path(place).rglob("*")) if run not in (path, *path.parents)
        ]
        assert others == before
