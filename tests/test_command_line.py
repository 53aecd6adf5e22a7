"""What --help and a wrong command line say, before a script imports what takes seconds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

import quickstart
from rfdetr.cli import make_parser, script_settings
from rfdetr.console import UserError
from rfdetr.resolve import settings_of
from rfdetr.settings import STAGES, DetectorSettings
from rfdetr.sizes import SIZES
from rfdetr.tool_settings import (
    ConvertSettings,
    EvaluationSettings,
    ExportSettings,
    PredictionSettings,
    ShrinkSettings,
    ValidationSettings,
)

SCRIPTS = {
    **{kind.script: kind for kind in STAGES.values()},
    "shrink_head.py": ShrinkSettings,
    "evaluate.py": EvaluationSettings,
    "predict.py": PredictionSettings,
    "export.py": ExportSettings,
    "validate_setup.py": ValidationSettings,
    "convert_dataset.py": ConvertSettings,
}
SLOW = ("torch", "torchvision", "timm", "cv2")

# runs a script as `python SCRIPT` does, and tells what it has imported
WATCHED = f"""
import atexit, runpy, sys
slow = {SLOW!r}
def tell():
    print("imported:", *[name for name in slow if name in sys.modules])
atexit.register(tell)
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def at_once(script: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script that has to end before it imports anything slow."""
    words = [sys.executable, "-c", WATCHED, str(ROOT / script), *flags]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1].strip() == "imported:", done.stderr
    return done


def error_of(kind: type, *flags: str) -> str:
    with pytest.raises(UserError) as caught:
        make_parser(kind, "").parse_args(flags)
    return str(caught.value)


@pytest.mark.parametrize("script", [*SCRIPTS, "quickstart.py"])
def test_help_and_slips_are_answered_before_the_slow_imports(script, tmp_path):
    done = at_once(script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and f"usage: python {script} " in done.stdout
    done = at_once(script, "--sede", "1", cwd=tmp_path)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    first, second = done.stderr.splitlines()
    assert first.startswith("error: there is no flag --sede")
    assert second == f"all flags: python {script} --help"


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train_detector_stage1.py", ["--dataset", "nowhere"], "nowhere"),
        ("train_detector_stage1.py", ["--resolution", "100"], "96 and 128"),
        ("train_seg_stage2.py", ["--config", "no.yaml"], "no.yaml"),
        ("train_detector_stage1.py", ["--resume", "no_run"], "no_run"),
        ("train_detector_stage1.py", ["--pretrain_weights", "no.pth"], "no.pth"),
        ("train_seg_stage2.py", ["--stage1_run", "no_run"], "No checkpoint found in Stage-1"),
        ("shrink_head.py", ["--in_ckpt", "no.pth", "--out_ckpt", "o.pth"], "no.pth"),
        ("convert_dataset.py", ["--input", "no_folder"], "no_folder"),
        ("predict.py", [], "--checkpoint, --input, --output"),
        ("predict.py", ["--checkpoint", "a.pt", "--input", "no.png", "--output", "o"], "no.png"),
        ("predict.py", ["--tile", "10"], "expected auto or 0 or a whole number from 32 to"),
    ],
)
def test_what_is_missing_is_told_before_them_too(script, flags, message, tmp_path):
    (tmp_path / "a.pt").touch()
    done = at_once(script, *flags, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith(("error: ", message))


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--epoch", "--epochs"),
        ("--output-dir", "--output_dir"),
        ("--wieght_decay=1", "--weight_decay"),
        ("--head_of_lettuce", None),
    ],
)
def test_a_mistyped_flag_is_refused_with_the_near_one(flag, meant):
    text = error_of(DetectorSettings, flag, "1")
    assert flag.split("=")[0] in text
    assert (f"did you mean {meant}?" in text) if meant else ("did you mean" not in text)


def test_a_mistyped_choice_is_refused_with_the_near_one():
    assert "'tinny' (did you mean tiny?)" in error_of(DetectorSettings, "--size", "tinny")
    assert "did you mean" not in error_of(DetectorSettings, "--size", "vast")


def test_a_word_too_many_and_a_bad_value_are_told_in_two_lines():
    assert "'there' belongs to no flag" in error_of(DetectorSettings, "--epochs", "3", "there")
    for flags in (["--epochs", "0"], ["--size", "huge"], ["--lr"]):
        text = error_of(DetectorSettings, *flags)
        assert text.startswith(flags[0]) and len(text.splitlines()) == 2


def test_what_a_flag_takes_is_told_in_words():
    for flags, words in (
        (["--epochs", "many"], "expected a whole number from 1 to 1,000,000,000, got 'many'"),
        (["--batch", "0"], "expected auto or a whole number from 1 to 65,536, got '0'"),
        (["--drop_path", "2"], "expected a number from 0 to 0.9, got '2'"),
    ):
        assert words in error_of(DetectorSettings, *flags)


@pytest.mark.parametrize("flag", ["--resume=", "--pretrain_weights=", "--config=", "--dataset="])
def test_an_empty_value_is_refused_whatever_the_flag(flag):
    with pytest.raises(UserError, match=r"got an empty text: is a variable of the shell unset\?"):
        make_parser(DetectorSettings, "").parse_args([flag])
    if flag in ("--pretrain_weights=", "--dataset="):
        with pytest.raises(UserError, match="got an empty text"):
            quickstart.parse([flag])


def test_a_missing_flag_is_answered_with_the_command_that_lists_all():
    with pytest.raises(
        UserError, match="missing: --in_ckpt, --out_ckpt\nall flags: python .* --help"
    ):
        script_settings(ShrinkSettings, "", [])


@pytest.mark.parametrize("kind", SCRIPTS.values(), ids=lambda kind: kind.__name__)
def test_help_tells_every_default(kind):
    help_of = {}
    for action in make_parser(kind, "")._actions:
        help_of[action.dest] = action.help
    for name in settings_of(kind):
        assert "default" in help_of[name] or "required" in help_of[name], name


def test_help_tells_the_defaults_of_each_size():
    text = " ".join(make_parser(DetectorSettings, "").format_help().split())
    tiny, nano = SIZES["tiny"].recipe, SIZES["nano"].recipe
    assert f"learning rate (default: {nano.lr}; tiny: {tiny.lr})" in text
    assert f"tiny: {SIZES['tiny'].resolution}; nano" in text


def test_help_speaks_of_its_own_script_alone():
    for kind in (*STAGES.values(), ValidationSettings):
        text = " ".join(make_parser(kind, "").format_help().split())
        assert ("as the detector" in text) == (kind is STAGES["segmentation"])
        assert "stage 2" not in text
        assert ("--init_ckpt" in text) == (kind is STAGES["single"])


# a script whose imports swallow an exception, as those of C++ modules may: an interrupted one ends
IMPORTS = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from rfdetr.cli import check_command
from rfdetr.console import run_script
from rfdetr.tool_settings import ValidationSettings

check_command(ValidationSettings, "", __name__)

class Module:
    def __del__(self):
        if "imports" in sys.argv[-1]:
            signal.raise_signal(signal.SIGINT)

Module()
print("imported", flush=True)

def main(argv):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        print("tidied up")

run_script(main)
"""


@pytest.mark.parametrize(
    "during, printed, told",
    [
        ("imports", "", "interrupted before anything was done\n"),
        ("work", "imported\ntidied up\n", "interrupted\n"),
    ],
)
def test_a_ctrl_c_is_told_in_a_word(during, printed, told, few, tmp_path):
    dataset = tmp_path / during
    shutil.copytree(few, dataset)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, "--dataset", str(dataset)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert (done.returncode, done.stdout) == (130, printed)
    assert done.stderr == told


# Ctrl-C as a module is imported
EARLY = """
import runpy, signal, sys

class Finder:
    def find_spec(self, name, *_):
        if name == sys.argv[2]:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_a_ctrl_c_during_the_first_imports_is_told_in_a_word(script):
    if script == "quickstart.py":  # parsed by old Pythons, it imports little
        return
    early = [sys.executable, "-c", EARLY, ROOT / script, "rfdetr.cli"]
    done = subprocess.run(early, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (130, "interrupted before anything was done\n")


LEFT = {
    "evaluate": "interrupted: scores are printed and written at the end",
    "convert_dataset": "interrupted: the dataset is written at the end, whole or not at all",
    "export": "interrupted: the file is written at the end, whole or not at all",
    "shrink_head": "interrupted: the file is written at the end, whole or not at all",
    "validate_setup": "interrupted: the dataset is as it was",
}


@pytest.mark.parametrize("script", LEFT)
def test_a_ctrl_c_at_work_says_what_it_leaves(script):
    """While its command line is read for the second time, which is as good as later."""
    at_work = EARLY.replace(
        "sys.meta_path.insert(0, Finder())",
        "import rfdetr.cli\nrfdetr.cli.check_command = lambda *_: None\n"
        "rfdetr.cli.script_settings = lambda *_: signal.raise_signal(signal.SIGINT)",
    )
    words = [sys.executable, "-c", at_work, ROOT / f"{script}.py", "-"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith(LEFT[script])
    assert "The same command begins again from the start" in done.stderr
