"""Image files: what a file_name may mean, and what earlier checks found in the file, kept outside the dataset.

A file of the same size and time is not read again. Only time is saved by it: names are judged and annotations read anew
each time, and a file that is not what it was, or a damaged cache, is looked at as if there were none. What a system
refused for the moment (rights, a network disk) is not remembered.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import time
import zlib
from pathlib import Path

FORMAT = 2  # raise it when findings change their form or meaning
SETTLED = (
    2e9  # nanoseconds: a file younger than its disk's clock ticks may change again without a trace
)

PARTS, PART = (
    4,
    8192,
)  # what is read of a file to know it again: the number of parts, and the bytes of each
_PASSING = (
    "EACCES EPERM EIO ESTALE ETIMEDOUT EAGAIN EINTR EBUSY EMFILE ENFILE ENOMEM ENOBUFS ENOLCK ENXIO ENODEV ENONET "
    "ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNRESET ECONNREFUSED ENOTCONN ESHUTDOWN EHOSTDOWN EHOSTUNREACH "
    "EREMOTEIO ECOMM EPROTO EKEYEXPIRED EKEYREVOKED ENOKEY EDEADLK"
)
PASSING = {
    getattr(errno, name) for name in _PASSING.split() if hasattr(errno, name)
}  # each system has its own

Stamp = tuple[int, int] | None  # bytes, time of change in nanoseconds; None where there is no file


def stays_inside(name: object) -> bool:
    """False for `..`, absolute and UNC paths and drive letters, as any system would read them, and for no text."""
    if type(name) is not str or not name or "\0" in name:
        return False
    return ".." not in re.split(r"[\\/]", name) and not re.match(r"[\\/]|[A-Za-z]:", name)


def find_image(folder: Path, name: str) -> Path:
    """The file that a file_name means: with backslashes, also what Windows would read."""
    windows = folder / name.replace("\\", "/")
    return windows if "\\" in name and not os.path.exists(folder / name) else folder / name


def is_regular_file(path: str | Path) -> bool:
    """Whether a path leads to a plain file. Pipes, sockets and devices are not to be opened: that may never end."""
    return os.path.isfile(path)


def kind_of_file(mode: int) -> str:
    """In words, what a `stat` mode says that something is."""
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a plain file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def is_passing(error: BaseException) -> bool:
    """Whether the system refused to read a file: that says nothing of what is in it, and may be over the next time."""
    return isinstance(error, OSError) and error.errno in PASSING


def content_hash(path: Path) -> int:
    """64 bits of the sha256 of a file's size and of four parts of it, 32 KB in all, as a signed number."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for part in range(PARTS):
            file.seek(max(size - PART, 0) * part // (PARTS - 1))
            digest.update(file.read(PART))
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def stamp_of(path: Path) -> Stamp:
    try:
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        return None


class ImageCache(contextlib.AbstractContextManager):
    """The findings in one folder of images, by name; new ones are written at the end of the `with` block.

    They are kept in the folder RFDETR_CACHE, else in the user's cache. Nothing fails where that cannot be read or
    written, and processes that write at once replace each other's files whole.
    """

    def __init__(self, folder: Path):
        usual = Path(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rfdetr-two-stage"
        )
        name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
        self.file = Path(os.environ.get("RFDETR_CACHE") or usual, "checks", f"{name}_{FORMAT}.json")
        self.known, self.new = {}, {}  # name -> stamp, finding (anything that JSON holds)
        with contextlib.suppress(OSError, ValueError):
            checksum, body = self.file.read_bytes().split(b"\n", 1)
            self.known = json.loads(body) if int(checksum, 16) == zlib.crc32(body) else {}

    def get(self, name: str, stamp: Stamp) -> list | None:
        """What was found under this name in a file of the same stamp."""
        known = self.known.get(name)
        return known[1] if known and stamp and tuple(known[0]) == stamp else None

    def put(self, name: str, stamp: Stamp, finding: list) -> None:
        if stamp and time.time_ns() - stamp[1] > SETTLED:
            self.new[name] = stamp, finding

    def __exit__(self, *error: object) -> None:
        if not self.new:
            return
        body = json.dumps(self.known | self.new).encode()
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.file.parent)
            try:
                with open(handle, "wb") as file:
                    file.write(b"%08x\n" % zlib.crc32(body) + body)
                os.replace(temporary, self.file)
            except OSError:
                os.unlink(temporary)
