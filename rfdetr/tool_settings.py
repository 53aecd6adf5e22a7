"""Every setting of the scripts that do not train, once: default, bounds, unit and help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rfdetr.fields import (
    REQUIRED,
    checkpoint_file,
    choice,
    decimal,
    gray_range,
    integer,
    path,
    switch,
    text,
    texts,
    tile_of,
)
from rfdetr.settings import (
    AMP,
    EXIF,
    OWN_LETTERBOX,
    OWN_RESOLUTION,
    DataSettings,
    TileSettings,
    letterbox_of,
    overlap_of,
    tile_full_of,
)
from rfdetr.sizes import AUGMENTS, SIZES

FORMS = {  # of datasets that convert_dataset.py reads, in words
    "yolo": "a YOLO dataset",
    "voc": "a Pascal VOC dataset",
    "labelme": "a LabelMe dataset",
    "masks": "a dataset of mask images",
}
ESTIMATE = (
    "memory and time of each size, from a measured step of --size "
    "(about a minute; on a CPU longer for large sizes)"
)


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(TileSettings):
    """What evaluate.py and predict.py have in common."""

    tile: int | str | None = tile_of(
        "look at larger images in tiles of so many pixels; auto: at the scale of the training "
        "images; 0: as a whole (default: as in training)"
    )
    tile_overlap: float | None = overlap_of("as in training")
    tile_full: bool | None = tile_full_of("as in training")

    checkpoint: Path = checkpoint_file(
        REQUIRED, "a file of this repository, a run's folder (its best.pt), or an official file"
    )
    resolution: int | None = integer(None, "input side in pixels (default: the checkpoint's)")
    letterbox: bool | None = letterbox_of("as in training")
    batch: int = integer(8, "images in one forward pass")
    device: str = text("auto", "auto, cpu, cuda, cuda:1, mps")
    amp: str = choice("auto", "mixed precision (auto: as in training; off on a CPU)", AMP)
    compile: bool = switch(False, "torch.compile the encoder: slow start, then fast")
    max_detections: int | None = integer(
        None, "detections of an image, at most (default: as many as the model keeps)"
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(InferenceSettings, DataSettings):
    """evaluate.py; once `cli.with_own_dataset` has filled it in, `dataset` is never None."""

    dataset: Path | None = path(
        None,
        "COCO-format folder (default: that of --checkpoint's run; where it lies in none: "
        f"{DataSettings.dataset}/)",
    )
    val_fraction: float | None = decimal(
        None, "without valid/: the share of train/ (default: training's)", low=0.001, high=0.9
    )
    exif: str | None = choice(
        None, "orientation of images whose size does not tell (default: as in training)", EXIF
    )
    gray: str | float | None = gray_range("as in training")
    split: str = choice("valid", "which images", ("train", "valid", "test"))
    max_detections: int | None = integer(
        None,
        "detections of an image, at most; above 100 their figures stand beside COCO's (default: as "
        "many as the model keeps; figures at 300 and 1000 where an image has over 100 objects)",
    )
    workers: int = integer(0, "loader processes", low=0, high=256)
    json: Path | None = path(None, "write the figures here", metavar="FILE")
    results: Path | None = path(
        None, "write COCO results here: bbox.json, segm.json", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class PredictionSettings(InferenceSettings):
    """predict.py"""

    input: tuple[str, ...] = texts(REQUIRED, "images, folders, globs, videos", metavar="PATH")
    output: Path = path(REQUIRED, "folder for pictures and JSON", metavar="DIR")
    threshold: float = decimal(0.5, "lowest score", high=1.0)
    nms: float = decimal(
        0.6,
        "drop a box whose IoU with a better one of its class is larger, or that all but coincides "
        "with one of any class; 0: drop none",
        high=1.0,
    )
    track: bool = switch(
        False,
        "give each object an id over the frames of a video; each folder's images are frames, too, "
        "in the order of the numbers in their names, and with --pages 1 each file's pages",
    )
    pictures: str = choice("png", "of each image; 0: none, and no videos", ("png", "jpg", "0"))
    exif: str | None = choice(
        None, "orientation of the images (default: as the training images were read)", EXIF
    )
    gray: str | float | None = gray_range("as in training")
    pages: bool = switch(False, "of a file with several pages or frames, see each as an image")


@dataclass(frozen=True, kw_only=True)
class ShrinkSettings:
    """shrink_head.py"""

    in_ckpt: Path = checkpoint_file(
        REQUIRED, "a stage-1 checkpoint, a run's folder (its best.pt), or an official file"
    )
    out_ckpt: Path = path(REQUIRED, "where to write the shrunk one")
    keep: tuple[str, ...] = texts(
        (),
        "classes in their new order (default: all it has); --keep=-NAME for a name with a dash",
        metavar="CLASS",
    )


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """export.py"""

    checkpoint: Path = checkpoint_file(
        REQUIRED, "a file of this repository, or a run's folder (its best.pt)"
    )
    format: str = choice("rfdetr", "rfdetr: the package on PyPI, 1.11", ("rfdetr",))
    out: Path = path(REQUIRED, "where to write it")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """convert_dataset.py"""

    input: Path = path(REQUIRED, "folder of the dataset (of YOLO also its data.yaml)")
    output: Path = path(Path("dataset"), "a new or empty folder for the COCO dataset")
    format: str = choice("auto", "what is in the folder", ("auto", *FORMS))
    copy: str = choice(
        "link",
        "link: images are hard links where the disk allows it: one file under two names",
        ("link", "copy"),
    )
    class_name: str = text("object", "of masks: what their objects are called", metavar="NAME")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(TileSettings, DataSettings):
    """validate_setup.py"""

    size: str | None = choice(
        None, "model size to be trained (default: nano with a GPU, else tiny)", SIZES
    )
    resolution: int | None = integer(None, f"its input side (default: {OWN_RESOLUTION})")
    letterbox: bool | None = letterbox_of(OWN_LETTERBOX)
    device: str = text("auto", "auto, cpu, cuda, cuda:1, mps")
    check_images: bool = switch(True, "decode every image")
    need_masks: bool = switch(False, "missing masks are an error")
    fix: Path | None = path(
        None, "write a cleaned copy of the annotations there, and check the copy", metavar="DIR"
    )
    drop_rectangles: bool = switch(
        False, "--fix: leave out masks that are rectangles; training then guesses them"
    )
    preview: Path | None = path(
        None, "draw objects of each class: a .webp, .png or .jpg, or a folder", metavar="PATH"
    )
    augment: str | None = choice(
        None,
        "--preview: training images as this varies them (default: objects of each class)",
        AUGMENTS,
    )
    flip: bool = switch(True, "0: mirror none of them, whatever --augment does")
    estimate: bool = switch(False, ESTIMATE)
    json: Path | None = path(None, "write what is found here, too", metavar="FILE")
