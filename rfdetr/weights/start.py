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
from rfdetr.weights.fitting import load_pretrained


def start_from(
    model: Detector,
    table: ClassTable,
    weights: Path | None,
    exclude: list[str],
    backbone: Path | None = None,
) -> Tensor | None:
    """Load pretrained weights into a new model; print what was loaded, skipped and left as it was.

    Class rows go to the class of the same name; from COCO's head to COCO's, every row goes to
    itself. `backbone`: a file with DINOv2's weights alone, taken instead of `weights`.
    Returns the content hashes of the images that the weights were trained on, as far as known;
    None without weights.
    """
    if weights is None and backbone is None:
        tick("Weights: none, training from scratch")
        return None
    if backbone is not None:
        content = checkpoint.load_backbone(backbone, model.size.patch)
    else:
        content = checkpoint.load(weights)
    state = content["model"]
    source_row = _source_rows(checkpoint.table_of(content), table)
    for name, head in model.state_dict().items():
        if is_class_head(name) and name in state:
            prepared = head.cpu().clone()
            for row, other in source_row.items():
                prepared[row] = state[name][other]
            state[name] = prepared
    report = load_pretrained(model, state, exclude)
    tick(f"Weights: {backbone or weights}")
    say(report.summary())
    return checkpoint.trained_on(content)


def start_detector(
    model: Detector, table: ClassTable, settings: DetectorTraining, init_ckpt: Path | None = None
) -> Tensor | None:
    """Give a new detector the weights that the settings name; `init_ckpt` goes before
    --pretrain_weights.

    Returns as start_from; raises UserError for files that cannot be had or read.
    """
    source = init_ckpt
    if source is None and settings.backbone_weights is None:
        source = find_weights(settings.pretrain_weights, model.size)
    exclude = list(settings.pretrain_exclude_keys)
    return start_from(model, table, source, exclude, settings.backbone_weights)


def _source_rows(source: ClassTable, table: ClassTable) -> dict[int, int]:
    """{row of the new head: row of the pretrained one that it starts from}."""
    if source.is_coco and table.background == 0:
        return {row: row for row in range(source.rows_total)}
    row_of = dict(zip(source.names, source.rows))
    rows = zip(table.names, table.rows)
    return {row: row_of[name] for name, row in rows if name in row_of}
