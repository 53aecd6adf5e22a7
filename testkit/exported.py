"""Made-up detectors, their exported files and their predictions."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rfdetr.classes import assign_rows
from rfdetr.detr import RFDETR
from rfdetr.models.detector import Detector
from rfdetr.models.windowed_vit import WindowedViT
from rfdetr.sizes import SIZES
from rfdetr.weights import checkpoint
from rfdetr.weights.checkpoint import load_backbone
from rfdetr.weights.fitting import load_pretrained
from rfdetr.weights.official import to_official
from testkit.made_up import hashed, made_up
from testkit.official import build_own

RECORDED = ("nano", 128)  # few tokens: every one is a proposal


def picture(resolution: int, seed: int) -> np.ndarray:
    noise = hashed(f"picture {seed}", (resolution // 8, resolution // 8, 3))
    return (128 + 70 * noise).byte().numpy().repeat(8, axis=0).repeat(8, axis=1)


def made_up_content(size: str, resolution: int, shrunk: bool) -> dict:
    """A detector for cells, dog and vessel, with the official mask head where the size has it."""
    masks = "official" if SIZES[size].mask_head == "official" else None
    with torch.device("meta"):
        meta = to_official(Detector(SIZES[size], rows=91, mask_head=masks).state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in meta.items()}
    table = assign_rows(["cells", "dog", "vessel"], [1, 2, 3], "coco91")
    state = build_own(size, shapes).state_dict()
    content = checkpoint.make_content("detector", SIZES[size], resolution, table, masks, state)
    return checkpoint.shrink(content, ["vessel", "cells"]) if shrunk else content


def own_predictions(
    content: dict, image: np.ndarray, nudges: tuple[float, ...] = (0.0,)
) -> list[dict]:
    """For features scaled by 1 + each nudge: what is predicted on an image.

    Scores (n,), boxes (n, 4) xyxy and masks (n, H, W) in pixels, and the classes' names.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "best.pt", content)
        model = RFDETR.from_checkpoint(Path(folder) / "best.pt", device="cpu")
    weight = model.model.backbone[0].encoder["encoder"].layernorm.weight
    kept = weight.data
    predictions = []
    for nudge in nudges:
        weight.data = kept * (1 + nudge)
        one = model.predict(image, threshold=0.0, nms=0)
        boxes = torch.tensor(one.boxes, dtype=torch.float32)
        prediction = {"scores": torch.tensor(one.scores), "boxes": boxes, "names": one.names}
        if one.rles:
            prediction["masks"] = torch.from_numpy(one.masks)
        predictions.append(prediction)
    return predictions


def differences(own: dict, theirs: dict) -> tuple[float, float, float, float]:
    """The share of detections with a partner of the same class, then the partners' differences.

    Of scores, of boxes in pixels, and the share of mask pixels.

    Equal scores may come in another order, so partners are those that are nearest in all.
    """
    other = torch.tensor([[a != b for b in own["names"]] for a in theirs["names"]])
    cost = torch.cdist(theirs["boxes"], own["boxes"], p=torch.inf) + 1e6 * other
    cost += 1e4 * (theirs["scores"][:, None] - own["scores"]).abs()
    rows, columns = map(torch.from_numpy, linear_sum_assignment(cost.numpy()))
    same = (~other[rows, columns]).sum().item() / max(other.shape)
    scores, boxes = (
        (own[key][columns] - theirs[key][rows]).abs().max().item() for key in ("scores", "boxes")
    )
    masks = (
        (own["masks"][columns] != theirs["masks"][rows]).float().mean().item()
        if "masks" in own
        else 0.0
    )
    return same, scores, boxes, masks


def hugging_face(size: str, patch: int = 14, grid: int = 37) -> dict[str, Tensor]:
    """Made-up DINOv2 weights under Hugging Face's names, of the width that the size needs."""
    prefix = "backbone.0.encoder.encoder."
    with torch.device("meta"):
        state = to_official(
            {prefix + n: t for n, t in WindowedViT(SIZES[size]).state_dict().items()}
        )
    shapes = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in state.items()}
    width = shapes["embeddings.cls_token"][-1]
    shapes["embeddings.position_embeddings"] = (1, grid**2 + 1, width)
    shapes["embeddings.patch_embeddings.projection.weight"] = (width, 3, patch, patch)
    return {name: made_up(name, shape) for name, shape in shapes.items()}


def own_features(size: str, backbone: Path, images: Tensor) -> list[Tensor]:
    model = Detector(SIZES[size], rows=91, groups=1).eval()
    load_pretrained(model, load_backbone(backbone, SIZES[size].patch)["model"], [])
    with torch.inference_mode():
        return model.backbone[0].encoder["encoder"](images)
