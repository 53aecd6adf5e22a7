"""The walls between the modules, read from the source itself."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# A room may import from lower layers, and within its own as long as nothing goes round in a circle.
LAYERS = [
    [
        "arguments",
        "console",
        "files",
        "fields",
        "settings",
        "tool_settings",
        "sizes",
        "boxes",
        "masks",
        "distributed",
        "ids",
        "classes",
        "commands",
        "memory",
        "packages",
        "parser",
        "renaming",
        "resolve",
        "requirements",
        "sigterm",
        "streams",
        "text",
        "placement",
        "tiling",
        "progress",
    ],
    ["device", "models", "data", "metrics", "losses"],
    ["runs", "weights", "inference"],
    ["training"],
    ["main", "cli", "detr", "setup_check"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGE = sorted((ROOT / "rfdetr").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
TESTKIT = sorted((ROOT / "testkit").rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports; `from rfdetr import x` is rfdetr.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= (
                {f"rfdetr.{alias.name}" for alias in node.names}
                if node.module == "rfdetr"
                else {node.module}
            )
    return found


def part_of(module: str) -> str | None:
    """rfdetr.data.coco -> data; None for what is not of the package."""
    words = module.split(".")
    return words[1] if words[0] == "rfdetr" and len(words) > 1 else None


def test_every_module_has_its_layer():
    assert {part_of(module_of(path)) for path in PACKAGE} - {None} == set(LEVEL)


@pytest.mark.parametrize("path", PACKAGE, ids=module_of)
def test_imports_point_down(path):
    own = part_of(module_of(path))
    if own is None:
        pytest.skip("the package's own door")
    above = {m for m in imports_of(path) if part_of(m) in LEVEL and LEVEL[part_of(m)] > LEVEL[own]}
    assert not above


def test_nothing_goes_round_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in PACKAGE:
        own = part_of(module_of(path))
        graph.setdefault(own, set()).update(
            {part_of(m) for m in imports_of(path)} & LEVEL.keys() - {own}
        )
    graph.pop(None)
    done: set[str] = set()
    while remaining := graph.keys() - done:
        ready = {name for name in remaining if graph[name] <= done}
        assert ready, f"a circle among {sorted(remaining)}"
        done |= ready


@pytest.mark.parametrize(
    "part, forbidden",
    [
        ("models", {"rfdetr.data", "rfdetr.training.engine", "argparse"}),
        ("data", {"rfdetr.models"}),
        ("metrics", {"rfdetr.models", "rfdetr.training.engine"}),
        ("losses", {"rfdetr.data", "rfdetr.models"}),
    ],
)
def test_walls(part, forbidden):
    for path in sorted((ROOT / "rfdetr" / part).rglob("*.py")):
        for module in imports_of(path):
            assert not any(module == f or module.startswith(f + ".") for f in forbidden), (
                f"{path}: {module}"
            )


def test_nothing_imports_a_script():
    scripts = {path.stem for path in SCRIPTS}
    for path in [*PACKAGE, *SCRIPTS, *BENCHMARKS]:  # tests and testkit run them
        assert not imports_of(path) & scripts, path


def tops_of(path: Path) -> set[str]:
    """The first words of what a file imports: packages, and modules that lie beside it."""
    return {module.split(".")[0] for module in imports_of(path)}


def test_tests_and_benchmarks_do_not_import_each_other():
    """What both need lies in testkit/, which imports neither."""
    tests = {"tests"} | {path.stem for path in TESTS}
    benchmarks = {"benchmarks"} | {path.stem for path in BENCHMARKS}
    for path in TESTS:
        assert not tops_of(path) & benchmarks, path
    for path in BENCHMARKS:
        assert not tops_of(path) & tests, path
    for path in TESTKIT:
        assert not tops_of(path) & (tests | benchmarks), path


def imports_of_ours(node: ast.AST) -> Iterator[ast.ImportFrom]:
    """`from rfdetr.x import y` in a piece of code, without functions that are a peer's: the package
    on PyPI has the same name.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and "peer" in child.name:
            continue
        if isinstance(child, ast.ImportFrom) and child.module.startswith("rfdetr."):
            yield child
        yield from imports_of_ours(child)


def test_benchmarks_import_what_there_is():
    modules = {module_of(path) for path in PACKAGE}
    for path in BENCHMARKS:
        if "peer" in path.stem and path.stem not in ("peer_ours", "peers_at_equal_time"):
            continue
        for statement in imports_of_ours(ast.parse(path.read_text(encoding="utf-8"))):
            module = importlib.import_module(statement.module)
            for name in (one.name for one in statement.names):
                is_module = f"{statement.module}.{name}" in modules
                assert is_module or hasattr(module, name), f"{path.name}: {name}"


def test_what_is_used_needs_nothing_that_only_tests_it():
    for path in [*PACKAGE, *SCRIPTS]:
        assert not tops_of(path) & {"tests", "benchmarks", "testkit", "conftest"}, path


@pytest.mark.parametrize(
    "given, set_to",
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "None")],
)
def test_threads_do_not_spin_for_long_unless_told_otherwise(given, set_to):
    own = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    others = {name: value for name, value in os.environ.items() if name not in own}
    code = "import os, rfdetr; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=others | given, capture_output=True, text=True)
    assert done.stdout.strip() == set_to, done.stderr
