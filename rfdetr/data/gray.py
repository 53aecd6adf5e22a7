"""Gray images of more than 8 bits: which of their values become black and white.

A 12-bit image scaled by its 16 bits would arrive with 17 gray levels. So the range is taken from
the training images, kept in the checkpoint, and used wherever that model sees an image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rfdetr.console import tick, warn
from rfdetr.data.bands import bands_of
from rfdetr.data.images import (
    LARGE,
    GrayWindow,
    has_deep_colours,
    is_deep,
    open_image,
    tell_of_dark_file,
    to_rgb_array,
)

if TYPE_CHECKING:
    from rfdetr.data.records import ImageList, ImageTable

USUAL_PERCENT = 99.9  # of "auto"; black is the same share from below
IMAGES = 100  # that are looked at, evenly spaced
PIXELS = 1 << 16  # of each


@dataclass(frozen=True)
class Sample:
    """What some images are: how many have gray of more than 8 bits, and some of its values."""

    deep: int
    plain: int
    values: np.ndarray


@dataclass(frozen=True)
class GrayScale:
    """How a model's images with gray of more than 8 bits are read.

    by: "auto", "full" or a percentile, as --gray has it. window: what is black and what is white,
    in the images' own values; None where each image goes by its bits. deep, plain: of the images
    that were looked at, how many have gray of more than 8 bits, and how many have not.
    """

    by: str | float
    window: GrayWindow | None
    deep: int
    plain: int

    def to_dict(self) -> dict:
        window = None if self.window is None else list(self.window)
        return {"by": self.by, "window": window, "deep": self.deep, "plain": self.plain}

    @classmethod
    def from_dict(cls, values: dict) -> GrayScale:
        """Raises ValueError, TypeError or KeyError for what `to_dict` does not give."""
        by = values["by"]
        window = values["window"]
        if by not in ("auto", "full") and not 50 < float(by) <= 100:
            raise ValueError(f"gray is by {by!r}")
        if window is not None:
            black, white = map(float, window)
            if not -np.inf < black < white < np.inf:
                raise ValueError(f"gray is from {black} to {white}")
            window = (black, white)
        return cls(by, window, int(values["deep"]), int(values["plain"]))

    @property
    def note(self) -> str | None:
        """A line on what is done; None where no image needs it."""
        if not self.deep:
            return None
        images = f"{self.deep} of {self.deep + self.plain} images looked at"
        if self.window is None:
            return f"Gray of more than 8 bits in {images}: each by its bits, 0..65535 (--gray full)"
        black, white = self.window
        percent = percent_of(self.by)
        return (
            f"Gray of more than 8 bits in {images}: {black:.6g} is black, {white:.6g} white "
            f"({100 - percent:.4g} % and {percent:.4g} % of their pixels; --gray full: by its bits)"
        )


# of models whose training images had 8 bits, for sure
EIGHT_BIT = GrayScale(by="auto", window=None, deep=0, plain=1)


def percent_of(by: str | float) -> float:
    return USUAL_PERCENT if isinstance(by, str) else float(by)


def look_at(
    images: Sequence,
    pixels_of: Callable[[object, bool], np.ndarray | None],
    values_too: bool = True,
) -> Sample:
    """A bounded part of the images, evenly spaced, always the same.

    pixels_of: an image's array where it is gray of more than 8 bits, else None; raises an error
    for what counts as neither. values_too: False: files are opened, not decoded.
    """
    deep = 0
    plain = 0
    values = []
    for image in images[:: -(-len(images) // IMAGES) or 1]:
        try:
            pixels = pixels_of(image, values_too)
        except Exception:  # a damaged file; what reads it in earnest tells of it
            continue
        if pixels is None:
            plain += 1
        else:
            deep += 1
            values.append(some_of(pixels))
    return Sample(deep, plain, np.concatenate([np.empty(0), *values]))


def look_at_records(images: ImageTable | ImageList) -> Sample:
    """As look_at, of a split's images."""
    return look_at(images, lambda image, values_too: deep_pixels(image.path, values_too))


def deep_pixels(path: str | Path, values_too: bool = True) -> np.ndarray | None:
    """The first page of a file as `pixels_if_deep`; of a large one the values of `some_of`."""
    with contextlib.ExitStack() as opened:
        image = opened.enter_context(open_image(path))
        if values_too and has_deep_colours(image) and image.width * image.height <= LARGE:
            tell_of_dark_file(path, to_rgb_array(image))
            return None
        bands = None
        if values_too and is_deep(image) and image.width * image.height > LARGE:
            file = opened.enter_context(open(path, "rb"))
            bands = bands_of(image, file, np.asarray, apply_exif=False)
        if bands is None:
            return pixels_if_deep(image, values_too)
        drawn = np.sort(positions_drawn(image.width * image.height))
        values = []
        first = 0
        for band in bands:
            begin, end = np.searchsorted(drawn, [first, first + band.size])
            values.append(band.ravel()[drawn[begin:end] - first])
            first += band.size
        return np.concatenate(values)


def pixels_if_deep(image: Image.Image, values_too: bool) -> np.ndarray | None:
    """(H, W), or nothing of it, where it is gray of more than 8 bits; else None."""
    if not is_deep(image):
        return None
    return np.asarray(image) if values_too else np.empty(0)


def some_of(pixels: np.ndarray) -> np.ndarray:
    """Up to PIXELS finite values, drawn by a fixed seed."""
    flat = pixels.ravel()
    if len(flat) > PIXELS:
        flat = flat[positions_drawn(len(flat))]
    return flat[np.isfinite(flat)].astype(np.float64)


def positions_drawn(count: int) -> np.ndarray:
    """PIXELS of 0..count - 1, by a fixed seed."""
    return np.random.default_rng(0).integers(0, count, PIXELS)


def scale_by(by: str | float, sample: Sample) -> GrayScale:
    """The range that these images have by a value of --gray.

    Where the percentiles coincide, as with few bright pixels, it is that of all values.
    """
    window = None
    if by != "full" and len(sample.values):
        percent = percent_of(by)
        window = tuple(np.percentile(sample.values, [100 - percent, percent]).tolist())
        if window[0] >= window[1]:
            window = (float(sample.values.min()), float(sample.values.max()))
        if window[0] >= window[1]:
            window = None
    return GrayScale(by, window, sample.deep, sample.plain)


def scale_for(
    given: str | float | None, stored: GrayScale | None, sample: Sample
) -> tuple[GrayScale | None, str | None]:
    """How images are read for a checkpoint, and what to warn of.

    given: --gray, which goes before what the checkpoint has (`stored`). None: each image by its
    bits, as it was before checkpoints kept this.
    """
    if given is not None:
        return scale_by(given, sample), None
    if stored is None or stored.by == "full":
        return stored, None
    if stored.window is None and sample.deep:
        here = replace(scale_by(stored.by, sample), plain=sample.plain)
        return here, (
            f"the checkpoint was trained on images of 8 bits, these have gray of more. {here.note}"
        )
    if stored.window and not stored.plain and sample.plain:
        some = "these images have"
        if sample.deep:
            some = f"{sample.plain} of {sample.plain + sample.deep} images looked at have"
        return stored, (
            f"the checkpoint was trained on gray of more than 8 bits, {some} 8 bits: "
            "they are read as they are, 0 is black and 255 white"
        )
    return stored, None


def told_scale(
    given: str | float | None, stored: GrayScale | None, images: ImageTable | ImageList
) -> GrayScale | None:
    """As scale_for, of a split's images; what is done is said."""
    scale, warning = scale_for(given, stored, look_at_records(images))
    if warning:
        warn(warning)
    elif scale and scale.note:
        tick(f"As in training: {scale.note}" if scale is stored else scale.note)
    return scale


def window_of(scale: GrayScale | None) -> GrayWindow | None:
    return scale.window if scale else None
