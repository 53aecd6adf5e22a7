"""Mask gIoU, cIoU and Dice: how well the masks of an image cover a class, whatever the instances."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy import ndarray as Array
from pycocotools import mask as mask_api

SCORE_THRESHOLD = 0.5


def mask_overlap(rows: Array, rles: list[dict], annotations: list[dict]) -> dict[str, float | None]:
    """Compare the union of the found masks with the union of the true ones, per (image, class).

    rows (n, 7): image, box, score and class of what was found, rles its n compressed RLEs; what scores SCORE_THRESHOLD
    or more counts. annotations: COCO's, with compressed RLEs. Crowds are no ground truth; what is found inside them and
    outside every true mask of the class is not held against the prediction.

    Over the pairs where either side has pixels, with I the intersection, A and B the two areas and U = A + B - I:
    giou = mean I/U, ciou = sum I / sum U, dice = mean 2I/(A+B). All None where no such pair exists.
    Definitions as in referring segmentation: LISA, arXiv:2308.00692.
    """
    found, true, crowds = defaultdict(list), defaultdict(list), defaultdict(list)
    for i in np.flatnonzero(rows[:, 5] >= SCORE_THRESHOLD):
        found[rows[i, 0], rows[i, 6]].append(rles[i])
    for row in annotations:
        (crowds if row["iscrowd"] else true)[row["image_id"], row["category_id"]].append(
            row["segmentation"]
        )
    found, true, crowds = (
        {pair: mask_api.merge(r) for pair, r in groups.items()} for groups in (found, true, crowds)
    )

    ious, dices, intersections, unions = [], [], 0, 0
    for pair in found.keys() | true.keys():
        own, truth, crowd = found.get(pair), true.get(pair), crowds.get(pair)
        found_area, true_area, intersection = _pixels(own), _pixels(truth), _pixels(own, truth)
        found_area -= _pixels(own, crowd) - _pixels(own, crowd, truth)
        union = found_area + true_area - intersection
        if union:
            ious.append(intersection / union)
            dices.append(2 * intersection / (found_area + true_area))
            intersections += intersection
            unions += union
    if not ious:
        return {"giou": None, "ciou": None, "dice": None}
    return {
        "giou": sum(ious) / len(ious),
        "ciou": intersections / unions,
        "dice": sum(dices) / len(dices),
    }


def _pixels(*masks: dict | None) -> int:
    """Pixels that lie in every RLE; None is an empty one."""
    if None in masks:
        return 0
    # 32 bit unsigned in C: differences would wrap without int
    return int(mask_api.area(mask_api.merge(list(masks), True) if len(masks) > 1 else masks[0]))
