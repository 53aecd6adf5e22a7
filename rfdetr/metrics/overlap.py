"""Mask gIoU, cIoU and Dice: how well masks cover a class in an image, whatever the instances."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy import ndarray as Array
from pycocotools import mask as mask_api

SCORE_THRESHOLD = 0.5


def mask_overlap(
    images: Array, classes: Array, scores: Array, rles: list[dict], annotations: list[dict]
) -> dict[str, float | None]:
    """Compare the union of the detected masks with the union of the true ones, per (image, class).

    images, classes, scores (n,): of n detections, whose masks are the compressed RLEs; those that
    score SCORE_THRESHOLD or more count. annotations: COCO's, with compressed RLEs. Crowds are no
    ground truth: what is detected inside them, outside every true mask of the class, does not
    count.

    Over the pairs where either side has pixels, with I the intersection, A and B the two areas and
    U = A + B - I: giou = mean I/U, ciou = sum I / sum U, dice = mean 2I/(A+B). All are None where
    no such pair exists. Definitions as in referring segmentation: LISA, arXiv:2308.00692.
    """
    detected_rles = defaultdict(list)
    true_rles = defaultdict(list)
    crowd_rles = defaultdict(list)
    for i in np.flatnonzero(scores >= SCORE_THRESHOLD):
        detected_rles[images[i], classes[i]].append(rles[i])
    for annotation in annotations:
        pair = annotation["image_id"], annotation["category_id"]
        group = crowd_rles if annotation["iscrowd"] else true_rles
        group[pair].append(annotation["segmentation"])

    ious = []
    dices = []
    all_intersections = 0
    all_unions = 0
    for pair in sorted(detected_rles.keys() | true_rles.keys()):
        detected = union_of(detected_rles.get(pair))
        true = union_of(true_rles.get(pair))
        crowd = union_of(crowd_rles.get(pair))
        in_crowd_alone = pixels_in_all(detected, crowd) - pixels_in_all(detected, crowd, true)
        detected_area = pixels_in_all(detected) - in_crowd_alone
        true_area = pixels_in_all(true)
        intersection = pixels_in_all(detected, true)
        union = detected_area + true_area - intersection
        if union == 0:
            continue
        ious.append(intersection / union)
        dices.append(2 * intersection / (detected_area + true_area))
        all_intersections += intersection
        all_unions += union
    if not ious:
        return {"giou": None, "ciou": None, "dice": None}
    return {
        "giou": sum(ious) / len(ious),
        "ciou": all_intersections / all_unions,
        "dice": sum(dices) / len(dices),
    }


def union_of(rles: list[dict] | None) -> dict | None:
    return mask_api.merge(rles) if rles else None


def pixels_in_all(*rles: dict | None) -> int:
    """How many pixels lie in every RLE; None is an empty one."""
    if None in rles:
        return 0
    inner = rles[0]
    if len(rles) > 1:
        inner = mask_api.merge(list(rles), True)
    # 32 bit unsigned in C: differences would wrap without int
    return int(mask_api.area(inner))
