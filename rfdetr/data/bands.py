"""Large TIFF, PNG and BMP files from top to bottom, a few rows at a time.

Pillow decodes a file as a whole. So each band of rows is copied into a small file of the same kind
in memory, which Pillow reads like any other: its pixels are those of the whole file, bit for bit.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from rfdetr.data.images import FORMATS, ORIENTATION

# an opened band -> (h, w, ...)
Convert = Callable[[Image.Image], np.ndarray]
BAND_BYTES = 1 << 23  # of a file's rows that are decoded at once, about; one row at least
MOST_BYTES = 1 << 26  # a strip or a row of tiles with more of them is no small part

# TIFF tags
WIDTH, HEIGHT = 256, 257
COMPRESSION = 259
STRIP_OFFSETS, STRIP_ROWS, STRIP_BYTES = 273, 278, 279
PLANES = 284  # 2: each channel by itself
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 322, 323, 324, 325
UNCOMPRESSED = 1
OLD_JPEG = 6  # whose strips need more of the file than themselves
# what tells how pixels are stored: bits, compression, kind, fill order, samples, planes, predictor,
# palette, extra samples, sample format, JPEG tables, YCbCr
PIXEL_TAGS = (258, COMPRESSION, 262, 266, 277, PLANES, 317, 320, 338, 339, 347, 529, 530, 531, 532)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the kind of colour
PNG_GRAY = 0

BMP_START = struct.Struct("<2sIHHIIiiHHI")  # up to the compression
BMP_PLAIN = (0, 3)  # rows as they are; with channels by bit fields


def bands_of(
    image: Image.Image, file: BinaryIO, convert: Convert, apply_exif: bool
) -> Iterator[np.ndarray] | None:
    """The rows of an opened image, (h, W, ...) each as `convert` makes it of a part, in order.

    file: the same file, opened by itself.  apply_exif: None is returned where the image would have
    to be turned upright.  None as well where the file has no such parts: other formats, interlaced
    PNG, TIFF in one strip, ...
    """
    if image.format == "TIFF":
        turned = apply_exif and image.getexif().get(ORIENTATION, 1) != 1
        return None if turned else tiff_bands(image, file, convert)
    if image.format == "PNG":
        return png_bands(file, convert, apply_exif)
    if image.format == "BMP":
        return bmp_bands(file, convert)
    return None


def opened(content: bytes | bytearray) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=FORMATS)


# ---------------------------------------------------------------- TIFF


@dataclass(frozen=True)
class TiffPart:
    """A strip, a part of one, or a tile: `size` bytes from `offset` on, width x height pixels."""

    offset: int
    size: int
    width: int
    height: int


def tiff_bands(image: Image.Image, file: BinaryIO, convert: Convert) -> Iterator[np.ndarray] | None:
    """As bands_of, whatever the orientation."""
    tags = image.tag_v2
    rows = tiff_tiles(tags) if TILE_OFFSETS in tags else tiff_strips(tags)
    largest = max((sum(part.size for part in row) for row in rows), default=MOST_BYTES + 1)
    tallest = max((part.width * part.height for row in rows for part in row), default=0)
    needs_more = tags.get(PLANES, 1) != 1 or tags.get(COMPRESSION) == OLD_JPEG
    if needs_more or max(largest, tallest) > MOST_BYTES:
        return None

    def decoded() -> Iterator[np.ndarray]:
        left = tags[HEIGHT]
        for row in rows:
            parts = [convert(opened(tiff_of(part, tags, file))) for part in row]
            yield np.concatenate(parts, axis=1)[:left, : tags[WIDTH]]
            left -= row[0].height

    return decoded()


def tiff_strips(tags: TiffImagePlugin.ImageFileDirectory_v2) -> list[list[TiffPart]]:
    """The strips from top to bottom; those without compression cut into bands."""
    width = tags[WIDTH]
    left = tags[HEIGHT]
    strips = []
    for offset, size in zip(tags.get(STRIP_OFFSETS, ()), tags.get(STRIP_BYTES, ())):
        height = min(tags.get(STRIP_ROWS, left), left)
        left -= height
        step = height
        if tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED and size % height == 0:
            step = max(BAND_BYTES * height // size, 1)
        for first in range(0, height, step):
            rows = min(step, height - first)
            part = TiffPart(offset + size * first // height, size * rows // height, width, rows)
            strips.append([part])
    return strips if left == 0 else []


def tiff_tiles(tags: TiffImagePlugin.ImageFileDirectory_v2) -> list[list[TiffPart]]:
    """The tiles, row by row."""
    width = tags[TILE_WIDTH]
    height = tags[TILE_HEIGHT]
    tiles = [
        TiffPart(offset, size, width, height)
        for offset, size in zip(tags[TILE_OFFSETS], tags[TILE_BYTES])
    ]
    across = -(-tags[WIDTH] // width)
    down = -(-tags[HEIGHT] // height)
    if len(tiles) != across * down:
        return []
    return [tiles[first : first + across] for first in range(0, len(tiles), across)]


def tiff_of(part: TiffPart, tags: TiffImagePlugin.ImageFileDirectory_v2, file: BinaryIO) -> bytes:
    """A TIFF that holds the part alone, in one strip.  Raises ValueError where the file ends."""
    own = TiffImagePlugin.ImageFileDirectory_v2(prefix=tags.prefix)
    for tag in PIXEL_TAGS:
        if tag in tags:
            own.tagtype[tag] = tags.tagtype[tag]
            own[tag] = tags[tag]
    own[WIDTH] = part.width
    own[HEIGHT] = own[STRIP_ROWS] = part.height
    own[STRIP_BYTES] = part.size
    own[STRIP_OFFSETS] = (0,)  # from the end of the tags on
    content = io.BytesIO()
    own.save(content)
    file.seek(part.offset)
    return content.getvalue() + read_all(file, part.size)


def read_all(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError("the file ends too early")
    return data


# ---------------------------------------------------------------- PNG


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", checksum)


def png_bands(file: BinaryIO, convert: Convert, apply_exif: bool) -> Iterator[np.ndarray] | None:
    """As bands_of: PNG of 8 bits a channel, or gray of 16, without interlacing."""
    chunks, data_chunks = png_chunks(file)
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks.pop(0)[1])
    is_plain = bits == 8 or bits == 16 and colour == PNG_GRAY
    if not is_plain or interlaced or any(kind == b"acTL" for kind, _ in chunks):
        return None
    row_bytes = width * PNG_CHANNELS[colour] * bits // 8

    def small_png(rows: bytes) -> Image.Image:
        """Filtered rows, each with its filter before it, as an opened image."""
        size = struct.pack(">IIBBBBB", width, len(rows) // (1 + row_bytes), bits, colour, 0, 0, 0)
        parts = [PNG_SIGNATURE, png_chunk(b"IHDR", size)]
        parts += [png_chunk(kind, data) for kind, data in chunks]
        parts += [png_chunk(b"IDAT", zlib.compress(rows, 0)), png_chunk(b"IEND", b"")]
        return opened(b"".join(parts))

    blank = bytes(1 + row_bytes)
    if apply_exif and small_png(blank).getexif().get(ORIENTATION, 1) != 1:
        return None

    def decoded() -> Iterator[np.ndarray]:
        row_above = blank  # a row's filter may refer to the one above it
        for rows in png_rows(file, data_chunks, height, 1 + row_bytes):
            band = small_png(row_above + rows)
            last_row = np.asarray(band)[-1]
            if bits == 16:
                last_row = last_row.astype(">u2")
            row_above = b"\0" + last_row.tobytes()
            yield convert(band)[1:]

    return decoded()


def png_chunks(file: BinaryIO) -> tuple[list[tuple[bytes, bytes]], list[tuple[int, int]]]:
    """((kind, content) of all chunks but pixels, (offset, size) of those with pixels)."""
    chunks = []
    data_chunks = []
    file.seek(len(PNG_SIGNATURE))
    kind = b""
    while kind != b"IEND":
        size, kind = struct.unpack(">I4s", read_all(file, 8))
        if kind == b"IDAT":
            data_chunks.append((file.tell(), size))
            file.seek(size + 4, io.SEEK_CUR)
        else:
            chunks.append((kind, read_all(file, size)))
            file.seek(4, io.SEEK_CUR)
    return chunks[:-1], data_chunks


def png_rows(
    file: BinaryIO, data_chunks: list[tuple[int, int]], height: int, row_bytes: int
) -> Iterator[bytes]:
    """All filtered rows, a band of them at a time.  Raises ValueError where some are missing."""
    step = max(BAND_BYTES // row_bytes, 1) * row_bytes
    left = height * row_bytes
    stream = zlib.decompressobj()
    rows = bytearray()
    for offset, size in data_chunks:
        file.seek(offset)
        packed = read_all(file, size)
        while left:
            rows += stream.decompress(packed, min(step, left) - len(rows))
            if len(rows) < min(step, left):
                break  # the next chunk goes on
            packed = stream.unconsumed_tail
            yield bytes(rows)
            left -= len(rows)
            rows.clear()
    if left:
        raise ValueError("the image is truncated")


# ---------------------------------------------------------------- BMP


def bmp_bands(file: BinaryIO, convert: Convert) -> Iterator[np.ndarray] | None:
    """As bands_of: BMP without compression, whose lowest row comes first."""
    start = read_all(file, BMP_START.size)
    magic, _, _, _, offset, header_size, width, height, _, bits, method = BMP_START.unpack(start)
    if magic != b"BM" or header_size < 40 or method not in BMP_PLAIN or height <= 0:
        return None
    file.seek(0)
    header = bytearray(read_all(file, offset))
    row_bytes = (width * bits + 31) // 32 * 4
    step = max(BAND_BYTES // row_bytes, 1)

    def decoded() -> Iterator[np.ndarray]:
        for top in range(0, height, step):
            bottom = min(top + step, height)
            file.seek(offset + (height - bottom) * row_bytes)
            struct.pack_into("<i", header, 22, bottom - top)
            yield convert(opened(header + read_all(file, (bottom - top) * row_bytes)))

    return decoded()
