"""Image files as arrays of RGB pixels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from rfdetr.console import UserError
from rfdetr.text import printable

if TYPE_CHECKING:
    from rfdetr.data.records import ImageRecord

# Only these are decoded: for others Pillow would call a program (Ghostscript for EPS), whatever
# the file's name says. JPEG includes cameras' MPO; AVIF is there from Pillow 11.3 on.
Image.init()
FORMATS = [
    name
    for name in "JPEG PNG TIFF BMP WEBP GIF PPM JPEG2000 AVIF DIB PCX ICO TGA".split()
    if name in Image.OPEN
]
# Above a limit Pillow warns, above twice that it raises. Only the latter is taken for a bomb here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

ORIENTATION = 0x0112  # EXIF tag: 2-4 mirror or turn by 180 degrees, 5-8 also swap width and height
UNDO_ORIENTATION = {  # orientation -> what takes the upright image back to the stored one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def load_image(record: ImageRecord) -> np.ndarray:
    """The pixels of an image, (H, W, 3) uint8 RGB; of animated images the first frame.

    Raises UserError naming the file where it cannot be decoded or has changed its size since it
    was checked.
    """
    pixels = read_pixels(record.path, record.apply_exif)
    height, width = pixels.shape[:2]
    if (height, width) != (record.height, record.width):
        raise UserError(
            f"{printable(record.path)}: {width}x{height} pixels, "
            f"the annotations say {record.width}x{record.height}"
        )
    return pixels


def read_pixels(path: str | Path, apply_exif: bool) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB, oriented as `oriented` says.

    Raises UserError where it cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb_array(oriented(image, apply_exif))
    except Exception as error:  # on damaged files Pillow raises OSError, struct.error and others
        raise UserError(
            f"{printable(path)}: cannot be read as an image: {error}. Replace it or leave it out"
        ) from error


def oriented(image: Image.Image, apply_exif: bool) -> Image.Image:
    """The image turned upright by its EXIF orientation, or else with its pixels as stored."""
    if apply_exif:
        return ImageOps.exif_transpose(image)
    if image.format != "TIFF":
        return image
    orientation = image.tag_v2.get(ORIENTATION)
    if orientation not in UNDO_ORIENTATION:
        return image
    image.load()  # Pillow turns TIFFs upright while it loads them
    return image.transpose(UNDO_ORIENTATION[orientation])


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """An opened image as (H, W, 3) uint8 RGB."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        gray = to_8_bit(image)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):  # a palette's transparency may be bytes, which only RGBA takes
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def to_8_bit(image: Image.Image) -> np.ndarray:
    """Gray of more than 8 bits as (H, W) uint8, scaled by its range.

    The range is 0..65535 for 16 bits, else the least of 0..1, 0..255, 0..65535 that holds it, or
    0..its maximum.
    """
    gray = np.nan_to_num(np.asarray(image, np.float64).clip(0))
    brightest = gray.max(initial=0)
    if image.mode.startswith("I;16"):
        white = 65535
    else:
        white = next((top for top in (1, 255, 65535) if brightest <= top), brightest)
    return (gray * (255 / white)).round().clip(0, 255).astype(np.uint8)
