"""Pictures as PNG and JPEG files, written a band of rows at a time."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from rfdetr.console import UserError
from rfdetr.data.bands import PNG_SIGNATURE, png_chunk

RGB_8_BITS = (8, 2, 0, 0, 0)  # bits, kind of colour, and the only methods there are
LEFT = b"\1"  # a row's filter: each byte is the difference to that of the pixel at its left
JPEG_STEP = 128  # rows of a band: eight rows of blocks, as many as there are restart markers
MOST_JPEG_SIDE = 65_500  # what libjpeg writes
START_OF_FRAME = b"\xff\xc0"
START_OF_SCAN = b"\xff\xda"
END_OF_IMAGE = b"\xff\xd9"
LAST_RESTART = b"\xff\xd7"


def write_png(file: Path, bands: Iterable[np.ndarray], height: int, width: int) -> None:
    """bands: (h, width, 3) uint8 RGB each, from top to bottom."""
    packer = zlib.compressobj(1)
    with open(file, "wb") as out:
        out.write(PNG_SIGNATURE)
        out.write(png_chunk(b"IHDR", struct.pack(">II5B", width, height, *RGB_8_BITS)))
        for band in bands:
            rows = band.copy()
            rows[:, 1:] -= band[:, :-1]
            filters = np.frombuffer(LEFT * len(rows), np.uint8)[:, None]
            filtered = np.hstack([filters, rows.reshape(len(rows), -1)])
            out.write(png_chunk(b"IDAT", packer.compress(filtered)))
        out.write(png_chunk(b"IDAT", packer.flush()))
        out.write(png_chunk(b"IEND", b""))


def write_jpeg(
    file: Path, bands: Iterable[np.ndarray], height: int, width: int, quality: int
) -> None:
    """bands: as in write_png, each but the last of a multiple of JPEG_STEP rows; quality: Pillow's.

    Each band is encoded by itself, and all of them are joined at restart markers, where a decoder
    begins anew.  Raises UserError for sides that a JPEG cannot have.
    """
    if max(height, width) > MOST_JPEG_SIDE:
        raise UserError(
            f"{file}: a JPEG has at most {MOST_JPEG_SIDE:,} pixels a side, this picture has "
            f"{max(height, width):,}. Write PNG: --pictures png"
        )
    with open(file, "wb") as out:
        is_first = True
        for band in bands:
            content = io.BytesIO()
            image = Image.fromarray(band)
            image.save(content, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_rows=1)
            head, scan = split_jpeg(content.getvalue())
            if is_first:
                frame = head.index(START_OF_FRAME)
                size = struct.pack(">H", height)  # behind marker, length and bits
                out.write(head[: frame + 5] + size + head[frame + 7 :])
                is_first = False
            else:
                out.write(LAST_RESTART)
            out.write(scan)
        out.write(END_OF_IMAGE)


def split_jpeg(content: bytes) -> tuple[bytes, bytes]:
    """(what comes before a JPEG's pixels, the pixels)."""
    marker = content.index(START_OF_SCAN)
    (size,) = struct.unpack_from(">H", content, marker + 2)
    begin = marker + 2 + size
    return content[:begin], content[begin : -len(END_OF_IMAGE)]
