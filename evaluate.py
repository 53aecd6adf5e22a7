"""Score a checkpoint on a split: COCO box and mask figures, and mask overlap.

python evaluate.py --checkpoint runs/segmentation_nano_384_1/best.pt --split valid --json scores.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rfdetr.cli import add_compile_flag, add_exif_flag
from rfdetr.console import UserError, number, run_script, tick, warn
from rfdetr.data.coco import read_dataset
from rfdetr.data.layout import find_splits
from rfdetr.data.loaders import SplitDataset, check_unread, evaluation_loader
from rfdetr.data.records import CocoSplit
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
    fraction = division(content, args)
    splits = read_dataset(args.dataset, fraction, exif=args.exif or content.get("exif"))
    require_same_division(content, splits, args)
    if args.split not in splits:
        raise UserError(
            f"{args.dataset} has no {args.split} split, it has {', '.join(splits)}: choose with --split"
        )
    split = splits[args.split]
    for message in split.warnings:
        warn(message)
    tell_trained_images(checkpoint.trained_on(content).tolist(), split, args.split)
    model, table = checkpoint.build_model(content)
    table = table.in_order_of(
        split.class_names, split.category_ids, f"{args.dataset} ({args.split})"
    )
    resolution = checkpoint.input_side(content, args.resolution, args.checkpoint)

    loader = evaluation_loader(
        SplitDataset(split, resolution, None, masks=False), args.batch, args.workers
    )
    masks = model.head is not None and split.mask_count > 0
    model.to(precision.device)
    if args.compile:
        compile_in_place(model.encoder, precision.device)
    judge = SplitEvaluator(loader, table, precision, masks)
    evaluator = judge.evaluator(model)
    check_unread(judge.unread, split)
    summary = evaluator.summary()
    print(
        f"{args.checkpoint} on {args.dataset} ({args.split}, {len(split.images)} images, {resolution} px)"
    )
    print(format_table(summary))
    if args.json:
        write_json(args.json, summary)
        tick(f"Scores: {args.json}")
    if args.results:
        with writing_to(args.results, "--results"):
            evaluator.save(args.results)
        tick(f"COCO results: {args.results}")


def trained_fraction(content: dict) -> float | None:
    """The --val_fraction that the checkpoint was trained with."""
    fraction = content.get("args", {}).get("val_fraction")
    return fraction if isinstance(fraction, float) else None


def division(content: dict, args: argparse.Namespace) -> float | None:
    """--val_fraction, or where it is left out and the dataset has no valid split, that of the checkpoint's training."""
    own = trained_fraction(content)
    if args.val_fraction or not own or "valid" in find_splits(args.dataset):
        return args.val_fraction
    tick(
        f"--val_fraction {own}: {args.dataset} has no valid split, it is divided as in the checkpoint's training"
    )
    return own


def require_same_division(
    content: dict, splits: dict[str, CocoSplit], args: argparse.Namespace
) -> None:
    """Raise UserError where train/ is divided otherwise than in training: images that were trained on would be scored.

    Another dataset, none of whose images the checkpoint was trained on, may be divided as one likes.
    """
    own, given = trained_fraction(content), args.val_fraction
    if (
        args.split != "valid"
        or not own
        or not given
        or own == given
        or "valid" in find_splits(args.dataset)
    ):
        return
    trained = set(checkpoint.trained_on(content).tolist())
    if trained and not trained & {*splits["train"].content_hashes, *splits["valid"].content_hashes}:
        return
    raise UserError(
        f"--val_fraction {given}: {args.checkpoint} was trained with --val_fraction {own}, so that images it was "
        f"trained on would be scored. Leave the flag out, or give --val_fraction {own}"
    )


def tell_trained_images(trained: list[int], split: CocoSplit, name: str) -> None:
    """Warn where images of a split, by their content, are among those that the checkpoint was trained on."""
    known = set(trained)
    files = [image.file_name for image in split.images if image.content_hash in known]
    if not files:
        return
    count = f"{len(files)} of the {len(split.images)} images"
    if name == "train":
        tick(f"--split train: the checkpoint was trained on {count}")
        return
    examples = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    warn(
        f"{count} of {name} were trained on, by their content ({examples}): scores on them say little"
    )


if __name__ == "__main__":
    run_script(main)
