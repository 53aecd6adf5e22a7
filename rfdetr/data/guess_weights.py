"""How much each piece of evidence counts in a guessed mask, as the drawn masks tell."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from pycocotools import mask as mask_api
from scipy.optimize import minimize
from scipy.special import expit

from rfdetr.data.guess import UNLEARNT, evidence_of
from rfdetr.data.records import ImageRecord
from rfdetr.masks import to_rle

EXAMPLES = 20  # images with drawn masks, spread over the dataset
LEAST_OBJECTS = 20  # with fewer drawn masks nothing is learnt
SHRINKAGE = 1e-3  # of the weights of standardised evidence
# A pixel's weight is its object's pixels to the power of this: a large object counts for more than
# a small one, but not as much more as it has pixels.
SIZE_POWER = -0.75
MOST_PIXELS = 10_000  # of an object that are learnt from, about: a regular grid of a larger one's
DECIMALS = 4  # of the weights, so that the number of threads changes none


def learn_weights(examples: Iterable[tuple[ImageRecord, np.ndarray]]) -> np.ndarray:
    """Weights (len(EVIDENCE),) of a logistic regression on the pixels of boxes with a drawn mask.

    examples: images and their pixels, uint8 (h, w, 3) at any size.  UNLEARNT where fewer than
    LEAST_OBJECTS masks are drawn.
    """
    known = []
    signs = []  # +1 in a mask, -1 beside it
    shares = []
    for record, image in examples:
        boxes = evidence_of(image, record.boxes, record.labels, record.height, record.width)
        for segmentation, box in zip(record.segmentations, boxes):
            if segmentation is None:
                continue
            mask = mask_api.decode(to_rle(segmentation, record.height, record.width))
            mask = mask[box.rows, box.columns]
            step = math.ceil(math.sqrt(mask.size / MOST_PIXELS))
            grid = slice(None, None, step), slice(None, None, step)
            pixels = np.column_stack([box.colour[grid].ravel(), box.shape[grid].ravel()])
            of_box = np.broadcast_to(box.of_box, (len(pixels), len(box.of_box)))
            known.append(np.hstack([pixels, of_box]))
            signs.append(2.0 * mask[grid].ravel() - 1)
            shares.append(np.full(len(pixels), mask.size**SIZE_POWER * step**2))
    if len(known) < LEAST_OBJECTS:
        return UNLEARNT
    return logistic_regression(*map(np.concatenate, (known, signs, shares)))


def logistic_regression(known: np.ndarray, signs: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Weights (F,) that tell signs (n,), -1 or +1, from `known` (n, F), whose last column is one;
    each row counts by its share (n,).
    """
    mean = known.mean(0)
    deviation = known.std(0)
    mean[-1] = 0
    deviation[-1] = 1
    deviation = np.maximum(deviation, 1e-6)
    standardised = (known - mean) / deviation
    shares = shares / shares.sum()

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (standardised @ weights)
        value = shares @ np.logaddexp(0, -margins) + SHRINKAGE / 2 * weights @ weights
        pull = shares * signs * expit(-margins)
        return value, SHRINKAGE * weights - pull @ standardised

    weights = minimize(loss, np.zeros(known.shape[1]), jac=True, method="L-BFGS-B").x / deviation
    weights[-1] -= mean @ weights
    return weights.round(DECIMALS)
