"""How many objects keep one id in videos of moving demo objects: `predict.py --track 1`, counted.

python benchmarks/tracking.py --checkpoint runs/segmentation_tiny_160_1 [--scenes 5] [--keep DIR]

The demo's cells move on straight lines over each other and over a slow glomerulus; the fast ones
enter or leave. What is visible of an object is matched to the records of its frame by the IoU of
the boxes. An object that is found in fewer than two frames tells nothing about ids and is not
counted. A switch: an object's id differs from that of the frame in which it was found last. At the
end stands what becomes of the records above the threshold alone, without the second association.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

ROOT = Path(__file__).resolve().parents[1]
LEAST_IOU = 0.5  # of a record and the object that it is taken for


@dataclass
class Count:
    """objects: found in two frames or more, of which `keep_one` keep one id.

    visible: boxes in all frames, of which `found` are found.
    """

    objects: int = 0
    keep_one: int = 0
    switches: int = 0
    visible: int = 0
    found: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(astuple(self), astuple(other))))

    def __str__(self) -> str:
        return (
            f"{self.keep_one} of {self.objects} objects keep one id, {self.switches} switches; "
            f"found in {self.found / max(1, self.visible):.1%} of {self.visible} visible boxes"
        )


def count_ids(truth: list[dict[int, np.ndarray]], records: list[dict]) -> Count:
    """truth: in each frame the boxes (4,) xyxy of the visible objects; records: of one video."""
    from rfdetr.inference.overlaps import box_ious

    of_frame = defaultdict(list)
    for record in records:
        of_frame[record["frame"]].append(record)
    ids = defaultdict(list)
    for frame, objects in enumerate(truth):
        numbers = list(objects)
        boxes = np.array([objects[number] for number in numbers]).reshape(-1, 4)
        here = of_frame[frame]
        found = np.array([record["bbox"] for record in here]).reshape(-1, 4)
        found[:, 2:] += found[:, :2]
        ious = box_ious(boxes, found)
        for i, j in zip(*linear_sum_assignment(ious, maximize=True)):
            if ious[i, j] >= LEAST_IOU:
                ids[numbers[i]].append(here[j]["track"])
    several = [given for given in ids.values() if len(given) > 1]
    return Count(
        objects=len(several),
        keep_one=sum(len(set(given)) == 1 for given in several),
        switches=sum(a != b for given in several for a, b in zip(given, given[1:])),
        visible=sum(len(objects) for objects in truth),
        found=sum(len(given) for given in ids.values()),
    )


def follow_sure_ones(records: list[dict], frames: int, threshold: float) -> list[dict]:
    """The records of at least `threshold`, with the ids that they get without the others."""
    from rfdetr.inference.tracking import Tracker

    tracker = Tracker(threshold)
    followed = []
    for frame in range(frames):
        here = [one for one in records if one["frame"] == frame and one["score"] >= threshold]
        boxes = np.array([one["bbox"] for one in here]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        names = sorted({one["class"] for one in records})
        ids = tracker.update(
            boxes,
            np.array([one["score"] for one in here]),
            np.array([names.index(one["class"]) for one in here]),
            [one["mask"] for one in here] if here and here[0]["mask"] else None,
        )
        followed += [one | {"track": track} for one, track in zip(here, ids.tolist())]
    return followed


def main() -> None:
    from testkit.moving import moving_scene, write_video

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="trained on the demo data")
    parser.add_argument("--scenes", type=int, default=5)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", type=Path, help="folder for the videos")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        scenes = {}
        for seed in range(args.scenes):
            scenes[seed] = moving_scene(args.frames, cells=args.cells, seed=seed)
            write_video(folder / f"scene_{seed}.mp4", scenes[seed].frames)
        files = {seed: str(folder / f"scene_{seed}.mp4") for seed in scenes}
        command = [sys.executable, str(ROOT / "predict.py"), "--checkpoint", args.checkpoint]
        command += ["--device", args.device, "--threshold", str(args.threshold)]
        command += ["--track", "1", "--output", str(folder / "found")]
        subprocess.run([*command, "--input", *files.values()], check=True)
        records = json.loads((folder / "found/predictions.json").read_text(encoding="utf-8"))
    total = Count()
    of_sure_ones = Count()
    for seed, scene in scenes.items():
        of_scene = [record for record in records if record["file"] == files[seed]]
        count = count_ids(scene.truth, of_scene)
        print(f"scene {seed}: {count}")
        total += count
        sure = follow_sure_ones(of_scene, args.frames, args.threshold)
        of_sure_ones += count_ids(scene.truth, sure)
    print(f"all: {total}")
    print(f"without the second association: {of_sure_ones}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
