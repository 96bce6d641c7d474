"""The site builds, leads nowhere wrong, fetches nothing, and what its pages show is what runs."""

import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from jsonargparse import capture_parser
from PIL import Image

from tests import test_adapter
from tests.browser import Visit, chromium
from tests.test_readme import PAGES as PAGES_THAT_RUN_ELSEWHERE
from tests.test_readme import blocks, globbed, unrolled
from tta_lightning import Stream, Trainer, callbacks, data, meta, methods, rules
from tta_lightning.cli import main
from tta_lightning.data.scenarios import SCENARIOS
from tta_lightning.errors import InputError
from tta_lightning.methods import Source, Tent
from tta_lightning.models import SmallConvNet

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if str(path.relative_to(ROOT)) not in PAGES_THAT_RUN_ELSEWHERE
]
VERBS = ("fit", "validate", "test", "adapt", "compare", "report", "completion")
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
OFFLINE = ("timm:resnet18", "timm:test_resnet")  # the same, in a second
COMMAND = re.compile(  # also behind a launcher; not `tta --help`
    r"(?:CUDA_VISIBLE_DEVICES=\d )?(?:torchrun .*--no-python |srun .*?)?(tta [a-z].*?)(?: &)?"
)


class Page(HTMLParser):
    """What a page of the site holds."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.unnamed, self.tags = [], [], [], [], []
        self.text = path.read_text("utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append(tag)
        if known.get("id"):
            self.ids.append(known["id"])
        if tag == "a" and known.get("href"):
            self.links.append(known["href"])
        if known.get(LOADED.get(tag)):
            self.loaded.append(known[LOADED[tag]])
        if tag == "img" and not known.get("alt"):
            self.unnamed.append(known.get("src"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The site, built as `make docs` does."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "l2m4m"):
        pytest.importorskip(package, reason="pip install 'tta_lightning[docs]'")
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def site(folder):
    """Its pages by their path."""
    return {path: Page(path) for path in sorted(folder.rglob("*.html"))}


def test_every_link_leads_somewhere(site):
    checked = 0
    for path, page in site.items():
        if path.name == "404.html":  # is shown at any address, so its links are those of a server
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                continue
            assert not parts.scheme, (path.name, link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), (path.name, link)
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].ids, (path.name, link)
            checked += 1
    assert checked > 1000


def test_ids_are_unique(site):
    for path, page in site.items():
        twice = {name for name in page.ids if page.ids.count(name) > 1}
        assert not twice, (path.name, twice)


def test_pictures_have_text(site):
    assert [page.unnamed for page in site.values() if page.unnamed] == []


def test_nothing_is_fetched_from_elsewhere(site, folder):
    for path, page in site.items():
        for address in page.loaded:
            parts = urlsplit(address)
            assert not parts.scheme, (path.name, address)
            assert not parts.netloc, (path.name, address)
        assert 'class="mermaid"' not in page.text  # the theme would fetch what draws it
    for path in folder.rglob("*.css"):
        text = path.read_text("utf-8")
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", text), path.name


def test_nothing_of_this_machine_is_in_it(site):
    for path, page in site.items():
        for place in (str(ROOT), str(Path.home()) + "/", sys.prefix):
            assert place not in page.text, (path.name, place)


def test_every_page_of_the_navigation_has_one_title(site):
    for path, page in site.items():
        assert page.tags.count("h1") == 1, path.name


@pytest.mark.parametrize("name", [*methods.__all__, "STAG", "MGG"])
def test_every_method_has_a_page_with_its_equation(site, folder, name):
    page = site[folder / "method" / f"{name.lower()}.html"]
    assert re.search(rf"<h1[^>]*>.*?{name}", page.text)
    assert "math" in page.tags
    assert f'id="tta_lightning.methods.{name}"' in site[folder / "api" / "methods.html"].text or (
        name in ("STAG", "MGG")
    )


def test_equations_were_turned_into_mathml(site):
    """No dollar is left over, but in code."""
    for path, page in site.items():
        without = re.sub(r"<(pre|code|script)\b.*?</\1>", "", page.text, flags=re.DOTALL)
        assert "$" not in without, (path.name, re.findall(r".{30}\$.{30}", without))


def section(text, start, level):
    """The part of a page from a heading with an id to the next one of its level."""
    begin = text.index(f'id="{start}"')
    end = re.search(rf"<h[2-{level}]\b", text[begin:])
    return text[begin : begin + end.start()] if end else text[begin:]


def test_the_reference_has_every_verb_and_its_options(site, folder):
    text = site[folder / "reference" / "cli.html"].text
    parts = {verb: section(text, f"tta-{verb}", 2) for verb in VERBS}
    expected = {
        **{
            "fit": ("-c", "--print_config", "--seed_everything", "--model", "--data", "--ckpt_path")
        },
        **{"validate": ("--ckpt_path", "--verbose"), "test": ("--ckpt_path", "--verbose")},
        **{"adapt": ("-c", "--model", "--data", "--resume_from"), "compare": ("-o", "--force")},
        **{"report": ("-o", "--figures"), "completion": ("SHELL",)},
    }
    for verb, options in expected.items():
        for option in options:
            assert f"<code>{option}</code>" in parts[verb], (verb, option)
    assert "--resume_from" not in parts["fit"]
    assert "--ckpt_path" not in parts["adapt"]
    trainer = section(text, "options-of-the-trainer", 2)
    for option in inspect.signature(Trainer).parameters.keys() - {"kwargs"}:
        assert f"<code>--trainer.{option}</code>" in trainer


def test_the_reference_has_every_class_and_scenario_and_their_options(site, folder):
    text = site[folder / "reference" / "classes.html"].text
    kinds = {
        "methods": (methods, object, "--model."),
        "trainings": (meta, object, "--model."),
        "rules": (rules, rules.UpdateRule, "--model.rule."),
        "callbacks": (callbacks, callbacks.AdaptCallback, "--trainer.callbacks."),
        "sources": (data, data.ImageSource, "--data.source."),
    }
    for kind, (package, base, prefix) in kinds.items():
        for name in package.__all__:
            item = getattr(package, name)
            if not inspect.isclass(item) or not issubclass(item, base) or item is base:
                continue
            part = section(text, f"{kind}-{name.lower()}", 3)
            parameters = inspect.signature(item).parameters.values()
            for parameter in parameters:
                assert f"<code>{prefix}{parameter.name}</code>" in part, (name, parameter.name)
                if isinstance(parameter.default, int | float | str) and parameter.default != "":
                    shown = str(parameter.default)
                    shown = shown.lower() if isinstance(parameter.default, bool) else shown
                    assert f"default <code>{shown}</code>" in part, (name, parameter.name)
    for name, scenario in SCENARIOS.items():
        part = section(text, name, 3)
        for parameter in inspect.signature(scenario).parameters.values():
            is_option = parameter.kind is parameter.KEYWORD_ONLY
            assert (f"<code>{parameter.name}</code>" in part) == is_option


def test_pages_that_are_opened_as_files(folder):
    """Search works without a server, nothing is asked for elsewhere, everybody can read them."""
    with chromium() as browser:
        visit = Visit(browser, folder / "index.html")
        visit.page.locator(".md-search__input").click()
        visit.page.keyboard.type("Fisher")
        found = '.md-search-result__link[href*="methods.html"][href*="EATA.fisher"]'
        visit.page.locator(found).first.wait_for(timeout=20_000)
        visits = [
            visit,
            Visit(browser, folder / "your_own_model.html", dark=True),
            Visit(browser, folder / "method" / "eata.html", width=390),
        ]
        for visit in visits:
            wide = "document.documentElement.scrollWidth > innerWidth"
            assert not visit.page.evaluate(wide), visit.page.url
            assert visit.said == []
            assert visit.elsewhere() == []
            # the theme gives several of its navigations the same name
            assert [v for v in visit.violations() if v[0] != "landmark-unique"] == []


# What the pages show ------------------------------------------------------------------------------


def make_images(folder, count=12):
    """A folder of JPEG files."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two small runs, of the source model and of Tent, on one stream."""
    pytest.importorskip("mlxtend")
    runs = tmp_path_factory.mktemp("finished")
    for name, method in (("source", Source), ("tent", Tent)):
        stream = Stream(
            data.Digits("test"),
            corruptions=["fog", "contrast"],
            severity=3,
            batch_size=10,
            limit=40,
        )
        trainer = Trainer(run_dir=runs / name, accelerator="cpu", enable_progress_bar=False)
        trainer.adapt(method(SmallConvNet()), datamodule=stream)
    return runs


@pytest.fixture
def workplace(tmp_path, monkeypatch, finished):
    """A folder with configurations, images, and the runs that pages speak of."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("photos", "clean"):
        make_images(tmp_path / name)
    for name in ("ant", "bat"):
        make_images(tmp_path / "sorted" / name, 2)
    shutil.copytree(finished, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def commands():
    """Every tta command of the pages once, from blocks that are to be typed or are scripts."""
    found = {}
    for path in SOURCES:
        text = path.read_text("utf-8")
        for block in re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            for line in unrolled(block).splitlines():
                command = COMMAND.fullmatch(line.strip())
                if command:
                    typed = " ".join(command[1].partition(" > ")[0].split())
                    found.setdefault(typed, path.name)
    return found


def write_modules(folder):
    """Save the classes of the reader's own that pages begin with their file's name."""
    for page in ("your_own_model.md", "writing_a_method.md"):
        for block in blocks("python", (ROOT / "docs" / page).read_text()):
            name = re.match(r"# (my_\w+\.py)", block)
            if name:
                (folder / name[1]).write_text(block)


def test_commands_are_understood(workplace, capsys):
    """Those that only look at runs are run; the others are parsed, with all their files."""
    write_modules(workplace)
    parser = capture_parser(main, ["adapt"])
    finished = itertools.cycle(("tent", "source"))
    found = commands()
    assert {shlex.split(line)[1] for line in found} >= {"fit", "adapt", "compare", "report"}
    for line, page in found.items():
        _, verb, *arguments = shlex.split(line)
        arguments = [re.sub(r"\$\w+", "tent", each) for each in arguments if each != "$FROM"]
        if verb in ("fit", "validate", "test", "adapt"):
            try:
                parser.parse_args([verb, *arguments])
            except InputError as error:
                pytest.fail(f"{page}: {line}: {error}")
            continue
        shown = [each for pattern in arguments for each in globbed(pattern)]
        for run in (each for each in shown if each.startswith("runs/") and not Path(each).exists()):
            shutil.copytree(Path("runs", next(finished)), run)
        assert main([verb, *shown]) == 0, (page, line, capsys.readouterr().err)
    assert Path("report.html").stat().st_size > 0
    assert {path.suffix for path in Path("figures").iterdir()} == {".png", ".pdf"}


def run_blocks(page, namespace, replaced=("", "")):
    """Execute the Python of a page, one block after the other."""
    for block in blocks("python", (ROOT / "docs" / page).read_text()):
        exec(compile(block.replace(*replaced), page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT / "docs")) for path in SOURCES])
def test_python_compiles(page):
    for block in blocks("python", (ROOT / "docs" / page).read_text()):
        compile(block, page, "exec")


def test_python_of_the_home_page():
    assert run_blocks("index.md", {})["logits"].shape == (16, 10)


def test_python_of_the_figures(workplace):
    namespace = run_blocks("figures.md", {})
    assert namespace["png"].startswith(b"\x89PNG")
    assert sorted(path.name for path in Path("figures").iterdir()) == [
        "running_accuracy.pdf",
        "running_accuracy.png",
    ]
    assert len(namespace["charts"]) == 5
    assert set(namespace["worst"].index) == {"fog", "contrast"}
    assert namespace["settings"]["stream.severity"] == 3
    for frame in ("predictions", "curve", "metrics", "manifest"):
        row = re.search(rf"^\| `run\.{frame}` .*$", (ROOT / "docs/figures.md").read_text(), re.M)
        named = re.findall(r"`(\w+)`", row[0])
        assert set(named) <= set(getattr(namespace["run"], frame).columns), frame


def test_the_tutorial_from_a_checkpoint_to_plain_timm(workplace, capsys):
    page = ROOT / "docs" / "your_own_model.md"
    shown = blocks("python", page.read_text())
    exec(compile(shown[0].replace('"resnet18"', '"test_resnet"'), page.name, "exec"), {})
    first = unrolled(blocks("bash", page.read_text())[0]).strip().replace(*OFFLINE)
    assert main([*shlex.split(first)[1:], "--data.image_size=64"]) == 0, capsys.readouterr().err
    written = {path.name for path in Path("runs/photos").iterdir()}
    assert {"predictions.csv", "adapted.safetensors", "report.html"} <= written
    lines = Path("runs/photos/predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 12
    namespace = run_blocks(page.name, {}, ('resnet18"', 'test_resnet"'))
    assert namespace["logits"].shape == (2, 10)


@pytest.fixture(scope="module")
def written():
    """What the page on writing a method defines."""
    return run_blocks("writing_a_method.md", {"__name__": "my_methods"})


def test_the_method_of_the_page_learns(written):
    assert written["logits"].shape == (16, 10)
    assert written["adapter"].report.updated


@pytest.mark.parametrize("norm", ["bn", "gn", "ln"])
def test_the_method_of_the_page_passes_the_contract(written, norm):
    make = written["METHODS"]["balanced"]
    checks = [
        check
        for name, check in inspect.getmembers(test_adapter.TestContract(), inspect.ismethod)
        if name.startswith("test_") and [*inspect.signature(check).parameters] == ["make", "norm"]
    ]
    assert len(checks) >= 10
    for check in checks:
        check(make, norm)
