"""From the category ids of each split to labels that all splits share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rfdetr.data.checks import CheckedSplit, placeholders


@dataclass(frozen=True)
class ClassNumbers:
    """The classes of a dataset; a class's label is its place in `class_names`."""

    class_names: list[str]
    left_out: list[str]  # names of placeholder categories
    category_ids: dict[str, list[int]]  # split -> its own ids by label
    labels: dict[str, dict[int, int]]  # split -> label by its own id


def number_classes(splits: dict[str, CheckedSplit]) -> ClassNumbers:
    """Number the classes of a dataset's splits.

    Labels follow the first split's ascending category ids; classes that only later splits annotate
    come after. Splits are matched by name: they may number their categories differently. A
    placeholder, some other category's parent, has no annotation in any split.
    """
    used = {name: used_categories(split) for name, split in splits.items()}
    entries = [entry for split in splits.values() for entry in split.categories]
    left_out = placeholders(entries, set().union(*used.values()))
    class_names: list[str] = []
    ids_by_name: dict[str, dict[str, int]] = {}  # split -> class name -> category id
    for name, split in splits.items():
        listed = {(entry["id"], entry["name"]) for entry in split.categories}
        kept = sorted(listed - left_out)
        is_first = not ids_by_name
        for category_id, class_name in kept:
            if class_name not in class_names and (is_first or category_id in used[name]):
                class_names.append(class_name)
        # of several with one name, which is an error, the first
        ids_by_name[name] = {class_name: category_id for category_id, class_name in reversed(kept)}
    # ids that no split uses, for classes that a split does not list
    spare = 1 + max((entry["id"] for entry in entries), default=0)
    category_ids = {}
    labels = {}
    for name, split in splits.items():
        category_ids[name] = [
            ids_by_name[name].get(class_name, spare + label)
            for label, class_name in enumerate(class_names)
        ]
        labels[name] = {
            entry["id"]: class_names.index(entry["name"])
            for entry in split.categories
            if entry["name"] in class_names
        }
    return ClassNumbers(
        class_names=class_names,
        left_out=sorted({class_name for _, class_name in left_out}),
        category_ids=category_ids,
        labels=labels,
    )


def used_categories(split: CheckedSplit) -> set[int]:
    """The category ids of a split's sound annotations."""
    return set(np.unique(split.columns.categories).tolist())
