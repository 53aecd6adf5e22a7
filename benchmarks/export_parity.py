"""Exported files, and DINOv2 alone as a start, in the published package: the same numbers?

python benchmarks/export_parity.py
python benchmarks/export_parity.py --record     (writes tests/fixtures/export_nano.pt)

For every size a "trained" detector with made-up weights and classes, once with the 91-row head and
once shrunk, goes through export's to_package; the package loads the file in its own environment
(benchmarks/parity.py makes it), by from_checkpoint and by its class, and predicts an image of the
model's own side. export_peer.py runs under the peer's Python, where `rfdetr` is the package.
"""

# ruff: noqa: E402 (the repository is put on the path first)
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peer import BACKBONES, OFFICIAL, ROOT, peer_environment
from safetensors.torch import save_file

from rfdetr.sizes import SIZES
from rfdetr.weights.package import to_package
from testkit.exported import (
    RECORDED,
    differences,
    hugging_face,
    made_up_content,
    own_features,
    own_predictions,
    picture,
)
from testkit.made_up import hashed


def ask_peer(python: str, folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-W", "ignore", str(ROOT / "benchmarks/export_peer.py"), str(folder)]
    subprocess.run(command, check=True, env=environment, cwd=folder)


def compare_exports(python: str, size: str, resolution: int, record: bool) -> None:
    answers = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = {}
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
                found = f"{same:.0%} of {len(own['scores'])} found, "
                found += f"scores {scores:.1e}, boxes {boxes:.1e} px"
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {}
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
    args = parser.parse_args()
    python = args.peer_python or peer_environment()
    if args.record:
        compare_exports(python, *RECORDED, record=True)
        return
    for size in args.sizes:
        compare_exports(python, size, SIZES[size].resolution, record=False)
    compare_backbones(python)


if __name__ == "__main__":
    main()
