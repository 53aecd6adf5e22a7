"""Costs and losses of whole-image masks at a few points.

Sources: Mask2Former (arXiv:2112.01527), PointRend's choice of points (arXiv:1912.08193), in the
numbers of PyPI rfdetr 1.11.  Points are x, y in 0..1 of the image.

Letters: B images, Q queries of one image, M matched queries, T objects of all images, t of one
image, P points, C channels of the pixel embeddings, R side of the true masks, h w of the predicted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.losses.matcher import Matches, on_device
from rfdetr.sizes import LossWeights

CELLS_PER_POINT = 16
OVERSAMPLED = 3  # so many points are drawn for each one wanted
UNCERTAIN = 0.75  # share of the wanted points that are the drawn ones with a logit nearest 0


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples (N, C, P) of maps (N, C, h, w) at points (N, P, 2)."""
    grid = (2 * points - 1)[:, :, None]  # (N, P, 1, 2) in -1..1
    samples = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    return samples[..., 0]


def true_at(masks: Tensor, chosen: Tensor, points: Tensor) -> Tensor:
    """The pixels (M, P) of the chosen masks that the points lie in, as 0.0 or 1.0.

    masks (T, R, R), chosen (M,) indices into them, points (M or 1, P, 2).
    """
    side = masks.shape[-1]
    pixels = (points * side - 0.5).round().long().clamp(0, side - 1)
    x, y = pixels.unbind(-1)
    return masks[chosen[:, None], y, x].float()


@torch.no_grad()
def mask_costs(
    prediction: dict, masks: Tensor, has_mask: Tensor, counts: list[int], weights: LossWeights
) -> Tensor:
    """What each query's mask costs as each object's of its image: weighted BCE and dice, (T, Q).

    prediction: with what OfficialMaskHead.supervise adds. masks (T, R, R) 0 or 1; has_mask (T,),
    objects without a mask cost nothing; counts: objects per image. All images and queries are
    compared at the same random points.
    """
    pixels = prediction["pixels"].float()  # (B, C, h, w)
    kernels = prediction["kernels"].float()  # (B, Q, C)
    bias = prediction["mask_bias"].float()
    h, w = pixels.shape[-2:]
    count = max(h * w // CELLS_PER_POINT, 1)
    points = torch.rand(1, count, 2, device=pixels.device)  # (1, P, 2)
    every_mask = torch.arange(len(masks), device=pixels.device)
    truth_of_images = true_at(masks, every_mask, points).split(counts)
    costs = []
    for i, truth in enumerate(truth_of_images):  # (t, P)
        logits = kernels[i] @ sample(pixels[i : i + 1], points)[0] + bias  # (Q, P)
        p = logits.sigmoid()
        bce = truth @ F.softplus(-logits).T + (1 - truth) @ F.softplus(logits).T  # (t, Q)
        overlap = 2 * truth @ p.T + 1  # (t, Q)
        dice = 1 - overlap / (p.sum(1) + truth.sum(1, keepdim=True) + 1)
        costs.append(weights.mask * bce / count + weights.dice * dice)
    return torch.cat(costs) * has_mask[:, None]


@torch.no_grad()
def uncertain_points(maps: Tensor) -> Tensor:
    """Points (M, P, 2) for mask logits (M, 1, h, w): most where these are near 0, some anywhere."""
    M, _, h, w = maps.shape
    P = max(h, h * w // CELLS_PER_POINT)
    drawn = torch.rand(M, OVERSAMPLED * P, 2, device=maps.device)
    certainty = sample(maps, drawn)[:, 0].abs()  # (M, OVERSAMPLED * P)
    nearest = certainty.topk(int(UNCERTAIN * P), dim=1, largest=False).indices
    uncertain = drawn.gather(1, nearest[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(M, P - nearest.shape[1], 2, device=maps.device)
    return torch.cat((uncertain, anywhere), dim=1)


def sample_matched_masks(
    prediction: dict, matches: Matches, masks: Tensor
) -> tuple[Tensor, Tensor]:
    """The matched queries' masks and their objects' at the points where the loss looks.

    masks (T, R, R).  Returns logits (M, P) and truth (M, P).
    """
    pixels = prediction["pixels"]  # (B, C, h, w)
    counts = torch.bincount(matches.image, minlength=len(pixels)).tolist()
    (there,) = on_device([matches], pixels.device)
    kernels = prediction["kernels"][there.image, there.query].split(counts)  # (m, C) each
    maps = [own @ image.flatten(1) for own, image in zip(kernels, pixels)]  # (m, h*w) each
    maps = torch.cat(maps).float() + prediction["mask_bias"]
    maps = maps.unflatten(1, pixels.shape[-2:])[:, None]  # (M, 1, h, w)
    points = uncertain_points(maps)
    return sample(maps, points)[:, 0], true_at(masks, there.object, points)
