"""A dataset's images laid side by side into large ones, to try tiles on: every object once.

python benchmarks/mosaics.py --dataset nuclei --out nuclei_1024 --side 1024 [--alike] [--only 256]

In the dataset's order pictures of all kinds lie side by side, as no large image has them; with
`--alike` they are ordered by their mean brightness. With `--only 256` those of 256 x 256 pixels are
taken alone, so that a tile of 256 shows objects as large as an original does; `--side 256` then
writes these originals, one a picture. A picture ends where its images do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rfdetr.masks import to_rle  # noqa: E402

GROUND = 128  # gray where no image lies
ANNOTATIONS = "_annotations.coco.json"


def rows_of(sizes: list[tuple[int, int]], side: int) -> list[tuple[int, int, int, int]]:
    """(picture, index, left, top) of images (width, height) in their order, in rows; those larger
    than a picture are left out.
    """
    places = []
    picture = 0
    left = 0
    top = 0
    row_height = 0
    for index, (width, height) in enumerate(sizes):
        if max(width, height) > side:
            continue
        if left + width > side:
            left = 0
            top += row_height
            row_height = 0
        if top + height > side:
            picture += 1
            left = 0
            top = 0
            row_height = 0
        places.append((picture, index, left, top))
        left += width
        row_height = max(row_height, height)
    return places


def moved(annotation: dict, left: int, top: int, height: int, width: int) -> dict:
    """The annotation as it lies in a picture of height x width pixels."""
    x, y, box_width, box_height = annotation["bbox"]
    shape = annotation["segmentation"]
    if isinstance(shape, list):
        shift = np.array([left, top])
        shape = [(np.reshape(one, (-1, 2)) + shift).ravel().tolist() for one in shape]
    elif shape:
        small = mask_api.decode(to_rle(shape, *shape["size"]))
        canvas = np.zeros((height, width), dtype=np.uint8, order="F")
        canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
        shape = mask_api.encode(canvas)
        shape["counts"] = shape["counts"].decode()
    box = [x + left, y + top, box_width, box_height]
    return annotation | {"bbox": box, "segmentation": shape}


def read_pixels(folder: Path, image: dict) -> np.ndarray:
    """An image of a COCO file, (H, W, 3) uint8."""
    return np.asarray(Image.open(folder / image["file_name"]).convert("RGB"))


def make_mosaics(
    source: Path, target: Path, side: int, alike: bool = False, only: int | None = None
) -> None:
    """Write the mosaics of one split's folder; alike, only: as the flags."""
    data = json.loads((source / ANNOTATIONS).read_text(encoding="utf-8"))
    if only:
        data["images"] = [
            image for image in data["images"] if image["width"] == image["height"] == only
        ]
    if alike:
        data["images"].sort(key=lambda image: read_pixels(source, image).mean())
    target.mkdir(parents=True)
    places = rows_of([(image["width"], image["height"]) for image in data["images"]], side)
    of_image: dict[int, list[dict]] = {}
    for annotation in data["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    images = []
    annotations = []
    for picture in range(places[-1][0] + 1 if places else 0):
        parts = [(data["images"][index], *at) for number, index, *at in places if number == picture]
        height = max(top + image["height"] for image, _, top in parts)
        width = max(left + image["width"] for image, left, _ in parts)
        canvas = np.full((height, width, 3), GROUND, dtype=np.uint8)
        for image, left, top in parts:
            bottom = top + image["height"]
            canvas[top:bottom, left : left + image["width"]] = read_pixels(source, image)
            for annotation in of_image.get(image["id"], []):
                new = moved(annotation, left, top, height, width)
                annotations.append(new | {"id": len(annotations) + 1, "image_id": picture + 1})
        name = f"mosaic_{picture:03d}.png"
        Image.fromarray(canvas).save(target / name)
        images.append({"id": picture + 1, "file_name": name, "width": width, "height": height})
    content = {"images": images, "annotations": annotations, "categories": data["categories"]}
    (target / ANNOTATIONS).write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--alike", action="store_true", help="like beside like, by brightness")
    parser.add_argument("--only", type=int, help="images with this side alone")
    args = parser.parse_args()
    for split in ("train", "valid", "test"):
        if (args.dataset / split / ANNOTATIONS).is_file():
            make_mosaics(args.dataset / split, args.out / split, args.side, args.alike, args.only)
    print(f"Next: python train_detector_stage1.py --dataset {args.out} --size tiny --tile auto")


if __name__ == "__main__":
    main()
