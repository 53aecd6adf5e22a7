"""The package's predictions from exported files; export_parity.py runs it with the peer's Python.

python benchmarks/export_peer.py FOLDER
"""

# ruff: noqa: E402 (the repository is put on the path, behind the peer's own rfdetr)

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peer import BACKBONES

import rfdetr
from rfdetr import config
from rfdetr.models import build_model_from_config
from testkit.made_up import hashed, layout


def write_answers(folder: Path) -> None:
    """Predictions of folder/*.pth, and features from folder/facebook/dinov2-*."""
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


if __name__ == "__main__":
    write_answers(Path(sys.argv[1]))
