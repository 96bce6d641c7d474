"""The docstrings are written for any reader; here they become Markdown, before they are shown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":[a-z]+:`(?P<target>~?[\w.]+)`")
_LITERAL = re.compile(r"::$", flags=re.MULTILINE)  # an indented block of code follows
PACKAGE = "tta_lightning"


def to_markdown(text: str, scope: str = "") -> str:
    """Turn the few marks of reStructuredText that docstrings use into Markdown.

    Args:
        text: A docstring, or a part of one.
        scope: Dotted path of the class that names without dots are looked for in; empty for none.

    Returns:
        The text with references as links where what they name is documented, else as code.
    """
    return _LITERAL.sub(":", _ROLE.sub(lambda found: _link(found["target"], scope), text))


def to_code(text: str) -> str:
    """Turn references of reStructuredText into names in code, for pages that need no links."""
    return _ROLE.sub(lambda found: f"`{_name(found['target'])}`", text)


def _name(target: str) -> str:
    """Return what is shown of a reference: after a tilde its last part."""
    return target.rpartition(".")[2] if target.startswith("~") else target


def _link(target: str, scope: str) -> str:
    path = target.removeprefix("~")
    if not path.startswith(PACKAGE):
        path = f"{scope}.{path}"
    # optional: what no page documents stays as code, and is no broken link
    return f'<autoref identifier="{path}" optional><code>{_name(target)}</code></autoref>'


class Restructured(griffe.Extension):
    """Applied by mkdocstrings to every object that it shows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was read."""
        if obj.docstring is None:
            return
        scope = obj if obj.is_class else obj.parent
        path = scope.path if scope is not None and scope.is_class else ""
        obj.docstring.value = to_markdown(obj.docstring.value, path)
