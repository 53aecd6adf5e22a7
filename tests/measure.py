"""How the code reads, in figures: it reports, and fails nothing.

python -m tests.measure            every file of the evening's path, and the totals
python -m tests.measure --all      every file outside tests, testkit and benchmarks
python -m tests.measure --tests    tests, testkit and benchmarks
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDE = 100  # characters
# What one reads to know how the system works, in this order.
EVENING = """
train_detector_stage1.py train_seg_stage2.py train_seg_single_stage.py
rfdetr/main.py rfdetr/settings.py
rfdetr/models/*.py rfdetr/losses/*.py
rfdetr/training/engine.py rfdetr/training/objective.py rfdetr/training/optim.py
rfdetr/training/frozen.py rfdetr/training/feature_cache.py rfdetr/training/feature_file.py
rfdetr/data/coco.py rfdetr/data/augment.py rfdetr/data/loaders.py
rfdetr/inference/detections.py rfdetr/inference/evaluation.py
rfdetr/sizes.py rfdetr/classes.py rfdetr/boxes.py
""".split()
NOT_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass
class Measures:
    """Of one file, or of several together."""

    lines: int = 0
    code_lines: int = 0  # lines with a token that is no comment
    tokens: int = 0
    wide: int = 0
    double_assignments: int = 0
    longest_function: tuple[int, str] = (0, "")
    most_arguments: tuple[int, str] = (0, "")

    def __add__(self, other: Measures) -> Measures:
        return Measures(
            self.lines + other.lines,
            self.code_lines + other.code_lines,
            self.tokens + other.tokens,
            self.wide + other.wide,
            self.double_assignments + other.double_assignments,
            max(self.longest_function, other.longest_function),
            max(self.most_arguments, other.most_arguments),
        )

    @property
    def tokens_a_line(self) -> float:
        return self.tokens / max(self.code_lines, 1)


def measure(path: Path) -> Measures:
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kept = [token for token in tokens if token.type not in NOT_CODE]
    result = Measures(
        lines=len(text.splitlines()),
        code_lines=len({token.start[0] for token in kept}),
        tokens=len(kept),
        wide=sum(len(line) > WIDE for line in text.splitlines()),
    )
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and is_double(node):
            result.double_assignments += 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            names = [argument.arg for argument in node.args.args + node.args.kwonlyargs]
            arguments = len([name for name in names if name not in ("self", "cls")])
            place = f"{path.relative_to(ROOT).as_posix()}: {node.name}"
            result.longest_function = max(result.longest_function, (length, place))
            result.most_arguments = max(result.most_arguments, (arguments, place))
    return result


def is_double(node: ast.Assign) -> bool:
    """Whether it is `a, b = x, y`: two statements in one line."""
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


ALL = ["*.py", "rfdetr/**/*.py"]
TESTS = ["tests/*.py", "testkit/*.py", "benchmarks/*.py"]


def files(patterns: list[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every file of the program")
    parser.add_argument("--tests", action="store_true", help="what tests and measures it")
    args = parser.parse_args()
    patterns = EVENING
    if args.all:
        patterns = ALL
    elif args.tests:
        patterns = TESTS
    total = Measures()
    print(f"{'file':<44}{'lines':>7}{'tokens a line':>15}{'wide':>6}{'a, b = x, y':>13}")
    for path in files(patterns):
        one = measure(path)
        total += one
        print_row(path.relative_to(ROOT).as_posix(), one)
    print_row("all together", total)
    print("longest function: {} lines, {}".format(*total.longest_function))
    print("most arguments:   {}, {}".format(*total.most_arguments))


def print_row(name: str, row: Measures) -> None:
    print(
        f"{name:<44}{row.lines:>7}{row.tokens_a_line:>15.1f}{row.wide:>6}"
        f"{row.double_assignments:>13}"
    )


if __name__ == "__main__":
    main()
