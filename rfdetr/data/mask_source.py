"""Where a run's masks come from: drawn ones, guessed ones (`guess.py`), or both."""

from __future__ import annotations

import numpy as np

from rfdetr.console import UserError, tick, warn
from rfdetr.data.faults import GUESSED_INSTEAD, NO_MASKS
from rfdetr.data.guess_weights import LEAST_OBJECTS
from rfdetr.data.records import CocoSplit

SAMPLED = 10  # annotations that are told of
GUESSED = (
    "masks are guessed from the boxes and the images' colours. Scored with drawn masks, that "
    "reached {} of the mask mAP that drawn ones give on cell nuclei and {} on the demo data. {}. "
    "--masks given refuses to guess"
)
DRAW_SOME = (
    "The best next step is to draw the masks of ten varied images, then --masks boxes uses both"
)
LEARNT = "How the guesses are made is learnt from the masks that are drawn"
SHARES = ("97 %", "97 %")  # docs/results.md


def choose_masks(split: CocoSplit, asked: str) -> bool:
    """Whether the masks that a training split lacks are guessed: what --masks `asked` for comes to.

    auto: where there is no mask at all; boxes: all that are missing; given: never.  Prints what is
    there and warns of what is not.  Raises UserError where a split without masks is to be taken as
    given.
    """
    has_mask = split.images.has_mask
    drawn = int(has_mask.sum())
    missing = len(has_mask) - drawn
    if drawn == 0 and asked == "given":
        instead = f"--masks given: {GUESSED_INSTEAD}"
        raise UserError(NO_MASKS.format(split.annotation_file, len(has_mask), instead))
    if drawn:
        count = min(SAMPLED, len(has_mask))
        places = np.linspace(0, len(has_mask) - 1, count).astype(int)
        sampled = has_mask[places].sum()
        tick(f"Validated: {sampled}/{count} sample annotations contain segmentation masks")
    if not missing:
        return False
    lacking = f"{split.annotation_file}: {missing} of {len(has_mask)} annotations have no mask: "
    guess = asked == "boxes" or drawn == 0
    if guess:
        learnt = drawn >= LEAST_OBJECTS
        warn(lacking + GUESSED.format(*SHARES, LEARNT if learnt else DRAW_SOME))
    else:
        warn(lacking + "they give no mask loss. --masks boxes guesses them from the boxes")
    return guess


def images_with_masks(split: CocoSplit) -> list[int]:
    """The indices of images with a drawn mask."""
    return np.unique(split.places[split.images.has_mask]).tolist()


def images_with_drawn_masks(split: CocoSplit) -> list[int]:
    """The same, where these are less than half of all images."""
    drawn = images_with_masks(split)
    return drawn if 2 * len(drawn) < len(split.images) else []
