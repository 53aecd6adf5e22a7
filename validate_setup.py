"""Tell before anything runs whether it will: packages, device, disk, and every problem of the dataset at once.

python validate_setup.py --dataset dataset --check_images 1
"""

from __future__ import annotations

import argparse
import functools
import platform
import re
import shutil
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from rfdetr.console import UserError, banner, boolean, number, run_script, tick, warn

TEST_ONLY = {"pytest", "hypothesis"}
SHOWN_CLASSES = 40


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=Path("dataset"), help="COCO-format folder (default: dataset)")
    parser.add_argument("--val_fraction", type=number(float, 0.001, 0.9), help="without valid/: split this off train/")
    parser.add_argument("--check_images", type=boolean, default=True, metavar="0|1", help="decode every image")
    parser.add_argument("--need_masks", type=boolean, default=False, metavar="0|1", help="missing masks are an error")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that is said here too")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    packages = check_packages()
    # Only now: these need the packages that were just looked for.
    from tqdm import tqdm

    from rfdetr.data.coco import class_table
    from rfdetr.data.validation import Problem, inspect_dataset

    free = shutil.disk_usage(Path.cwd()).free / 2**30
    devices = describe_devices()
    disk = f"{free:.1f} GiB in {Path.cwd()}"
    banner("SETUP CHECK", {"Python": packages["python"], "Devices": "; ".join(devices), "Free disk": disk})
    progress = functools.partial(tqdm, desc="Images", unit="image", disable=None, leave=False)
    try:
        checks, problems = inspect_dataset(
            args.dataset, args.val_fraction, args.need_masks, args.check_images, progress
        )
    except UserError as error:
        checks, problems = {}, [Problem("DATASET_LAYOUT", "error", str(error), 1, [str(args.dataset)])]
    errors = [problem for problem in problems if problem.severity == "error"]

    names, ids, left_out = class_table(checks)
    splits = {name: describe_split(check) for name, check in checks.items()}
    print_dataset(names, ids, splits)
    if left_out:
        print(f"Left out (placeholder, parent of other classes): {', '.join(left_out)}")
    for problem in problems:
        print_problem(problem)

    masks = splits.get("train", {}).get("masks", 0) > 0
    report = {
        "format": 1,
        "ok": not errors,
        "environment": {**packages, "os": platform.platform(), "devices": devices, "free_disk_gib": round(free, 1)},
        "splits": splits,
        "classes": [{"name": name, "ids": {split: ids[split][row] for split in ids}} for row, name in enumerate(names)],
        "left_out": left_out,
        "stages": {"detector": not errors, "segmentation": not errors and masks, "single": not errors and masks},
        "problems": [asdict(problem) for problem in problems],
    }
    if args.json:
        from rfdetr.rundir import write_json

        try:
            write_json(args.json, report)
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written: {error.strerror}") from error
    if errors:
        kinds = ", ".join(dict.fromkeys(problem.code for problem in errors))
        raise UserError(
            f"{errors[0].message.rstrip('.')}. All errors, listed above: {kinds}. Correct and run this again"
        )

    tick("Python and packages are as requirements.txt asks")
    images = "every image could be decoded" if args.check_images else "images were opened, not decoded (--check_images)"
    tick(f"Dataset: {len(names)} classes, {sum(row['images'] for row in splits.values())} images; {images}")
    tick("Stage 1 (boxes) is possible")
    if masks:
        tick("Stage 2 and single stage (masks) are possible")
    else:
        warn("Stage 2 and single stage are not possible: the annotations have no masks")
    place = f'"{args.dataset}"' if " " in str(args.dataset) else args.dataset
    fraction = f" --val_fraction {args.val_fraction:g}" if args.val_fraction else ""
    print(f"Next: python train_detector_stage1.py --dataset {place}{fraction}")


def check_packages() -> dict[str, str]:
    """Package -> installed version.  Raises UserError naming all that is missing or too old for requirements.txt."""

    def release(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]

    python = platform.python_version()
    found = {"python": python}
    lacking = [f"Python is {python}, 3.10 or newer is needed"] if release(python) < [3, 10] else []
    for line in Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines():
        name, _, least = line.split("#")[0].strip().partition(">=")
        if not name or name in TEST_ONLY:
            continue
        try:
            found[name] = metadata.version(name) or "0"  # None for a package half removed
            if release(found[name]) < release(least):
                lacking.append(f"{name} is {found[name]}, {least} or newer is needed")
        except metadata.PackageNotFoundError:
            lacking.append(f"{name} is missing")
    if lacking:
        raise UserError(
            f"{'; '.join(lacking)}. Run: python -m pip install -r requirements.txt, or python quickstart.py"
        )
    return found


def describe_devices() -> list[str]:
    """What torch can compute on, best first."""
    import torch

    lines = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "with" if gpu.major >= 8 else "without"
        lines.append(f"cuda:{index} {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, {bf16} bf16")
    if torch.backends.mps.is_available():
        lines.append("mps (Apple GPU)")
    return [*lines, f"cpu, {torch.get_num_threads()} threads"]


def describe_split(check) -> dict:
    """Counts of one checked split (rfdetr.data.validation.SplitCheck)."""
    objects = check.objects()
    counts = Counter(item.entry["image_id"] for item in objects)
    return {
        "file": str(check.found.file),
        "images": len(check.images),
        "negatives": len(check.images) - len(counts),
        "objects": len(objects),
        "masks": check.mask_count(),
        "most_in_an_image": max(counts.values(), default=0),
        "per_class": dict(check.class_counts()),
    }


def print_dataset(names: list[str], ids: dict[str, list[int]], splits: dict[str, dict]) -> None:
    """One line a split, then one row a class: label, category id in the first split, name, objects per split."""
    for name, row in splits.items():
        print(
            f"{name + ':':<7}{row['images']} images ({row['negatives']} without objects), {row['objects']} objects, "
            f"{row['masks']} with masks, at most {row['most_in_an_image']} in an image"
        )
    if names:
        print(f"{'label':>5} {'id':>8}  {'name':<24}" + "".join(f"{split:>9}" for split in splits))
    for label, name in enumerate(names[:SHOWN_CLASSES]):
        counts = "".join(f"{row['per_class'].get(name, 0):>9}" for row in splits.values())
        print(f"{label:>5} {next(iter(ids.values()))[label]:>8}  {name[:24]:<24}{counts}")
    if len(names) > SHOWN_CLASSES:
        print(f"  ... and {len(names) - SHOWN_CLASSES} more classes")


def print_problem(problem) -> None:
    """The sentence, then up to 20 places one by one (rfdetr.data.validation.Problem)."""
    print(f"[{problem.severity}] {problem.code}: {problem.message}")
    for place in problem.places if problem.count > 3 else ():
        print(f"    {place}")
    if problem.count > len(problem.places):
        print(f"    ... and {problem.count - len(problem.places)} more")


if __name__ == "__main__":
    run_script(main)
