"""Stage 2: freeze the detector of stage 1 and train a light mask head on top of it.

python train_seg_stage2.py --size nano --stage1_run runs/detector_nano_384_1
    --checkpoint runs/detector_nano_384_1/checkpoint_mydata.pth --epochs 50 --batch 4 --accum 2
python train_seg_stage2.py --size nano --checkpoint rf-detr-nano.pth    (COCO's classes: no stage 1)
"""

from __future__ import annotations

from rfdetr.sigterm import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()  # while modules are imported

from rfdetr.cli import check_command, training_settings
from rfdetr.resolve import plain
from rfdetr.settings import SegmentationSettings

# before torch, whose import takes seconds
check_command(SegmentationSettings, __doc__, __name__)

from collections.abc import Callable
from pathlib import Path

from torch import nn

from rfdetr import distributed
from rfdetr.classes import ClassTable
from rfdetr.console import run_script, tick
from rfdetr.data.augment import find_preset
from rfdetr.data.dataset import SplitDataset
from rfdetr.data.loaders import training_loader
from rfdetr.data.mask_source import choose_masks
from rfdetr.files import file_sha256
from rfdetr.main import begin, finish, fit, open_run
from rfdetr.models.cpu_copy import for_inference
from rfdetr.models.detector import Detector
from rfdetr.models.segmentation import MASK_HEADS, HeadForm
from rfdetr.training.feature_cache import CachedLoader, FeatureCache
from rfdetr.training.feature_room import choose_cache, fits_in_memory
from rfdetr.training.frozen import MaskObjective
from rfdetr.training.frozen_start import (
    detector_file,
    frozen_detector,
    mask_head_name,
    warn_of_newer_weights,
    warn_of_other_exif,
    warn_of_other_resolution,
    warn_of_own_mask_head,
)
from rfdetr.training.next_commands import predict_with
from rfdetr.training.objective import input_sides
from rfdetr.training.optim import parameter_group
from rfdetr.training.report import detector_of_config, draw_guesses, write_stage2_config
from rfdetr.training.session import (
    Session,
    choose_letterbox,
    choose_tiles,
    make_trainer,
    split_evaluator,
    training_data,
)
from rfdetr.weights import checkpoint


def main(argv: list[str] | None = None) -> None:
    settings, resumed = training_settings(SegmentationSettings, __doc__, argv)
    # a resumed run has its detector in its own state
    path = settings.output_dir if resumed else detector_file(settings)
    content = resumed or checkpoint.load(path)
    session = begin(settings, resumed, content)
    session.guess_masks = choose_masks(session.train, settings.masks)
    checkpoint.require_size(content, session.size, path)
    warn_of_other_exif(content, session.train, path)
    if not resumed:
        warn_of_other_resolution(content, settings.resolution, path)
        warn_of_own_mask_head(content, path)
        warn_of_newer_weights(content, path)
    session.trained_on = checkpoint.trained_on(content)
    session.resolution = checkpoint.input_side(content, settings.resolution, path)
    choose_tiles(session, content)
    choose_letterbox(session, content)
    rows_in_file = checkpoint.table_of(content).rows_total
    head_name = mask_head_name(settings, content, path)
    detector, table = frozen_detector(session, content, path)

    form = checkpoint.mask_form(resumed) if resumed else None
    head = MASK_HEADS[head_name](detector.size.hidden, form).to(session.device)
    losses = MaskObjective(
        detector=for_inference(detector, session.precision),
        table=table,
        weights=settings.loss_weights,
        precision=session.precision,
        sides=input_sides(settings, session.size, session.resolution),
        seed=settings.seed,
        progress=session.progress,
    )
    dataset, sampler = training_data(session, masks=True)
    groups = [parameter_group(list(head.parameters()), settings.seg_lr, settings.weight_decay)]
    trainer = make_trainer(session, head, losses, groups, sampler.steps)
    evaluator = split_evaluator(session, "valid", table, masks=True, frozen=losses.detector)
    evaluator.keep_detections = fits_in_memory(evaluator.split, detector.size, session.resolution)
    cache = feature_cache(session, losses)
    choice = distributed.from_main(choose_cache(settings.cache, cache, settings.multi_scale))
    pack = packer(session, detector, table, head_name, head.form)

    with open_run(session, detector):
        if not resumed:
            tick(f"Found Stage-1 checkpoint: {path}")
        if rows_in_file != table.rows_total:
            kept = ", ".join(table.names)
            tick(f"Class head cut from {rows_in_file} rows to {kept} and background")
        tick(f"Detector frozen: {count_parameters(detector):,} parameters")
        trainable = count_parameters(head)
        tick(f"Segmentation head trainable: {trainable:,} parameters ({head_name})")
        tick(f"Feature cache: {choice.why}")
        if choice.where != "off" and settings.augment != session.size.recipe.augment:
            tick(
                "The cache has the images as they are, and mirrored: with --cache off "
                f"--augment {settings.augment} varies them"
            )
        if session.run and session.guess_masks:
            draw_guesses(session.run, dataset)
        if session.run:
            session.stage2_config = stage2_config(
                session, path, head_name, choice.where, detector, head
            )
            if not resumed:  # a resumed run writes it when it has something to save
                write_stage2_config(session)
        if choice.where == "off":
            pin = session.device.type == "cuda"
            loader = training_loader(dataset, sampler, settings.workers, pin)
        else:
            cache.open(choice.where == "disk", choice.images)
            loader = CachedLoader(cache, sampler, settings.workers)
        fit(session, trainer, loader, evaluator, pack)
        if choice.where == "disk":
            cache.close(settings.keep_cache)
        remark, command = predict_with(session)
        finish(session, table, masks=True, next_command=command, remark=remark)


def feature_cache(session: Session, losses: MaskObjective) -> FeatureCache:
    """What the detector sees of the images without augmentation, for all runs beside this one."""
    settings = session.settings
    plain_images = SplitDataset(
        split=session.train,
        resolution=session.resolution,
        augment=None,
        masks=True,
        guess=session.guess_masks,
        tiling=session.tiling,
        letterbox=session.letterbox,
    )
    runs = settings.output_dir.parent if settings.output_dir else Path("runs")
    return FeatureCache(losses, plain_images, cached_views(settings), runs / "feature_cache")


def cached_views(settings: SegmentationSettings) -> int:
    """How many flips of each image are cached: one, the image itself, where none is mirrored."""
    preset = find_preset(settings.augment, settings.flip)
    return settings.cache_views if preset.mirrored_axes else 1


def packer(
    session: Session, detector: Detector, table: ClassTable, head_name: str, form: HeadForm
) -> Callable[[dict], dict]:
    """Turns the mask head's weights into a checkpoint's content, after a look at whether the
    detector is as it was.
    """
    frozen = checkpoint.fingerprint(detector)

    def pack(head_state: dict) -> dict:
        if checkpoint.fingerprint(detector) != frozen:
            raise RuntimeError("the frozen detector has changed")
        weights = detector.state_dict()
        weights |= {f"mask_head.{key}": value for key, value in head_state.items()}
        return checkpoint.make_content(
            "segmentation", detector.size, session.resolution, table, head_name, weights, form
        )

    return pack


def stage2_config(
    session: Session, path: Path, head_name: str, cache: str, detector: Detector, head: nn.Module
) -> dict:
    """What stage2_config.json says.  path: of the detector, or of a resumed run."""
    parameters = {"detector": count_parameters(detector), "mask_head": count_parameters(head)}
    return {
        **plain(session.settings),
        "resolution": session.resolution,
        **(detector_of_config(session.folder) if session.resumed else described_file(path)),
        "mask_head": head_name,
        "cache": cache,
        "guessed_masks": session.guess_masks,
        "class_names": list(session.train.class_names),
        "parameters": parameters,
    }


def described_file(path: Path) -> dict[str, str]:
    return {"detector_file": str(path), "detector_sha256": file_sha256(path)}


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    run_script(main)
