"""Image files as arrays of RGB pixels."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from rfdetr.console import UserError, warn
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
# Above a limit Pillow warns, above twice that it raises. Only the latter is taken for a bomb here,
# and of files that are too small for so many pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
LARGE = 1 << 25  # pixels, 100 MB: of larger images a part at a time is read where that is enough
MOST_PIXELS = 1 << 29  # pycocotools' masks hold no more
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
SUSPECT_PIXELS = 178_956_970  # where Pillow's own limit is, unless ...
PIXELS_A_BYTE = 300  # ... the file has a byte for so many; a blank PNG has 340 and more

ORIENTATION = 0x0112  # EXIF tag: 2-4 mirror or turn by 180 degrees, 5-8 also swap width and height
SAMPLES_PER_PIXEL = 277  # TIFF tags
PHOTOMETRIC = 262
GRAY_OR_RGB = (0, 1, 2)  # values of PHOTOMETRIC
MOST_CHANNELS = 4  # RGB and transparency
DARK = 4096  # values of 16 bits that do not reach it have 12 bits or fewer
GrayWindow = tuple[float, float]  # what is black, what is white, in an image's own values
DARK_TOLD: list[str] = []  # the image that was told of
UNDO_ORIENTATION = {  # orientation -> what takes the upright image back to the stored one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def load_image(record: ImageRecord, window: GrayWindow | None = None) -> np.ndarray:
    """The pixels of an image, (H, W, 3) uint8 RGB; of animated images the first frame.

    window: of gray of more than 8 bits, as in `to_8_bit`.
    Raises UserError naming the file where it cannot be decoded or has changed its size since it
    was checked.
    """
    pixels = read_pixels(record.path, record.apply_exif, window)
    require_size(pixels, record)
    return pixels


def require_size(pixels: np.ndarray, record: ImageRecord) -> None:
    """UserError where an image has another size than it had when it was checked."""
    height, width = pixels.shape[:2]
    if (height, width) != (record.height, record.width):
        raise UserError(
            f"{printable(record.path)}: {width}x{height} pixels, "
            f"the annotations say {record.width}x{record.height}"
        )


def read_pixels(
    path: str | Path, apply_exif: bool, window: GrayWindow | None = None, page: int = 0
) -> np.ndarray:
    """A page of an image file as (H, W, 3) uint8 RGB, oriented as `oriented` says.

    window: as in `to_8_bit`.  Raises UserError where it cannot be read.
    """
    try:
        with open_image(path) as image:
            if page:
                image.seek(page)
            may_be_dark = has_deep_colours(image)
            pixels = to_rgb_array(oriented(image, apply_exif), window)
    except Exception as error:  # on damaged files Pillow raises OSError, struct.error and others
        raise unreadable(path, error) from error
    if may_be_dark:
        tell_of_dark_file(path, pixels)
    return pixels


def unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(
        f"{printable(path)}: cannot be read as an image: {error}. Replace it or leave it out"
    )


@contextmanager
def open_image(path: str | Path, file: BinaryIO | None = None) -> Iterator[Image.Image]:
    """An opened image file; `file`: where it is open already, and stays so.

    Raises what Pillow raises, and ValueError for too many channels.
    """
    try:
        opened = Image.open(file or path, formats=FORMATS)
    except UnidentifiedImageError:
        require_few_channels(tiff_tags(path))
        raise
    with opened as image:
        require_no_bomb(image, path)
        if image.format == "TIFF":
            require_few_channels(image.tag_v2)
        yield image


def require_no_bomb(image: Image.Image, path: str | Path) -> None:
    """DecompressionBombError for very many pixels in a small file."""
    pixels = image.width * image.height
    if pixels > SUSPECT_PIXELS and pixels > PIXELS_A_BYTE * os.path.getsize(path):
        raise Image.DecompressionBombError(f"{pixels:,} pixels in a file of a few bytes")


def require_few_channels(tags: TiffImagePlugin.ImageFileDirectory_v2 | dict) -> None:
    """ValueError for a TIFF with more than RGB and transparency."""
    channels = tags.get(SAMPLES_PER_PIXEL, 1)
    if channels > MOST_CHANNELS and tags.get(PHOTOMETRIC) in GRAY_OR_RGB:
        raise ValueError(
            f"it has {channels} channels, and a model sees gray, RGB or RGBA. Choose the one or "
            "three that show the objects, and save them as an image of their own"
        )


def tiff_tags(path: str | Path) -> TiffImagePlugin.ImageFileDirectory_v2 | dict:
    """The tags of the first page of a TIFF that Pillow does not read; empty for other files."""
    try:
        with open(path, "rb") as file:
            header = file.read(8)
            if header[2:3] == b"\x2b":  # BigTIFF
                header += file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(tags.next)
            tags.load(file)
            return tags
    except Exception:  # no TIFF, or a damaged one: Pillow's own error tells
        return {}


def oriented(image: Image.Image, apply_exif: bool) -> Image.Image:
    """The image turned upright by its EXIF orientation, or else with its pixels as stored."""
    if apply_exif:
        is_upright = image.getexif().get(ORIENTATION, 1) not in UNDO_ORIENTATION
        return image if is_upright else ImageOps.exif_transpose(image)  # which copies it
    if image.format != "TIFF":
        return image
    orientation = image.tag_v2.get(ORIENTATION)
    if orientation not in UNDO_ORIENTATION:
        return image
    image.load()  # Pillow turns TIFFs upright while it loads them
    return image.transpose(UNDO_ORIENTATION[orientation])


def is_deep(image: Image.Image) -> bool:
    """Whether an image is gray of more than 8 bits: integers or floating-point numbers."""
    return image.mode in ("F", "I") or image.mode.startswith("I;16")


def has_deep_colours(image: Image.Image) -> bool:
    """Whether an opened file, not yet decoded, has several channels of 16 bits.

    Pillow gives the upper 8 of them.
    """
    return not is_deep(image) and any(";16" in str(part[3]) for part in image.tile)


def tell_of_dark_file(path: str | Path, pixels: np.ndarray) -> None:
    """As tell_of_dark_colours, of a file with deep colours; pixels: what was read of it."""
    tell_of_dark_colours(256 * int(pixels.max(initial=0)) + 255, printable(path))


def tell_of_dark_colours(brightest: int, what: str) -> None:
    """Warn, once, of colours of 16 bits whose brightest value is low; what: the image in words.

    Processes that load images for another are silent: `gray.look_at_records` has looked at some.
    """
    is_loader = multiprocessing.parent_process() is not None
    if brightest >= DARK or DARK_TOLD or is_loader:
        return
    DARK_TOLD.append(what)
    warn(
        f"{what}: colours of 16 bits are read as 0..65535, and no value here is above {brightest}: "
        "to the model the image is nearly black. Scale such images to 8 bits, all by the same "
        "factor (where the values are 0..255: image.astype('uint8'))"
    )


def to_rgb_array(image: Image.Image, window: GrayWindow | None = None) -> np.ndarray:
    """An opened image as (H, W, 3) uint8 RGB; window: as in `to_8_bit`."""
    if is_deep(image):
        gray = to_8_bit(image, window)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode in ("P", "PA"):  # a palette's transparency may be bytes, which only RGBA takes
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def to_8_bit(image: Image.Image, window: GrayWindow | None = None) -> np.ndarray:
    """Gray of more than 8 bits as (H, W) uint8, scaled by a range of its values.

    The range is `window`; without one 0..65535 for 16 bits, else the least of 0..1, 0..255,
    0..65535 that holds the image, or 0..its maximum. NaN is black.
    """
    if window is not None:
        return scaled(np.asarray(image), window)
    gray = np.nan_to_num(np.asarray(image, np.float64).clip(0))
    brightest = gray.max(initial=0)
    if image.mode.startswith("I;16"):
        white = 65535
    else:
        white = next((top for top in (1, 255, 65535) if brightest <= top), brightest)
    return (gray * (255 / white)).round().clip(0, 255).astype(np.uint8)


def scaled(gray: np.ndarray, window: GrayWindow) -> np.ndarray:
    """Gray values of any shape as uint8: 0 up to `window`'s first value, 255 from its second on."""
    black, white = window
    shares = (gray.astype(np.float64).clip(black, white) - black) / (white - black)
    return np.nan_to_num(shares * 255).round().astype(np.uint8)
