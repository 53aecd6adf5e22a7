"""Stage 1: fine-tune an RF-DETR detector on the boxes of a COCO-format dataset.

python train_detector_stage1.py --size nano --epochs 50 --batch 4 --accum 4 --workers 2 --multi_scale 1
"""

from __future__ import annotations

import argparse
import shlex
from functools import partial

from rfdetr import main as shared
from rfdetr.cli import add_common_flags, add_detector_flags, parse
from rfdetr.console import number, run_script
from rfdetr.data.loaders import training_loader
from rfdetr.models.detector import Detector
from rfdetr.sizes import LossWeights
from rfdetr.text import keep_flags
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
    parser.add_argument(
        "--lr", type=number(float, 0), help="learning rate (default: the size's own)"
    )
    parser.add_argument(
        "--lr_encoder", type=number(float, 0), help="the encoder's (default: the size's own)"
    )
    parser.add_argument(
        "--drop_path", type=number(float, 0, 0.9), help="encoder: share of blocks skipped at random"
    )
    parser.add_argument(
        "--head", choices=["coco91", "dataset"], default="coco91", help="rows of the class head"
    )
    args = parse(parser, argv, "detector")

    session = shared.begin(args, "detector")
    size = session.size
    table = shared.class_table(session, args.head)
    model = Detector(
        size,
        table.rows_total,
        table.background_last,
        drop_path=args.drop_path,
        grad_checkpoint=args.grad_checkpoint,
    ).to(session.device)
    if not args.resume_from:
        source = find_weights(args.pretrain_weights, size)
        excluded = args.pretrain_exclude_keys
        session.trained_on = start_from(model, table, source, excluded, args.backbone_weights)
    shared.adapt_encoder(session, model)

    sides, progress = input_sides(args), session.progress
    objective = Objective(table, LossWeights(), session.precision, sides, args.seed, progress)
    resolve_batch(args, model, objective)
    dataset, sampler = shared.training_data(session, masks=False)
    loader = training_loader(dataset, sampler, args.workers, pin=session.device.type == "cuda")
    groups = parameter_groups(model, args.lr, args.lr_encoder, args.weight_decay, size)
    trainer = make_trainer(session, model, objective, groups, sampler.steps)
    judge = shared.split_evaluator(session, "valid", table, masks=False)

    pack = partial(make_content, "detector", size, args.resolution, table, None)
    with shared.open_run(session, "detector", "STAGE 1: DETECTOR TRAINING", model, judge):
        best = shared.fit(session, trainer, loader, judge, pack)
        weights = session.folder / f"checkpoint_best_{best['weights']}.pth"
        command = ["python", "shrink_head.py", "--in_ckpt", str(weights)]
        command += ["--out_ckpt", str(session.folder / "checkpoint_mydata.pth")]
        shared.finish(session, table, False, f"{shlex.join(command)} {keep_flags(table.names)}")


if __name__ == "__main__":
    run_script(main)
