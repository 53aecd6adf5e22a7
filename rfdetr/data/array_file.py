"""Arrays in one file, to be mapped into memory by as many processes as want them.

A line with the length and checksum of what follows it, a JSON header, and the arrays, each at a
multiple of ALIGNED bytes. Nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rfdetr.files import atomic_write

ALIGNED = 64  # bytes
BLOCK = 1 << 22  # bytes that are read at once
LINE = 32  # bytes of the first line


class DamagedFile(ValueError):
    """The file is not what write_arrays wrote."""


def write_arrays(path: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Write arrays and `meta`, plain values, whole or not at all.  UserError as atomic_write."""
    layout = {}
    offset = 0  # from the end of the header on
    checksum = 0
    for name, array in arrays.items():
        layout[name] = [array.dtype.str, list(array.shape), offset]
        offset += padded(array.nbytes)
        checksum = zlib.crc32(np.ascontiguousarray(array).data.cast("B"), checksum)
    content = {"meta": meta, "arrays": layout, "bytes": offset, "checksum": checksum}
    header = json.dumps(content).encode()
    header += b" " * (padded(LINE + len(header)) - LINE - len(header))

    def write(file) -> None:
        file.write(b"%015d %015d\n" % (len(header), zlib.crc32(header)))
        file.write(header)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data.cast("B"))
            file.write(bytes(padded(array.nbytes) - array.nbytes))

    atomic_write(path, write)


def padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def read_header(path: Path) -> tuple[dict, int, str]:
    """(the header, where the arrays begin, a text that no other content has).

    Raises OSError and DamagedFile.
    """
    with open(path, "rb") as file, refusing_damage():
        size = os.fstat(file.fileno()).st_size
        length, checksum = (int(number) for number in file.read(LINE).split())
        if not 0 <= length <= size - LINE:
            raise DamagedFile(path)
        raw = file.read(length)
        if zlib.crc32(raw) != checksum:
            raise DamagedFile(path)
        header = json.loads(raw)
        if size != LINE + length + header["bytes"]:
            raise DamagedFile(path)
    return header, LINE + length, f"{checksum}-{header['checksum']}"


@contextlib.contextmanager
def refusing_damage() -> Iterator[None]:
    """Any error of what a damaged file says is DamagedFile."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DamagedFile(str(error)) from error


def map_arrays(path: Path, header: dict, begin: int) -> dict[str, np.ndarray]:
    """The arrays, mapped read-only.  header, begin: of read_header.  Raises as that."""
    with open(path, "rb") as file, refusing_damage():
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {}
        for name, (dtype, shape, offset) in header["arrays"].items():
            count = int(np.prod(shape))
            flat = np.frombuffer(mapped, np.dtype(dtype), count, begin + offset if count else 0)
            arrays[name] = flat.reshape(shape)
    return arrays


def check_arrays(path: Path, header: dict, begin: int) -> None:
    """Read all the arrays once.  Raises OSError, and DamagedFile where a bit has changed."""
    checksum = 0
    with open(path, "rb") as file, refusing_damage():
        for dtype, shape, offset in header["arrays"].values():
            file.seek(begin + offset)
            left = int(np.prod(shape)) * np.dtype(dtype).itemsize
            while left:
                block = file.read(min(left, BLOCK))
                if not block:
                    raise DamagedFile(path)
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
    if checksum != header["checksum"]:
        raise DamagedFile(path)
