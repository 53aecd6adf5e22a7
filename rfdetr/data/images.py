"""Image files as arrays of RGB pixels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rfdetr.console import UserError, printable
from rfdetr.data.records import ImageRecord

# Only these are decoded: for others Pillow would call a program (Ghostscript for EPS), whatever the file's name says.
FORMATS = (
    "JPEG PNG TIFF BMP WEBP GIF PPM JPEG2000 AVIF DIB PCX ICO TGA".split()
)  # JPEG: cameras' MPO too


Image.init()
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # AVIF: from Pillow 11.3 on


# Above this Pillow warns, above twice this it raises, and only that counts as a decompression bomb here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


ORIENTATION = 0x0112  # EXIF tag: 2-4 mirror or turn by 180 degrees, 5-8 also swap width and height


UNTURN = {  # EXIF orientation -> what undoes its being applied
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def load_image(record: ImageRecord) -> np.ndarray:
    """The pixels, (H, W, 3) uint8 RGB, turned as `record.exif` says; of animated images the first frame.

    Raises UserError naming the file where it cannot be decoded or has changed its size since it was checked.
    """
    pixels = read_pixels(record.path, record.exif)
    if pixels.shape[:2] != (record.height, record.width):
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise UserError(
            f"{printable(record.path)}: {size} pixels, the annotations say {record.width}x{record.height}"
        )
    return pixels


def read_pixels(path: str | Path, turn: bool) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB; turn: as for `oriented`.  UserError if it is unreadable."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb_array(oriented(image, turn))
    except (
        Exception
    ) as error:  # Pillow's readers raise anything from OSError to struct.error on damaged files
        message = f"{printable(path)}: cannot be read as an image: {error}. Replace it or delete its entry"
        raise UserError(message) from error


def oriented(image: Image.Image, turn: bool) -> Image.Image:
    """An image upright by its EXIF orientation where `turn` is True, else with its pixels as they are stored."""
    if turn:
        return ImageOps.exif_transpose(image)
    orientation = image.tag_v2.get(ORIENTATION) if image.format == "TIFF" else 1
    if orientation not in UNTURN:
        return image
    image.load()  # Pillow turns TIFFs while it loads them
    return image.transpose(UNTURN[orientation])


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Gray of more than 8 bits is scaled by its range: 0..1, 0..255, 0..65535 or its own maximum."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        gray = np.nan_to_num(np.asarray(image, np.float64).clip(0))
        top = gray.max(initial=0)
        full = (
            65535
            if image.mode.startswith("I;16")
            else next((n for n in (1, 255, 65535) if top <= n), top)
        )
        gray = (gray * (255 / full)).round().clip(0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):  # a palette's transparency may be bytes, which only RGBA takes
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
