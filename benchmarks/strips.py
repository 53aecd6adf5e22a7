"""Demo images side by side, three wide: what a letterbox is measured on.

python benchmarks/strips.py --dataset dataset_demo --out demo_strips
python train_detector_stage1.py --size tiny --dataset demo_strips --epochs 3 --letterbox 1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

ANNOTATIONS = "_annotations.coco.json"


def beside(annotation: dict, shift: int) -> dict:
    """The annotation, whose mask is polygons, `shift` pixels further right."""
    x, y, width, height = annotation["bbox"]
    shape = []
    for polygon in annotation["segmentation"]:
        shape.append((np.reshape(polygon, (-1, 2)) + [shift, 0]).ravel().tolist())
    return annotation | {"bbox": [x + shift, y, width, height], "segmentation": shape}


def make_strips(source: Path, target: Path, images_each: int) -> None:
    """Write the strips of one split's folder, whose images are equally high."""
    data = json.loads((source / ANNOTATIONS).read_text(encoding="utf-8"))
    target.mkdir(parents=True)
    of_image: dict[int, list[dict]] = {}
    for annotation in data["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    images = []
    annotations = []
    for number in range(1, len(data["images"]) // images_each + 1):
        parts = data["images"][(number - 1) * images_each : number * images_each]
        pixels = [np.asarray(Image.open(source / part["file_name"])) for part in parts]
        strip = np.concatenate(pixels, axis=1)
        name = f"strip_{number:03d}.png"
        Image.fromarray(strip).save(target / name)
        height, width = strip.shape[:2]
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        shift = 0
        for part in parts:
            for annotation in of_image.get(part["id"], []):
                ids = {"id": len(annotations) + 1, "image_id": number}
                annotations.append(beside(annotation, shift) | ids)
            shift += part["width"]
    content = {"images": images, "annotations": annotations, "categories": data["categories"]}
    (target / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True, help="demo data")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--images", type=int, default=3, help="of a strip")
    args = parser.parse_args()
    for split in ("train", "valid"):
        make_strips(args.dataset / split, args.out / split, args.images)


if __name__ == "__main__":
    main()
