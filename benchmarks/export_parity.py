"""Exported files, and DINOv2 alone as a start, in the published package: the same numbers?

python benchmarks/export_parity.py
python benchmarks/export_parity.py --record     (writes tests/fixtures/export_nano.pt)

For every size a "trained" detector with made-up weights and classes, once with the 91-row head and once shrunk, goes
through export's to_package; the package loads the file in its own environment (benchmarks/parity.py makes it), by
from_checkpoint and by its class, and predicts an image of the model's own side. This file runs itself under the peer's
Python (--as_peer), where `rfdetr` is the package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind the peer's own rfdetr
from benchmarks.parity import OFFICIAL, build_own, hashed, layout, made_up, peer_environment  # noqa: E402

BACKBONES = {
    "base": ("small", 384),
    "large": ("base", 768),
}  # the sizes that the package itself starts from DINOv2
RECORDED = ("nano", 128)  # few tokens: every one is a proposal


def picture(resolution: int, seed: int) -> np.ndarray:
    noise = hashed(f"picture {seed}", (resolution // 8, resolution // 8, 3))
    return (128 + 70 * noise).byte().numpy().repeat(8, axis=0).repeat(8, axis=1)


def made_up_content(size: str, resolution: int, shrunk: bool) -> dict:
    """A detector of this repository for cells, dog and vessel, with the official mask head where the size has it."""
    from rfdetr.classes import assign_rows
    from rfdetr.models.detector import Detector
    from rfdetr.sizes import SIZES
    from rfdetr.weights import checkpoint
    from rfdetr.weights.official import to_official

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
    """Scores (n,), boxes (n, 4) xyxy and masks (n, H, W) in pixels, names, for features scaled by 1 + each nudge."""
    from pycocotools.mask import decode

    from rfdetr.detr import RFDETR
    from rfdetr.weights import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "best.pt", content)
        model = RFDETR.from_checkpoint(Path(folder) / "best.pt", device="cpu")
    weight = model.model.backbone[0].encoder["encoder"].layernorm.weight
    kept, found = weight.data, []
    for nudge in nudges:
        weight.data = kept * (1 + nudge)
        one = model.predict(image, threshold=0.0)
        boxes = torch.tensor(one.boxes, dtype=torch.float32)
        found.append({"scores": torch.tensor(one.scores), "boxes": boxes, "names": one.names})
        if one.masks:
            found[-1]["masks"] = torch.stack(
                [torch.from_numpy(decode(mask)).bool() for mask in one.masks]
            )
    return found


def differences(own: dict, theirs: dict) -> tuple[float, float, float, float]:
    """The share of detections with a partner of the same class, then scores, boxes and masks of partners.

    Equal scores may come in another order, so partners are those that are nearest in all.
    """
    from scipy.optimize import linear_sum_assignment

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
    from rfdetr.models.windowed_vit import WindowedViT
    from rfdetr.sizes import SIZES
    from rfdetr.weights.official import to_official

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
    from rfdetr.models.detector import Detector
    from rfdetr.sizes import SIZES
    from rfdetr.weights.checkpoint import load_backbone
    from rfdetr.weights.fitting import load_pretrained

    model = Detector(SIZES[size], rows=91, groups=1).eval()
    load_pretrained(model, load_backbone(backbone, SIZES[size].patch)["model"], [])
    with torch.inference_mode():
        return model.backbone[0].encoder["encoder"](images)


def as_peer(folder: Path) -> None:
    """Under the peer's Python: predictions of folder/*.pth, and features from folder/facebook/dinov2-*."""
    import rfdetr
    from rfdetr import config
    from rfdetr.models import build_model_from_config

    os.chdir(folder)
    for file in sorted(Path().glob("*.pth")):
        content = torch.load(file, weights_only=True)
        image = np.load(file.with_suffix(".npy"))
        kind = getattr(rfdetr, content["model_name"])
        answers = {
            "layout": layout(
                {name: tuple(tensor.shape) for name, tensor in content["model"].items()}
            )
        }
        path = str(file.resolve())
        for route in ("from_checkpoint", "class"):
            if route == "class":
                model = kind(pretrain_weights=path, device="cpu", resolution=len(image))
            else:
                model = rfdetr.RFDETR.from_checkpoint(path, device="cpu")
            own = model.model.model.state_dict()
            assert {n for n, t in own.items() if t.numel()} == set(content["model"]), (
                "tensors left over"
            )
            found = model.predict(image, threshold=0.0)
            answers[route] = {
                "scores": torch.tensor(found.confidence),
                "boxes": torch.tensor(found.xyxy),
                "names": [str(name) for name in found.data["class_name"]],
            }
            if found.mask is not None:
                answers[route]["masks"] = torch.from_numpy(found.mask).bool()
        torch.save(answers, file.with_suffix(".answer"))
    for size, (name, _) in BACKBONES.items():
        if Path(
            f"facebook/dinov2-{name}"
        ).exists():  # a folder of this name stands in for the hub's
            kind = {"base": config.RFDETRBaseConfig, "large": config.RFDETRLargeDeprecatedConfig}[
                size
            ]
            model = build_model_from_config(
                kind(pretrain_weights=None, device="cpu"), config.TrainConfig(dataset_dir=".")
            )
            with torch.inference_mode():
                features = model.eval().backbone[0].encoder(hashed("images", (1, 3, 112, 112)))
            torch.save([map_.clone() for map_ in features], f"{size}.features")


def ask_peer(python: str, folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-W", "ignore", str(Path(__file__)), "--as_peer", str(folder)]
    subprocess.run(command, check=True, env=environment, cwd=folder)


def compare_exports(python: str, size: str, resolution: int, record: bool) -> None:
    from rfdetr.weights.package import to_package

    answers = {}
    with tempfile.TemporaryDirectory() as name:
        folder, ours = Path(name), {}
        for shrunk in (False, True):
            content = made_up_content(size, resolution, shrunk)
            for seed in range(
                10
            ):  # near-tied proposals swap at a touch: take a picture whose result survives one
                image = picture(resolution, seed)
                first, *again = own_predictions(content, image, (0.0, 1e-6, -1e-6, 1e-5, -1e-5))
                if max((first["boxes"] - other["boxes"]).abs().max() for other in again) < 0.1:
                    break
            else:
                print(f"{size}: no picture whose result survives a touch", flush=True)
            label = "shrunk" if shrunk else "91 rows"
            ours[label] = first | {"seed": seed}
            torch.save(to_package(content), folder / f"{label}.pth")
            np.save(folder / f"{label}.npy", image)
        ask_peer(python, folder)
        for label, own in ours.items():
            answer = torch.load(folder / f"{label}.answer", weights_only=True)
            for route in ("from_checkpoint", "class"):
                same, scores, boxes, masks = differences(own, answer[route])
                found = f"{same:.0%} of {len(own['scores'])} found, scores {scores:.1e}, boxes {boxes:.1e} px"
                found += f", {masks:.1e} of the mask pixels differ" if "masks" in own else ""
                print(f"{size:<11} {label:<8} {route:<15} {found}", flush=True)
            answers[label] = {
                "layout": answer["layout"],
                "seed": own["seed"],
                **answer["from_checkpoint"],
            }
    if record:
        torch.save(answers, ROOT / "tests" / "fixtures" / f"export_{size}.pt")


def compare_backbones(python: str) -> None:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder, files = Path(name), {}
        for size, (kind, width) in BACKBONES.items():
            files[size] = folder / "facebook" / f"dinov2-{kind}" / "model.safetensors"
            files[size].parent.mkdir(parents=True)
            save_file(hugging_face(size), files[size], metadata={"format": "pt"})
            (files[size].parent / "config.json").write_text(
                json.dumps({"model_type": "dinov2", "hidden_size": width})
            )
        ask_peer(python, folder)
        for size, file in files.items():
            ours = own_features(size, file, hashed("images", (1, 3, 112, 112)))
            theirs = torch.load(folder / f"{size}.features", weights_only=True)
            worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))
            print(
                f"{size:<7} from DINOv2 alone: features differ by {worst:.1e} of the largest",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer_python", help="the Python of an environment with rfdetr==1.11.*")
    parser.add_argument("--sizes", nargs="+", choices=OFFICIAL, default=OFFICIAL)
    parser.add_argument(
        "--record", action="store_true", help="write the fixture of the tests instead"
    )
    parser.add_argument("--as_peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_peer:
        as_peer(args.as_peer)
        return
    sys.path.insert(0, str(ROOT))
    from rfdetr.sizes import SIZES

    python = args.peer_python or peer_environment()
    if args.record:
        compare_exports(python, *RECORDED, record=True)
        return
    for size in args.sizes:
        compare_exports(python, size, SIZES[size].resolution, record=False)
    compare_backbones(python)


if __name__ == "__main__":
    main()
