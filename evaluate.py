"""Score a checkpoint on a split: COCO box and mask figures, and mask overlap.

python evaluate.py --checkpoint runs/segmentation_nano_384_1/best.pt --json scores.json
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import check_command, script_settings
from rfdetr.tool_settings import EvaluationSettings, PredictionSettings

# before torch, whose import takes seconds
check_command(EvaluationSettings, __doc__, __name__)

import math
from dataclasses import replace
from pathlib import Path

from rfdetr.commands import training_command
from rfdetr.console import UserError, run_script, say, tick, warn
from rfdetr.data.coco import read_dataset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.gray import told_scale
from rfdetr.data.layout import find_splits
from rfdetr.data.letterbox import letterbox_for
from rfdetr.data.loaders import check_unread, evaluation_loader
from rfdetr.data.records import CocoSplit
from rfdetr.data.statistics import shrink_problems, words_on_trained
from rfdetr.device import compile_in_place, pick_device, pick_inference_precision
from rfdetr.files import make_folder, make_place, require_earlier_report, write_json, writing_to
from rfdetr.inference.detections import tell_few_queries
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.metrics.overlap import SCORE_THRESHOLD
from rfdetr.metrics.table import format_table
from rfdetr.resolve import plain
from rfdetr.sizes import size_from_dict
from rfdetr.text import counted, rounded_down
from rfdetr.tiling import tell_idle_flags, tell_tiles, tiling_of
from rfdetr.training.next_commands import prediction, where_all_lie, words_on_trained_folder
from rfdetr.weights import checkpoint


def main(argv: list[str] | None = None) -> None:
    settings = script_settings(EvaluationSettings, __doc__, argv)
    device = pick_device(settings.device)
    content = checkpoint.load(settings.checkpoint)
    if settings.json:
        make_place(settings.json, "--json")
        require_earlier_report(settings.json, "--json", "bbox")
    if settings.results:
        make_folder(settings.results, "--results")
    split = read_split(settings, content)

    model, table = checkpoint.build_model(content)
    where = f"{settings.dataset} ({settings.split})"
    again = training_command(plain(settings) | {"size": model.size.name, "resolution": None})
    table = table.in_order_of(
        split.class_names, split.category_ids, where, again, split.renames
    )
    precision = pick_inference_precision(settings.amp, device, model.size.recipe.amp)
    model.to(device)
    if settings.compile:
        compile_in_place(model.encoder, device, weights_stay=True)
    resolution = checkpoint.input_side(content, settings.resolution, settings.checkpoint)
    tiling = tiling_of(content, settings.tile, settings.tile_overlap, settings.tile_full)
    tell_idle_flags(tiling, settings.tile_overlap, settings.tile_full)
    tell_tiles(content, tiling, int(split.images.sizes.max(initial=0)))
    letterbox, warning = letterbox_for(settings.letterbox, content)
    if warning:
        warn(warning)
    if not tiling:
        for problem in shrink_problems(
            split, resolution, model.size.block, letterbox, trained_with=content
        ):
            warn(problem.message)
        tell_few_queries(settings.max_detections, model.size.queries)
    dataset = SplitDataset(
        split=split,
        resolution=resolution,
        augment=None,
        masks=False,
        tiling=tiling,
        letterbox=letterbox,
    )
    pin = device.type == "cuda"
    loader = evaluation_loader(dataset, settings.batch, settings.workers, pin=pin)
    has_masks = split.mask_count > 0
    if model.head is not None and not has_masks:
        say(f"{settings.dataset} ({settings.split}) has no masks: boxes alone are scored")
    # what two tiles have found is told to be one object by its masks
    masks = model.head is not None and (has_masks or tiling is not None)
    evaluator = SplitEvaluator(
        loader, table, precision, masks, max_detections=settings.max_detections
    )

    coco = evaluator.collect(model)
    check_unread(evaluator.unread, split)
    summary = coco.summary()
    images = counted(len(split.images), "image")
    place = f"{settings.dataset} ({settings.split}, {images}, {resolution} px)"
    print(f"{settings.checkpoint} on {place}")
    print(format_table(summary))
    best = coco.best_score()
    if masks and has_masks and best < SCORE_THRESHOLD:
        say(
            f"No score reaches {SCORE_THRESHOLD}, the best is {best:.2g}: gIoU, cIoU and Dice "
            "count no detection"
        )
    if settings.json:
        write_json(settings.json, summary)
        tick(f"Scores: {settings.json}")
    if settings.results:
        with writing_to(settings.results, "--results"):
            coco.save(settings.results)
        tick(f"COCO results: {settings.results}")
    if split.images:
        folder = split.images[0].path.parent
        if is_divided_as_in_training(settings, content):
            print(words_on_trained_folder(folder))
        command = prediction(settings.checkpoint, where_all_lie(split.images), plain(settings))
        if best < PredictionSettings.threshold:
            command += f" --threshold {rounded_down(best)}"
        print(f"Next:  {command}")


def read_split(settings: EvaluationSettings, content: dict) -> CocoSplit:
    """The split to score, with its warnings printed.  Raises UserError.

    Without a valid split, train/ is divided as in the checkpoint's training. Errors of the other
    splits are none here.
    """
    fraction = settings.val_fraction
    trained = trained_fraction(content)
    files = find_splits(settings.dataset)
    is_divided = "valid" not in files
    if is_divided and trained and not fraction:
        fraction = trained
        tick(
            f"--val_fraction {trained}: {settings.dataset} has no valid split, "
            "it is divided as in the checkpoint's training"
        )
    exif = settings.exif or content.get("exif")
    tile = content.get("tile") if settings.tile is None else settings.tile
    # those of a model in tiles are of a tile
    queries = math.inf if tile else size_from_dict(content["size"]).queries
    # a train split could be divided; else the splits that there are are named below
    needed = ("valid",) if settings.split == "valid" and "train" in files else ()
    judged = {settings.split}
    if is_divided and settings.split == "valid":
        judged.add("train")
    splits = read_dataset(
        settings.dataset, fraction, queries, exif, settings.rename, needed, judged
    )
    trained_on = set(checkpoint.trained_on(content).tolist())
    if is_divided and trained and fraction != trained and settings.split == "valid":
        refuse_other_division(settings, trained, trained_on, splits)
    if settings.split not in splits:
        raise UserError(
            f"{settings.dataset} has no {settings.split} split, it has {', '.join(splits)}: "
            "choose with --split"
        )
    split = splits[settings.split]
    for message in split.warnings:
        warn(message)
    tell_trained_images(trained_on, split, settings.split)
    scale = told_scale(settings.gray, checkpoint.gray_of(content), split.images)
    return replace(split, gray=scale)


def is_divided_as_in_training(settings: EvaluationSettings, content: dict) -> bool:
    """Whether the scored images lie among those that the checkpoint was trained on."""
    dataset = Path(content.get("args", {}).get("dataset") or "")
    is_own = dataset.absolute() == settings.dataset.absolute()
    return is_own and settings.split == "valid" and "valid" not in find_splits(settings.dataset)


def trained_fraction(content: dict) -> float | None:
    """The --val_fraction that the checkpoint was trained with."""
    fraction = content.get("args", {}).get("val_fraction")
    return fraction if isinstance(fraction, float) else None


def refuse_other_division(
    settings: EvaluationSettings, trained: float, trained_on: set[int], splits: dict[str, CocoSplit]
) -> None:
    """UserError where train/ is divided otherwise than in training: images that were trained on
    would be scored.

    Another dataset, none of whose images the checkpoint was trained on, may be divided as one
    likes.
    """
    here = {*splits["train"].content_hashes, *splits["valid"].content_hashes}
    if trained_on and not trained_on & here:
        return
    raise UserError(
        f"--val_fraction {settings.val_fraction}: {settings.checkpoint} was trained with "
        f"--val_fraction {trained}, so that images it was trained on would be scored. Leave the "
        f"flag out, or give --val_fraction {trained}"
    )


def tell_trained_images(trained_on: set[int], split: CocoSplit, name: str) -> None:
    """Say where images of a split are among those that the checkpoint was trained on."""
    if name == "train":
        count = sum(image.content_hash in trained_on for image in split.images)
        if count:
            of_all = f"{count} of the {len(split.images)} images"
            tick(f"--split train: the checkpoint was trained on {of_all}")
        return
    told = words_on_trained(split, name, trained_on)
    if told:
        warn(told)


if __name__ == "__main__":
    run_script(
        main,
        interrupted="interrupted: scores are printed and written at the end, once all images are "
        "seen. The same command begins again from the start",
    )
