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
    from rfdetr.data.records import CocoSplit, ImageList, ImageTable

USUAL_PERCENT = 99.9  # of "auto"; black is the same share from below
IMAGES = 100  # that are looked at, evenly spaced
PIXELS = 1 << 16  # of each
FEW = 5  # whose values are read where the range is known
LEVELS = 256
FEW_LEVELS = 20  # of an image that is nearly black: 12 bits scaled as 16 leave 17
# times the white of the training images: a dim image is no rarity, one so much brighter is
TOO_BRIGHT = 3
TOO_DARK = 1 / 8
OWN_RANGE = "--gray auto takes the range of these images"  # where a model is used


@dataclass(frozen=True)
class Sample:
    """What some images are: how many have gray of more than 8 bits, and some of its values.

    brightest: (name, value that 99.9 % of its pixels reach at most) of those that were read.
    """

    deep: int
    plain: int
    values: np.ndarray
    brightest: list[tuple[str, float]]


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
    most_read: int = IMAGES,
) -> Sample:
    """A bounded part of the images, evenly spaced, always the same.

    pixels_of: an image's array where it is gray of more than 8 bits, else None; raises an error
    for what counts as neither.  most_read: images of which values are read, too; of the others
    the files are opened, not decoded.
    """
    deep = 0
    plain = 0
    values = [np.empty(0)]
    brightest = []
    chosen = images[:: -(-len(images) // IMAGES) or 1]
    stride = -(-len(chosen) // most_read)
    for number, image in enumerate(chosen):
        try:
            pixels = pixels_of(image, number % stride == 0)
        except Exception:  # a damaged file; what reads it in earnest tells of it
            continue
        if pixels is None:
            plain += 1
            continue
        deep += 1
        own = some_of(pixels)
        if len(own):
            values.append(own)
            brightest.append((name_of(image), float(np.percentile(own, USUAL_PERCENT))))
    return Sample(deep, plain, np.concatenate(values), brightest)


def name_of(image: object) -> str:
    """The file of an image, a record or a page; an array has none."""
    path = getattr(image, "path", image)
    return str(path) if isinstance(path, (str, Path)) else "an array"


def look_at_records(images: ImageTable | ImageList, most_read: int = IMAGES) -> Sample:
    """As look_at, of a split's images."""
    return look_at(images, lambda image, values_too: deep_pixels(image.path, values_too), most_read)


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
    given: str | float | None, stored: GrayScale | None, sample: Sample, advice: str = OWN_RANGE
) -> tuple[GrayScale | None, str | None]:
    """How images are read for a checkpoint, and what to warn of.

    given: --gray, which goes before what the checkpoint has (`stored`). None: each image by its
    bits, as it was before checkpoints kept this.  advice: what to do with images of another range.
    """
    if given is not None:
        scale = scale_by(given, sample)
        return scale, words_on_dark(scale, sample)
    if stored is None or stored.by == "full":
        return stored, None
    if stored.window is None and sample.deep:
        here = replace(scale_by(stored.by, sample), plain=sample.plain)
        told = "the checkpoint was trained on images of 8 bits, these have gray of more. "
        return here, told + "; ".join(filter(None, [here.note, words_on_dark(here, sample)]))
    if stored.window and not stored.plain and sample.plain:
        some = "these images have"
        if sample.deep:
            some = f"{sample.plain} of {sample.plain + sample.deep} images looked at have"
        return stored, (
            f"the checkpoint was trained on gray of more than 8 bits, {some} 8 bits: "
            "they are read as they are, 0 is black and 255 white"
        )
    warning = words_on_other_range(stored, sample)
    return stored, warning and f"{warning}. {advice}"


def words_on_dark(scale: GrayScale, sample: Sample) -> str | None:
    """Which of a range's own images are nearly black in it; None without any."""
    if scale.window is None:
        return None
    black, white = scale.window
    least = black + (white - black) * FEW_LEVELS / LEVELS
    dark = [(name, value) for name, value in sample.brightest if value < least]
    if not dark:
        return None
    name, value = max(dark, key=lambda image: image[1])
    return (
        f"nearly black by that range: {len(dark)} ({name}: hardly a pixel above {value:.6g}). "
        "Unless they are meant to be, as empty images are, they are of another bit depth than the "
        "others: scale all alike first"
    )


def words_on_other_range(stored: GrayScale, sample: Sample) -> str | None:
    """What to warn of where images are far brighter or darker than those that a range is of."""
    here = scale_by(stored.by, sample)
    if stored.window is None or here.window is None:
        return None
    black, white = stored.window
    times = (here.window[1] - black) / (white - black)
    if TOO_DARK < times < TOO_BRIGHT:
        return None
    seen = "nearly black" if times <= TOO_DARK else "far too bright"
    percent = percent_of(stored.by)
    return (
        f"{percent:.4g} % of these images' pixels are up to {here.window[1]:.6g}, of the training "
        f"images' up to {white:.6g}: as if of another bit depth, they are {seen} to the model"
    )


def other_ranges(splits: dict[str, CocoSplit], scale: GrayScale | None) -> list[str]:
    """What to warn of splits whose gray is of another range than that of train (`scale`)."""
    found = []
    if scale is None or scale.window is None:
        return found
    for name, split in splits.items():
        if name == "train":
            continue
        told = words_on_other_range(scale, look_at_records(split.images, FEW))
        if told:
            found.append(f"{name}: {told}. Scale all alike first")
    return found


def told_scale(
    given: str | float | None,
    stored: GrayScale | None,
    images: ImageTable | ImageList,
    advice: str = OWN_RANGE,
) -> GrayScale | None:
    """As scale_for, of a split's images; what is done is said."""
    scale, warning = scale_for(given, stored, look_at_records(images), advice)
    if scale and scale.note and scale.note not in (warning or ""):
        tick(f"As in training: {scale.note}" if scale is stored else scale.note)
    if warning:
        warn(warning)
    return scale


def window_of(scale: GrayScale | None) -> GrayWindow | None:
    return scale.window if scale else None
