"""Score a checkpoint on a split: COCO box and mask figures, and mask overlap.

python evaluate.py --checkpoint runs/segmentation_nano_384_1/best.pt --split valid --json scores.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rfdetr import checkpoint
from rfdetr.cli import add_compile_flag
from rfdetr.console import UserError, number, run_script, tick, warn
from rfdetr.data.coco import read_dataset
from rfdetr.data.loaders import SplitDataset, check_unread, evaluation_loader
from rfdetr.evaluation import Judge
from rfdetr.metrics.coco_eval import format_table
from rfdetr.precision import compile_in_place, pick_device, pick_precision
from rfdetr.rundir import make_folder, make_place, write_json, writing_to


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a file of this repository, or an official one")
    parser.add_argument("--dataset", type=Path, default=Path("dataset"), help="COCO-format folder (default: dataset)")
    parser.add_argument("--split", choices=["train", "valid", "test"], default="valid")
    parser.add_argument("--val_fraction", type=number(float, 0.001, 0.9), help="as in training, without valid/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write COCO results here: bbox.json, segm.json")
    parser.add_argument("--resolution", type=number(int, 1), help="input side (default: the checkpoint's)")
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
    splits = read_dataset(args.dataset, args.val_fraction)
    if args.split not in splits:
        raise UserError(f"{args.dataset} has no {args.split} split, it has {', '.join(splits)}: choose with --split")
    split = splits[args.split]
    for message in split.warnings:
        warn(message)
    model, table = checkpoint.build_model(content)
    table = table.in_order_of(split.class_names, split.category_ids, f"{args.dataset} ({args.split})")
    resolution = checkpoint.input_side(content, args.resolution, args.checkpoint)

    loader = evaluation_loader(SplitDataset(split, resolution, None, masks=False), args.batch, args.workers)
    masks = model.head is not None and split.mask_count > 0
    model.to(precision.device)
    if args.compile:
        compile_in_place(model.encoder, precision.device)
    judge = Judge(loader, table, precision, masks)
    evaluator = judge.evaluator(model)
    check_unread(judge.unread, split)
    summary = evaluator.summary()
    print(f"{args.checkpoint} on {args.dataset} ({args.split}, {len(split.images)} images, {resolution} px)")
    print(format_table(summary))
    if args.json:
        write_json(args.json, summary)
        tick(f"Scores: {args.json}")
    if args.results:
        with writing_to(args.results, "--results"):
            evaluator.save(args.results)
        tick(f"COCO results: {args.results}")


if __name__ == "__main__":
    run_script(main)
