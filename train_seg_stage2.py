"""Stage 2: freeze the detector of stage 1 and train a light mask head on top of it.

python train_seg_stage2.py --size nano --stage1_run runs/detector_nano_384_1
    --checkpoint runs/detector_nano_384_1/checkpoint_mydata.pth --epochs 50 --batch 4 --accum 2
python train_seg_stage2.py --size nano --checkpoint rf-detr-nano.pth     (classes of COCO: no stage 1 at all)
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from rfdetr import distributed
from rfdetr import main as shared
from rfdetr.classes import COCO_NAMES
from rfdetr.cli import add_common_flags, parse
from rfdetr.console import UserError, boolean, keep_flags, number, run_script, tick, warn
from rfdetr.data.coco import require_masks
from rfdetr.data.loaders import SplitDataset, training_loader
from rfdetr.device import free_memory_mb
from rfdetr.files import write_json
from rfdetr.models.segmentation import MASK_HEADS
from rfdetr.sizes import SIZES, LossWeights
from rfdetr.training.auto_batch import resolve_batch
from rfdetr.training.feature_cache import CachedLoader, FeatureCache, choose_cache
from rfdetr.training.frozen import MaskObjective
from rfdetr.training.objective import input_sides
from rfdetr.training.optim import make_trainer
from rfdetr.weights import checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_flags(parser)
    add, share = parser.add_argument, number(float, 0)
    add("--stage1_run", type=Path, help="run folder of stage 1")
    add(
        "--checkpoint",
        type=Path,
        help="detector to freeze (default: the run's best.pt, else last.pt)",
    )
    add("--seg_lr", type=share, help="learning rate of the mask head (default: the size's own)")
    add("--mask_loss_coef", type=share, default=1.0, help="weight of the mask's BCE")
    add("--dice_loss_coef", type=share, default=1.0, help="weight of the mask's dice loss")
    add(
        "--mask_head",
        choices=["auto", "nano", "standard"],
        default="auto",
        help="auto: the size's own",
    )
    add(
        "--cache",
        choices=["auto", "ram", "disk", "off"],
        default="auto",
        help="the frozen features",
    )
    add("--cache_views", type=number(int, 1, 4), help="flips of each image that are cached")
    add("--keep_cache", type=boolean, default=True, metavar="0|1", help="on disk, for later runs")
    add("--auto_shrink", type=boolean, default=False, metavar="0|1", help="cut the class head here")
    args = parse(parser, argv, "segmentation")

    session = shared.begin(args, "segmentation")
    train, device = session.splits["train"], session.device
    require_masks(train)
    # a resumed run has its detector in its own state
    path = args.output_dir if args.resume_from else detector_file(args)
    content = args.resume_from or checkpoint.load(path)
    checkpoint.require_size(content, session.size, path)
    session.trained_on = checkpoint.trained_on(content)
    if content.get("exif", train.exif) != train.exif:
        warn(
            f"{path} was trained with images' EXIF orientation read as --exif {content['exif']}, here it is "
            f"{train.exif}: where sizes do not tell, add --exif {content['exif']}"
        )
    if args.resume_from:
        args.resolution = args.resolution or content["resolution"]
    else:
        args.resolution = checkpoint.input_side(content, args.resolution, path)
    name, rows = head_name(args, content, path), checkpoint.table_of(content).rows_total
    content = with_rows_of(train.class_names, content, path, args)
    detector, table = checkpoint.build_model(content, groups=None)
    table = table.in_order_of(train.class_names, train.category_ids, f"{args.dataset} (train)")
    detector.to(device).requires_grad_(False)
    size, frozen_hash = detector.size, checkpoint.fingerprint(detector)

    head = MASK_HEADS[name](size.hidden).to(device)
    weights = LossWeights(mask=args.mask_loss_coef, dice=args.dice_loss_coef)
    sides = input_sides(args)
    objective = MaskObjective(
        detector, table, weights, session.precision, sides, args.seed, session.progress
    )
    resolve_batch(args, head, objective)
    dataset, sampler = shared.training_data(session, masks=True)
    groups = [
        {
            "params": list(head.parameters()),
            "base_lr": args.seg_lr,
            "weight_decay": args.weight_decay,
        }
    ]
    trainer = make_trainer(session, head, objective, groups, sampler.steps)
    plain = SplitDataset(train, args.resolution, None, masks=True)
    parent = (args.output_dir.parent if args.output_dir else Path("runs")) / "feature_cache"
    cache = FeatureCache(objective, plain, args.cache_views, parent)
    where, why = distributed.from_main(choose_cache(args.cache, cache, args.multi_scale))
    judge = shared.split_evaluator(session, "valid", table, masks=True, frozen=detector)
    # of each valid image: features and queries in fp32, and its pixels
    kept = 2 * cache.record_bytes(0) + 4 * size.hidden * size.select + 3 * args.resolution**2
    judge.keep = len(judge.split.images) * kept < free_memory_mb() * 2**20 / 4

    def pack(state: dict) -> dict:
        if checkpoint.fingerprint(detector) != frozen_hash:
            raise RuntimeError("the frozen detector has changed")
        weights = detector.state_dict() | {
            f"mask_head.{key}": value for key, value in state.items()
        }
        return checkpoint.make_content("segmentation", size, args.resolution, table, name, weights)

    with shared.open_run(
        session, "segmentation", "STAGE 2: SEGMENTATION HEAD TRAINING", detector, judge
    ):
        parameters = {
            "detector": sum(p.numel() for p in detector.parameters()),
            "mask_head": sum(p.numel() for p in head.parameters()),
        }
        if session.run:
            tick(f"Found Stage-1 checkpoint: {path}")
            if rows != table.rows_total:
                tick(f"Class head cut from {rows} rows to {', '.join(table.names)} and background")
            tick(f"Detector frozen: {parameters['detector']:,} parameters")
            tick(f"Segmentation head trainable: {parameters['mask_head']:,} parameters ({name})")
            tick(f"Feature cache: {why}")
            if not args.resume_from:  # it is there, and the detector's file may be gone
                settings = shared.plain_args(args) | {
                    "detector_file": str(path),
                    "detector_sha256": checkpoint.file_sha256(path),
                    "mask_head": name,
                    "cache": where,
                    "class_names": list(table.names),
                    "parameters": parameters,
                }
                write_json(session.folder / "stage2_config.json", settings)
        if where == "off":
            loader = training_loader(dataset, sampler, args.workers, pin=device.type == "cuda")
        else:
            loader = CachedLoader(cache.open(where == "disk"), sampler, args.workers)
        shared.fit(session, trainer, loader, judge, pack)
        if where == "disk":
            cache.close(args.keep_cache)
        shared.finish(session, table, True, shared.predict_command(session))


def detector_file(args: argparse.Namespace) -> Path:
    """The checkpoint that was asked for, else best.pt or last.pt of the stage-1 run."""
    if args.checkpoint:
        return args.checkpoint
    if args.stage1_run is None:
        raise UserError(
            "name the detector to freeze: --stage1_run runs/detector_... or --checkpoint FILE"
        )
    for name in ("best.pt", "last.pt"):
        if (args.stage1_run / name).is_file():
            return args.stage1_run / name
    there = sorted(p.name for p in args.stage1_run.iterdir()) if args.stage1_run.is_dir() else None
    raise UserError(
        f"No checkpoint found in Stage-1 directory {args.stage1_run}: it has no best.pt and no last.pt. There is: "
        f"{', '.join(there) if there else 'nothing' if there is not None else 'no such folder'}. "
        "Run python train_detector_stage1.py, or name a file with --checkpoint"
    )


def head_name(args: argparse.Namespace, content: dict, path: Path) -> str:
    """The mask head to train; a mask model's own is not trained on a frozen detector."""
    name = SIZES[args.size].mask_head if args.mask_head == "auto" else args.mask_head
    if name == content["mask_head"] == "official":
        raise UserError(
            f"{path} has {args.size}'s own mask head already, which is trained with the detector: python "
            f"train_seg_single_stage.py --size {args.size}. For a light one on its frozen detector: --mask_head nano"
        )
    return "standard" if name == "official" else name


def with_rows_of(names: list[str], content: dict, path: Path, args: argparse.Namespace) -> dict:
    """The checkpoint without masks, its class heads cut to `names` where that is asked for or goes without saying."""
    table = checkpoint.table_of(content)
    if table.rows_total != len(names) + 1:
        coco = content.get("official") and table.is_coco
        if coco and not set(names) <= set(table.names):
            raise UserError(not_coco_message(table.rows_total, names, path, args))
        if not (coco or args.auto_shrink):
            raise UserError(unshrunk_message(table.rows_total, names, path))
        content = checkpoint.shrink(content, names)
    model = {
        k: v
        for k, v in content["model"].items()
        if not k.startswith(("mask_head.", "segmentation_head."))
    }
    return content | {"model": model, "mask_head": None}


def unshrunk_message(rows: int, names: list[str], path: Path) -> str:
    return (
        f"Frozen detector head out_dim ({rows}) != requested ({len(names) + 1})\n"
        f"{path} has a {rows}-row class head, the dataset has {len(names)} classes ({', '.join(names)}). Run:\n"
        f"  python shrink_head.py --in_ckpt {shlex.quote(str(path))} "
        f"--out_ckpt {shlex.quote(str(path.parent / 'checkpoint_mydata.pth'))} {keep_flags(names)}\n"
        "and pass the new file with --checkpoint, or add --auto_shrink 1."
    )


def not_coco_message(rows: int, names: list[str], path: Path, args: argparse.Namespace) -> str:
    others = [name for name in names if name not in COCO_NAMES.values()]
    words = f"--size {args.size} --dataset {shlex.quote(str(args.dataset))}"
    run = f"runs/detector_{args.size}_{args.resolution}_N"
    return (
        f"Frozen detector head out_dim ({rows}) != requested ({len(names) + 1})\n"
        f"{path} is an official COCO detector, which does not know {', '.join(others)}. Teach it, then mask it:\n"
        f"  python train_detector_stage1.py {words} --pretrain_weights {shlex.quote(str(path))}\n"
        f"  python train_seg_stage2.py {words} --stage1_run {run} --auto_shrink 1"
    )


if __name__ == "__main__":
    run_script(main)
