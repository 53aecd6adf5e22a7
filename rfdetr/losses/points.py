"""Costs and losses of whole-image masks, looked at in a few points.

Sources: Mask2Former (arXiv:2112.01527), PointRend's choice of points (arXiv:1912.08193), in the numbers of PyPI rfdetr
1.11.  Letters: B images, M matched queries, T objects of all images, P points, R side of the true masks, h w of the
predicted ones.  Points are x, y in 0..1 of the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS_PER_POINT = 16
OVERSAMPLED = 3  # so many points are drawn for each one wanted
UNCERTAIN = 0.75  # share of the wanted points that are the drawn ones with a logit nearest 0


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear: maps (N, C, h, w), points (N, P, 2) -> values (N, C, P)."""
    return F.grid_sample(
        maps, (2 * points - 1)[:, :, None], padding_mode="border", align_corners=False
    )[..., 0]


def true_at(masks: Tensor, chosen: Tensor, points: Tensor) -> Tensor:
    """masks (T, R, R), chosen (M,) of them, points (M or 1, P, 2) -> the pixels (M, P) that the points lie in."""
    x, y = (points * masks.shape[-1] - 0.5).round().long().clamp(0, masks.shape[-1] - 1).unbind(-1)
    return masks[chosen[:, None], y, x].float()


@torch.no_grad()
def mask_costs(
    prediction: dict, masks: Tensor, has_mask: Tensor, counts: list[int], bce: float, dice: float
) -> Tensor:
    """What each query's mask costs as each object's, (T, Q): `bce` times the BCE and `dice` times the dice loss.

    prediction: as OfficialMaskHead.supervise leaves it; masks (T, R, R) 0 or 1, has_mask (T,), objects without one
    cost nothing; counts: objects per image. All images and queries are compared in the same random points.
    """
    pixels, kernels = prediction["pixels"].float(), prediction["kernels"].float()
    h, w = pixels.shape[-2:]
    points = torch.rand(1, max(h * w // CELLS_PER_POINT, 1), 2, device=pixels.device)
    costs, everything = [], true_at(masks, torch.arange(len(masks), device=pixels.device), points)
    for i, truth in enumerate(everything.split(counts)):  # (t, P)
        logits = (
            kernels[i] @ sample(pixels[i : i + 1], points)[0] + prediction["mask_bias"].float()
        )  # (Q, P)
        p = logits.sigmoid()
        cross = truth @ F.softplus(-logits).T + (1 - truth) @ F.softplus(logits).T
        overlap = (2 * truth @ p.T + 1) / (p.sum(1) + truth.sum(1, keepdim=True) + 1)
        costs.append(bce * cross / logits.shape[1] + dice * (1 - overlap))
    return torch.cat(costs) * has_mask[:, None]


@torch.no_grad()
def uncertain_points(maps: Tensor) -> Tensor:
    """Points (M, P, 2) for mask logits (M, 1, h, w): most where these are near 0, the rest anywhere."""
    M, _, h, w = maps.shape
    P = max(h, h * w // CELLS_PER_POINT)
    drawn = torch.rand(M, OVERSAMPLED * P, 2, device=maps.device)
    near = sample(maps, drawn)[:, 0].abs().topk(int(UNCERTAIN * P), dim=1, largest=False).indices
    anywhere = torch.rand(M, P - near.shape[1], 2, device=maps.device)
    return torch.cat((drawn.gather(1, near[..., None].expand(-1, -1, 2)), anywhere), dim=1)


def at_points(
    prediction: dict, image: Tensor, query: Tensor, obj: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (M, P) of the matched queries' masks, and the masks (T, R, R) of their objects at the same points (M, P).

    image (M,) ascending, query (M,), obj (M,).
    """
    pixels, kernels = prediction["pixels"], prediction["kernels"]
    maps = [own[query[image == i]] @ pixels[i].flatten(1) for i, own in enumerate(kernels)]
    maps = (torch.cat(maps).float() + prediction["mask_bias"]).unflatten(1, pixels.shape[-2:])[
        :, None
    ]
    points = uncertain_points(maps)
    return sample(maps, points)[:, 0], true_at(masks, obj, points)
