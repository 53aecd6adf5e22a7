"""Whether the classes of valid and test are those that train teaches, and how often they are shown.

Where a file has errors, which may hide objects, a class is taken to have all the annotations that
are listed: what is said then stays true when the errors are mended.
"""

from __future__ import annotations

from rfdetr.data.faults import FEW_OBJECTS, PLACES_KEPT, Faults, Problem, first_few
from rfdetr.data.records import CocoSplit
from rfdetr.renaming import STYLE, Renames, alike_classes, certain_renames, suggest_renames
from rfdetr.text import counted

# errors after which classes may lack, and those after which objects of known ones may
HIDE_CLASSES = ("JSON_", "CAT_INVALID", "CAT_NAME_", "CAT_ID_DUPLICATE")
HIDE_OBJECTS = (*HIDE_CLASSES, "ANN_CATEGORY_", "ANN_IMAGE_")


def class_problems(split: CocoSplit, train: CocoSplit) -> list[Problem]:
    """A warning for classes that train lists without an object, an error for those it lacks.

    None where errors of train may be why they lack.
    """
    if has_any(train, HIDE_CLASSES):
        return []
    here = counts_of(split)
    taught = counts_of(train)
    faults = Faults(split.annotation_file)
    # else train is empty, or has faults, which is told
    if any(taught.values()) and not has_any(train, HIDE_OBJECTS):
        for name, count in here.items():
            if count and name in train.annotated and not taught[name]:
                faults.note("CLASS_NOT_IN_TRAIN", repr(name))
    problems = faults.problems()
    ids = dict(zip(split.class_names, split.category_ids))
    # train's annotations may be of a class that its list has lost
    unknown = [name for name in unknown_classes(here, train) if ids[name] not in train.unlisted]
    if unknown:
        guessed = meanings(here, train)
        meant = {name: guessed[name] for name in unknown if name in guessed}
        places = [f"{name!r}: {here[name]} annotations" for name in unknown]
        headline = (
            f"{split.annotation_file}: {counted(len(unknown), 'class')} that train does not have"
        )
        listed = [repr(name) for name in train.class_names if name in train.annotated]
        known = first_few(listed, 20)
        message = f"{headline} ({first_few(places)}; train has {known}): "
        message += advice_on(unknown, meant, split.renames)
        certain = certain_renames(meant)
        problem = Problem(
            "CLASS_UNKNOWN",
            "error",
            message,
            len(places),
            places[:PLACES_KEPT],
            headline,
            split.renames.more(certain),
            split.renames.replaced(certain),
        )
        problems.append(problem)
    return problems


def rare_class_problems(train: CocoSplit, valid: CocoSplit | None) -> list[Problem]:
    """Warnings for classes that train shows too rarely, that valid does not show, and whose names
    differ in style alone, or that no split shows.

    None where errors of train may be why they lack.
    """
    if has_any(train, HIDE_OBJECTS):
        return []
    taught = counts_of(train)
    here = counts_of(valid) if valid and not has_any(valid, HIDE_OBJECTS) else {}
    of_train = Faults(train.annotation_file)
    for name, count in taught.items():
        if any(taught.values()) and count == 0 and not here.get(name):  # else valid's own warning
            of_train.note("CLASS_NOT_IN_TRAIN", repr(name))
        if 0 < count < FEW_OBJECTS:
            of_train.note("CLASS_FEW", f"{name!r}: {count}{kind_of_count(train)}")
    problems = of_train.problems() + alike_problems(train, taught)
    if here:
        meant = {name for names in meanings(here, train).values() for name in names}
        of_valid = Faults(valid.annotation_file)
        for name, count in taught.items():
            if count and not here.get(name) and name not in meant:
                of_valid.note("CLASS_NOT_SCORED", repr(name))
        problems += of_valid.problems()
    return problems


def alike_problems(train: CocoSplit, taught: dict[str, int]) -> list[Problem]:
    """A warning where names of train's classes differ in style alone."""
    alike = alike_classes(taught)
    if not alike:
        return []
    kind = kind_of_count(train)
    places = [
        f"{old!r}: {taught[old]}, {new!r}: {taught[new]} annotations{kind}"
        for old, new in alike.items()
    ]
    count = counted(len(alike), "class")
    what = f"{count} whose name differs from another's in {STYLE} alone"
    headline = f"{train.annotation_file}: {what}"
    message = (
        f"{headline} ({first_few(places)}): they are learnt as classes of their own; if they are "
        f"the same, add here and to every later command: {train.renames.flags(alike)}"
    )
    kept = places[:PLACES_KEPT]
    renames = train.renames.more(alike)
    replaced = train.renames.replaced(alike)
    problem = Problem(
        "CLASS_ALIKE", "warning", message, len(alike), kept, headline, renames, replaced
    )
    return [problem]


def has_any(split: CocoSplit, codes: tuple[str, ...]) -> bool:
    """Whether a split has faults of codes that begin so."""
    return any(problem.code.startswith(codes) for problem in split.problems)


def counts_of(split: CocoSplit) -> dict[str, int]:
    """Class name -> its objects, or where errors may hide some the annotations that are listed."""
    counts = dict(zip(split.class_names, split.objects_per_class))
    if has_errors(split):
        return dict.fromkeys(counts, 0) | split.annotated
    return counts


def kind_of_count(split: CocoSplit) -> str:
    """What to add to such a count, which is then higher than that of the class table."""
    return " listed" if has_errors(split) else ""


def has_errors(split: CocoSplit) -> bool:
    return any(problem.severity == "error" for problem in split.problems)


def unknown_classes(here: dict[str, int], train: CocoSplit) -> list[str]:
    """here: class name -> its objects in another split."""
    return [name for name, count in here.items() if count and name not in train.annotated]


def meanings(here: dict[str, int], train: CocoSplit) -> dict[str, list[str]]:
    """The classes of another split that train lacks -> what they are probably called there."""
    unknown = unknown_classes(here, train)
    partners = [name for name, count in counts_of(train).items() if count and not here.get(name)]
    return suggest_renames(unknown, partners, train.annotated)


def advice_on(unknown: list[str], meant: dict[str, list[str]], renames: Renames) -> str:
    """meant: those of the unknown classes whose meaning can be guessed; renames: the given ones."""
    sentences = []
    if meant:
        sentences.append(f"if they are the same, add: {renames.choices(meant)}")
    if len(meant) < len(unknown):
        sentences.append(
            "a class needs objects in train, or the name of one that has: "
            "--rename \"OLD=NEW\" (valid's name=train's name)"
        )
    return ". Else ".join(sentences)
