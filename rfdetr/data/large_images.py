"""Images of which a part at a time is looked at: large ones stay on disk, not in memory.

python -m rfdetr.data.large_images  is the process that decodes what has to be decoded as a whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from rfdetr.console import UserError
from rfdetr.data.bands import bands_of
from rfdetr.data.images import (
    LARGE,
    GrayWindow,
    has_deep_colours,
    is_deep,
    open_image,
    oriented,
    read_pixels,
    require_size,
    tell_of_dark_file,
    to_rgb_array,
    unreadable,
)
from rfdetr.files import free_disk

if TYPE_CHECKING:
    from rfdetr.data.records import ImageRecord

CROPPED_ROWS = 256  # of an image that was decoded as a whole, at a time


class ImageOnDisk:
    """The pixels (H, W, 3) uint8 RGB of an image in a temporary file.

    An index reads its part of them as an array, as it does of an array; the file goes with the
    object.
    """

    def __init__(self, file: BinaryIO, height: int, width: int):
        self.file = file
        self.shape = (height, width, 3)

    def __getitem__(self, part: slice | tuple) -> np.ndarray:
        # mapped anew each time: what a mapping has read counts as the process's memory
        return np.array(np.memmap(self.file, np.uint8, "r", shape=self.shape)[part])


Pixels = np.ndarray | ImageOnDisk


def load_for_tiles(record: ImageRecord, window: GrayWindow | None = None) -> Pixels:
    """As images.load_image; large images stay on disk."""
    pixels = read_for_tiles(record.path, record.apply_exif, window)
    require_size(pixels, record)
    return pixels


def read_for_tiles(
    path: str | Path, apply_exif: bool, window: GrayWindow | None = None, page: int = 0
) -> Pixels:
    """As images.read_pixels; large images stay on disk.

    Raises UserError where it cannot be read, and where the disk has no room for its pixels.
    """
    pixels = count_pixels(path, page)
    if pixels <= LARGE:
        return read_pixels(path, apply_exif, window, page)
    require_room(path, 3 * pixels)
    file = tempfile.TemporaryFile()
    try:
        size = write_pixels(file, path, apply_exif, window, page)
    except Exception as error:  # as in read_pixels
        raise unreadable(path, error) from error
    on_disk = ImageOnDisk(file, *size)
    with open_image(path) as image:
        may_be_dark = has_deep_colours(image)
    if may_be_dark:
        tell_of_dark_file(path, on_disk[::CROPPED_ROWS])
    return on_disk


def count_pixels(path: str | Path, page: int = 0) -> int:
    """0 for what cannot be opened."""
    try:
        with open_image(path) as image:
            if page:
                image.seek(page)
            return image.width * image.height
    except Exception:  # what reads it tells of it
        return 0


def require_room(path: str | Path, needed: int) -> None:
    """UserError where the folder of temporary files has not so many bytes left."""
    folder = tempfile.gettempdir()
    free = free_disk(Path(folder))
    if free < needed:
        raise UserError(
            f"{path}: its pixels take {needed / 1e9:.1f} GB in {folder} while it is looked at in "
            f"tiles, where {free / 1e9:.1f} GB are free. Free some space there, or name another "
            "folder in the environment variable TMPDIR"
        )


def write_pixels(
    file: BinaryIO, path: str | Path, apply_exif: bool, window: GrayWindow | None, page: int
) -> tuple[int, int]:
    """Write the pixels of an image to a file; returns (height, width) as it is seen."""
    with open_image(path) as image, open(path, "rb") as source:
        if page:
            image.seek(page)
        bands = None
        if scales_alike(image, window) and (image.format == "TIFF" or page == 0):
            convert = partial(to_rgb_array, window=window)
            bands = bands_of(image, source, convert, apply_exif)
        if bands is None:
            return write_whole(file, path, apply_exif, window, page)
        height = 0
        width = 0
        for band in bands:
            file.write(np.ascontiguousarray(band))
            height += len(band)
            width = band.shape[1]
        file.flush()
        return height, width


def scales_alike(image: Image.Image, window: GrayWindow | None) -> bool:
    """Whether each part of an image is scaled to 8 bits as the whole is."""
    return not is_deep(image) or window is not None or image.mode.startswith("I;16")


def write_whole(
    file: BinaryIO, path: str | Path, apply_exif: bool, window: GrayWindow | None, page: int
) -> tuple[int, int]:
    """As write_pixels, of an image that is decoded as a whole, which takes 4 bytes a pixel and
    more: in a process of its own, so that they are given back to the system.
    """
    request = json.dumps([str(path), apply_exif, window, page])
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", __name__, request],
        stdout=file,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    last_line = done.stderr.strip().rpartition("\n")[2]
    if done.returncode:
        raise ValueError(last_line or f"its decoder ended with {done.returncode}")
    return tuple(json.loads(last_line))


def decode(request: str) -> None:
    """The process of write_whole: pixels to stdout, then [height, width] to stderr."""
    path, apply_exif, window, page = json.loads(request)
    with open_image(path) as image:
        if page:
            image.seek(page)
        image = oriented(image, apply_exif)
        image.load()
    for rows in rows_of(image, window):
        sys.stdout.buffer.write(rows)
    sys.stdout.buffer.flush()
    print(json.dumps([image.height, image.width]), file=sys.stderr)


def rows_of(image: Image.Image, window: GrayWindow | None) -> Iterator[np.ndarray]:
    """All rows of a decoded image as RGB, some at a time where that is the same."""
    if not scales_alike(image, window):
        yield to_rgb_array(image, window)
        return
    for top in range(0, image.height, CROPPED_ROWS):
        bottom = min(top + CROPPED_ROWS, image.height)
        yield to_rgb_array(image.crop((0, top, image.width, bottom)), window)


if __name__ == "__main__":
    try:
        decode(sys.argv[1])
    except Exception as error:
        print(error, file=sys.stderr)
        sys.exit(1)
