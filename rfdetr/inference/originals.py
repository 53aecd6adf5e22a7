"""What predict() takes as images, as pixels: files, folders, PIL images, arrays, tensors."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rfdetr.console import UserError, warn
from rfdetr.data import large_images
from rfdetr.data.gray import deep_pixels, pixels_if_deep
from rfdetr.data.image_files import count_pages, is_regular_file
from rfdetr.data.images import (
    GrayWindow,
    open_image,
    oriented,
    read_pixels,
    scaled,
    tell_of_dark_colours,
    to_8_bit,
    to_rgb_array,
)
from rfdetr.data.large_images import ImageOnDisk, Pixels, read_for_tiles
from rfdetr.inference.image_paths import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    files_named_by,
    warn_of_deeper,
    what_is_there_instead,
)
from rfdetr.runs.places import what_is_there
from rfdetr.text import DOWNLOAD_FIRST, command_line, is_url, with_article


@dataclass(frozen=True)
class Page:
    """One page or frame of a file that has several; the first is number 1."""

    path: Path
    number: int


ImageInput = str | Path | Page | Image.Image | np.ndarray | Tensor | ImageOnDisk

CHANNELS = (1, 3, 4)  # gray, RGB, RGBA


@dataclass(frozen=True)
class Single:
    """One image; is_named: by itself, not by a folder or pattern that it was found in."""

    image: ImageInput
    is_named: bool


@dataclass(frozen=True)
class Original:
    """An image of height x width pixels that was looked at; one from a file is read again.

    pixels: (H, W, 3) uint8 RGB, in memory or on disk, or None; page: its number in a file of
    several, from 1 on; turn, window: as in `read_image`.
    """

    height: int
    width: int
    pixels: Pixels | None = None
    path: Path | None = None
    turn: bool = True
    window: GrayWindow | None = None
    page: int | None = None

    @classmethod
    def of(
        cls, image: ImageInput, pixels: Pixels, turn: bool, window: GrayWindow | None = None
    ) -> Original:
        """What to keep of an image with these pixels: a file's name in place of its pixels."""
        height, width = pixels.shape[:2]
        if isinstance(image, Page):
            return cls(height, width, None, image.path, turn, window, image.number)
        if isinstance(image, (str, Path)):
            return cls(height, width, path=Path(image), turn=turn, window=window)
        return cls(height, width, pixels=pixels)

    @property
    def is_large(self) -> bool:
        """Whether its file's pixels stay on disk while it is looked at in parts."""
        return self.height * self.width > large_images.LARGE

    def read(self) -> np.ndarray:
        """The pixels.  Raises UserError where the file has gone or changed its size."""
        pixels = self.read_parts(in_tiles=False)
        return pixels[:] if isinstance(pixels, ImageOnDisk) else pixels

    def read_parts(self, in_tiles: bool = True) -> Pixels:
        """As `read`, but a large image may be on disk; in_tiles: as in `read_image`."""
        if self.pixels is not None:
            return self.pixels
        image = Page(self.path, self.page) if self.page else self.path
        pixels = read_image(image, self.turn, self.window, in_tiles)
        if pixels.shape[:2] != (self.height, self.width):
            raise UserError(
                f"{self.path} was {self.width}x{self.height} pixels when it was predicted, and is "
                f"{pixels.shape[1]}x{pixels.shape[0]} now: predict again"
            )
        return pixels


def split_up(images: object) -> list | None:
    """The images of a list, a folder, a pattern or a batch (B, ...); None for what is one image.

    Raises UserError for a folder or pattern without images.
    """
    if isinstance(images, (list, tuple, Iterator)) and not is_open_file(images):
        return list(images)
    if isinstance(images, (np.ndarray, Tensor)):
        return list(images) if images.ndim == 4 else None
    if names_several(images):
        files = files_named_by(str(images), IMAGE_SUFFIXES)
        if not files:
            instead = what_is_there_instead(Path(images), IMAGE_SUFFIXES, "images")
            raise UserError(f"{images}: {instead}")
        if os.path.isdir(images):
            warn_of_deeper(Path(images), files)
        return files
    return None


def names_several(image: object) -> bool:
    """Whether it is the path of a folder, or a pattern such as "photos/*.png"."""
    if not isinstance(image, (str, Path)) or is_url(image):
        return False
    return os.path.isdir(image) or glob.has_magic(str(image)) and not os.path.lexists(image)


def is_open_file(image: object) -> bool:
    """Whether it is what open() gives, or alike: no image, though its lines can be iterated."""
    return hasattr(image, "read") and not isinstance(image, ImageOnDisk)


def flatten(images: object, pages: bool = False, is_named: bool = True) -> list[Single]:
    """Single images in their order, from lists, folders, patterns and batches of any depth.

    pages: each page of a file with several is an image.  is_named: of a single one, as in Single.
    """
    several = split_up(images)
    if several is not None:
        is_named = not names_several(images)
        return [single for item in several for single in flatten(item, pages, is_named)]
    singles = [images]
    if pages and isinstance(images, (str, Path)):
        singles = pages_of(images)
    return [Single(image, is_named) for image in singles]


def pages_of(path: str | Path) -> list[str | Path | Page]:
    """A file's pages, or the path itself where it has one, or cannot be read."""
    count = 1
    if is_regular_file(path):
        with contextlib.suppress(Exception), open_image(path) as image:
            count = count_pages(image)
    if count == 1:
        return [path]
    return [Page(Path(path), number) for number in range(1, count + 1)]


def deep_pixels_of(image: ImageInput, values_too: bool) -> np.ndarray | None:
    """The values of an image that is gray of more than 8 bits, else None; for `gray.look_at`.

    Raises TypeError for floating-point arrays, which may be both.
    """
    if isinstance(image, Page):
        image = image.path
    if isinstance(image, (str, Path)):
        return deep_pixels(_checked_file(image), values_too)
    if isinstance(image, Image.Image):
        return pixels_if_deep(image, values_too)
    if isinstance(image, ImageOnDisk):
        return None
    array = _channels_last(image) if isinstance(image, Tensor) else image
    if array.dtype.kind == "f":
        raise TypeError("floating-point numbers")
    return array if _is_gray(array) and _is_16_bit(array) else None


def read_image(
    image: ImageInput, turn: bool = True, window: GrayWindow | None = None, in_tiles: bool = False
) -> Pixels:
    """Any accepted image as (H, W, 3) uint8 RGB; turn: make it upright by its EXIF orientation.

    window: what is black and white in gray of more than 8 bits, and then in gray arrays of
    floating-point numbers too; None: each goes by its bits, floating-point arrays by 0..1.
    in_tiles: it is looked at in parts, so that a large file's pixels may stay on disk.
    Raises UserError for what is no image or cannot be read.
    """
    if isinstance(image, ImageOnDisk):
        return image
    read = read_for_tiles if in_tiles else read_pixels
    if isinstance(image, Page):
        return read(_checked_file(image.path), turn, window, image.number - 1)
    if isinstance(image, (str, Path)):
        return read(_checked_file(image), turn, window)
    if isinstance(image, Tensor):
        return _from_array(_channels_last(image), window)
    if isinstance(image, np.ndarray):
        return _from_array(image, window)
    if isinstance(image, Image.Image):
        try:
            return to_rgb_array(oriented(image, turn), window)
        except Exception as error:  # as in read_pixels: opened files are decoded only here
            raise UserError(f"the PIL image cannot be read as an image: {error}") from error
    kind = type(image).__name__
    advice = ""
    if is_open_file(image):
        kind = f"file object ({kind})"
        advice = ". Give its path, or PIL.Image.open(file)"
    elif isinstance(image, (bytes, bytearray, memoryview)):
        advice = ". Of a file's bytes, give PIL.Image.open(io.BytesIO(content))"
    raise UserError(
        f"an image must be a path, a PIL image, an array or a tensor, this one is "
        f"{with_article(kind)}{advice}"
    )


def read_or_warn(
    image: ImageInput, turn: bool, window: GrayWindow | None, in_tiles: bool
) -> Pixels | None:
    """As read_image; None, with a warning, for what cannot be read."""
    try:
        return read_image(image, turn, window, in_tiles)
    except UserError as error:
        warn(str(error))
        return None


def file_of(image: ImageInput) -> str | Path | None:
    """The file of an image or page that comes from one."""
    image = image.path if isinstance(image, Page) else image
    return image if isinstance(image, (str, Path)) else None


def _checked_file(path: str | Path) -> str | Path:
    """The path itself.  Raises UserError for what is not there, or no plain file."""
    if is_url(path):
        raise UserError(f"{path} {DOWNLOAD_FIRST}")
    if not str(path):
        raise UserError("an image must be a path, this one is an empty text")
    if not os.path.exists(path):
        there = what_is_there(Path(path))
        raise UserError(f"{path}: cannot be read as an image: {there} Looked from {os.getcwd()}")
    if not is_regular_file(path):
        raise UserError(f"{path} is not an image file, but a folder, pipe, socket or device")
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        command = command_line("python", "predict.py", "--checkpoint", "FILE", "--input", path)
        raise UserError(
            f"{path} is a video, no image: give its frames as RGB arrays (OpenCV's are BGR: "
            f"frame[:, :, ::-1]), or run: {command}"
        )
    return path


def _channels_last(tensor: Tensor) -> np.ndarray:
    """A tensor (C, H, W) or (H, W) on any device as an array (H, W, C) or (H, W)."""
    if tensor.ndim == 3:
        if tensor.shape[0] not in CHANNELS:
            advice = ""
            if tensor.shape[2] in CHANNELS:
                advice = ". Give tensor.permute(2, 0, 1)"
            raise UserError(
                "an image tensor must be (C, H, W) with 1, 3 or 4 channels, this one is "
                f"{tuple(tensor.shape)}{advice}"
            )
        tensor = tensor.permute(1, 2, 0)
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # which numpy has not
        tensor = tensor.float()
    return tensor.numpy()


def _from_array(array: np.ndarray, window: GrayWindow | None) -> np.ndarray:
    """Gray (H, W), or (H, W, C) with 1, 3 or 4 channels -> a new array (H, W, 3) uint8 RGB."""
    is_image = array.ndim == 2 or array.ndim == 3 and array.shape[2] in CHANNELS
    if not array.size or not is_image:
        advice = ""
        if array.ndim == 3 and array.shape[0] in CHANNELS:
            advice = ". Give array.transpose(1, 2, 0)"
        raise UserError(
            "an image array must be gray (H, W), RGB (H, W, 3) or RGBA (H, W, 4), this one is "
            f"{array.shape}{advice}"
        )
    if window and _is_gray(array) and (_is_16_bit(array) or array.dtype.kind == "f"):
        pixels = scaled(array, window)
        _tell_of_lost_contrast(array, pixels, window)
    else:
        pixels = _to_bytes(array)
        if _is_16_bit(array) and not _is_gray(array):
            tell_of_dark_colours(int(array.max()), "an array")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return to_rgb_array(Image.fromarray(np.ascontiguousarray(pixels)))


def _tell_of_lost_contrast(array: np.ndarray, pixels: np.ndarray, window: GrayWindow) -> None:
    """Warn where a window leaves one colour of a gray array: its `pixels`.

    Raises UserError where that is because its numbers are shares of 0..1 and the window's are not.
    """
    low = array.min()
    high = array.max()
    if pixels.min() < pixels.max() or not low < high:
        return
    black, white = window
    message = (
        f"a gray array reaches from {low:.4g} to {high:.4g}, and {black:.6g} is black and "
        f"{white:.6g} white, as in training or by gray: nothing is to be seen in it"
    )
    if array.dtype.kind == "f" and low >= 0 and high <= 1 < white:
        raise UserError(f"{message}. Give the numbers that the file has, or gray='full' for 0..1")
    warn(message)


def _is_gray(array: np.ndarray) -> bool:
    """Of an array (H, W), (H, W, C)."""
    return array.shape[2:] in ((), (1,))


def _is_16_bit(array: np.ndarray) -> bool:
    return array.dtype.kind == "u" and array.dtype.itemsize == 2


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """An image array of any accepted type as uint8 of the same shape; 16 bits as files are read."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        raise UserError(
            "an image array must be uint8, uint16, or float in 0..1, this one is bool, as masks "
            "are. Give the image itself; of a black and white one array.astype('uint8') * 255"
        )
    if _is_16_bit(array):
        rows = np.ascontiguousarray(array, np.uint16).reshape(len(array), -1)
        return to_8_bit(Image.fromarray(rows)).reshape(array.shape)
    if array.dtype.kind != "f":
        raise UserError(
            "an image array must be uint8, uint16, or float in 0..1, this one is "
            f"{array.dtype}. Where its values are 0..255, give image.astype('uint8')"
        )
    low = array.min()
    high = array.max()
    if not np.isfinite(array).all():
        raise UserError("a float image must lie in 0..1, this one has NaN or infinite pixels")
    if low < 0 or high > 1:
        raise UserError(
            f"a float image must lie in 0..1, this one reaches from {low:.4g} to {high:.4g}. Where "
            "it is 0..255, divide it by 255; give it before it is normalised"
        )
    return (array * 255.0).round().astype(np.uint8)
