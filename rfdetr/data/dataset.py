"""A split as a dataset: an image's pixels and objects as the model is to see them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms import v2

from rfdetr.console import UserError
from rfdetr.data.augment import PRESETS, Preset, random_view
from rfdetr.data.copy_paste import hidden, paste
from rfdetr.data.gray import window_of
from rfdetr.data.guess import GUESSING_SIDE, with_guesses
from rfdetr.data.guess_weights import EXAMPLES, learn_weights
from rfdetr.data.images import LARGE, load_image
from rfdetr.data.large_images import Pixels, load_for_tiles
from rfdetr.data.letterbox import as_input
from rfdetr.data.mask_source import images_with_masks
from rfdetr.data.mosaic import Part, draw_parts, join
from rfdetr.data.records import CocoSplit, ImageRecord
from rfdetr.data.targets import clear_outside, seen_of, target_of
from rfdetr.data.tiles import in_tiles, tiles_with_masks, visible_objects
from rfdetr.masks import draw_masks, is_turned
from rfdetr.placement import Placement, letterbox_borders
from rfdetr.tiling import Tiling, Window, crop

RAM_CACHE_BYTES = 2 << 30  # decoded, resized images of small sets stay in memory
GUESSES_KEPT = 100_000  # masks that each process keeps, about 50 MB; others are guessed anew


@dataclass
class Batch:
    """n images of R x R pixels with their objects."""

    images: Tensor  # uint8 (n, 3, R, R)
    # One an image: boxes (t, 4) cxcywh 0..1, labels (t,), has_mask (t,) bool, index (its place in
    # the split), and masks uint8 (t, R, R) where the dataset was asked for them.
    targets: list[dict]
    # number of an unreadable image -> why; in tiles, too, of whole images
    unread: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.images[part], self.targets[part])

    @property
    def objects(self) -> int:
        return sum(len(target["labels"]) for target in self.targets)

    @property
    def indices(self) -> list[int]:
        return [target["index"] for target in self.targets]

    def pin_memory(self) -> Batch:
        """With images and masks where a GPU reads them by itself; the rest is small."""
        targets = []
        for target in self.targets:
            if "masks" in target:
                target = target | {"masks": target["masks"].pin_memory()}
            targets.append(target)
        return Batch(self.images.pin_memory(), targets, self.unread)


class SplitDataset(Dataset):
    """A split's images at one resolution.

    Keys are (index, seed). The seed alone decides the augmentation, so that neither the number of
    workers nor a resume changes what is seen; None means no augmentation. Where an image cannot be
    read, the next one of the split stands in for it, with the same seed, and the sample's "unread"
    has the reason.
    """

    def __init__(
        self,
        split: CocoSplit,
        resolution: int,
        augment: Preset | str | None,
        masks: bool,
        guess: bool = False,
        tiling: Tiling | None = None,
        letterbox: bool = False,
    ):
        """augment: a preset, a name in augment.PRESETS, or None.  guess: masks that are missing are
        guessed from the boxes.  tiling: the images are those tiles; with augmentation not the same
        ones each time.  letterbox: images and tiles keep their proportions.
        """
        self.whole_split = split
        self.split = in_tiles(split, tiling)
        self.tiling = tiling
        self.letterbox = letterbox
        self.resolution = resolution
        self.preset = PRESETS[augment] if isinstance(augment, str) else augment
        self.masks = masks
        self.guess = guess
        self.last_read: tuple[Path | None, Pixels | None] = (None, None)  # cut into tiles
        self.guessed: dict[int, list] = {}  # index -> the image's masks, of the first images
        self.guesses = 0  # how many masks these have
        self.donors: list[int] = []  # positions with masks, whose objects are pasted on others
        if self.preset is not None and self.preset.paste_chance:
            self.donors = self.positions_with_masks(images_with_masks(split))
        self.cache: dict[int, Tensor] | None = None  # index -> the resized image
        if self.bytes_of_images <= RAM_CACHE_BYTES:
            self.cache = {}
        self.cut_images: dict[Path, Pixels] | None = None  # those that moved tiles are cut from
        if tiling is not None and self.preset is not None and self.bytes_to_cut <= RAM_CACHE_BYTES:
            self.cut_images = {}
        # of each worker: its process id, and the index of the image that it took last
        self.in_work: Tensor | None = None

    def __len__(self) -> int:
        return len(self.split.images)

    def positions_with_masks(self, images: list[int]) -> list[int]:
        """Of images with masks, by number: where there are tiles the positions of those of their
        tiles that show an object with a mask.
        """
        if self.tiling is None:
            return images
        return tiles_with_masks(self.split.images, images)

    def number_of(self, index: int) -> int:
        """Which image of the whole split is seen, or a tile of it."""
        return index if self.tiling is None else self.split.images.places[index][0]

    def share_of(self, rank: int, world: int) -> list[int]:
        """Every `world`-th image of the split, in order; an image's tiles stay together."""
        if self.tiling is None:
            return list(range(rank, len(self), world))
        places = self.split.images.places
        return [index for index, (number, _) in enumerate(places) if number % world == rank]

    @property
    def bytes_of_images(self) -> int:
        return len(self) * 3 * self.resolution**2

    @property
    def bytes_to_cut(self) -> float:
        """Of all whole images; infinite where one is kept on disk."""
        pixels = self.whole_split.images.sizes.prod(axis=1)
        return math.inf if pixels.max(initial=0) > LARGE else 3 * float(pixels.sum())

    def __getitem__(self, key: tuple[int, int | None]) -> dict:
        index, seed = key
        if self.preset is None or seed is None:
            return self._view(index)
        # the CPU generator alone: torch.manual_seed would reach for the GPUs', at 2 ms a call
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._augmented(index, self.preset, None if self.tiling is None else seed)

    def _augmented(self, index: int, preset: Preset, seed: int | None) -> dict:
        """seed: tiles are moved by it."""
        if preset.mosaic_chance and torch.rand(()) < preset.mosaic_chance:
            sample = self._mosaic(index, preset, seed)
        else:
            sample = self._view_with_pastes(index, preset, seed)
        if preset.colours is not None:
            sample["image"] = preset.colours(sample["image"])
        sample["image"] = sample["image"].contiguous()
        if not self.masks:
            sample["target"].pop("masks", None)
        return sample

    def _mosaic(self, index: int, preset: Preset, seed: int | None) -> dict:
        """An image and three others, a part of each."""
        indices = [index, *torch.randint(len(self), (3,)).tolist()]
        parts = draw_parts(self.resolution)
        views = [self._view(one, preset, seed, part) for one, part in zip(indices, parts)]
        return join(views, parts)

    def _view_with_pastes(self, index: int, preset: Preset, seed: int | None) -> dict:
        sample = self._view(index, preset, seed)
        if self.donors and torch.rand(()) < preset.paste_chance:
            donor = self._view(self.donors[int(torch.randint(len(self.donors), ()))], preset, seed)
            if sample["shown"] is not None:  # nothing is pasted on a border
                donor["target"] = hidden(donor["target"], ~sample["shown"])
            sample = paste(sample, donor)
        return sample

    def _view(
        self,
        index: int,
        preset: Preset | None = None,
        seed: int | None = None,
        part: Part | None = None,
    ) -> dict:
        """An image in its own colours as a preset sees it, with its objects; seed: a tile is moved
        by it; part: of a mosaic, where the view then lies.
        """
        # Crops are taken from the whole image. Everything else is from the resized one, which is
        # worth keeping.
        crops = preset is not None and preset.crop_chance > 0
        index, image, unread, record = self.image(index, crops, seed)
        if self.masks and self.guess and None in record.segmentations:
            record = replace(record, segmentations=self.segmentations(index, record.window))
        placement = self.placement(record, self.letterbox and not crops)
        to_pixels = placement.to_input(*image.shape[-2:])
        matrix = np.eye(2, 3)
        if preset is not None:
            image, matrix = random_view(
                image, preset, self.resolution, np.diag(to_pixels)[:2], self.letterbox
            )
        matrix = matrix @ to_pixels
        pastes = preset is not None and bool(self.donors)
        window = self._window_in_view(record, matrix)
        if part is not None:
            image, matrix, window = part.take(image, matrix, window)
        target = target_of(
            record, matrix, self.resolution, window, part is not None, self.masks or pastes
        )
        target["index"] = index
        shown = self._shown(record, matrix) if pastes and part is None else None
        return {"image": image, "target": target, "unread": unread, "shown": shown}

    def placement(self, record: ImageRecord, letterbox: bool) -> Placement:
        """Where an input with or without borders lies in an image or a tile."""
        size = (record.height, record.width)
        return Placement.of_input(seen_of(record), *size, self.resolution, letterbox)

    def _window_in_view(self, record: ImageRecord, matrix: np.ndarray) -> Window:
        """Where a view that is not turned shows an image, between its borders; a turned one: all.

        matrix (2, 3): from pixels of the image to those of the view.
        """
        side = self.resolution
        if not self.letterbox or is_turned(matrix):
            return Window(0, 0, side, side)
        seen = seen_of(record)
        beside, above = letterbox_borders(seen.height, seen.width, side)
        if matrix[0, 0] == 0:  # x and y swapped
            beside, above = above, beside
        return Window(beside, above, side - beside, side - above)

    def _shown(self, record: ImageRecord, matrix: np.ndarray) -> Tensor | None:
        """bool (R, R): where an image lies in a view with borders; None where there are none."""
        left, top, right, bottom = seen_of(record)
        borders = letterbox_borders(bottom - top, right - left, self.resolution)
        if not self.letterbox or borders == (0, 0):
            return None
        rim = [[left, top, right, top, right, bottom, left, bottom]]
        shown = draw_masks([rim], record.height, record.width, matrix, self.resolution)
        clear_outside(shown, self._window_in_view(record, matrix))
        return torch.from_numpy(shown[0]).bool()

    def record(self, index: int, seed: int | None = None) -> ImageRecord:
        """An image, or a tile of one; seed: the tile is moved by it."""
        images = self.split.images
        return images[index] if seed is None else images.moved(index, seed)

    def image(
        self, index: int, whole: bool = False, seed: int | None = None
    ) -> tuple[int, Tensor, dict[int, str], ImageRecord]:
        """(index, pixels, {number of an unreadable image: why}, record) of the first image or tile
        to be read.

        The images are tried from `index` on.  Pixels are uint8 (3, R, R), or (3, H, W) where the
        `whole` image is asked for; seed: a tile is moved by it.  Raises UserError where no image of
        the split can be read.
        """
        unread: dict[int, str] = {}
        for position in (*range(index, len(self)), *range(index)):
            number = self.number_of(position)
            if number in unread:  # another tile of it
                continue
            self._note_in_work(position)
            try:
                record = self.record(position, seed)
                if whole:
                    pixels = self._read(record, seed is not None)
                else:
                    pixels = self._resized(position, record, seed)
                return position, pixels, unread, record
            except UserError as error:
                unread[number] = str(error)
        why = unread[self.number_of(index)]
        raise UserError(f"{self.split.annotation_file}: none of its images can be read. {why}")

    def prepare_for_workers(self, workers: int) -> None:
        """Before a loader's processes start: share which image each one reads.

        The caches are dropped where memory does not hold one for each.
        """
        self.in_work = torch.full((workers, 2), -1).share_memory_()
        if self.guess:
            _ = self.guess_weights  # learnt once, not in each of them
        self.last_read = (None, None)  # its file is this process's own
        if self.bytes_of_images * workers > RAM_CACHE_BYTES:
            self.cache = None
        if self.cut_images is not None:
            self.cut_images = {} if self.bytes_to_cut * workers <= RAM_CACHE_BYTES else None

    def images_in_work(self, processes: set[int]) -> list[str]:
        """The files that the workers with these process ids took last."""
        if self.in_work is None:
            return []
        taken = [index for process, index in self.in_work.tolist() if process in processes]
        return [str(self.split.images[index].path) for index in taken]

    def _note_in_work(self, index: int) -> None:
        worker = get_worker_info()
        if self.in_work is not None and worker is not None:
            self.in_work[worker.id] = torch.tensor([os.getpid(), index])

    def segmentations(self, index: int, window: Window | None = None) -> list[list | dict | None]:
        """The masks of an image's objects, guessed ones among them where that is asked for.

        window: of a tile that was moved; else it is where the split has it.
        """
        if self.tiling is None:
            return self._segmentations_of_image(index)
        number, own_window = self.split.images.places[index]
        masks = self._segmentations_of_image(number)
        kept = visible_objects(self.whole_split.images[number], window or own_window)
        return [masks[i] for i in kept]

    def _segmentations_of_image(self, index: int) -> list[list | dict | None]:
        record = self.whole_split.images[index]
        if not self.guess or None not in record.segmentations:
            return record.segmentations
        if index in self.guessed:
            return self.guessed[index]
        masks = with_guesses(record, self._pixels_to_guess_in(record), self.guess_weights)
        if self.guesses + len(masks) <= GUESSES_KEPT:
            self.guessed[index] = masks
            self.guesses += len(masks)
        return masks

    @cached_property
    def guess_weights(self) -> np.ndarray:
        """What the drawn masks tell of how to guess the others."""
        drawn = images_with_masks(self.whole_split)
        chosen = np.linspace(0, len(drawn) - 1, min(EXAMPLES, len(drawn))).astype(int)
        return learn_weights(self._examples([drawn[i] for i in chosen]))

    def _examples(self, indices: list[int]) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        """Those images that can be read, and their pixels to guess in."""
        for index in indices:
            record = self.whole_split.images[index]
            with suppress(UserError):
                yield record, self._pixels_to_guess_in(record)

    def _pixels_to_guess_in(self, record: ImageRecord) -> np.ndarray:
        """A whole image, uint8 (side, side, 3)."""
        side = max(self.resolution, GUESSING_SIDE)
        image = torch.from_numpy(self._pixels_of(record)).permute(2, 0, 1)
        pixels = v2.functional.resize(image, [side, side], antialias=True)
        return pixels.permute(1, 2, 0).numpy()

    def _resized(self, index: int, record: ImageRecord, seed: int | None) -> Tensor:
        is_kept = self.cache is not None and seed is None
        if is_kept and index in self.cache:
            return self.cache[index]
        pixels = self._read(record, seed is not None)
        image = as_input(pixels, self.resolution, self.letterbox).contiguous()
        if is_kept:
            self.cache[index] = image
        return image

    def _read(self, record: ImageRecord, moved: bool) -> Tensor:
        """(3, H, W) of an image or a tile, which was `moved` or lies where the split has it."""
        if record.window is None:
            return torch.from_numpy(self._pixels_of(record)).permute(2, 0, 1)
        if self.last_read[0] != record.path:
            self.last_read = (None, None)  # first: two of them would take twice the memory
            self.last_read = (record.path, self._to_cut(record, moved))
        return torch.from_numpy(crop(self.last_read[1], record.window)).permute(2, 0, 1)

    def _to_cut(self, record: ImageRecord, moved: bool) -> Pixels:
        """The whole image (H, W, 3) that a tile is cut from; kept for tiles that are moved, since
        of others the tile itself is.
        """
        kept = self.cut_images if moved and self.cut_images is not None else {}
        if record.path not in kept:
            kept[record.path] = load_for_tiles(record, window_of(self.split.gray))
        return kept[record.path]

    def _pixels_of(self, record: ImageRecord) -> np.ndarray:
        """The whole image, (H, W, 3) uint8."""
        return load_image(record, window_of(self.split.gray))
