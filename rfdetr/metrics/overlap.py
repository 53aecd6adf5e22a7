"""Mask gIoU, cIoU and Dice: how well the masks of an image cover a class, whatever the instances."""

from __future__ import annotations

from collections import defaultdict

from pycocotools import mask as mask_api

SCORE_THRESHOLD = 0.5


def mask_overlap(results: list[dict], annotations: list[dict]) -> dict[str, float | None]:
    """Compare the union of the found masks with the union of the true ones, per (image, class).

    results: COCO results with `image_id`, `category_id`, `score` and `segmentation` (compressed RLE); those scoring
    SCORE_THRESHOLD or more count. annotations: the same without `score`, with `iscrowd`. Crowds are no ground truth;
    what is found inside them and outside every true mask of the class is not held against the prediction.

    Over the pairs where either side has pixels, with I the intersection, A and B the two areas and U = A + B - I:
    giou = mean I/U, ciou = sum I / sum U, dice = mean 2I/(A+B). All None where no such pair exists.
    Definitions as in referring segmentation: LISA, arXiv:2308.00692.
    """
    found, true, crowds = defaultdict(list), defaultdict(list), defaultdict(list)
    for result in results:
        if result["score"] >= SCORE_THRESHOLD:
            found[result["image_id"], result["category_id"]].append(result["segmentation"])
    for row in annotations:
        (crowds if row["iscrowd"] else true)[row["image_id"], row["category_id"]].append(row["segmentation"])

    ious, dices, intersections, unions = [], [], 0, 0
    for pair in found.keys() | true.keys():
        found_area, true_area = _pixels(found[pair]), _pixels(true[pair])
        intersection = _pixels(found[pair], true[pair])
        if crowds[pair]:
            found_area -= _pixels(found[pair], crowds[pair]) - _pixels(found[pair], crowds[pair], true[pair])
        union = found_area + true_area - intersection
        if union:
            ious.append(intersection / union)
            dices.append(2 * intersection / (found_area + true_area))
            intersections += intersection
            unions += union
    if not ious:
        return {"giou": None, "ciou": None, "dice": None}
    return {"giou": sum(ious) / len(ious), "ciou": intersections / unions, "dice": sum(dices) / len(dices)}


def _pixels(*groups: list[dict]) -> int:
    """Pixels that lie in every group of RLEs; a group covers what any of its masks covers."""
    if not all(groups):
        return 0
    # 32 bit unsigned in C: differences would wrap without int
    return int(mask_api.area(mask_api.merge([mask_api.merge(group) for group in groups], True)))


def to_rle(segmentation, height: int, width: int) -> dict:
    """COCO polygons, an array (n, 4) of xywh boxes, uncompressed or compressed RLE -> compressed RLE of the image."""
    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    rle = mask_api.frPyObjects(segmentation, height, width)
    return mask_api.merge(rle) if isinstance(rle, list) else rle
