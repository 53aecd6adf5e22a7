"""What earlier checks found in image files, kept outside the dataset."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from pathlib import Path

FORMAT = 2  # raise it when findings change their form or meaning


SETTLED = (
    2e9  # nanoseconds: a file younger than its disk's clock ticks may change again without a trace
)


Stamp = tuple[int, int] | None  # bytes, time of change in nanoseconds; None where there is no file


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
