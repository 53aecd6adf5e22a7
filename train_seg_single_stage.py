"""Train detector and masks together, for who has the memory.

python train_seg_single_stage.py --size nano --epochs 50 --batch 4 --accum 4
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rfdetr import main as shared
from rfdetr.cli import add_common_flags, add_detector_flags, parse
from rfdetr.console import boolean, number, run_script
from rfdetr.data.coco import require_masks
from rfdetr.data.loaders import training_loader
from rfdetr.models.detector import Detector
from rfdetr.sizes import LossWeights, with_queries
from rfdetr.training.auto_batch import resolve_batch
from rfdetr.training.objective import Objective, input_sides
from rfdetr.training.optim import make_trainer, parameter_groups
from rfdetr.weights.checkpoint import make_content
from rfdetr.weights.download import find_weights
from rfdetr.weights.start import start_from


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_flags(parser)
    add_detector_flags(parser)
    add, share = parser.add_argument, number(float, 0)
    add("--init_ckpt", type=Path, help="start from this checkpoint instead of --pretrain_weights")
    add("--lr", type=share, help="learning rate (default: 5e-5, tiny its own)")
    add("--lr_encoder", type=share, help="the encoder's (default: 1e-4, tiny its own)")
    count = number(int, 1, 10_000)
    add("--num_queries", type=count, help="queries per image (default: the size's own)")
    add("--num_select", type=count, help="detections kept per image (default: as many as queries)")
    for name, default in asdict(LossWeights()).items():
        default = None if name in ("mask", "dice") else default  # the size's own
        add(f"--{name}_loss_coef", type=share, default=default, help=f"weight of the {name} loss")
    add("--lr_scheduler", choices=["cosine", "step", "constant"], default="cosine")
    add("--warmup_epochs", type=share, default=0.0, help="epochs of linear warm-up")
    patience = "stop after 10 epochs without gain, or --patience"
    add("--early_stopping", type=boolean, default=False, metavar="0|1", help=patience)
    args = parse(parser, argv, "seg_single")

    session = shared.begin(args, "seg_single")
    require_masks(session.splits["train"])
    select = args.num_select
    if args.resume_from and not select:
        select = args.resume_from["size"]["select"]  # older runs' do not follow their queries
    size = with_queries(session.size, args.num_queries, select)
    table = shared.class_table(session, "dataset")
    model = Detector(
        size,
        table.rows_total,
        table.background_last,
        size.mask_head,
        grad_checkpoint=args.grad_checkpoint,
    ).to(session.device)
    if not args.resume_from:
        source = args.init_ckpt or find_weights(args.pretrain_weights, size)
        excluded = args.pretrain_exclude_keys
        session.trained_on = start_from(model, table, source, excluded, args.backbone_weights)
    shared.adapt_encoder(session, model)

    weights = LossWeights(
        **{name: getattr(args, f"{name}_loss_coef") for name in asdict(LossWeights())}
    )
    sides, progress = input_sides(args), session.progress
    objective = Objective(table, weights, session.precision, sides, args.seed, progress)
    resolve_batch(args, model, objective)
    dataset, sampler = shared.training_data(session, masks=True)
    loader = training_loader(dataset, sampler, args.workers, pin=session.device.type == "cuda")
    groups = parameter_groups(model, args.lr, args.lr_encoder, args.weight_decay, size)
    trainer = make_trainer(session, model, objective, groups, sampler.steps)
    judge = shared.split_evaluator(session, "valid", table, masks=True)

    pack = partial(make_content, "single", size, args.resolution, table, size.mask_head)
    with shared.open_run(session, "single", "STAGE 1+2: SINGLE-STAGE TRAINING", model, judge):
        shared.fit(session, trainer, loader, judge, pack)
        shared.finish(session, table, True, shared.predict_command(session))


if __name__ == "__main__":
    run_script(main)
