"""YOLO11n-seg from scratch on the clock; peers_at_equal_time.py runs it.

/opt/yolo/bin/python benchmarks/peer_yolo.py --dataset D --out DIR --minutes 10

Runs in an environment with `ultralytics` (AGPL, which is why it is in none of ours) and
pycocotools. Everything is the package's own recipe (train's defaults: batch 16, mosaic but in the
last ten epochs, optimizer and rate chosen by itself), from yolo11n-seg.yaml, so that nothing is
downloaded. The number of epochs is found as the package does it with `time=`, by the mean time of
the epochs so far, but in CPU seconds. The averaged weights are handed in, with masks at the
original's size, up to 300 detections an image from confidence .001 on, as the package validates.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from training_clock import ANNOTATIONS, TrainingClock, coco_results, peer_arguments, write_facts

MODEL = "yolo11n-seg.yaml"
FINER = 4  # outlines are found on masks so many times as large, to lose no half pixels


class TimeIsOver(Exception):
    """Ends the package's loop; nothing of what it does afterwards is wanted."""


def outline(mask: np.ndarray) -> np.ndarray:
    """The corners (n, 2) of the largest part of a mask (H, W), in pixels; none if it is empty."""
    import cv2

    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros((0, 2))
    top, left = rows[0], columns[0]
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    finer = np.kron(part, np.ones((FINER, FINER), np.uint8))
    outlines, _ = cv2.findContours(finer, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(outlines, key=cv2.contourArea)
    corners = cv2.approxPolyDP(largest, 1.0, True).reshape(-1, 2)
    return (corners + 0.5) / FINER + (left, top)


def convert(dataset: Path, folder: Path) -> tuple[Path, dict[str, int], list[int]]:
    """The dataset as the package reads it: a text file of outlines beside each image.

    Returns the YAML file, {path of a valid image: its id}, and the category id of each class.
    """
    from pycocotools.coco import COCO

    ids = {}
    for split in ("train", "valid"):
        coco = COCO(str(dataset / split / ANNOTATIONS))
        categories = sorted(coco.getCatIds())
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for image in coco.loadImgs(coco.getImgIds()):
            path = folder / "images" / split / f"{image['id']}_{Path(image['file_name']).name}"
            path.symlink_to((dataset / split / image["file_name"]).resolve())
            if split == "valid":
                ids[str(path)] = image["id"]
            lines = []
            for annotation in coco.imgToAnns[image["id"]]:
                if annotation.get("iscrowd"):
                    continue
                corners = outline(coco.annToMask(annotation)) / (image["width"], image["height"])
                if len(corners) >= 3:
                    row = categories.index(annotation["category_id"])
                    numbers = " ".join(f"{number:.5f}" for number in corners.ravel())
                    lines.append(f"{row} {numbers}")
            label = (folder / "labels" / split / path.name).with_suffix(".txt")
            label.write_text("\n".join(lines))
    names = dict(enumerate(category["name"] for category in coco.loadCats(categories)))
    data = folder / "data.yaml"
    content = {"path": str(folder), "train": "images/train", "val": "images/valid", "names": names}
    data.write_text(json.dumps(content))  # JSON is YAML
    return data, ids, categories


class OnClock:
    """What the package's loop calls after a batch and after an epoch."""

    def __init__(self, clock: TrainingClock, side: int, ids: dict[str, int], categories: list[int]):
        """ids: of the valid split's images, by path; categories: the id of each class."""
        self.clock = clock
        self.side = side
        self.ids = ids
        self.categories = categories
        self.begin = clock.seconds
        self.batches = 0

    def after_batch(self, trainer) -> None:
        self.batches += 1
        if self.clock.over:
            self.finish(trainer)
        elif self.clock.due():
            self.hand_in(trainer.ema.ema)

    def after_epoch(self, trainer) -> None:
        """Fit the schedule into the minutes, as the package does with `time=`."""
        done = trainer.epoch + 1
        mean = (self.clock.seconds - self.begin) / done
        left = round((self.clock.budget - self.clock.seconds) / mean)
        if left < 1:
            self.finish(trainer)
        trainer.epochs = done + left
        trainer.args.epochs = trainer.epochs
        trainer._setup_scheduler()
        trainer.scheduler.last_epoch = trainer.epoch
        print(f"{done} epochs, {mean:.1f} s each: {trainer.epochs} in all", flush=True)

    def before_validation(self, trainer) -> None:
        """The last epoch has ended; the package would now score it by itself."""
        if trainer.epoch + 1 >= trainer.epochs:
            self.finish(trainer)

    def finish(self, trainer) -> None:
        self.hand_in(trainer.ema.ema)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        optimizer = type(trainer.optimizer).__name__
        taken = f"{trainer.epochs} epochs, {trainer.batch_size} images a batch, {optimizer}"
        write_facts(self.clock.out, parameters, self.batches * trainer.batch_size, taken)
        raise TimeIsOver

    def hand_in(self, weights) -> None:
        from ultralytics import YOLO

        boxes = []
        masks = []
        with self.clock.paused():
            model = YOLO(MODEL)
            model.model = copy.deepcopy(weights).float().eval()  # predict() merges layers
            for path, image_id in self.ids.items():
                (found,) = model.predict(
                    path,
                    imgsz=self.side,
                    conf=0.001,
                    iou=0.7,
                    max_det=300,
                    retina_masks=True,
                    verbose=False,
                )
                if found.masks is None:
                    continue
                of_boxes, of_masks = coco_results(
                    image_id,
                    found.boxes.xyxy.numpy(),
                    found.boxes.conf.numpy(),
                    [self.categories[row] for row in found.boxes.cls.int().tolist()],
                    found.masks.data.bool().numpy(),
                )
                boxes += of_boxes
                masks += of_masks
            self.clock.hand_in(boxes, masks)


def train(args, folder: Path) -> None:
    import torch
    from ultralytics import YOLO

    torch.set_num_threads(1)
    clock = TrainingClock(args.out, args.minutes)
    with clock.paused():
        data, ids, categories = convert(args.dataset, folder / "data")
    on_clock = OnClock(clock, args.side, ids, categories)
    model = YOLO(MODEL)
    model.add_callback("on_train_batch_end", on_clock.after_batch)
    model.add_callback("on_train_epoch_end", on_clock.before_validation)
    model.add_callback("on_fit_epoch_end", on_clock.after_epoch)
    model.train(
        data=str(data),
        imgsz=args.side,
        seed=args.seed,
        device="cpu",
        workers=0,
        pretrained=False,
        val=False,
        plots=False,
        save=False,
        project=str(folder),
    )


def main() -> None:
    args = peer_arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["YOLO_CONFIG_DIR"] = folder
        os.environ["YOLO_OFFLINE"] = "true"
        try:
            train(args, Path(folder))
        except TimeIsOver:
            print("The time is over.")


if __name__ == "__main__":
    main()
