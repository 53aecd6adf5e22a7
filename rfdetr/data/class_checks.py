"""Whether the classes of valid and test are those that train teaches."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rfdetr.data.faults import FEW_OBJECTS, PLACES_KEPT, Faults, Problem, first_few
from rfdetr.data.records import CocoSplit
from rfdetr.renaming import rename_flags, suggest_renames


def class_problems(split: CocoSplit, train: CocoSplit, listed: Collection[str]) -> list[Problem]:
    """A warning for classes that train lists without an object, an error for those it lacks.

    listed: the names that train's file lists.
    """
    here = dict(zip(split.class_names, split.objects_per_class))
    taught = dict(zip(train.class_names, train.objects_per_class))
    faults = Faults(split.annotation_file)
    unknown = []
    for name, count in here.items():
        if count and name not in listed:
            unknown.append(name)
        elif count and not taught[name]:
            faults.note("CLASS_NOT_IN_TRAIN", repr(name))
    problems = faults.problems()
    if unknown:
        partners = [name for name, count in taught.items() if count and not here[name]]
        renames = suggest_renames(unknown, partners, listed)
        places = [f"{name!r}: {here[name]} annotations" for name in unknown]
        count = f"{len(unknown)} class{'es' if len(unknown) > 1 else ''}"
        headline = f"{split.annotation_file}: {count} that train does not have"
        known = first_few([repr(name) for name in split.class_names if name in listed], 20)
        message = (
            f"{headline} ({first_few(places)}; train has {known}): {advice_on(unknown, renames)}"
        )
        kept = places[:PLACES_KEPT]
        problems.append(
            Problem("CLASS_UNKNOWN", "error", message, len(places), kept, headline, renames)
        )
    return problems


def rare_class_problems(train: CocoSplit, valid: CocoSplit | None) -> list[Problem]:
    """Warnings for classes that train shows too rarely, and for those that valid does not show.

    None where there are errors: what lacks may be their effect.
    """
    problems = train.problems + (valid.problems if valid else [])
    if any(problem.severity == "error" for problem in problems):
        return []
    of_train = Faults(train.annotation_file)
    of_valid = Faults(valid.annotation_file if valid else Path())
    scored = valid.objects_per_class if valid else train.objects_per_class
    for name, taught, here in zip(train.class_names, train.objects_per_class, scored):
        if 0 < taught < FEW_OBJECTS:
            of_train.note("CLASS_FEW", f"{name!r}: {taught}")
        if taught and not here:
            of_valid.note("CLASS_NOT_SCORED", repr(name))
    return of_train.problems() + of_valid.problems()


def advice_on(unknown: list[str], renames: list[str]) -> str:
    """renames: OLD=NEW of those of the unknown classes whose meaning can be guessed."""
    sentences = []
    if renames:
        sentences.append(f"if they are the same, add: {rename_flags(renames)}")
    if len(renames) < len(unknown):
        sentences.append(
            "a class needs objects in train, or the name of one that has: "
            "--rename \"OLD=NEW\" (valid's name=train's name)"
        )
    return ". Else ".join(sentences)
