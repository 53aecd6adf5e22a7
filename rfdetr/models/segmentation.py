"""Mask heads on top of a detector.

A mask is a query's kernel dotted with every pixel's embedding (MaskFormer, arXiv:2107.06278;
CondInst, arXiv:2003.05664) plus a quadratic in the position inside the query's own box. Training
looks inside the predicted box only, on a fixed grid, so that a small object weighs as much as a
large one. The published mask models' own head is in official_masks.py.

Letters: B images, M chosen queries of all images, Q queries of one image, C channels, P channels of
the pixel embeddings, h w side of the feature map or of the pixel embeddings, H W of the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdetr.boxes import cxcywh_to_xyxy
from rfdetr.device import to_device
from rfdetr.models.windowed_vit import standardise
from rfdetr.placement import Placement

GRID = 28  # samples per side inside a box
ENLARGE = 1.15  # masks may reach a little over the predicted box
AT_ONCE = 64  # masks whose logits are computed together: it bounds the memory of many masks
WIDE = 128  # hidden channels from which on a head has its full width
STRIDES = (1, 2, 4)  # pixels a side of a cell of the mask logits; heads of earlier versions have 4
FINE = {1: 4, 2: 8}  # stride -> channels of the pixel embeddings, where the convolutions' are split


class HeadForm(NamedTuple):
    """How a head computes, as far as its weights do not show it.

    stride: pixels a side of a cell of the mask logits, one of STRIDES.
    standardise: whether it sees images of zero mean and unit variance, so that light and contrast
    do not matter; those of earlier versions see them as the detector is given them.
    """

    stride: int
    standardise: bool = True


def new_form(hidden: int) -> HeadForm:
    """Of a new head: inputs of the smallest models, 160 pixels wide, have no pixel to lose."""
    return HeadForm(stride=2 if hidden >= WIDE else 1)


def enlarged(boxes: Tensor) -> Tensor:
    """The regions that masks lie in: boxes enlarged by ENLARGE, not clipped to the image.

    boxes (..., 4) cxcywh 0..1 -> (..., 4) xyxy 0..1.
    """
    centre = boxes[..., :2]
    size = boxes[..., 2:] * ENLARGE
    return cxcywh_to_xyxy(torch.cat((centre, size), dim=-1))


def points_in_boxes(boxes: Tensor, h: int, w: int) -> Tensor:
    """The centres of the GRID x GRID grid of each enlarged box, for maps of h x w cells.

    boxes (M, 4) cxcywh 0..1 -> (M, GRID, GRID, 2) x and y in grid_sample's -1..1. A point outside
    the image moves to the nearest cell's centre, as boxes of a diverged model do, NaN included.
    """
    x0, y0, x1, y1 = enlarged(boxes.float()).nan_to_num()[..., None].unbind(1)  # (M, 1) each
    share = (torch.arange(GRID, device=boxes.device) + 0.5) / GRID
    x = (x0 + (x1 - x0) * share).clamp(0.5 / w, 1 - 0.5 / w)  # (M, GRID)
    y = (y0 + (y1 - y0) * share).clamp(0.5 / h, 1 - 0.5 / h)
    x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])
    return torch.stack((x, y), dim=-1) * 2 - 1


def sample_in_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """Bilinear samples of each map on the GRID x GRID grid of its own enlarged box.

    maps (M, h, w), boxes (M, 4) cxcywh 0..1 -> (M, GRID, GRID) fp32.
    """
    points = points_in_boxes(boxes, *maps.shape[-2:])
    return F.grid_sample(maps[:, None].float(), points, align_corners=False)[:, 0]


def between(places: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """For places in 0..cells along an axis: the cells with the centres around each, and how near
    the second one is.
    """
    places = (places - 0.5).clamp(0, cells - 1)
    low = places.long()
    return low, (low + 1).clamp(max=cells - 1), places - low


def box_quadratic(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """weights (M, 6) times (x, y, x2, y2, xy, 1) -> (M, h, w).

    x and y, in -1..1 over the enlarged box, broadcast to (M, h, w).
    """
    a, b, c, d, e, f = weights[..., None, None].unbind(1)  # (M, 1, 1) each
    return a * x + b * y + c * x * x + d * y * y + e * x * y + f


def maps_in_parts(kernels: Tensor, pixels: Tensor) -> Iterator[Tensor]:
    """Each kernel's dot product with every pixel.

    kernels (M, P), pixels (P, h, w) -> M times (h, w) fp32, AT_ONCE of them computed together.
    """
    flat = pixels.float().flatten(1)  # (P, h*w)
    for part in kernels.float().split(AT_ONCE):
        yield from (part @ flat).unflatten(1, pixels.shape[1:])


class PixelSampler:
    """Bilinear samples of maps (h, w) of the input at the centres of the original's pixels."""

    def __init__(self, placement: Placement, pixels: Tensor):
        """pixels (P, h, w): for the maps' sides and their device."""
        h, w = pixels.shape[1:]
        x = to_device(placement.column_positions(w), pixels.device)
        y = to_device(placement.row_positions(h), pixels.device)
        self.x_low, self.x_high, self.x_part = between(x, w)
        self.y_low, self.y_high, self.y_part = between(y, h)

    def __call__(self, one_map: Tensor, rows: slice, columns: slice) -> Tensor:
        """one_map (h, w) at these rows and columns of the original: (bh, bw)."""
        left = one_map[:, self.x_low[columns]]
        right = one_map[:, self.x_high[columns]]
        across = torch.lerp(left, right, self.x_part[columns])  # (h, bw)
        above = across[self.y_low[rows]]
        below = across[self.y_high[rows]]
        return torch.lerp(above, below, self.y_part[rows, None])


class PastedMask(NamedTuple):
    """A mask in pixels of the original: bool (bh, bw), its corner at (left, top), and the IoU ()
    that it expects of itself; on the device of what it was made of.
    """

    left: int
    top: int
    mask: Tensor
    iou: Tensor


def expected_iou(logits: Tensor) -> Tensor:
    """The IoU () of a mask (logits > 0) with the truth, as far as its own probabilities tell.

    logits (h, w). The expected overlap by the expected union, each pixel on its own; 0.0 for an
    empty mask. Ranked by it times the class score, masks have .004 to .008 more mAP; by the mean
    probability inside times the class score .003 to .004.
    """
    p = logits.sigmoid().nan_to_num()  # NaN weights make an empty mask
    inside = logits > 0
    overlap = (p * inside).sum()
    union = inside.sum() + p.sum() - overlap
    return overlap / union.clamp(min=1)


class MaskHead(nn.Module):
    """Pixel embeddings from features and image, and a kernel for each chosen query.

    Convolutions work on cells of 4x4 pixels, which still know all of them; at the end each gives
    the embeddings of its four cells at stride 2 (sub-pixel convolution, arXiv:1609.05158). At
    stride 1 their cells are 2x2 pixels, at stride 4 none is split.

    docs/results.md ("Mask heads") has what was measured.
    """

    def __init__(
        self,
        hidden: int,
        trunk: int,
        fuse: int,
        stem: int,
        pixel: int,
        context: int,
        query: int,
        form: HeadForm,
    ):
        """`hidden`: channels of the features and of the queries.
        `trunk`: 3x3 convolutions on the features, at `context` channels.
        `fuse`: 3x3 convolutions on the sum with the image's own cells.
        `stem`: channels that a cell's pixels become first.
        `pixel`: channels of the cells.
        `query`: width of the perceptron that makes a kernel.
        """
        super().__init__()
        self.form = form
        stride = form.stride
        cell = 2 if stride == 1 else 4
        layers: list[nn.Module] = [conv_norm_act(hidden, context, kernel=1)]
        layers += [conv_norm_act(context, context) for _ in range(trunk)]
        self.context = nn.Sequential(*layers, nn.Conv2d(context, pixel, kernel_size=1))
        self.detail = nn.Sequential(
            conv_norm_act(3, stem, kernel=cell, stride=cell), nn.Conv2d(stem, pixel, kernel_size=1)
        )
        self.fuse = nn.Sequential(*(conv_norm_act(pixel, pixel) for _ in range(fuse)))
        self.finer = nn.Identity()
        embedding = pixel
        if stride < cell:
            embedding = FINE[stride]
            self.finer = nn.Sequential(
                nn.Conv2d(pixel, 4 * embedding, kernel_size=1), nn.PixelShuffle(2)
            )
        self.query = nn.Sequential(
            nn.Linear(hidden + 4, query), nn.SiLU(), nn.Linear(query, embedding + 6)
        )

    def pixels(self, features: Tensor, images: Tensor) -> Tensor:
        """features (B, C, h, w), images (B, 3, H, W) normalised -> (B, P, H/stride, W/stride)."""
        if self.form.standardise:
            images = standardise(images)
        # a CPU's convolutions are faster with an input whose channels lie together
        images = images.contiguous(memory_format=torch.channels_last)
        features = features.contiguous(memory_format=torch.channels_last)
        detail = self.detail(images)  # (B, pixel, H/cell, W/cell)
        context = self.context(features)  # (B, pixel, h, w)
        context = F.interpolate(
            context, size=detail.shape[-2:], mode="bilinear", align_corners=False
        )
        return self.finer(self.fuse(context + detail))

    def kernels(self, queries: Tensor, boxes: Tensor) -> Tensor:
        """queries (M, C), boxes (M, 4) cxcywh 0..1 -> (M, P + 6) fp32.

        A kernel is P weights for a pixel's embedding and then the quadratic's six.
        """
        queries_and_boxes = torch.cat((queries, boxes.to(queries.dtype)), dim=-1)  # (M, C + 4)
        return self.query(queries_and_boxes).float()

    def grid_logits(
        self, pixels: Tensor, queries: Tensor, boxes: Tensor, image_index: Tensor
    ) -> Tensor:
        """Mask logits (M, GRID, GRID) on the grid of each query's enlarged box: what the loss sees.

        pixels (B, P, h, w), queries (M, C), boxes (M, 4) cxcywh 0..1, image_index (M,) ascending,
        on the CPU.
        """
        kernels = self.kernels(queries, boxes)  # (M, P + 6)
        counts = torch.bincount(image_index, minlength=len(pixels)).tolist()
        points = points_in_boxes(boxes, *pixels.shape[-2:]).flatten(1, 2)  # (M, GRID * GRID, 2)
        samples = []
        # the few channels are sampled first: a whole map for each query would be far larger
        for image, own_points, own_kernels in zip(
            pixels.float(), points.split(counts), kernels[:, :-6].split(counts)
        ):
            inside = F.grid_sample(image[None], own_points[None], align_corners=False)[0]
            samples.append(torch.einsum("mp,pmg->mg", own_kernels, inside))  # (m, GRID * GRID)
        samples = torch.cat(samples).unflatten(1, (GRID, GRID))
        axis = (torch.arange(GRID, device=boxes.device) + 0.5) / GRID * 2 - 1  # -1..1
        quadratic = box_quadratic(kernels[:, -6:], axis[None, None, :], axis[None, :, None])
        return samples + quadratic

    def paste(
        self, pixels: Tensor, queries: Tensor, boxes: Tensor, placement: Placement
    ) -> Iterator[PastedMask]:
        """Masks of one image's chosen queries in the pixels of its original, one by one.

        pixels (P, h, w), queries (M, C), boxes (M, 4) cxcywh 0..1 of the input, best on the CPU,
        which needs them. Each mask is drawn in the visible part of its enlarged box; elsewhere it
        is empty.
        """
        kernels = self.kernels(queries, to_device(boxes, queries.device))
        regions = placement.to_original(enlarged(boxes.float().cpu()))
        regions = regions.nan_to_num()  # what NaN weights give: an empty mask
        sampler = PixelSampler(placement, pixels)
        x = torch.arange(placement.width, device=pixels.device) + 0.5
        y = torch.arange(placement.height, device=pixels.device) + 0.5
        maps = maps_in_parts(kernels[:, :-6], pixels)
        for one_map, kernel, region in zip(maps, kernels, regions.tolist()):
            rows, columns = placement.visible_pixels(region)
            x0, y0, x1, y1 = region
            # in -1..1 over the region
            u = (2 * x[columns] - x0 - x1) / (x1 - x0)
            v = (2 * y[rows] - y0 - y1) / (y1 - y0)
            quadratic = box_quadratic(kernel[None, -6:], u[None, None, :], v[None, :, None])[0]
            logits = sampler(one_map, rows, columns) + quadratic
            yield PastedMask(columns.start, rows.start, logits > 0, expected_iou(logits))


class MaskHeadNano(MaskHead):
    """The light head of the family, at most a quarter of the standard one."""

    def __init__(self, hidden: int, form: HeadForm | None = None):
        form = form or new_form(hidden)
        query = 128 if hidden >= WIDE else 40
        stem, pixel = (24, 16) if form.stride == 1 else (48, 32)
        super().__init__(
            hidden,
            trunk=0,
            fuse=1,
            stem=stem,
            pixel=pixel,
            context=32,
            query=query,
            form=form,
        )


class MaskHeadStandard(MaskHead):
    """The larger head: convolutions on the features, wider pixel embeddings and kernels."""

    def __init__(self, hidden: int, form: HeadForm | None = None):
        form = form or new_form(hidden)
        if hidden >= WIDE:
            widths = {"trunk": 2, "pixel": 64, "context": 128, "query": 256}
        else:
            widths = {"trunk": 1, "pixel": 48, "context": 56, "query": 104}
        if form.stride == 1:
            widths["pixel"] //= 2
        super().__init__(hidden, fuse=2, stem=48, **widths, form=form)


MASK_HEADS = {"nano": MaskHeadNano, "standard": MaskHeadStandard}


def conv_norm_act(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, group norm over 8 channels a group, SiLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - stride) // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(outputs // 8, outputs), nn.SiLU())
