"""From the category ids of each split to labels that all splits share."""

from __future__ import annotations

import numpy as np

from rfdetr.data.checks import CocoSplit, placeholders
from rfdetr.masks import object_area


def number_classes(splits: dict[str, CocoSplit]) -> None:
    """Number the classes of checked splits, and make the arrays of their images' objects.

    Labels follow the first split's ascending category ids; classes that only later splits annotate come after. Splits
    are matched by name, they may number their categories differently. A placeholder has no annotation in any split.
    """
    used = {
        n: {a["category_id"] for image in split.images for a in image.annotations}
        for n, split in splits.items()
    }
    listed = [entry for split in splits.values() for entry in split.categories]
    left_out = placeholders(listed, set().union(*used.values()))
    names: list[str] = []
    own: dict[str, dict[str, int]] = {}  # split -> name -> id
    for name, split in splits.items():
        pairs = sorted({(entry["id"], entry["name"]) for entry in split.categories} - left_out)
        names += [
            title for key, title in pairs if title not in names and (not own or key in used[name])
        ]
        own[name] = {title: key for key, title in pairs}
    spare = 1 + max((entry["id"] for entry in listed), default=0)
    for name, split in splits.items():
        split.class_names, split.left_out = names, sorted({title for _, title in left_out})
        split.category_ids = [
            own[name].get(title, spare + label) for label, title in enumerate(names)
        ]
        label_of = {
            entry["id"]: names.index(entry["name"])
            for entry in split.categories
            if entry["name"] in names
        }
        for image in split.images:
            for entry in (entry for entry in image.annotations if entry["area"] is None):
                entry["area"] = object_area(entry, image.height, image.width)
            image.boxes = np.array([entry["box"] for entry in image.objects], np.float32).reshape(
                -1, 4
            )
            image.labels = np.array(
                [label_of[entry["category_id"]] for entry in image.objects], np.int64
            )
            image.segmentations = [entry["segmentation"] for entry in image.objects]
        split.count()
