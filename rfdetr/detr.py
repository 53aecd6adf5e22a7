"""The Python door: load a model by size or checkpoint, and predict.

from rfdetr.detr import RFDETRNano
prediction = RFDETRNano(checkpoint="runs/.../best.pt").predict("image.jpg", threshold=0.5)
prediction.picture().save("found.png")
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfdetr.arguments import (
    as_arguments,
    checked_setting,
    naming_arguments,
    require_count,
    require_path,
    require_share,
    require_switch,
)
from rfdetr.console import UserError, warn
from rfdetr.data.gray import FEW, IMAGES, look_at, scale_for, window_of
from rfdetr.data.image_files import headers_of
from rfdetr.data.images import GrayWindow
from rfdetr.data.large_images import Pixels
from rfdetr.data.letterbox import as_input, letterbox_for
from rfdetr.data.statistics import pages_warning
from rfdetr.device import pick_device, pick_inference_precision
from rfdetr.inference.batches import in_batches
from rfdetr.inference.choice import Choice
from rfdetr.inference.detections import (
    DetectionRunner,
    Detections,
    make_predictions,
    require_finite,
    sure_detections,
)
from rfdetr.inference.image_paths import none_read, some_unread
from rfdetr.inference.originals import (
    ImageInput,
    Original,
    Single,
    deep_pixels_of,
    file_of,
    flatten,
    is_open_file,
    read_image,
    read_or_warn,
)
from rfdetr.inference.prediction import Prediction
from rfdetr.inference.tiles import COMPARABLE, DetectedInWindow, in_windows, merge
from rfdetr.placement import Placement
from rfdetr.settings import MOST_TILE_OVERLAP
from rfdetr.sizes import SIZES
from rfdetr.text import counted
from rfdetr.tiling import Tiling, Window, crop, idle_flags, tiling_of
from rfdetr.tool_settings import PredictionSettings
from rfdetr.weights.checkpoint import build_model, gray_of, input_side, load
from rfdetr.weights.download import find_weights

# beside a download that failed
OWN_FILE = "with checkpoint=PATH. A checkpoint of your own needs no download"


class RFDETR:
    """A detector, with masks where its checkpoint has a mask head.

    `model` is the plain torch module; `exif` ("apply" or "ignore") how image files are turned;
    `gray` how gray of more than 8 bits is read, None: by its bits.
    """

    size_name: str | None = None  # the official weights a subclass starts from
    in_python = True  # what is said names arguments, not the flags of predict.py

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        amp: str = PredictionSettings.amp,
        resolution: int | None = None,
    ):
        """checkpoint: a file of this repository or an official one; None: the official weights of
        the size, downloaded. resolution: the input side in pixels; None: the checkpoint's own.

        Raises UserError for a file that is missing, damaged or of another size, a side that does
        not fit, and another argument that is none.
        """
        place = pick_device(str(device), self.in_python)
        if checkpoint is not None:
            require_path("checkpoint", checkpoint)
        amp = checked_setting("amp", amp)
        if resolution is not None:
            require_count("resolution", resolution)
        size = SIZES.get(self.size_name)
        if checkpoint is None and size is None:
            raise UserError(
                "RFDETR needs a checkpoint; the sizes' own classes (RFDETRNano ...) have official "
                "weights"
            )
        path = Path(checkpoint or find_weights("auto", size, OWN_FILE))
        content = load(path)
        self.path = path
        own = content["size"]["name"]
        if size is not None and own != size.name:
            raise UserError(
                f"{path} is a {own} checkpoint, and {type(self).__name__} is for {size.name}: "
                f"RFDETR.from_checkpoint({str(path)!r}) takes every size"
            )
        with naming_arguments(self.in_python):
            self.resolution = input_side(content, resolution, path)
            model, self.table = build_model(content)
            self.precision = pick_inference_precision(amp, place, model.size.recipe.amp)
        self.model = model.to(place)
        self.runner = DetectionRunner(self.table, self.precision)
        self.exif = content.get("exif") or "apply"  # as the images it was trained on were read
        # as in a checkpoint
        known = ("tile", "tile_overlap", "tile_full", "image_side", "letterbox", "args")
        self.trained_with = {name: content[name] for name in known if name in content}
        self.gray = gray_of(content)
        self.best_score = 0.0  # of all that predict() has seen in images, below its threshold too
        self._warned_of: set[str] = set()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        amp: str = PredictionSettings.amp,
        resolution: int | None = None,
    ) -> RFDETR:
        """Any checkpoint, whatever its size."""
        return RFDETR(path, device, amp, resolution)

    def __repr__(self) -> str:
        classes = counted(len(self.table.names), "class")
        kind = "boxes" if self.model.head is None else "masks"
        where = f"{self.resolution} px, {self.precision.device}, {kind}, {self.path}"
        return f"{type(self).__name__}({self.model.size.name}, {classes}, {where})"

    @property
    def class_names(self) -> list[str]:
        return list(self.table.names)

    def predict(
        self,
        images: ImageInput | list[ImageInput],
        threshold: float = PredictionSettings.threshold,
        *,
        nms: float = PredictionSettings.nms,
        batch: int = PredictionSettings.batch,
        max_detections: int | None = None,
        gray: str | float | None = PredictionSettings.gray,
        pages: bool = PredictionSettings.pages,
        tile: int | str | None = PredictionSettings.tile,
        tile_overlap: float | None = PredictionSettings.tile_overlap,
        tile_full: bool | None = PredictionSettings.tile_full,
        letterbox: bool | None = PredictionSettings.letterbox,
    ) -> Prediction | list[Prediction]:
        """Detect objects with a score of at least `threshold`, 0..1, in one image or several.

        An image is a path; a PIL image; an array, gray (H, W), RGB as in PIL (OpenCV's BGR must be
        turned) or RGBA (H, W, 4); or a tensor (C, H, W). Arrays and tensors are uint8, or float in
        0..1; uint16 is scaled as in files. Several are a list that may mix all these, a folder, a
        pattern ("photos/*.png"), an array (B, H, W, C) or a tensor (B, C, H, W). The model gets
        `batch` of them at a time.
        nms: the IoU, 0..1, above which the worse of two boxes of a class is left out, and one of
        two classes where they all but coincide; 0: none is, as in the official package.
        max_detections: of an image, the best ones; None: as many as the model keeps, which is as
        many as it has queries unless it was trained with --num_select. gray: what is black and
        white in gray of more than 8 bits: "full", its bits; "auto" or a percentile, the range of
        these images; None: as in training. pages: each page of a file that has several is an image.
        tile: images larger than so many pixels are looked at in tiles of that side, which overlap
        by the share tile_overlap; "auto": at the scale of the training images; 0: none are; None:
        as in training. tile_full: each image is looked at as a whole, too. letterbox: images and
        tiles keep their proportions in the model's input. Of all three None means as in training.

        Returns a Prediction; for several images a list of them. Files of a folder or pattern that
        cannot be read are left out, with a warning: each Prediction's `path` tells its file. Raises
        UserError for an argument out of its range, another image that cannot be read, and where the
        model gives NaN.
        """
        require_share("threshold", threshold)
        require_share("nms", nms)
        require_count("batch", batch)
        if tile_overlap is not None:
            require_share("tile_overlap", tile_overlap, MOST_TILE_OVERLAP)
        if max_detections is not None:
            require_count("max_detections", max_detections)
        require_switch("pages", pages)
        if tile_full is not None:
            require_switch("tile_full", tile_full)
        # before the overlapping ones are left out
        self.runner.max_detections = max(max_detections or 0, self.model.size.select)
        if isinstance(images, Iterator) and not is_open_file(images):
            images = list(images)
        singles = flatten(images, pages)
        if not pages:
            self._warn_of_pages(singles)
        choice = Choice(
            threshold=threshold,
            nms=nms,
            batch=batch,
            max_detections=max_detections,
            window=self.gray_window([single.image for single in singles], gray),
            tiling=self.tiling(tile, tile_overlap, tile_full),
            letterbox=self.letterboxed(letterbox),
        )
        is_one = len(singles) == 1 and singles[0].image is images
        if is_one:
            pixels = read_image(images, self.exif == "apply", choice.window, bool(choice.tiling))
            return self._predict([(images, pixels)], choice)[0]
        predictions = []
        for part in in_batches(self._readable(singles, choice), batch):
            predictions += self._predict(part, choice)
        return predictions

    def tiling(
        self, tile: int | str | None, overlap: float | None, full: bool | None
    ) -> Tiling | None:
        """The tiles that predict() looks at, by its arguments; None for none.

        Warns, once, of those that change nothing.  Raises UserError where there is nothing to tell
        what "auto" is.
        """
        with naming_arguments(self.in_python):
            tiling = tiling_of(self.trained_with, tile, overlap, full)
        for warning in idle_flags(tiling, overlap, full):
            self._warn_once(warning, warning)
        return tiling

    def letterboxed(self, given: bool | None = None) -> bool:
        """Whether predict() lets images keep their proportions; given: its argument.

        Warns, once, where training did otherwise.  Raises UserError for another value.
        """
        if given is not None:
            require_switch("letterbox", given)
        letterbox, warning = letterbox_for(given, self.trained_with)
        self._warn_once("letterbox", warning)
        return letterbox

    def gray_window(
        self, images: list[ImageInput], gray: str | float | None = None
    ) -> GrayWindow | None:
        """What is black and white in those of the images that are gray of more than 8 bits.

        gray: as in `predict`.  Warns, once, where the training images were of another kind.
        """
        if gray is not None:
            gray = checked_setting("gray", gray)
        elif self.gray is None or self.gray.by == "full":
            return None
        is_known = gray is None and self.gray.window is not None
        sample = look_at(images, deep_pixels_of, FEW if is_known else IMAGES)
        scale, warning = scale_for(gray, self.gray, sample)
        self._warn_once("gray", warning)
        return window_of(scale)

    def _warn_once(self, subject: str, warning: str) -> None:
        """Of each subject once; an empty text is no warning."""
        if warning and subject not in self._warned_of:
            self._warned_of.add(subject)
            warn(as_arguments(warning) if self.in_python else warning)

    def _warn_of_pages(self, singles: list[Single]) -> None:
        files = filter(None, (file_of(single.image) for single in singles))
        warning = pages_warning(headers_of(map(Path, files)), "pages=True")
        if warning:
            warn(warning)

    def _readable(
        self, singles: list[Single], choice: Choice
    ) -> Iterator[tuple[ImageInput, Pixels]]:
        """The images with their pixels.

        Files that a folder or pattern has and that cannot be read are left out with a warning;
        UserError for others, and where nothing is left.
        """
        turn = self.exif == "apply"
        found = {file_of(single.image) for single in singles if not single.is_named}
        unread = set(found)
        for position, single in enumerate(singles):
            image = single.image
            if single.is_named:
                try:
                    pixels = read_image(image, turn, choice.window, bool(choice.tiling))
                except UserError as error:
                    raise UserError(f"images[{position}]: {error}") from error
            else:
                pixels = read_or_warn(image, turn, choice.window, bool(choice.tiling))
            if pixels is not None:
                unread.discard(file_of(image))
                yield image, pixels
        are_all_found = not any(single.is_named for single in singles)
        if unread and unread == found and are_all_found:
            raise UserError(none_read(len(found)))
        if unread:
            warn(some_unread(len(unread), len(found)))

    def _predict(self, images: list[tuple[ImageInput, Pixels]], choice: Choice) -> list[Prediction]:
        """In one batch of single images with their pixels."""
        turn = self.exif == "apply"
        pixels = [array for _, array in images]
        originals = [Original.of(image, array, turn, choice.window) for image, array in images]
        if choice.tiling is not None:
            return [
                self._predict_in_tiles(original, array, choice)
                for original, array in zip(originals, pixels)
            ]
        inputs = torch.stack([self._as_input(array, choice) for array in pixels])
        placements = [self._placed(None, array, choice) for array in pixels]
        predictions = []
        for detections in self._detect(inputs, placements):
            predictions += make_predictions(
                detections,
                [originals[i] for i in detections.indices],
                choice.threshold,
                self.model.head,
                self.table,
                self.precision,
                choice.nms,
                choice.max_detections,
            )
        return predictions

    def _predict_in_tiles(self, original: Original, pixels: Pixels, choice: Choice) -> Prediction:
        """In one image (H, W, 3) uint8, a batch of its tiles at a time."""
        height, width = pixels.shape[:2]
        windows = choice.tiling.windows(height, width)
        seen: list[DetectedInWindow] = []
        for first in range(0, len(windows), choice.batch):
            part = windows[first : first + choice.batch]
            inputs = torch.stack([self._as_input(crop(pixels, window), choice) for window in part])
            placements = [self._placed(window, pixels, choice) for window in part]
            for detections in self._detect(inputs, placements):
                of_detections = [part[i] for i in detections.indices]
                least = choice.threshold * COMPARABLE
                chosen = sure_detections(detections, least, choice.nms)
                seen += in_windows(
                    detections, of_detections, chosen, self.model.head, self.precision
                )
        merged = merge(seen, height, width, choice.threshold)
        prediction = merged.as_prediction(original, self.table)
        if len(windows) > 1:
            prediction = prediction.without_duplicates(choice.nms)
        return prediction[: choice.max_detections]

    def _detect(self, inputs: Tensor, placements: list[Placement]) -> Iterator[Detections]:
        """As DetectionRunner.run; keeps the best score.

        Raises UserError where a score or a box is NaN or infinite.
        """
        indices = list(range(len(inputs)))
        with naming_arguments(self.in_python):
            for detections in self.runner.run(self.model, inputs, placements, indices):
                require_finite(detections, self.precision)
                for i, scores in enumerate(detections.scores.numpy()):
                    seen = scores[detections.in_sight(i)]
                    self.best_score = max([self.best_score, *seen.tolist()])
                yield detections

    def _as_input(self, pixels: np.ndarray, choice: Choice) -> Tensor:
        """(H, W, 3) uint8 -> the model's input, (3, R, R) uint8."""
        image = torch.tensor(pixels).permute(2, 0, 1)
        return as_input(image, self.resolution, choice.letterbox)

    def _placed(self, window: Window | None, pixels: np.ndarray, choice: Choice) -> Placement:
        """Where the input made of a window, or of all, of an image (H, W, 3) lies in it."""
        height, width = pixels.shape[:2]
        window = window or Window(0, 0, width, height)
        return Placement.of_input(window, height, width, self.resolution, choice.letterbox)


def _of_size(size: str) -> type[RFDETR]:
    """The class of one size, which starts from its official weights."""
    name = "RFDETR" + size.title().replace("-", "").replace("Xl", "XL")
    return type(name, (RFDETR,), {"size_name": size})


RFDETRNano = _of_size("nano")
RFDETRSmall = _of_size("small")
RFDETRMedium = _of_size("medium")
RFDETRBase = _of_size("base")
RFDETRLarge = _of_size("large")
RFDETRLarge2026 = _of_size("large-2026")
RFDETRSegNano = _of_size("seg-nano")
RFDETRSegSmall = _of_size("seg-small")
RFDETRSegMedium = _of_size("seg-medium")
RFDETRSegLarge = _of_size("seg-large")
RFDETRSegXLarge = _of_size("seg-xlarge")
RFDETRSeg2XLarge = _of_size("seg-2xlarge")
