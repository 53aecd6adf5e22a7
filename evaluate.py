"""Score a checkpoint on a split: COCO box and mask figures, and mask overlap.

python evaluate.py --checkpoint runs/segmentation_nano_384_1/best.pt --json scores.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rfdetr.cli import add_compile_flag, add_exif_flag
from rfdetr.console import UserError, number, run_script, tick, warn
from rfdetr.data.coco import read_dataset
from rfdetr.data.faults import CocoSplit, find_splits
from rfdetr.data.loaders import SplitDataset, check_unread, evaluation_loader
from rfdetr.device import compile_in_place, pick_device, pick_precision
from rfdetr.files import make_folder, make_place, write_json, writing_to
from rfdetr.inference.evaluation import SplitEvaluator
from rfdetr.metrics.coco_eval import format_table
from rfdetr.weights import checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a file of this repository, or an official one",
    )
    parser.add_argument(
        "--dataset",
        type=Path,
        default=Path("dataset"),
        help="COCO-format folder (default: dataset)",
    )
    parser.add_argument("--split", choices=["train", "valid", "test"], default="valid")
    parser.add_argument(
        "--val_fraction",
        type=number(float, 0.001, 0.9),
        help="without valid/ (default: training's)",
    )
    add_exif_flag(parser, "as the checkpoint's training images were read")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="write COCO results here: bbox.json, segm.json"
    )
    parser.add_argument(
        "--resolution", type=number(int, 1), help="input side (default: the checkpoint's)"
    )
    parser.add_argument("--batch", type=number(int, 1), default=8)
    parser.add_argument("--workers", type=number(int, 0, 256), default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="off")
    add_compile_flag(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    precision = pick_precision(args.amp, pick_device(args.device))
    content = checkpoint.load(args.checkpoint)
    if args.json:
        make_place(args.json, "--json")
    if args.results:
        make_folder(args.results, "--results")
    split = read_split(
        content, args.checkpoint, args.dataset, args.split, args.val_fraction, args.exif
    )
    for message in split.warnings:
        warn(message)
    tell_trained_images(checkpoint.trained_on(content).tolist(), split, args.split)
    model, table = checkpoint.build_model(content)
    table = table.in_order_of(
        split.class_names, split.category_ids, f"{args.dataset} ({args.split})"
    )
    model.to(precision.device)
    if args.compile:
        compile_in_place(model.encoder, precision.device)
    resolution = checkpoint.input_side(content, args.resolution, args.checkpoint)
    dataset = SplitDataset(split, resolution, None, masks=False)
    loader = evaluation_loader(dataset, args.batch, args.workers)
    has_masks = model.head is not None and split.mask_count > 0
    split_evaluator = SplitEvaluator(loader, table, precision, has_masks)
    coco_evaluator = split_evaluator.collect(model)
    check_unread(split_evaluator.unread, split)

    summary = coco_evaluator.summary()
    print(
        f"{args.checkpoint} on {args.dataset} ({args.split}, {len(split.images)} images, "
        f"{resolution} px)"
    )
    print(format_table(summary))
    if args.json:
        write_json(args.json, summary)
        tick(f"Scores: {args.json}")
    if args.results:
        with writing_to(args.results, "--results"):
            coco_evaluator.save(args.results)
        tick(f"COCO results: {args.results}")


def read_split(
    content: dict,
    checkpoint_file: Path,
    dataset: Path,
    name: str,
    val_fraction: float | None,
    exif: str | None,
) -> CocoSplit:
    """The split of a dataset, divided and read as in the checkpoint's training where that is open.

    Raises UserError where there is no such split, and where images that the checkpoint was trained
    on would be scored as valid ones.
    """
    trained_fraction = content.get("args", {}).get("val_fraction")
    if not isinstance(trained_fraction, float):
        trained_fraction = None
    is_divided = "valid" not in find_splits(dataset)
    if is_divided and val_fraction is None and trained_fraction:
        val_fraction = trained_fraction
        tick(
            f"--val_fraction {val_fraction}: {dataset} has no valid split, it is divided as in the "
            "checkpoint's training"
        )
    splits = read_dataset(dataset, val_fraction, exif=exif or content.get("exif"))
    is_divided_otherwise = is_divided and trained_fraction and val_fraction != trained_fraction
    if name == "valid" and is_divided_otherwise and may_know_images(content, splits):
        raise UserError(
            f"--val_fraction {val_fraction}: {checkpoint_file} was trained with --val_fraction "
            f"{trained_fraction}, so that images it was trained on would be scored. Leave the flag "
            f"out, or give --val_fraction {trained_fraction}"
        )
    if name not in splits:
        raise UserError(
            f"{dataset} has no {name} split, it has {', '.join(splits)}: choose with --split"
        )
    return splits[name]


def may_know_images(content: dict, splits: dict[str, CocoSplit]) -> bool:
    """Whether the checkpoint was trained on an image of train/ or valid/, or does not tell."""
    trained = set(checkpoint.trained_on(content).tolist())
    images = {*splits["train"].samples, *splits["valid"].samples}
    return not trained or not trained.isdisjoint(images)


def tell_trained_images(trained: list[int], split: CocoSplit, name: str) -> None:
    """Warn where the checkpoint was trained on images of a split.

    trained: content hashes of its training images; name: the split's.
    """
    known = set(trained)
    files = [image.file_name for image in split.images if image.sample in known]
    if not files:
        return
    count = f"{len(files)} of the {len(split.images)} images"
    if name == "train":
        tick(f"--split train: the checkpoint was trained on {count}")
        return
    examples = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    warn(
        f"{count} of {name} were trained on, by their content ({examples}): scores on them say "
        "little"
    )


if __name__ == "__main__":
    run_script(main)
