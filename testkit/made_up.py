"""Weights, images, targets and points that are hashes of their names and indices."""

from __future__ import annotations

import hashlib
import math
import zlib
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

OBJECTS = (6, 0)  # a batch of two, one image without objects
ORIGINAL = (90, 120)  # height and width that post-processing goes back to


def hashed(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of mean 0 and variance 1 that depend on nothing but the name and the index."""
    x = np.arange(math.prod(shape), dtype=np.uint32)
    x *= np.uint32(0x9E3779B1)
    x += np.uint32(zlib.crc32(name.encode()))
    for _ in range(2):
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x45D9F3B)
    x ^= x >> np.uint32(16)
    return (
        torch.from_numpy(x.astype(np.float32)).mul_(2 * 3**0.5 / 2**32).sub_(3**0.5).reshape(shape)
    )


def made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights for an official name: activations stay sane, boxes moderate, nothing is 0 or 1."""
    noise = hashed(name, shape)
    if len(shape) == 1:
        scale = name.endswith((".weight", "lambda1"))
        return 1 + 0.2 * noise if scale else 0.1 * noise - (2 if "class_embed" in name else 0)
    if "embeddings." in name and "projection" not in name:
        return 0.5 * noise
    if name in ("refpoint_embed.weight", "query_feat.weight"):
        return noise * (0.3 if "refpoint" in name else 1)
    small = 1.0
    if "bbox_embed" in name and "layers.2" in name:
        small = 0.3
    elif "query_features_proj" in name:
        small = 0.1
    return noise * small * (shape[0] / noise.numel()) ** 0.5


def made_up_batch(resolution: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images (B, 3, R, R), and the targets of each image.

    Rows (t,) of the class head, boxes (t, 4) cxcywh in 0..1, masks (t, R, R): ellipses in them.
    """
    targets = []
    for image, count in enumerate(OBJECTS):
        noise = hashed(f"boxes {image}", (count, 4)) / math.sqrt(3)
        rows = (hashed(f"rows {image}", (count,)).abs() * 45).long() + 1
        boxes = torch.cat((0.5 + 0.3 * noise[:, :2], 0.2 + 0.15 * noise[:, 2:]), dim=1)
        x, y, w, h = boxes.double()[..., None, None].unbind(1)
        axis = (torch.arange(resolution) + 0.5).double() / resolution
        masks = ((axis - x) / w) ** 2 + ((axis[:, None] - y) / h) ** 2 < 0.25
        has_mask = torch.ones(count, dtype=torch.bool)
        targets.append({"rows": rows, "boxes": boxes, "masks": masks, "has_mask": has_mask})
    return hashed("images", (len(OBJECTS), 3, resolution, resolution)), targets


def made_up_points(rows: int, *shape: int, device: torch.device | None = None) -> Tensor:
    """In place of torch.rand while losses are computed: the same numbers 0..1 in every row."""
    return (
        (hashed("points", (1, *shape)) / 12**0.5 + 0.5).clamp(0, 1).repeat(rows, *[1] * len(shape))
    )


def layout(shapes: dict[str, tuple[int, ...]]) -> str:
    """A digest of names and shapes."""
    return hashlib.sha256(
        "".join(f"{n} {tuple(s)}\n" for n, s in sorted(shapes.items())).encode()
    ).hexdigest()


def flat_predictions(prefix: str, outputs: dict) -> dict[str, Tensor]:
    layers = {"last": outputs} | {
        f"layer{i}": aux for i, aux in enumerate(outputs.get("aux_outputs", ()))
    }
    if "enc_outputs" in outputs:
        layers["proposals"] = outputs["enc_outputs"]
    return {
        f"{prefix} {kind}/{layer}": values[key].detach()
        for layer, values in layers.items()
        for kind, key in (
            ("logits", "pred_logits"),
            ("boxes", "pred_boxes"),
            ("masks", "pred_masks"),
        )
        if isinstance(
            values.get(key), Tensor
        )  # while training, masks are left as their two factors
    }


@contextmanager
def features_kept(encoder: torch.nn.Module, projector: torch.nn.Module, values: dict[str, Tensor]):
    """Put the feature maps of a forward pass into `values`."""

    def keep(prefix: str):
        return lambda module, inputs, maps: values.update(
            {f"{prefix}/{i}": x for i, x in enumerate(maps)}
        )

    hooks = [
        encoder.register_forward_hook(keep("encoder")),
        projector.register_forward_hook(keep("projector")),
    ]
    yield
    for hook in hooks:
        hook.remove()
