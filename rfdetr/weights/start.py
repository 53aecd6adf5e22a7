"""Pretrained weights into a new model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rfdetr.classes import ClassTable, is_class_head
from rfdetr.console import say, tick
from rfdetr.models.detector import Detector
from rfdetr.settings import DetectorTraining
from rfdetr.weights import checkpoint
from rfdetr.weights.download import find_weights
from rfdetr.weights.fitting import fit_class_head, load_pretrained

NAMES_SHOWN = 10


def start_from(
    model: Detector,
    table: ClassTable,
    weights: Path | None,
    exclude: list[str],
    backbone: Path | None = None,
    content: dict | None = None,
) -> Tensor | None:
    """Load pretrained weights into a new model; print what was loaded, skipped and left as it was.

    Class rows go to the class of the same name; from COCO's head to COCO's, every row that no
    other class has taken goes to itself; new classes begin at the mean (fit_class_head).
    `backbone`: a file with DINOv2's weights alone, taken instead of `weights`, whose `content` may
    be loaded already.
    Returns the content hashes of the images that the weights were trained on, as far as known;
    None without weights.
    """
    if weights is None and backbone is None:
        tick("Weights: none, training from scratch")
        return None
    if backbone is not None:
        content = checkpoint.load_backbone(backbone, model.size.patch)
    elif content is None:
        content = checkpoint.load(weights)
    state = content["model"]
    source = checkpoint.table_of(content)
    source_row = _source_rows(source, table)
    for name, head in model.state_dict().items():
        if is_class_head(name) and name in state:
            state[name] = fit_class_head(head.cpu(), state[name], source_row, source, table)
    report = load_pretrained(model, state, exclude)
    tick(f"Weights: {backbone or weights}")
    say(report.summary())
    new = [name for name, row in zip(table.names, table.rows) if row not in source_row]
    if new and any(is_class_head(name) for name in report.loaded):
        names = ", ".join(new[:NAMES_SHOWN]) + (" ..." if len(new) > NAMES_SHOWN else "")
        say(
            f"  classes new to the file, {len(new)}, at the mean of its {len(source.rows)} "
            f"classes' rows: {names}"
        )
    return checkpoint.trained_on(content)


def start_detector(
    model: Detector,
    table: ClassTable,
    settings: DetectorTraining,
    init_ckpt: Path | None = None,
    content: dict | None = None,
) -> Tensor | None:
    """Give a new detector the weights that the settings name; `init_ckpt`, whose `content` may be
    loaded already, goes before --pretrain_weights.

    Returns as start_from; raises UserError for files that cannot be had or read.
    """
    source = init_ckpt
    if source is None and settings.backbone_weights is None:
        source = find_weights(settings.pretrain_weights, model.size)
    exclude = list(settings.pretrain_exclude_keys)
    return start_from(model, table, source, exclude, settings.backbone_weights, content)


def _source_rows(source: ClassTable, table: ClassTable) -> dict[int, int]:
    """{row of the new head: row of the pretrained one that it starts from}."""
    row_of = dict(zip(source.names, source.rows))
    same = {}
    if source.is_coco and table.background == 0:
        same = {row: row for row in range(source.rows_total) if row not in table.rows}
    named = zip(table.names, table.rows)
    return same | {row: row_of[name] for name, row in named if name in row_of}
