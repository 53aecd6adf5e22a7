"""README and docs/ say what is so: commands, output, flags, messages, codes and links."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from quickstart import parse as quickstart_flags
from rfdetr.data.faults import CODES
from rfdetr.resolve import settings_of
from rfdetr.settings import STAGES
from rfdetr.sizes import SIZES
from rfdetr.tool_settings import (
    ConvertSettings,
    EvaluationSettings,
    ExportSettings,
    PredictionSettings,
    ShrinkSettings,
    ValidationSettings,
)

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
MOST_WORDS = 1500
SCRIPTS = {stage.script: stage for stage in STAGES.values()} | {
    "convert_dataset.py": ConvertSettings,
    "evaluate.py": EvaluationSettings,
    "export.py": ExportSettings,
    "predict.py": PredictionSettings,
    "shrink_head.py": ShrinkSettings,
    "validate_setup.py": ValidationSettings,
}
EVERY_SCRIPT = {"help", "debug", "config", "no_amp"}
OTHERS = {  # of torchrun, tensorboard, benchmarks and the demo generator
    "nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown_timeout",
    "logdir", "samples_per_plugin", "side", "kinds", "kind", "seeds", "busy", "train", "valid",
    "steps", "alike", "minutes", "only",
}  # fmt: skip

# What makes the README's commands small; a later flag wins. quickstart.py is run by
# test_quickstart.py, nano needs weights that no test has, DIR is the reader's own: of these the
# flags alone are checked.
SMALLER = {
    "rfdetr.data.demo": ["--train", 12, "--valid", 6, "--size", 96],
    "train_detector_stage1.py": [
        "--resolution", 64, "--epochs", 1, "--min_steps", 20, "--device", "cpu", "--workers", 0,
    ],
    "train_seg_stage2.py": ["--epochs", 1, "--min_steps", 5, "--device", "cpu", "--workers", 0],
}  # fmt: skip
SMALLER_NAMES = ("tiny_160", "tiny_64")
NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def prose(page: Path) -> str:
    text = page.read_text("utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command that begins with python or a script, wherever it stands."""
    lines = [line.removeprefix("$ ") for _, text in blocks(page) for line in text.splitlines()]
    lines += re.findall(r"`([^`\n]*)`", prose(page))
    for line in lines:
        if line.startswith("python "):
            yield shlex.split(line)[1:]
        elif line.split(" ")[0] in SCRIPTS:
            yield shlex.split(line)


def flags_of(script: str) -> set[str]:
    if script == "quickstart.py":
        return set(vars(quickstart_flags([]))) | EVERY_SCRIPT
    return set(settings_of(SCRIPTS[script])) | EVERY_SCRIPT


def test_the_readme_is_short():
    assert len(prose(README).split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page):
    known = set().union(*map(flags_of, SCRIPTS), flags_of("quickstart.py"), OTHERS)
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", page.read_text("utf-8")))
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_flags_of_its_script(page):
    for script, *words in commands(page):
        if script not in SCRIPTS and script != "quickstart.py":
            continue
        if "--test" in words:  # what follows is pytest's
            continue
        named = {word[2:].split("=")[0] for word in words if re.match(r"--\w", word)}
        assert named <= flags_of(script), (script, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_every_message_is_the_codes():
    """Texts in the tables' first column; numbers and ... stand for what differs."""
    for line in (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").splitlines():
        cells = line.split(" | ")
        for message in re.findall(r"`([^`]+)`", cells[0]) if len(cells) > 1 else []:
            parts = [part.strip() for part in re.split(r"\.\.\.|\d+", message)]
            wanted = re.compile(".*".join(map(re.escape, parts)))
            assert len("".join(parts)) > 6, message
            assert any(map(wanted.search, texts_of_the_code())), message


@functools.cache
def texts_of_the_code() -> list[str]:
    """Every string of the scripts and rfdetr/, with a blank for what is filled in."""
    texts = []
    for file in [*ROOT.glob("*.py"), *(ROOT / "rfdetr").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", " ") for part in node.values]
                texts.append("".join(part if isinstance(part, str) else " " for part in parts))
    return texts


def test_every_code_of_a_dataset_is_explained():
    text = (ROOT / "docs" / "data.md").read_text("utf-8")
    explained = re.findall(r"^\| `([A-Z_]+)` \| (\w+) \|", text, re.M)
    assert len(explained) == len(dict(explained))
    assert set(CODES) <= set(dict(explained))
    assert all(dict(explained)[code] == kind.severity for code, kind in CODES.items())
    for code in dict(explained).keys() - set(CODES):
        assert code in texts_of_the_code(), code


def test_the_table_of_sizes_is_complete():
    text = (ROOT / "docs" / "models.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| [\d,]+ \| [\d,]+ \| (\d+) \| `?([^`|]+)`? \|", text, re.M)
    table = {name: (int(side), start) for name, side, start in rows}
    own = {name: (size.resolution, size.weights_file or "nothing") for name, size in SIZES.items()}
    assert table == own


@pytest.mark.slow
def test_the_commands_of_the_readme(call, capsys, tmp_path):
    """In their order, made small; the quoted lines come in theirs, numbers being any numbers."""
    outputs = []
    for language, text in blocks(README):
        text = text.replace(*SMALLER_NAMES)
        if language == "bash":
            outputs = [run_small(line, call, capsys) for line in text.splitlines()]
        elif language == "text":
            require_lines(text, "".join(outputs))
        elif language == "python":
            exec(compile(text, str(README), "exec"), {})
            assert (tmp_path / "found.png").exists()


def run_small(line: str, call, capsys) -> str:
    """What a command prints when it is made small; nothing for those that are not run here."""
    python, *words = shlex.split(line)
    if python in ("git", "cd") or words[0] == "quickstart.py" or {"nano", "DIR"} & set(words):
        return ""
    script, *flags = words[1:] if words[0] == "-m" else words
    capsys.readouterr()
    call(importlib.import_module(script.removesuffix(".py")).main, *flags, *SMALLER.get(script, []))
    return capsys.readouterr().out


def require_lines(quoted: str, output: str) -> None:
    rest = output
    for line in quoted.splitlines():
        found = re.search(r"\s+".join(map(with_any_numbers, line.split())), rest)
        assert found, f"{line}\n--- is not in ---\n{output}"
        rest = rest[found.end() :]


def with_any_numbers(word: str) -> str:
    """A pattern of a word; a score that does not exist is shown as -."""
    if word == "-" or NUMBER.fullmatch(word):
        return r"(?:-|\d[\d.,]*)"
    return r"\d[\d.,]*".join(map(re.escape, NUMBER.split(word)))
