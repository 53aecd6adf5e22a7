"""What validate_setup.py says: the machine, every problem of the dataset, and what is possible with
it.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from rfdetr.commands import flags_of, same_command, training_command
from rfdetr.console import UserError, banner, say, tick, warn
from rfdetr.data.augment import find_preset
from rfdetr.data.class_checks import rare_class_problems
from rfdetr.data.coco import inspect_dataset
from rfdetr.data.exif import exif_note
from rfdetr.data.faults import PLACES_KEPT, PLACES_NAMED, Problem
from rfdetr.data.gray import look_at_records, other_ranges, scale_for
from rfdetr.data.layout import has_val_folder
from rfdetr.data.records import CocoSplit
from rfdetr.data.repair import can_repair, fix_dataset
from rfdetr.data.statistics import (
    COCO_AREAS,
    count_by_size,
    object_sides,
    shrink_problems,
    without_scores,
)
from rfdetr.data.tiles import images_an_epoch, tile_problems, training_tiling
from rfdetr.device import Precision, free_on_device_mb, pick_device, pick_precision
from rfdetr.files import make_place, require_earlier_report, write_json, writing_to
from rfdetr.inference.augment_sheet import augment_sheet
from rfdetr.inference.class_sheet import class_sheet
from rfdetr.renaming import rename_flags
from rfdetr.resolve import plain
from rfdetr.runs.environment import environment
from rfdetr.settings import VAL_FRACTION
from rfdetr.sizes import SIZES, check_resolution, usual_size
from rfdetr.text import counted, printable, with_its_blanks
from rfdetr.tiling import Tiling, tell_idle_flags
from rfdetr.tool_settings import ValidationSettings
from rfdetr.training.auto_batch import HEADROOM
from rfdetr.training.estimate import estimate

PICTURES = (".webp", ".png", ".jpg", ".jpeg")


def check_setup(settings: ValidationSettings, versions: dict[str, str]) -> None:
    """Print all of it, and write it where --json asks for it; UserError where the dataset has
    errors.
    """
    check_outputs(settings)
    device = pick_device(settings.device)
    size = SIZES[settings.size or usual_size(device.type == "cuda")]
    resolution = check_resolution(size, settings.resolution)
    precision = pick_precision(size.recipe.amp, device)
    machine = describe_machine(versions, precision)
    chosen = "" if settings.size else f" (usual on {device.type}; --size checks another)"
    banner("SETUP CHECK", {"size": f"{size.name}, {resolution} px{chosen}", **machine})
    settings = replace(settings, size=size.name)
    repaired = None
    original = settings.dataset
    if settings.drop_rectangles and not settings.fix:
        raise UserError("--drop_rectangles 1 is for a cleaned copy: add --fix NEW_DIR")
    if settings.fix:
        repaired = write_cleaned_copy(settings)
        settings = replace(settings, dataset=settings.fix, rename=())  # the copy has the new names

    splits, problems = inspect_dataset(
        settings.dataset,
        settings.val_fraction,
        settings.need_masks,
        settings.check_images,
        math.inf if settings.tile else size.queries,  # of a tile, not of an image
        settings.exif,
        settings.rename,
    )
    letterbox = size.recipe.letterbox if settings.letterbox is None else settings.letterbox
    train = splits.get("train")
    gray = None
    gray_warnings = []
    tiling = None
    if train:
        problems += rare_class_problems(train, splits.get("valid"))
        sample = look_at_records(train.images)
        gray, told = scale_for(settings.gray or "auto", None, sample)
        gray_warnings = [*filter(None, [told]), *other_ranges(splits, gray)]
        train = replace(train, gray=gray)
        tiling = training_tiling(
            train, resolution, settings.tile, settings.tile_overlap, settings.tile_full
        )
        tell_idle_flags(tiling, settings.tile_overlap, settings.tile_full)
    if tiling:
        problems += tile_problems(train, tiling)
    elif train and not any(problem.code == "ANN_BBOX_NORMALISED" for problem in problems):
        problems += shrink_problems(train, resolution, size.block, letterbox)
    problems.sort(key=lambda problem: problem.severity)
    counts = {}
    for name, split in splits.items():
        counts[name] = describe_split(split, resolution, letterbox, tiling)
    if counts:
        print_splits(counts)
    if tiling:
        tick(f"{tiling.told()}, cut from the images in training")
    note = exif_note(splits, settings.exif)
    for line in (note, gray and gray.note):
        if line:
            tick(line)
    for message in gray_warnings:
        warn(message)
    print_problems(problems, settings.json)
    if settings.preview and train:
        draw_preview(train, settings, resolution, letterbox)

    errors = [problem for problem in problems if problem.severity == "error"]
    report = {
        "format": 1,
        "ok": not errors,
        "environment": machine,
        "repaired": repaired,
        "exif": train.exif if train else None,
        "gray": gray.to_dict() if gray else None,
        "splits": counts,
        "images_an_epoch": images_an_epoch(train.images, tiling) if train else 0,
        # masks are guessed where there are none: splits has their numbers
        "stages": dict.fromkeys(("detector", "segmentation", "single"), not errors),
        "problems": [asdict(problem) for problem in problems],
        "gray_warnings": gray_warnings,
    }
    if settings.estimate and not errors:
        images = counts["train"]["images"]
        report["estimate"] = estimate_sizes(size.name, resolution, precision, images)
    if settings.json:
        write_json(settings.json, report)
    if errors:
        raise UserError(errors_message(errors, settings, original))
    say_what_is_possible(settings, splits, sum(row["images"] for row in counts.values()))
    print_next(settings, problems)


def check_outputs(settings: ValidationSettings) -> None:
    """UserError where --json or --preview would overwrite a file of the dataset, cannot be written
    or is no picture, and where --augment has nowhere to draw.
    """
    dataset = settings.dataset.resolve()
    drawn = settings.preview and preview_file(settings.preview)
    for path in (settings.json, settings.preview, drawn):
        if path and path.is_file() and dataset in path.resolve().parents:
            raise UserError(
                f"{path} is a file in the dataset's folder, where nothing is replaced: name another"
            )
    if settings.json:
        make_place(settings.json, "--json")
        require_earlier_report(settings.json, "--json", "problems")
    preview = settings.preview
    if preview and preview.suffix and not (is_picture(preview) or preview.is_dir()):
        raise UserError(
            f"--preview {preview}: a picture ends in {', '.join(PICTURES)}, a new folder has no dot"
        )
    if settings.augment and not settings.preview:
        raise UserError(
            f"--augment {settings.augment} is drawn by --preview: add --preview preview.webp"
        )


def describe_machine(versions: dict[str, str], precision: Precision) -> dict:
    device = precision.device
    machine = {**versions, **environment(device)}
    machine["free_disk_gib"] = round(shutil.disk_usage(Path.cwd()).free / 2**30, 1)
    if device.type == "cuda":
        machine["gpu_memory_gib"] = round(torch.cuda.mem_get_info(device)[1] / 2**30, 1)
    machine["precision"] = precision.name
    return machine


def write_cleaned_copy(settings: ValidationSettings) -> dict[str, dict[str, int]]:
    """Write --fix's copy and say what was done: split -> what -> how often."""
    with writing_to(settings.fix, "--fix"):
        done = fix_dataset(
            settings.dataset,
            settings.fix,
            settings.check_images,
            settings.exif,
            settings.rename,
            settings.drop_rectangles,
        )
    for split, counts in done.items():
        print(f"{split + ':':<7}" + ("repaired" if counts else "nothing repaired"))
        for what, count in counts.items():
            print(f"{count:>9}  {what}")
    tick(
        f"Written: {settings.fix}; its images are links to those of {settings.dataset}. "
        "The rest is about the copy"
    )
    return done


def describe_split(
    split: CocoSplit, resolution: int, letterbox: bool, tiling: Tiling | None
) -> dict:
    """What the report says of a split; its classes by label."""
    sides = object_sides(split, resolution, letterbox, tiling)
    classes = []
    for name, key, count in zip(split.class_names, split.category_ids, split.objects_per_class):
        key = key if name in split.annotated else None  # the file lists no such class
        classes.append({"name": name, "category_id": key, "objects": count})
    return {
        "file": str(split.annotation_file),
        "images": len(split.images),
        "negatives": split.objects_per_image.count(0),
        "objects": split.object_count,
        "masks": split.mask_count,
        "crowds": split.images.crowd_count,
        "most_in_an_image": max(split.objects_per_image, default=0),
        "sizes": count_by_size(split),
        "median_side_px": round(float(np.median(sides)), 1) if len(sides) else None,
        "classes": classes,
        "left_out": split.left_out,
    }


def print_splits(splits: dict[str, dict]) -> None:
    """One line a split, then one row a class: label, category id in the first split (- where that
    lists no such class), name, objects per split.
    """
    for name, row in splits.items():
        sizes = ", ".join(f"{count} {size}" for size, count in row["sizes"].items())
        images = counted(row["images"], "image")
        print(
            f"{name + ':':<7}{images} ({row['negatives']} without objects), "
            f"{counted(row['objects'], 'object')}, {row['masks']} with masks, "
            f"at most {row['most_in_an_image']} in an image ({sizes}; "
            f"median side {row['median_side_px'] or '-'} px at the model's input)"
        )
        if row["crowds"]:
            crowds = counted(row["crowds"], "crowd region")
            print(f"       and {crowds} (iscrowd), which training and scores ignore")
    areas = [f"{name} up to {area**0.5:.0f}²" for name, area in COCO_AREAS.items()]
    print(f"Sizes as in evaluate.py, by area in pixels of the image: {', '.join(areas[:2])}")
    print(f"{'label':>5} {'id':>8}  {'name':<24}" + "".join(f"{split:>9}" for split in splits))
    for label, rows in enumerate(zip(*(row["classes"] for row in splits.values()))):
        counts = "".join(f"{row['objects']:>9}" for row in rows)
        name = with_its_blanks(rows[0]["name"])[:24]
        key = rows[0]["category_id"]
        key = "-" if key is None else key
        print(f"{label:>5} {key:>8}  {name:<24}{counts}")
    first = next(iter(splits.values()))
    for name in first["left_out"]:
        print(f"Left out (placeholder, parent of other classes): {printable(name)}")


def print_problems(problems: list[Problem], report: Path | None) -> None:
    """One line each, with three examples.  report: the file of --json, which has more of them."""
    for problem in problems:
        if problem.code != "DATASET_LAYOUT":  # it is alone, and how the script ends
            print(f"[{problem.severity}] {problem.code}: {printable(problem.message)}")
    if any(problem.count > PLACES_NAMED for problem in problems):
        where = printable(report) if report else "--json FILE writes them"
        print(f"The first {PLACES_KEPT} places of each: {where}")


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def preview_file(path: Path) -> Path:
    """Where --preview draws: the picture that it names, or one in the folder."""
    return path if is_picture(path) else path / "preview.webp"


def draw_preview(
    split: CocoSplit, settings: ValidationSettings, resolution: int, letterbox: bool
) -> None:
    """Write the sheet of a split's classes, or of its images as --augment varies them.

    As preview.webp where --preview is a folder.
    """
    path = preview_file(settings.preview)
    with writing_to(path.parent, "--preview"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if settings.augment is None:
            class_sheet(split).save(path)
            tick(f"Some objects of each class: {path}")
            return
        preset = find_preset(settings.augment, settings.flip)
        title = f"--augment {settings.augment}" + ("" if settings.flip else " --flip 0")
        augment_sheet(split, preset, title, resolution, letterbox).save(path)
        tick(f"Training images as {title} varies them: {path}")


def estimate_sizes(name: str, resolution: int, precision: Precision, images: int) -> list[dict]:
    """Print and return what stage 1 takes by size."""
    rows = estimate(name, resolution, precision, images)
    free = free_on_device_mb(precision.device)
    print(f"Stage 1 here, {counted(images, 'image')} a pass, small sets repeated")
    columns = f"{'parameters':>13}{'MB, batch 1':>13}{'batch 4':>10}{'s an epoch':>12}"
    print(f"{'size':<13}{'px':>5}{columns}")
    for row in rows:
        how = "measured" if row["measured"] else "from the measured ones"
        one, four = row["memory_mb"].values()
        line = f"{row['size']:<13}{row['resolution']:>5}{row['parameters']:>13,}"
        line += f"{one:>13,}{four:>10,}{row['epoch_s']:>12,.0f}  {how}"
        if one > HEADROOM * free:
            line += ", more than is free"
        print(line)
    own = next(row for row in rows if row["size"] == name)
    fits = [batch for batch, needed in own["memory_mb"].items() if needed < HEADROOM * free]
    advice = "even --batch 1 is tight: try --grad_checkpoint 1"
    if fits:
        advice = f"--batch {fits[-1]} fits"
    print(f"{free:,.0f} MB are free: for {name}, {advice}; --batch auto finds the largest")
    return rows


def errors_message(errors: list[Problem], settings: ValidationSettings, original: Path) -> str:
    """How the script ends: the first error in short, and the others' codes; all is said above.

    original: the dataset that --fix copied.
    """
    if errors[0].code == "DATASET_LAYOUT":
        return errors[0].message
    is_valid_missing = {problem.code for problem in errors} == {"SPLIT_VALID_MISSING"}
    if is_valid_missing and not has_val_folder(settings.dataset):
        command = same_check(replace(settings, val_fraction=VAL_FRACTION))
        return f"there is no valid split. To check with a tenth of train/ as one: {command}"
    kinds = ", ".join(dict.fromkeys(problem.code for problem in errors))
    advice = advice_on(errors, settings)
    if settings.fix:
        advice = f"This is left to you: mend it in {original}, and write another copy"
    return f"{errors[0].headline.rstrip('.')}. All errors (see above): {kinds}. {advice}"


def advice_on(errors: list[Problem], settings: ValidationSettings) -> str:
    """What to do about errors; --fix is named where it can do some of it."""
    codes = {problem.code for problem in errors}
    renames = rename_flags(dict.fromkeys(pair for one in errors for pair in one.renames))
    if "CLASS_UNKNOWN" in codes and not renames:
        renames = '--rename "OLD=NEW"'
    can_fix = can_repair(codes) and "JSON_INVALID" not in codes
    replaced = {pair for one in errors for pair in one.renames_replaced}
    kept = tuple(pair for pair in settings.rename if pair not in replaced)
    command = same_check(replace(settings, rename=kept))
    if codes == {"CLASS_UNKNOWN"}:
        return f"If they are the same classes, run: {command} {renames}"
    if can_fix:
        command = f"{command} --fix NEW_DIR {renames}".strip()
        return f"Correct them and run this again, or repair what can be in a copy: {command}"
    if codes <= {"MASKS_NONE", "ANN_NO_TILE"}:
        return "This is left to you"
    return "Correct them and run this again"


def same_check(settings: ValidationSettings) -> str:
    """The command of another check; what --fix has written is what `settings` are about by now."""
    return same_command("validate_setup.py", replace(settings, fix=None, drop_rectangles=False))


def say_what_is_possible(
    settings: ValidationSettings, splits: dict[str, CocoSplit], images: int
) -> None:
    """Which trainings, and what they will lack."""
    train = splits["train"]
    how = "images were opened, not decoded (--check_images)"
    if settings.check_images:
        how = "every image could be decoded"
    classes = counted(len(train.class_names), "class")
    tick(f"{classes}, {counted(images, 'image')}; {how}")
    tick("Stage 1 (boxes) is possible")
    unscored = without_scores(splits)
    if train.mask_count:
        tick("Stage 2 and single stage (masks) are possible")
        if not unscored and not splits["valid"].mask_count:
            warn(
                "the valid split has no masks: there will be no mask scores, and best.pt will "
                "hold the last epoch's weights. Draw the masks of a few valid images"
            )
    else:
        warn(
            "Stage 2 and single stage (masks) will guess masks from the boxes: the annotations "
            "have none"
        )
    if unscored:
        warn(unscored)


def print_next(settings: ValidationSettings, problems: list[Problem]) -> None:
    """The next command; flags that warnings advise and that it has not are named before it."""
    messages = " ".join(problem.message for problem in problems)
    advised = [flag for flag in ("--tile auto", "--num_queries") if flag in messages]
    if advised:
        flags = " and ".join(advised)
        say(f"The next command is without {flags}, which warnings advise: add it if you wish")
    views = flags_of(plain(settings), "augment")
    if not settings.flip:
        views += ["--flip", "0"]
    print(" ".join(["Next:", training_command(plain(settings)), *views]))
