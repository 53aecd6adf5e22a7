"""Stage 1: fine-tune an RF-DETR detector on the boxes of a COCO-format dataset.

python train_detector_stage1.py --size nano --epochs 50 --batch 4 --accum 4 --workers 2
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import check_command, training_settings
from rfdetr.settings import DetectorSettings

# before torch, whose import takes seconds
check_command(DetectorSettings, __doc__, __name__)

from functools import partial

from rfdetr.console import run_script
from rfdetr.data.loaders import training_loader
from rfdetr.main import begin, finish, fit, open_run
from rfdetr.models.detector import Detector
from rfdetr.training.next_commands import after_detector
from rfdetr.training.objective import DetectorObjective, input_sides
from rfdetr.training.optim import parameter_groups
from rfdetr.training.session import (
    adapt_encoder,
    choose_letterbox,
    choose_tiles,
    class_table,
    make_trainer,
    split_evaluator,
    training_data,
)
from rfdetr.weights.checkpoint import make_content
from rfdetr.weights.start import start_detector


def main(argv: list[str] | None = None) -> None:
    settings, resumed = training_settings(DetectorSettings, __doc__, argv)
    session = begin(settings, resumed)
    choose_tiles(session, resumed)
    choose_letterbox(session, resumed)
    table = class_table(session, settings.head)
    model = Detector(
        session.size,
        table.rows_total,
        table.background_last,
        drop_path=settings.drop_path,
        grad_checkpoint=settings.grad_checkpoint,
    ).to(session.device)
    if not resumed:
        session.trained_on = start_detector(model, table, settings)
    adapt_encoder(session, model)

    sides = input_sides(settings, session.size, session.resolution)
    dataset, sampler = training_data(session, masks=False, sides=sides)
    pin = session.device.type == "cuda"
    loader = training_loader(dataset, sampler, settings.workers, pin)
    losses = DetectorObjective(
        table=table,
        weights=settings.loss_weights,
        precision=session.precision,
        sides=sides,
        seed=settings.seed,
        progress=session.progress,
    )
    groups = parameter_groups(model, settings.lr, settings.lr_encoder, settings.weight_decay)
    trainer = make_trainer(session, model, losses, groups, sampler.steps)
    evaluator = split_evaluator(session, "valid", table, masks=False)
    pack = partial(make_content, "detector", session.size, session.resolution, table, None)

    with open_run(session, model):
        best = fit(session, trainer, loader, evaluator, pack)
        remark, command = after_detector(session, table, best)
        finish(session, table, masks=False, next_command=command, remark=remark)


if __name__ == "__main__":
    run_script(main)
