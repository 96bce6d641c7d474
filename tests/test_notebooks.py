"""The notebooks are text, and run from top to bottom in an empty folder, without a network."""

import os
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("mlxtend")
for needed in ("ipykernel", "ipywidgets"):
    pytest.importorskip(needed, reason=f"the notebooks need {needed}")
jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
LIMIT = 180  # seconds a notebook
SVG, PNG, WIDGET = "image/svg+xml", "image/png", "application/vnd.jupyter.widget-view+json"
FIGURES = {  # at least, of both kinds
    "01_quickstart": (3, 1),
    "02_adaptation_curves": (9, 0),
    "03_mgg": (4, 0),
    "04_mt3": (3, 2),
    "05_stag": (5, 0),
    "06_your_own_method": (3, 0),
}
HEADER = {
    "jupytext": {"text_representation": {"extension": ".py", "format_name": "percent"}},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """One folder for the networks that notebooks share: the first one that needs one trains it."""
    return tmp_path_factory.mktemp("networks")


def run(notebook, folder):
    """Execute a notebook in a folder; raises what a cell raises."""
    deadline = time.monotonic() + LIMIT
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        timeout_func=lambda cell: max(1, round(deadline - time.monotonic())),
    )
    client.execute()


def shown(notebook, kind):
    """Everything of a kind that the cells of an executed notebook show."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return [o["data"][kind] for o in outputs if kind in o.get("data", {})]


def test_all_are_known_and_listed():
    assert [path.stem for path in NOTEBOOKS] == list(FIGURES)
    listed = re.findall(r"\]\((\w+\.py)\)", (FOLDER / "README.md").read_text())
    assert listed == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_text_without_outputs(path):
    text = path.read_text()
    notebook = jupytext.read(path)
    kept = {key: notebook.metadata[key] for key in notebook.metadata}
    assert kept == HEADER  # no version of the program that saved it last, no state of widgets
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert max(map(len, text.splitlines())) <= 110  # a picture in base64 is one long line
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, networks, tmp_path, monkeypatch):
    monkeypatch.setenv("TTA_NOTEBOOK_NETWORKS", str(networks))
    # On a busy machine two threads wait for each other for most of the time
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    notebook = jupytext.read(path)
    run(notebook, tmp_path)
    vectors, pixels = shown(notebook, SVG), shown(notebook, PNG)
    least = FIGURES[path.stem]
    assert (len(vectors) >= least[0], len(pixels) >= least[1]) == (True, True)
    for picture in vectors:
        drawn = ElementTree.fromstring(picture)
        marks = [e for e in drawn.iter() if e.tag.endswith("}path") and len(e.get("d", "")) > 1]
        assert len(marks) > 5  # a chart without data has its axes alone
    if path.stem == "02_adaptation_curves":
        assert shown(notebook, WIDGET)
        (page,) = [text for text in shown(notebook, "text/html") if "<iframe" in text]
        assert "https://cdn" not in page  # it carries the libraries itself
