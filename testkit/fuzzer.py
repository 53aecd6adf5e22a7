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
from pathlib import Path

import torch

from rfdetr.console import run_script
from rfdetr.device import memory_mb
from testkit.fuzz_cases import KINDS, Command, Materials
from testkit.in_process import restored_signals

SECONDS = 5.0


MEGABYTES = 2048.0


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


def refuse_network(*_, **__):
    raise urllib.error.URLError("the fuzzer has no network")


class Watchdog(threading.Thread):
    """Interrupts the main thread where a case takes more CPU time than it may; ends the process if it stays stuck."""

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


class Fuzzer:
    """A folder with materials in which cases are run one after another."""

    def __init__(self, folder: Path):
        folder = Path(folder).resolve()
        self.folder, self.place = folder, folder / "far/down/case"
        (folder / "base").mkdir(parents=True)
        self.base, self.watchdog = Materials(folder / "base"), Watchdog()

    @contextlib.contextmanager
    def surroundings(self):
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
        main = importlib.import_module(command.script).main
        before, resident = self.listing(command), memory_mb(torch.device("cpu"))
        given = {path: path.stat().st_mtime_ns for path in (self.place / "out").rglob("*.json")}
        said = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
        streams, argv = (sys.stdout, sys.stderr), sys.argv
        status = 0
        with self.surroundings(), warnings.catch_warnings():
            sys.stdout, sys.stderr = said
            sys.argv = [f"{command.script}.py", *command.argv]
            self.watchdog.hung, self.watchdog.begin = False, time.process_time()
            try:
                run_script(main, command.argv)
            except SystemExit as left:
                status = left.code or 0
            except BaseException as error:  # what run_script lets through is a finding too
                status, problem = 1, f"{type(error).__name__}: {error}"
                print(problem, file=sys.stderr)
            finally:
                self.watchdog.begin = None
                (sys.stdout, sys.stderr), sys.argv = streams, argv
        for stream in said:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in said)
        wrong = self.faults(status, out, err)
        if self.watchdog.hung:
            wrong.append(f"more than {SECONDS} s")
        grown = memory_mb(torch.device("cpu")) - resident
        wrong += [f"{grown:.0f} MB more"] * (grown > MEGABYTES)
        after = self.listing(command)
        changed = sorted(
            str(path)
            for path in before.keys() | after.keys()
            if before.get(path) != after.get(path)
        )
        wrong += [f"changed outside its outputs: {', '.join(changed[:5])}"] * bool(changed)
        return command, status, wrong + self.loose_json(given)

    def faults(self, status: int, out: str, err: str) -> list[str]:
        """What is wrong with the way a script ended and what it said."""
        # progress bars are printed over, a class may be called "Traceback"
        said = "\n".join(line.rsplit("\r", 1)[-1] for line in err.split("\n")).strip()
        wrong = []
        if status not in (0, 2):
            wrong.append(f"exit status {status}: {said[-600:]}")
        if "Traceback (most recent" in out + err:
            wrong.append(f"a traceback: {said[-600:]}")
        if status == 2 and (not said or "\n\n" in said):
            wrong.append(f"not one paragraph on stderr: {said[-600:]!r}")
        if "out of memory" in said:
            wrong.append(f"memory: {said[-300:]}")
        return wrong

    def listing(self, command: Command) -> dict[Path, tuple]:
        """All files of the temporary tree but the case's outputs: size, time of change, and content of the dataset."""
        given = [
            word
            for flag, word in zip(command.argv, command.argv[1:])
            if flag in OUTPUT_FLAGS and word
        ]
        given += [
            word.split("=", 1)[1]
            for word in command.argv
            if word.startswith(tuple(f"{f}=" for f in OUTPUT_FLAGS))
        ]
        own = [
            self.place / "out",
            self.place / "home",
            *(Path(os.path.normpath(self.place / "out" / word)) for word in given),
        ]
        found = {}
        for folder, _, files in os.walk(self.folder):
            folder = Path(folder)
            if any(path == folder or path in folder.parents for path in own):
                continue
            found[folder] = ()
            for path in (folder / name for name in files):
                if path not in own:
                    state = path.stat()
                    digest = (
                        hashlib.sha1(path.read_bytes()).digest()
                        if self.place in path.parents
                        else b""
                    )
                    found[path] = (state.st_size, state.st_mtime_ns, digest)
        return found

    def loose_json(self, given: dict[Path, int]) -> list[str]:
        """The written files that are no strict JSON: NaN, or cut off. `given`: what was there, and when it changed."""

        def refuse(name: str) -> None:
            raise ValueError(name)

        wrong = []
        for path in (self.place / "out").rglob("*.json"):
            if (
                not path.is_file()
                or "damaged" in path.name
                or given.get(path) == path.stat().st_mtime_ns
            ):
                continue
            try:
                json.loads(path.read_bytes(), parse_constant=refuse)
            except ValueError as error:
                wrong.append(f"{path.name}: {error}")
        return wrong


def run_cases(kinds: list[str], first: int, count: int, seed: int, keep: bool = False) -> int:
    """Run cases `first`, `first` + 1, ... of the kinds in turn, and print those with faults; returns how many had."""
    warnings.simplefilter("ignore")
    faulthandler.enable()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    fuzzer, ends, found = Fuzzer(folder / "tree"), Counter(), 0
    begin = time.perf_counter()
    for number in range(first, first + count):
        kind = kinds[number % len(kinds)]
        (folder / "case").write_text(
            f"--kinds {kind} --first {number}\n"
        )  # to be found where the process dies
        command, status, wrong = fuzzer.run(kind, number, seed)
        ends[kind, status] += 1
        if wrong:
            found += 1
            words = " ".join(word if len(word) < 80 else word[:80] + "..." for word in command.argv)
            print(
                f"--kinds {kind} --first {number}: {command.script} {words!r}",
                *wrong,
                sep="\n    ",
                flush=True,
            )
        if (number - first) % 1000 == 999:
            print(
                f"{number - first + 1} cases, {found} with faults; the running one is in {folder / 'case'}",
                flush=True,
            )
    print(
        "kind, exit status, cases:",
        *(f"{kind} {status}: {n}" for (kind, status), n in sorted(ends.items())),
        sep="\n",
    )
    print(f"{count} cases in {time.perf_counter() - begin:.0f} s, {found} with faults")
    if keep:
        print(f"the last case: {fuzzer.place}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return found
