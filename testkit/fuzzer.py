"""Runs the fuzzer's cases in this process and says what is wrong with the way they end."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rfdetr.console import run_script
from rfdetr.device import memory_mb
from testkit.fuzz_cases import KINDS, Command, Materials
from testkit.in_process import restored_signals

SECONDS = 5.0  # of CPU time that a case may take, whatever else the machine does
MEGABYTES = 2048.0  # that the process may grow by
OUTPUT_FLAGS = (
    "--output",
    "--output_dir",
    "--json",
    "--results",
    "--out",
    "--out_ckpt",
    "--fix",
    "--preview",
)
CPU = torch.device("cpu")


def refuse_network(*_, **__):
    raise urllib.error.URLError("the fuzzer has no network")


class Watchdog(threading.Thread):
    """Interrupts the main thread where a case takes more CPU time than it may.

    Ends the process where that does not help.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.begin: float | None = None
        self.hung = False
        self.start()

    def run(self) -> None:
        while True:
            time.sleep(0.2)
            begin = self.begin
            if begin is None or time.process_time() - begin < SECONDS:
                continue
            if not self.hung:
                self.hung = True
                faulthandler.dump_traceback(sys.__stderr__)
                signal.raise_signal(signal.SIGINT)
            elif time.process_time() - begin > 12 * SECONDS:
                os._exit(3)  # in C code, which no exception ends

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.hung = False
        self.begin = time.process_time()
        try:
            yield
        finally:
            self.begin = None


@dataclass
class Ending:
    """How a script ended: its exit status and what it printed."""

    status: int
    out: str
    err: str

    def faults(self) -> list[str]:
        """What is wrong with it: no success, and no paragraph with exit status 2 either."""
        # progress bars are printed over, a class may be called "Traceback"
        lines = [line.rsplit("\r", 1)[-1] for line in self.err.split("\n")]
        printed = "\n".join(lines).strip()
        wrong = []
        if self.status not in (0, 2):
            wrong.append(f"exit status {self.status}: {printed[-600:]}")
        if "Traceback (most recent" in self.out + self.err:
            wrong.append(f"a traceback: {printed[-600:]}")
        if self.status == 2 and (not printed or "\n\n" in printed):
            wrong.append(f"not one paragraph on stderr: {printed[-600:]!r}")
        if "out of memory" in printed:
            wrong.append(f"memory: {printed[-300:]}")
        return wrong


def ending_of(command: Command, watchdog: Watchdog) -> Ending:
    """Run a script's main(argv) in the current folder, with streams of its own."""
    main = importlib.import_module(command.script).main
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    before = sys.stdout, sys.stderr, sys.argv
    status = 0
    sys.stdout, sys.stderr = streams
    sys.argv = [f"{command.script}.py", *command.argv]
    try:
        with watchdog.watching(), warnings.catch_warnings():
            run_script(main, command.argv)
    except SystemExit as left:
        status = left.code or 0
    except BaseException as error:  # what run_script lets through is a finding too
        status = 1
        print(f"{type(error).__name__}: {error}", file=streams[1])
    finally:
        sys.stdout, sys.stderr, sys.argv = before
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams)
    return Ending(status, out, err)


class Fuzzer:
    """A folder with materials in which cases are run one after another."""

    def __init__(self, folder: Path):
        self.folder = Path(folder).resolve()
        self.place = self.folder / "far/down/case"
        (self.folder / "base").mkdir(parents=True)
        self.base = Materials(self.folder / "base")
        self.watchdog = Watchdog()

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """No network, the case's folder as the current one, a home and a cache of its own."""
        before = Path.cwd()
        opener = urllib.request.urlopen
        environment = os.environ.copy()
        home = str(self.place / "home")
        for name in ("HOME", "TORCH_HOME", "XDG_CACHE_HOME", "RFDETR_CACHE"):
            os.environ[name] = home
        urllib.request.urlopen = refuse_network
        os.chdir(self.place / "out")
        try:
            with restored_signals():
                yield
        finally:
            os.chdir(before)
            urllib.request.urlopen = opener
            os.environ.clear()
            os.environ.update(environment)

    def case(self, kind: str, number: int, seed: int) -> Command:
        """Make the case's folder; returns its command."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.base.data, self.place / "data")
        (self.place / "out").mkdir()
        rng = random.Random(f"{seed} {kind} {number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return KINDS[kind](rng, self.base, self.place)

    def run(self, kind: str, number: int, seed: int) -> tuple[Command, int, list[str]]:
        """(command, exit status, what was wrong) of one case."""
        command = self.case(kind, number, seed)
        files = self.listing(command)
        resident = memory_mb(CPU)
        given = {path: path.stat().st_mtime_ns for path in (self.place / "out").rglob("*.json")}
        with self.surroundings():
            ending = ending_of(command, self.watchdog)
        wrong = ending.faults()
        if self.watchdog.hung:
            wrong.append(f"more than {SECONDS} s")
        grown = memory_mb(CPU) - resident
        if grown > MEGABYTES:
            wrong.append(f"{grown:.0f} MB more")
        changed = differing(files, self.listing(command))
        if changed:
            wrong.append(f"changed outside its outputs: {', '.join(changed[:5])}")
        return command, ending.status, wrong + self.loose_json(given)

    def listing(self, command: Command) -> dict[Path, tuple]:
        """Size, time of change and content (of the dataset) of all files but the case's outputs."""
        out = self.place / "out"
        own = [out, self.place / "home"]
        own += [Path(os.path.normpath(out / word)) for word in outputs_of(command)]
        files: dict[Path, tuple] = {}
        for name, _, names in os.walk(self.folder):
            folder = Path(name)
            if any(path == folder or path in folder.parents for path in own):
                continue
            files[folder] = ()
            for path in (folder / name for name in names):
                if path not in own:
                    files[path] = self.state_of(path)
        return files

    def state_of(self, path: Path) -> tuple[int, int, bytes]:
        state = path.stat()
        digest = b""
        if self.place in path.parents:
            digest = hashlib.sha1(path.read_bytes()).digest()
        return state.st_size, state.st_mtime_ns, digest

    def loose_json(self, given: dict[Path, int]) -> list[str]:
        """The written files that are no strict JSON: NaN, or cut off.

        `given`: what was there, and when it changed.
        """

        def refuse(name: str) -> None:
            raise ValueError(name)

        wrong = []
        for path in (self.place / "out").rglob("*.json"):
            if not path.is_file() or "damaged" in path.name:
                continue
            if given.get(path) == path.stat().st_mtime_ns:
                continue
            try:
                json.loads(path.read_bytes(), parse_constant=refuse)
            except ValueError as error:
                wrong.append(f"{path.name}: {error}")
        return wrong


def outputs_of(command: Command) -> list[str]:
    """The files and folders that a command line names as outputs."""
    words = []
    for flag, word in zip(command.argv, command.argv[1:]):
        if flag in OUTPUT_FLAGS and word:
            words.append(word)
    starts = tuple(f"{flag}=" for flag in OUTPUT_FLAGS)
    words += [word.split("=", 1)[1] for word in command.argv if word.startswith(starts)]
    return words


def differing(before: dict[Path, tuple], after: dict[Path, tuple]) -> list[str]:
    """The paths that only one listing has, or that are not the same in both."""
    paths = before.keys() | after.keys()
    return sorted(str(path) for path in paths if before.get(path) != after.get(path))


def run_cases(kinds: list[str], first: int, count: int, seed: int, keep: bool = False) -> int:
    """Run cases `first`, `first` + 1, ... of the kinds in turn and print those with faults.

    Returns how many had.
    """
    warnings.simplefilter("ignore")
    faulthandler.enable()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    running = folder / "case"  # names the case in which the process dies
    fuzzer = Fuzzer(folder / "tree")
    ends: Counter[tuple[str, int]] = Counter()
    faulty = 0
    begin = time.perf_counter()
    for number in range(first, first + count):
        kind = kinds[number % len(kinds)]
        running.write_text(f"--kinds {kind} --first {number}\n")
        command, status, wrong = fuzzer.run(kind, number, seed)
        ends[kind, status] += 1
        if wrong:
            faulty += 1
            words = " ".join(shortened(word) for word in command.argv)
            title = f"--kinds {kind} --first {number}: {command.script} {words!r}"
            print(title, *wrong, sep="\n    ", flush=True)
        done = number - first + 1
        if done % 1000 == 0:
            print(f"{done} cases, {faulty} with faults; running: {running}", flush=True)
    print("kind, exit status, cases:")
    for (kind, status), cases in sorted(ends.items()):
        print(f"{kind} {status}: {cases}")
    print(f"{count} cases in {time.perf_counter() - begin:.0f} s, {faulty} with faults")
    if keep:
        print(f"the last case: {fuzzer.place}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return faulty


def shortened(word: str) -> str:
    return word if len(word) < 80 else word[:80] + "..."
