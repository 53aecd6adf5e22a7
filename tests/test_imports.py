"""The walls between the modules, and the sizes that keep them readable, read from the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# A module may import from lower layers, and within its own as long as nothing goes round in a circle.
LAYERS = [
    ["console", "sizes", "boxes", "distributed", "classes", "memory"],
    ["precision", "models", "data", "metrics", "losses"],
    ["convert", "rundir", "checkpoint", "weights", "visualise"],
    ["engine", "evaluation", "auto_batch", "feature_cache"],
    ["main", "cli", "detr", "estimate"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGE = sorted((ROOT / "rfdetr").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = [*PACKAGE, *SCRIPTS, *sorted((ROOT / "benchmarks").rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it; `from rfdetr import x` is rfdetr.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"rfdetr.{alias.name}" for alias in node.names} if node.module == "rfdetr" else {node.module}
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
        graph.setdefault(own, set()).update({part_of(m) for m in imports_of(path)} & LEVEL.keys() - {own})
    graph.pop(None)
    done: set[str] = set()
    while remaining := graph.keys() - done:
        ready = {name for name in remaining if graph[name] <= done}
        assert ready, f"a circle among {sorted(remaining)}"
        done |= ready


@pytest.mark.parametrize(
    "part, forbidden",
    [
        ("models", {"rfdetr.data", "rfdetr.engine", "argparse"}),
        ("data", {"rfdetr.models"}),
        ("metrics", {"rfdetr.models", "rfdetr.engine"}),
        ("losses", {"rfdetr.data", "rfdetr.models"}),
    ],
)
def test_walls(part, forbidden):
    for path in sorted((ROOT / "rfdetr" / part).glob("*.py")):
        for module in imports_of(path):
            assert not any(module == f or module.startswith(f + ".") for f in forbidden), f"{path}: {module}"


def test_nothing_imports_a_script():
    scripts = {path.stem for path in SCRIPTS}
    for path in SOURCES:
        assert not imports_of(path) & scripts, path


def functions(path: Path) -> list[tuple[str, int, int]]:
    """(name, lines, arguments) of every function of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            found.append((f"{module_of(path)}.{node.name}", node.end_lineno - node.lineno + 1, len(arguments)))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_function_is_longer_than_ninety_lines(path):
    assert [f"{name}: {lines}" for name, lines, _ in functions(path) if lines > 90] == []


def test_no_helper_called_once_has_more_than_six_arguments():
    long = {name.rsplit(".", 1)[1]: name for path in SOURCES for name, _, n in functions(path) if n > 6}
    long = {short: name for short, name in long.items() if short != "forward" and not short.startswith("__")}
    calls = dict.fromkeys(long, 0)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", None))
                calls[called] = calls.get(called, 0) + 1
    assert {long[short] for short in long if calls[short] <= 1} == set()


def test_the_whole_program_stays_small():
    core = [path for path in SOURCES if "benchmarks" not in path.parts]
    lines = {module_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in core}
    assert sum(lines.values()) <= 9500, sorted(lines.items(), key=lambda item: -item[1])[:10]
