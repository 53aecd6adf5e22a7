"""Scripts in processes forked from one that has imported torch already: that takes seconds."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from rfdetr.console import run_script
from rfdetr.sigterm import watch_sigterm

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds
SLOW = ["pytest", "hypothesis", "train_detector_stage1", "train_seg_stage2", "testkit.forked"]


@functools.cache
def processes() -> BaseContext:
    """Where processes come from: a server that has no threads yet, unlike the tests' process.

    Where there is no such server, each process imports what it needs itself.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    before = dict(os.environ)
    os.environ |= {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def nothing() -> None:
    """What is done before a script that is run as it is."""


class Forked:
    """Scripts that run one after the other in a process of their own, in a folder.

    commands: each a script's name and its words.  before: what the process does first; a function
    of a module.  session: whether the process leads a session of its own, as in a terminal.
    It prints to the files NAME.out and NAME.err of the folder.
    """

    def __init__(
        self,
        *commands: list[object],
        cwd: Path,
        before: Callable[[], None] = nothing,
        session: bool = False,
        env: Mapping[str, str] | None = None,
        name: str = "printed",
    ):
        self.files = [cwd / f"{name}.out", cwd / f"{name}.err"]
        words = [[str(word) for word in command] for command in commands]
        start_method = multiprocessing.get_start_method()
        arguments = (words, cwd, self.files, before, session, dict(env or {}), start_method)
        self.process = processes().Process(target=run_scripts, args=arguments)
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    @property
    def stdout(self) -> str:
        return text_of(self.files[0])

    @property
    def stderr(self) -> str:
        return text_of(self.files[1])

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int:
        """Its exit status: the last script's, or minus the number of the signal that ended it."""
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.kill()
            raise TimeoutError(f"not done after {PATIENCE} s\n{self.stdout}\n{self.stderr}")
        return self.process.exitcode

    def wait_for(self, text: str, count: int = 1) -> None:
        """Until it has printed `text` so often to stderr."""
        while self.stderr.count(text) < count:
            if not self.is_running:
                raise AssertionError(f"it has ended\n{self.stdout}\n{self.stderr}")
            time.sleep(0.02)


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def run_scripts(
    commands: list[list[str]],
    cwd: Path,
    files: list[Path],
    before: Callable[[], None],
    session: bool,
    env: dict[str, str],
    start_method: str,
) -> None:
    """What the process does; it starts loaders as any other script does."""
    multiprocessing.set_start_method(start_method, force=True)
    if session:
        os.setsid()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in enumerate(files, start=1):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watch_sigterm.cache_clear()
    torch.set_num_threads(1)
    before()
    sys.exit(run_in_turn(commands))


def run_in_turn(commands: list[list[str]]) -> object:
    """Run scripts in this process and say on stderr what they leave with; returns the last one."""
    status: object = 0
    for script, *words in commands:
        sys.argv = [f"{script}.py", *words]
        status = 0
        try:
            run_script(importlib.import_module(script).main)
        except SystemExit as left:
            status = left.code
        print(f"{script} left with", status, file=sys.stderr, flush=True)
    return status
