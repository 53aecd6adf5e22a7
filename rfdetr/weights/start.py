"""Pretrained weights into a new model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rfdetr.classes import ClassTable, is_class_head
from rfdetr.console import say, tick
from rfdetr.models.detector import Detector
from rfdetr.weights import checkpoint
from rfdetr.weights.official import load_pretrained


def start_from(
    model: Detector,
    table: ClassTable,
    weights: Path | None,
    exclude: list[str],
    backbone: Path | None = None,
) -> Tensor | None:
    """Load pretrained weights into a new model and print what was loaded, skipped and left as it was.

    Class rows go to the class of the same name; from COCO's head to COCO's, every row goes to itself. `backbone`: a
    file with DINOv2's weights alone, taken instead of `weights`.  Returns the content hashes of the images that the
    weights were trained on, as far as known.
    """
    if weights is None and backbone is None:
        tick("Weights: none, training from scratch")
        return None
    content = (
        checkpoint.load_backbone(backbone, model.size.patch)
        if backbone
        else checkpoint.load(weights)
    )
    source, state = checkpoint.table_of(content), content["model"]
    if source.is_coco and table.background == 0:
        pairs = {row: row for row in range(source.rows_total)}
    else:
        pairs = {
            row: source.rows[source.names.index(n)]
            for n, row in zip(table.names, table.rows)
            if n in source.names
        }
    for name, own in model.state_dict().items():
        if is_class_head(name) and name in state:
            rows = own.cpu().clone()
            for row, other in pairs.items():
                rows[row] = state[name][other]
            state[name] = rows
    report = load_pretrained(model, state, exclude)
    tick(f"Weights: {backbone or weights}")
    say(report.summary())
    return checkpoint.trained_on(content)
