"""Tell before anything runs whether it will: packages, device, disk, and every problem of the dataset at once.

python validate_setup.py --dataset dataset --size nano --check_images 1
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path

from rfdetr.console import UserError, banner, boolean, number, packages, run_script, tick, warn
from rfdetr.sizes import SIZES, check_resolution

TEST_ONLY = {"pytest", "hypothesis"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", type=Path, default=Path("dataset"), help="COCO-format folder (default: dataset)")
    add("--val_fraction", type=number(float, 0.001, 0.9), help="without valid/: split this share off train/")
    add("--size", choices=list(SIZES), default="nano", help="model size to be trained (default: nano)")
    add("--resolution", type=number(int, 1), help="its input side in pixels (default: the size's own)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--check_images", type=boolean, default=True, metavar="0|1", help="decode every image")
    add("--need_masks", type=boolean, default=False, metavar="0|1", help="missing masks are an error")
    add("--json", type=Path, metavar="FILE", help="write all that is said here too")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    found, needed = packages(Path(__file__).with_name("requirements.txt"))
    lacking = [
        f"{name} is {found[name]}, {needed[name]} or newer is needed" for name in needed if name not in TEST_ONLY
    ]
    if lacking:
        advice = "Run: python -m pip install -r requirements.txt, or python quickstart.py"
        raise UserError(f"{'; '.join(lacking)}. {advice}")
    # Only now: these need the packages that were just looked for.
    import torch

    from rfdetr.data.coco import inspect_dataset
    from rfdetr.precision import pick_device, pick_precision
    from rfdetr.rundir import environment, write_json

    size, device = SIZES[args.size], pick_device(args.device)
    found = {"size": f"{size.name}, {check_resolution(size, args.resolution)} px", **found, **environment(device)}
    found["free_disk_gib"] = round(shutil.disk_usage(Path.cwd()).free / 2**30, 1)
    if device.type == "cuda":
        found["gpu_memory_gib"] = round(torch.cuda.mem_get_info(device)[1] / 2**30, 1)
    found["precision"] = str(pick_precision("auto", device).dtype or "fp32")
    banner("SETUP CHECK", found)
    options = args.val_fraction, args.need_masks, args.check_images, size.queries
    splits, problems = inspect_dataset(args.dataset, *options)
    counts = {name: describe(split) for name, split in splits.items()}
    if counts:
        print_splits(counts)
    for problem in problems:
        more = [f"... and {problem.count - len(problem.places)} more"] * (problem.count > len(problem.places))
        # the sentence has the first three
        print(f"[{problem.severity}] {problem.code}: {problem.message}", *problem.places[3:], *more, sep="\n    ")

    errors = [problem for problem in problems if problem.severity == "error"]
    masks = not errors and splits["train"].mask_count > 0
    report = {
        "format": 1,
        "ok": not errors,
        "environment": found,
        "splits": counts,
        "stages": {"detector": not errors, "segmentation": masks, "single": masks},
        "problems": [asdict(problem) for problem in problems],
    }
    if args.json:
        write_json(args.json, report)
    if errors:
        kinds = ", ".join(dict.fromkeys(problem.code for problem in errors))
        raise UserError(f"{errors[0].message.rstrip('.')}. All errors: {kinds}. Correct and run this again")

    images = sum(row["images"] for row in counts.values())
    how = "every image could be decoded" if args.check_images else "images were opened, not decoded (--check_images)"
    tick(f"{len(splits['train'].class_names)} classes, {images} images; {how}")
    tick("Stage 1 (boxes) is possible")
    if masks:
        tick("Stage 2 and single stage (masks) are possible")
    else:
        warn("Stage 2 and single stage are not possible: the annotations have no masks")
    place = f'"{args.dataset}"' if " " in str(args.dataset) else args.dataset
    given = {name: getattr(args, name) for name in ("val_fraction", "size", "resolution", "device")}
    flags = "".join(f" --{name} {value}" for name, value in given.items() if value != parser.get_default(name))
    print(f"Next: python train_detector_stage1.py --dataset {place}{flags}")


def describe(split) -> dict:
    """What the report says of a split (rfdetr.data.coco.CocoSplit); its classes by label."""
    rows = zip(split.class_names, split.category_ids, split.per_class)
    return {
        "file": str(split.annotation_file),
        "images": len(split.images),
        "negatives": split.per_image.count(0),
        "objects": split.object_count,
        "masks": split.mask_count,
        "most_in_an_image": max(split.per_image, default=0),
        "classes": [{"name": name, "category_id": key, "objects": count} for name, key, count in rows],
        "left_out": split.left_out,
    }


def print_splits(splits: dict[str, dict]) -> None:
    """One line a split, then one row a class: label, category id in the first split, name, objects per split."""
    line = "{images} images ({negatives} without objects), {objects} objects, {masks} with masks"
    for name, row in splits.items():
        print(f"{name + ':':<7}" + line.format(**row) + f", at most {row['most_in_an_image']} in an image")
    print(f"{'label':>5} {'id':>8}  {'name':<24}" + "".join(f"{split:>9}" for split in splits))
    for label, rows in enumerate(zip(*(row["classes"] for row in splits.values()))):
        numbers = "".join(f"{row['objects']:>9}" for row in rows)
        print(f"{label:>5} {rows[0]['category_id']:>8}  {rows[0]['name'][:24]:<24}{numbers}")
    for name in next(iter(splits.values()))["left_out"]:
        print(f"Left out (placeholder, parent of other classes): {name}")


if __name__ == "__main__":
    run_script(main)
