"""Tell before anything runs whether it will: packages, device, disk, and every problem of the dataset at once.

python validate_setup.py --dataset dataset --size nano --check_images 1
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

from rfdetr.console import (
    UserError,
    banner,
    boolean,
    number,
    packages,
    printable,
    run_script,
    tick,
    warn,
)
from rfdetr.sizes import SIZES, check_resolution

TEST_ONLY = {"pytest", "hypothesis"}
PICTURES = (".webp", ".png", ".jpg")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--dataset",
        type=Path,
        default=Path("dataset"),
        help="COCO-format folder (default: dataset)",
    )
    add(
        "--val_fraction",
        type=number(float, 0.001, 0.9),
        help="without valid/: split this share off train/",
    )
    add(
        "--exif",
        choices=["apply", "ignore"],
        help="orientation of images whose size does not tell (default: apply)",
    )
    add(
        "--size",
        choices=list(SIZES),
        default="nano",
        help="model size to be trained (default: nano)",
    )
    add(
        "--resolution",
        type=number(int, 1),
        help="its input side in pixels (default: the size's own)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--check_images", type=boolean, default=True, metavar="0|1", help="decode every image")
    add(
        "--need_masks",
        type=boolean,
        default=False,
        metavar="0|1",
        help="missing masks are an error",
    )
    add(
        "--fix",
        type=Path,
        metavar="DIR",
        help="write a cleaned copy of the annotations there, and check the copy",
    )
    add(
        "--preview",
        type=Path,
        metavar="PATH",
        help="draw objects of each class: a .webp, .png or .jpg, or a folder",
    )
    add(
        "--estimate",
        type=boolean,
        default=False,
        metavar="0|1",
        help="measure a step: memory and time of each size",
    )
    add("--json", type=Path, metavar="FILE", help="write all that is said here too")
    add("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    for path in (args.json, args.preview):
        if path and path.is_file() and args.dataset.resolve() in path.resolve().parents:
            raise UserError(f"{path} is a file of the dataset, which is only read: name another")

    found, needed = packages(Path(__file__).with_name("requirements.txt"))
    lacking = [
        f"{name} is {found[name]}, {needed[name]} or newer is needed"
        for name in needed
        if name not in TEST_ONLY
    ]
    if lacking:
        advice = "Run: python -m pip install -r requirements.txt, or python quickstart.py"
        raise UserError(f"{'; '.join(lacking)}. {advice}")
    # Only now: these need the packages that were just looked for.
    import torch

    from rfdetr.data.coco import inspect_dataset
    from rfdetr.data.exif import exif_note
    from rfdetr.data.statistics import small_objects
    from rfdetr.device import pick_device, pick_precision
    from rfdetr.files import make_place, write_json
    from rfdetr.runs.environment import environment

    if args.json:
        make_place(args.json, "--json")
    size, device = SIZES[args.size], pick_device(args.device)
    resolution, precision = (
        check_resolution(size, args.resolution),
        pick_precision(size.recipe.amp, device),
    )
    found = {"size": f"{size.name}, {resolution} px", **found, **environment(device)}
    found["free_disk_gib"] = round(shutil.disk_usage(Path.cwd()).free / 2**30, 1)
    if device.type == "cuda":
        found["gpu_memory_gib"] = round(torch.cuda.mem_get_info(device)[1] / 2**30, 1)
    found["precision"] = str(precision.dtype or "fp32")
    banner("SETUP CHECK", found)
    repaired = fix(args) if args.fix else None
    options = args.val_fraction, args.need_masks, args.check_images, size.queries, args.exif
    splits, problems = inspect_dataset(args.dataset, *options)
    problems += small_objects(splits["train"], resolution, size.block) if "train" in splits else []
    counts = {name: describe(split, resolution) for name, split in splits.items()}
    if counts:
        print_splits(counts)
    if note := exif_note(splits, args.exif):
        tick(note)
    for problem in sorted(problems, key=lambda problem: problem.severity):
        more = [f"... and {problem.count - len(problem.places)} more"] * (
            problem.count > len(problem.places)
        )
        # the sentence has the first three
        message = printable(problem.message)
        print(
            f"[{problem.severity}] {problem.code}: {message}",
            *problem.places[3:],
            *more,
            sep="\n    ",
        )
    if args.preview and "train" in splits:
        draw_classes(splits["train"], args.preview)

    errors = [problem for problem in problems if problem.severity == "error"]
    masks = not errors and splits["train"].mask_count > 0
    report = {
        "format": 1,
        "ok": not errors,
        "environment": found,
        "repaired": repaired,
        "exif": next((split.exif for split in splits.values()), None),
        "splits": counts,
        "stages": {"detector": not errors, "segmentation": masks, "single": masks},
        "problems": [asdict(problem) for problem in problems],
    }
    if args.estimate and not errors:
        report["estimate"] = estimate_sizes(
            size.name, resolution, precision, counts["train"]["images"]
        )
    if args.json:
        write_json(args.json, report)
    if errors:
        kinds = ", ".join(dict.fromkeys(problem.code for problem in errors))
        then = (
            "This is left to you"
            if args.fix
            else "Correct and run this again, or have --fix DIR try"
        )
        raise UserError(f"{errors[0].message.rstrip('.')}. All errors: {kinds}. {then}")
    finish(
        args,
        parser,
        splits["train"].class_names,
        sum(row["images"] for row in counts.values()),
        masks,
    )


def finish(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    names: list[str],
    images: int,
    masks: bool,
):
    """Say what is possible, and the next command."""
    how = (
        "every image could be decoded"
        if args.check_images
        else "images were opened, not decoded (--check_images)"
    )
    tick(f"{len(names)} classes, {images} images; {how}")
    tick("Stage 1 (boxes) is possible")
    if masks:
        tick("Stage 2 and single stage (masks) are possible")
    else:
        warn("Stage 2 and single stage are not possible: the annotations have no masks")
    place = shlex.quote(str(args.dataset))
    given = {
        name: getattr(args, name)
        for name in ("val_fraction", "exif", "size", "resolution", "device")
    }
    flags = "".join(
        f" --{name} {value}" for name, value in given.items() if value != parser.get_default(name)
    )
    print(f"Next: python train_detector_stage1.py --dataset {place}{flags}")


def fix(args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Write the cleaned copy, say what was done, and let `args.dataset` be the copy from here on."""
    from rfdetr.data.repair import fix_dataset
    from rfdetr.files import writing_to

    with writing_to(args.fix, "--fix"):
        done = fix_dataset(args.dataset, args.fix, args.check_images, args.exif)
    for split, counts in done.items():
        print(f"{split + ':':<7}" + ("repaired" if counts else "nothing to repair"))
        for what, count in counts.items():
            print(f"{count:>9}  {what}")
    tick(
        f"Written: {args.fix}; its images are links to those of {args.dataset}. The rest is about the copy"
    )
    args.dataset = args.fix
    return done


def draw_classes(split, path: Path) -> None:
    """Write the sheet of classes of a split (rfdetr.data.coco.CocoSplit), as preview.webp where `path` is a folder."""
    from rfdetr.files import writing_to
    from rfdetr.inference.visualise import class_sheet

    if path.suffix.lower() not in PICTURES:
        path = path / "preview.webp"
    with writing_to(path.parent, "--preview"):
        path.parent.mkdir(parents=True, exist_ok=True)
        class_sheet(split).save(path)
    tick(f"Some objects of each class: {path}")


def estimate_sizes(name: str, resolution: int, precision, images: int) -> list[dict]:
    """Print and return what stage 1 takes by size; `precision`: rfdetr.device.Precision."""
    import torch

    from rfdetr.device import free_memory_mb
    from rfdetr.training.auto_batch import HEADROOM
    from rfdetr.training.estimate import estimate

    rows = estimate(name, resolution, precision, images)
    cuda = precision.device.type == "cuda"
    free = torch.cuda.mem_get_info(precision.device)[0] / 2**20 if cuda else free_memory_mb()
    print(
        f"Stage 1 here, {images} images a pass, small sets repeated (*: a step was measured, ~: from its shape)"
    )
    print(
        f"  {'size':<13}{'px':>5}{'parameters':>13}{'MB, batch 1':>13}{'batch 4':>10}{'s an epoch':>12}"
    )
    for row in rows:
        sign, (one, four) = "*" if row["measured"] else "~", row["memory_mb"].values()
        line = f"{sign} {row['size']:<13}{row['resolution']:>5}{row['parameters']:>13,}{one:>13,}{four:>10,}"
        tight = one > HEADROOM * free
        print(f"{line}{row['epoch_s']:>12,.0f}" + "  more than is free" * tight)
    own = next(row for row in rows if row["size"] == name)["memory_mb"]
    fits = [batch for batch, needed in own.items() if needed < HEADROOM * free]
    advice = (
        f"--batch {fits[-1]} fits" if fits else "even --batch 1 is tight: try --grad_checkpoint 1"
    )
    print(f"{free:,.0f} MB are free: for {name}, {advice}; --batch auto finds the largest")
    return rows


def describe(split, resolution: int) -> dict:
    """What the report says of a split (rfdetr.data.coco.CocoSplit); its classes by label."""
    import numpy as np

    from rfdetr.data.statistics import COCO_SIDES, object_sides

    rows = zip(split.class_names, split.category_ids, split.objects_per_class)
    sizes = np.searchsorted(
        list(COCO_SIDES.values()), object_sides(split, resolution), side="right"
    )
    return {
        "file": str(split.annotation_file),
        "images": len(split.images),
        "negatives": split.objects_per_image.count(0),
        "objects": split.object_count,
        "masks": split.mask_count,
        "most_in_an_image": max(split.objects_per_image, default=0),
        "sizes": {name: int((sizes == i).sum()) for i, name in enumerate(COCO_SIDES)},
        "classes": [
            {"name": name, "category_id": key, "objects": count} for name, key, count in rows
        ],
        "left_out": split.left_out,
    }


def print_splits(splits: dict[str, dict]) -> None:
    """One line a split, then one row a class: label, category id in the first split, name, objects per split."""
    line = "{images} images ({negatives} without objects), {objects} objects, {masks} with masks"
    for name, row in splits.items():
        sizes = ", ".join(f"{count} {size}" for size, count in row["sizes"].items())
        print(
            f"{name + ':':<7}"
            + line.format(**row)
            + f", at most {row['most_in_an_image']} in an image ({sizes})"
        )
    print(f"{'label':>5} {'id':>8}  {'name':<24}" + "".join(f"{split:>9}" for split in splits))
    for label, rows in enumerate(zip(*(row["classes"] for row in splits.values()))):
        numbers = "".join(f"{row['objects']:>9}" for row in rows)
        print(
            f"{label:>5} {rows[0]['category_id']:>8}  {printable(rows[0]['name'])[:24]:<24}{numbers}"
        )
    for name in next(iter(splits.values()))["left_out"]:
        print(f"Left out (placeholder, parent of other classes): {printable(name)}")


if __name__ == "__main__":
    run_script(main)
