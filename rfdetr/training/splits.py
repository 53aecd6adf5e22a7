"""The images of a run: its dataset's splits, read as this run is to see them."""

from __future__ import annotations

import math
from dataclasses import replace

from rfdetr.console import warn
from rfdetr.data.coco import read_dataset
from rfdetr.data.gray import other_ranges, told_scale
from rfdetr.data.records import CocoSplit
from rfdetr.settings import TrainingSettings
from rfdetr.weights import checkpoint

ONE_RANGE = "Scale these images as those were, or begin with these anew"


def read_splits(settings: TrainingSettings, queries: int) -> dict[str, CocoSplit]:
    """The dataset's splits, "test" only where it is to be scored; queries: for an image."""
    if settings.tile:
        queries = math.inf  # those are of a tile
    splits = read_dataset(
        settings.dataset, settings.val_fraction, queries, settings.exif, settings.rename
    )
    if settings.run_test and "test" not in splits:
        warn(f"--run_test 1: {settings.dataset} has no test split, it is skipped")
    if not settings.run_test:
        splits.pop("test", None)
    for split in splits.values():
        for message in split.warnings:
            warn(message)
    return splits


def with_gray(
    splits: dict[str, CocoSplit],
    settings: TrainingSettings,
    resumed: dict | None,
    frozen: dict | None,
) -> dict[str, CocoSplit]:
    """The splits with the range of gray of more than 8 bits: the run's own, the frozen detector's,
    or that of the training images; it is said.
    """
    given = settings.gray
    stored = checkpoint.gray_of(resumed or frozen or {})
    if resumed and stored and given == stored.by:
        given = None
    if not (resumed or frozen):
        given = given or "auto"
    if frozen and not resumed and given is not None and given != (stored.by if stored else "full"):
        warn(f"--gray {given}: the frozen detector's images were read otherwise; leave it out")
    scale = told_scale(given, stored, splits["train"].images, ONE_RANGE)
    for message in other_ranges(splits, scale):
        warn(message)
    return {name: replace(split, gray=scale) for name, split in splits.items()}
