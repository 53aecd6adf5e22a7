"""What earlier checks found in image files, kept outside the dataset.

A file of the same size and time is not read again. Only time is saved by it: names and annotations
are checked anew each time, and a file that has changed, or a damaged cache, is treated as if
nothing were known. What the system refused for the moment (rights, a network disk) is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from pathlib import Path

FORMAT = 5  # raise it when findings change their form or meaning
# Nanoseconds. A younger file may change again within one tick of its disk's clock, unnoticed.
SETTLED = 2e9

Stamp = tuple[int, int] | None  # (bytes, time of change in ns); None where there is no file


def stamp_of(path: str | Path) -> Stamp:
    """What tells an unchanged file at once."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


class ImageCache(contextlib.AbstractContextManager):
    """The findings in one folder of images, by name; new ones are written when the block ends.

    They are kept in the folder RFDETR_CACHE, else in the user's cache. Nothing fails where that
    cannot be read or written. Processes that write at once replace each other's files whole.
    """

    def __init__(self, folder: Path):
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
        self.file = cache_folder() / "checks" / f"{name}_{FORMAT}.json"
        # name -> (stamp, finding), where a finding is anything that JSON holds
        self.known = read_checked(self.file)
        self.new: dict[str, str] = {}  # the same; as JSON, a third of the memory

    def get(self, name: str, stamp: Stamp) -> list | None:
        """What was found under this name in a file of the same stamp."""
        if stamp is None or name not in self.known:
            return None
        known_stamp, finding = self.known[name]
        return finding if tuple(known_stamp) == stamp else None

    def put(self, name: str, stamp: Stamp, finding: list) -> None:
        """Keep a finding, unless the file is so young that its stamp may not tell a change."""
        if stamp and time.time_ns() - stamp[1] > SETTLED:
            self.new[name] = json.dumps((stamp, finding))

    def __exit__(self, *error: object) -> None:
        if self.new:
            known = {name: json.dumps(value) for name, value in self.known.items()}
            write_checked(self.file, known | self.new)


def cache_folder() -> Path:
    if os.environ.get("RFDETR_CACHE"):
        return Path(os.environ["RFDETR_CACHE"])
    return Path(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rfdetr-two-stage"
    )


def read_checked(file: Path) -> dict:
    """The content of a JSON file behind a line with its checksum; empty where it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        checksum, body = file.read_bytes().split(b"\n", 1)
        if int(checksum, 16) == zlib.crc32(body):
            return json.loads(body)
    return {}


def write_checked(file: Path, content: dict[str, str]) -> None:
    """Write what read_checked reads, whole or not at all; a disk that refuses is no error.

    content: values as JSON.
    """
    lines = (f"{json.dumps(name)}: {value}" for name, value in content.items())
    body = f"{{{', '.join(lines)}}}".encode()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        try:
            with open(handle, "wb") as opened:
                opened.write(b"%08x\n" % zlib.crc32(body) + body)
            os.replace(temporary, file)
        except OSError:
            os.unlink(temporary)
