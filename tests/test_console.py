"""Consoles that go away, one voice, memory that runs out, SIGTERM, commands to be pasted."""

from __future__ import annotations

import contextlib
import io
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, quick_flags
from hypothesis import example, given, settings
from hypothesis import strategies as st

import shrink_head
from rfdetr.classes import assign_rows
from rfdetr.data.dataset import SplitDataset
from rfdetr.device import unless_out_of_memory
from rfdetr.models.detector import Detector
from rfdetr.sizes import SIZES
from rfdetr.streams import lasting_output
from rfdetr.text import keep_flags
from rfdetr.training.frozen_start import unshrunk_message
from rfdetr.weights import checkpoint
from testkit.forked import Forked

posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell and its signals")


def script(body: str) -> list[str]:
    """A command that runs `body` as the main(argv) of a script, without torch, which is slow."""
    head = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    head += "from rfdetr.console import run_script, tick\n"
    lines = "\n    ".join(["def main(argv):", *body.strip().splitlines()])
    return [sys.executable, "-c", f"{head}{lines}\nrun_script(main)"]


def in_bash(command: list[str], rest: str, cwd: Path) -> subprocess.CompletedProcess:
    """`command REST` in bash, the status being the command's own."""
    line = f"{shlex.join(command)} {rest}; exit ${{PIPESTATUS[0]}}"
    words = ["bash", "-c", line]
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, env=environment(), timeout=120
    )


# ---------------------------------------------------------------- a console that goes away

TALKS = """
import time
for n in range(20000):
    print("line", n)
tick("half")
print("to stderr", file=sys.stderr, flush=True)
open("done.txt", "w").write("all of it")
print("done", flush=True)
"""


@posix
@pytest.mark.parametrize(
    "rest",
    [
        "| head -n 1",
        "| true",
        ">&-",
        "2>&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
        "> /dev/full",
        "2>&1 | true",
    ],
)
def test_a_console_that_goes_away_ends_nothing(rest, tmp_path):
    if "full" in rest and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    done = in_bash(script(TALKS), rest, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done.txt").read_text() == "all of it"
    assert (
        "Error" not in done.stderr
        and "Exception" not in done.stderr
        and "Traceback" not in done.stderr
    )


@posix
def test_what_is_printed_never_lands_in_a_file_that_took_the_consoles_place(tmp_path):
    body = """
import os
file = open("data.txt", "w")
os.write(1, b"from a library")
print("words", flush=True)
"""
    done = in_bash(script(body), ">&- 2>&-", tmp_path)
    assert done.returncode == 0 and (tmp_path / "data.txt").read_text() == ""


def test_the_consoles_streams_are_put_back_and_their_errors_too():
    before = sys.stdout, sys.stderr
    with lasting_output():
        assert sys.stdout is not before[0]
        sys.stdout.isatty()
    assert (sys.stdout, sys.stderr) == before
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(ascii_only), lasting_output():
        print("✓ tick", flush=True)
    assert ascii_only.buffer.getvalue() == b"? tick" + os.linesep.encode()


@posix
@pytest.mark.slow
def test_a_run_whose_reader_and_terminal_are_gone_saves_and_ends(few, tmp_path):
    """| head closes stdout and stderr; SIGHUP then ends the run, and its state and log are kept."""
    flags = [*map(str, quick_flags(few)), "--min_steps", "5000", "--output_dir", "run"]
    body = """
from rfdetr import progress
progress.LINE_EVERY = 0.0
sys.argv[0] = "train_detector_stage1.py"
import train_detector_stage1
train_detector_stage1.main(argv)
"""
    process = subprocess.Popen(
        [*script(body), *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        start_new_session=True,
        # under nohup the tests ignore it, and what they start would, too
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while b"/5000 steps" not in (line := process.stdout.read1()):
        assert line, "it has ended"
    process.stdout.close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)  # it goes on, although its progress cannot be written
    process.send_signal(signal.SIGHUP)
    assert process.wait(180) == 129
    assert checkpoint.load(tmp_path / "run/checkpoint.pt")["training"]["progress"]["step"] > 0
    log = (tmp_path / "run/log.txt").read_text()
    assert "--resume run" in log and "Traceback" not in log


# ---------------------------------------------------------------- one voice

SPEAKS = """
from rfdetr import progress
from rfdetr.console import banner, say
say("said")
tick("ticked")
banner("TITLE", {"Name": 1})
progress.LINE_EVERY = 0.0
list(progress.ProgressBar([1], "a bar"))
"""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_of_several_speaks(rank, tmp_path):
    ours = {"WORLD_SIZE": "2", "RANK": rank}
    done = subprocess.run(
        script(SPEAKS), cwd=tmp_path, capture_output=True, text=True, env=environment() | ours
    )
    assert done.returncode == 0, done.stderr
    for words in ("said", "ticked", "TITLE", "Name:"):
        assert (words in done.stdout) == (rank == "0")
    assert ("a bar" in done.stderr) == (rank == "0")


def test_a_warning_is_said_where_nobody_can_tell_who_else_has_said_it(tmp_path):
    lost = {"WORLD_SIZE": "2", "RANK": "1"}  # no address of the other process
    command = script("from rfdetr.console import warn\nwarn('careful')")
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment() | lost
    )
    assert done.returncode == 0 and done.stdout.count("careful") == 1


# ---------------------------------------------------------------- memory that runs out


def test_an_attempt_that_runs_out_of_memory_leaves_nothing_behind():
    cpu = torch.device("cpu")
    tensors = []

    def attempt():
        large = torch.zeros(10)
        tensors.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert unless_out_of_memory(attempt, cpu) is None
    assert tensors[0]() is None  # else the smaller attempt would have less memory
    assert unless_out_of_memory(lambda: 5, cpu) == 5
    with pytest.raises(RuntimeError, match="shape"):
        unless_out_of_memory(lambda: torch.zeros(2).view(3), cpu)


# ---------------------------------------------------------------- SIGTERM

WAITS = {
    "stdin": "input()",
    "a pipe": "os.mkfifo('pipe')\nopen('pipe')",
    "a thread that waits for a pipe": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "os.mkfifo('pipe')\n"
        "with ThreadPoolExecutor() as pool:\n"
        "    pool.submit(open, 'pipe').result()"
    ),
    "a C call": (  # which signals do not end; SIGTERM's handler in Python never runs
        "import ctypes, threading\n"
        "libc = ctypes.CDLL(None)\n"
        "lock = ctypes.create_string_buffer(256)\n"
        "libc.pthread_mutex_init(lock, None)\n"
        "libc.pthread_mutex_lock(lock)\n"
        "libc.pthread_mutex_lock(lock)"
    ),
}


@posix
@pytest.mark.parametrize("what", WAITS)
def test_sigterm_ends_a_script_whatever_it_waits_for(what, tmp_path):
    body = (
        "import os, rfdetr.sigterm\nrfdetr.sigterm.GRACE = 0.5\nprint('waits', flush=True)\n"
        + WAITS[what]
    )
    words = script(body)
    process = subprocess.Popen(
        words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "waits\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(60) == 143


@posix
def test_a_workers_sigterm_is_not_its_parents(tmp_path):
    """A loader ends its processes by SIGTERM; they were forked with the parent's handlers."""
    body = """
import multiprocessing, time, rfdetr.sigterm
rfdetr.sigterm.GRACE = 0.2
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
worker.start()
time.sleep(0.3)
worker.terminate()
worker.join()
time.sleep(1)
print("still here", worker.exitcode)
"""
    done = subprocess.run(script(body), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()[:10]) == (0, "still here"), done.stderr


def hang_at_the_seventh_image(alive: Path) -> None:
    """In each process that loads; what runs, loaders included, holds `alive` open."""
    os.open(alive, os.O_WRONLY)
    get = SplitDataset.__getitem__
    asked = []

    def item(self, key):
        asked.append(1)
        if len(asked) > 6:
            os.write(2, b"it hangs")
        while len(asked) > 6:
            time.sleep(1)
        return get(self, key)

    SplitDataset.__getitem__ = item


@posix
@pytest.mark.slow
@pytest.mark.parametrize("wait", [0, 2], ids=["during the last steps", "while nothing comes"])
def test_a_run_whose_loader_hangs_saves_and_ends_on_sigterm(wait, few, tmp_path):
    flags = ["--min_steps", 500, "--workers", 2, "--output_dir", "run"]
    command = ["train_detector_stage1", *quick_flags(few), *flags]
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    run = Forked(command, cwd=tmp_path, before=partial(hang_at_the_seventh_image, alive))
    run.wait_for("it hangs", count=2)
    time.sleep(wait)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 143, run.stderr
    assert select.select([reader], [], [], 60)[0]  # its end: the loaders are gone, too
    os.close(reader)
    said = run.stdout + run.stderr
    assert "--resume run" in said and "Traceback" not in said and "Exception" not in said
    assert checkpoint.load(tmp_path / "run/checkpoint.pt")["training"]["progress"]["step"] > 0


# ---------------------------------------------------------------- commands to be pasted

ODD = [
    "--out_ckpt=x.pt",
    "-1",
    "---",
    "-h",
    "it's",
    'a "b"',
    "$HOME",
    "`id`",
    "!x",
    "a b",
    "- a",
    "é 血",
    "*",
    "~",
]
ODD += ["a\\", "-$(x) 'y'"]


@pytest.fixture(scope="module")
def odd_checkpoint(tmp_path_factory) -> Path:
    """A detector whose classes have the names above."""
    path = tmp_path_factory.mktemp("odd") / "odd's $1.pt"
    size, table = SIZES["tiny"], assign_rows(ODD, list(range(1, 1 + len(ODD))), "coco91")
    model = Detector(size, table.rows_total, table.background_last)
    checkpoint.save(
        path, checkpoint.make_content("detector", size, 64, table, None, model.state_dict())
    )
    return path


@posix
def test_the_printed_command_can_be_pasted_whatever_the_classes_are_called(odd_checkpoint, call):
    message = unshrunk_message(91, ODD, odd_checkpoint)
    command = next(line.strip() for line in message.splitlines() if "shrink_head.py" in line)
    assert command.startswith("python shrink_head.py ")
    command = command.replace("python shrink_head.py", r"printf '%s\0'", 1)
    folder = odd_checkpoint.parent
    told = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, check=True)
    call(shrink_head.main, *told.stdout.decode().split("\0")[:-1])
    assert checkpoint.load(folder / "checkpoint_mydata.pth")["classes"]["names"] == ODD
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint_mydata.pth",
        odd_checkpoint.name,
    ]


def test_stage_1_prints_such_a_command_too(call, capsys, tmp_path, few):
    """Its Next line, of a run on classes that look like flags."""
    import json

    import train_detector_stage1

    data = Path(shutil.copytree(few, tmp_path / "data"))
    for file in data.glob("*/_annotations.coco.json"):
        content = json.loads(file.read_text())
        for category, name in zip(content["categories"], ["--out_ckpt=x.pt", "it's", "-1"]):
            category["name"] = name
        file.write_text(json.dumps(content))
    call(train_detector_stage1.main, *quick_flags(data))
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("Next:").strip()
    words = shlex.split(line)
    assert words[:2] == ["python", "shrink_head.py"]
    call(shrink_head.main, *words[2:])
    names = checkpoint.load(Path(words[words.index("--out_ckpt") + 1]))["classes"]["names"]
    assert sorted(names) == sorted(["--out_ckpt=x.pt", "it's", "-1"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1, unique=True
    )
)
@example(["cells", "blood_vessel", "glomerulus"])
def test_keep_flags_come_back_as_the_names(names):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", nargs="+", action="extend")
    names = [
        name for name in names if name != "--"
    ]  # which argparse takes for itself, in every form
    names = names or ["a"]
    assert parser.parse_args(shlex.split(keep_flags(names))).keep == names


def test_plain_names_are_printed_plainly():
    assert (
        keep_flags(["cells", "blood vessel", "it's"]) == """--keep "cells" "blood vessel" "it's\""""
    )
    assert keep_flags(["a", "-b", "c"]) == '--keep "a" --keep=-b --keep "c"'
