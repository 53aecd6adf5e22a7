"""Train detector and masks together, for who has the memory.

python train_seg_single_stage.py --size nano --epochs 50 --batch 4 --accum 4
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import check_command, training_settings
from rfdetr.settings import SingleSettings
from rfdetr.sizes import ModelSize

# before torch, whose import takes seconds
check_command(SingleSettings, __doc__, __name__)

from functools import partial

from rfdetr.console import run_script
from rfdetr.data.loaders import training_loader
from rfdetr.data.mask_source import choose_masks
from rfdetr.main import begin, finish, fit, open_run
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import HeadForm, new_form
from rfdetr.training.next_commands import predict_with
from rfdetr.training.objective import DetectorObjective, input_sides
from rfdetr.training.optim import parameter_groups
from rfdetr.training.report import draw_guesses
from rfdetr.training.session import (
    adapt_encoder,
    choose_letterbox,
    choose_tiles,
    class_table,
    make_trainer,
    split_evaluator,
    training_data,
)
from rfdetr.weights import checkpoint
from rfdetr.weights.start import start_detector


def main(argv: list[str] | None = None) -> None:
    settings, resumed = training_settings(SingleSettings, __doc__, argv)
    session = begin(settings, resumed)
    session.guess_masks = choose_masks(session.train, settings.masks)
    size = session.size
    table = class_table(session, "dataset")
    start = None
    if settings.init_ckpt and not resumed:
        start = checkpoint.load(settings.init_ckpt)
    choose_tiles(session, resumed or start)
    choose_letterbox(session, resumed or start)
    mask_form = form_of_head(size, resumed or start)
    model = Detector(
        size,
        table.rows_total,
        table.background_last,
        size.mask_head,
        grad_checkpoint=settings.grad_checkpoint,
        mask_form=mask_form,
    ).to(session.device)
    if not resumed:
        session.trained_on = start_detector(model, table, settings, settings.init_ckpt, start)
    adapt_encoder(session, model)

    sides = input_sides(settings, size, session.resolution)
    dataset, sampler = training_data(session, masks=True, sides=sides)
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
    evaluator = split_evaluator(session, "valid", table, masks=True)
    pack = partial(
        checkpoint.make_content,
        "single",
        size,
        session.resolution,
        table,
        size.mask_head,
        mask_form=mask_form,
    )

    with open_run(session, model):
        if session.run and session.guess_masks:
            draw_guesses(session.run, dataset)
        fit(session, trainer, loader, evaluator, pack)
        remark, command = predict_with(session)
        finish(session, table, masks=True, next_command=command, remark=remark)


def form_of_head(size: ModelSize, content: dict | None) -> HeadForm:
    """The form of the mask head in the checkpoint that the run begins with; else a new head's."""
    if content and content["mask_head"] == size.mask_head:
        return checkpoint.mask_form(content)
    return new_form(size.hidden)


if __name__ == "__main__":
    run_script(main)
