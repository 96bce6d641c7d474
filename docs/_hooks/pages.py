"""Pages that no file of docs/ holds: those made of the program, and files from elsewhere."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command_line import class_reference, verb_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# where in the site the repository's own pages are
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "notebooks/README.md": "notebooks.md",
}
_AT_HOME = {page: file for file, page in ELSEWHERE.items() if page != "index.md"}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)(?P<file>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and those that pages link to outside docs/."""
    made = {"reference/cli.md": verb_reference(), "reference/classes.md": class_reference()}
    for page, file in _AT_HOME.items():
        if (ROOT / file).is_file():  # else mkdocs says that the page lacks
            made[page] = (ROOT / file).read_text("utf-8")
    written = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for page, text in {**written, **made}.items():
        made |= {_page_of(file): _listing(file) for file in _linked_sources(text, page)}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Lead links that are right in the repository to the pages that they have in the site."""
    here = page.file.src_uri

    def lead(link: re.Match[str]) -> str:
        target = _page_of(_resolved(link["file"], here))
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (link["anchor"] or "")

    return _LINK.sub(lead, markdown)


def _resolved(link: str, page: str) -> str:
    """Return the path in the repository that a link on a page means."""
    folder = posixpath.dirname(_AT_HOME.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, link))


def _page_of(file: str) -> str:
    """Return the address in the site of a file of the repository."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    if file in ELSEWHERE:
        return ELSEWHERE[file]
    return f"source/{file}.md" if (ROOT / file).is_file() else file


def _linked_sources(text: str, page: str) -> Iterator[str]:
    """Yield the files outside docs/ that a page links to and that are no pages themselves."""
    for link in _LINK.finditer(text):
        file = _resolved(link["file"], page)
        if _page_of(file).startswith("source/"):
            yield file


def _listing(file: str) -> str:
    """Show a file as a page."""
    language = {".py": "python", ".yaml": "yaml", ".sh": "bash"}.get(Path(file).suffix, "text")
    text = (ROOT / file).read_text("utf-8").rstrip("\n")
    return f"# `{file}`\n\n~~~~~{language}\n{text}\n~~~~~\n"
