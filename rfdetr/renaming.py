"""Class names that mean the same although they differ: telling them, and `--rename "Date=date"`."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from rfdetr.console import UserError
from rfdetr.text import quoted_name

LETTERS = 4  # of a name; in shorter ones one edit makes another word


def without_style(name: str) -> str:
    """A name without case, blanks, dashes, underscores and a plural's s."""
    name = unicodedata.normalize("NFKC", name).casefold()
    name = re.sub(r"[\s_-]+", "", name)
    return name.removesuffix("s") or name


def is_near(one: str, other: str) -> bool:
    """Whether two names differ in style or by one letter alone; other digits are other names."""
    one = without_style(one)
    other = without_style(other)
    if one == other:
        return True
    if re.sub(r"\D", "", one) != re.sub(r"\D", "", other):
        return False
    return min(len(one), len(other)) >= LETTERS and is_one_edit(one, other)


def is_one_edit(one: str, other: str) -> bool:
    """Whether inserting, deleting or replacing one letter makes two different texts equal."""
    if len(one) > len(other):
        one, other = other, one
    if len(other) - len(one) > 1:
        return False
    start = 0
    while start < len(one) and one[start] == other[start]:
        start += 1
    same_length = len(one) == len(other)
    return one[start + same_length :] == other[start + 1 :]


def suggest_renames(
    names: Iterable[str], partners: Collection[str], others: Collection[str] = ()
) -> dict[str, list[str]]:
    """What some names probably mean, one of `partners` or else of `others`; where several are as
    near all of them, the likeliest first.

    Near names come first; where one name and one partner are left, these may be the same, too.
    """
    free = list(partners)
    left = []
    meant: dict[str, list[str]] = {}
    for name in names:
        near = nearest(name, free, others)
        if not near:
            left.append(name)
            continue
        meant[name] = near
        if len(near) == 1:
            free = [partner for partner in free if partner != near[0]]
    if len(left) == len(free) == 1:
        meant[left[0]] = free
    return meant


def nearest(name: str, partners: Collection[str], others: Collection[str]) -> list[str]:
    """Those of other names that differ in style alone, else the near ones of `partners`, else of
    `others`; the most alike first.
    """
    style = without_style(name)
    every = dict.fromkeys([*partners, *others])
    near = [other for other in every if without_style(other) == style]
    near = near or [partner for partner in partners if is_near(name, partner)]
    near = near or [other for other in others if is_near(name, other)]
    return difflib.get_close_matches(name, near, n=max(len(near), 1), cutoff=0)


def certain_renames(meant: dict[str, list[str]]) -> list[str]:
    """OLD=NEW of the names that can mean one other alone."""
    return as_pairs({name: others[0] for name, others in meant.items() if len(others) == 1})


def rename_choices(meant: dict[str, list[str]]) -> str:
    """The --rename flags of what suggest_renames tells, those to choose among with "or"."""
    parts = [rename_flags(certain_renames(meant))]
    for name, others in meant.items():
        if len(others) > 1:
            parts.append(" or ".join(rename_flags([f"{name}={other}"]) for other in others))
    return "; ".join(part for part in parts if part)


def alike_classes(counts: dict[str, int]) -> dict[str, str]:
    """Classes whose names differ from another's in case and blanks alone -> the most frequent such.

    counts: class name -> its objects; classes without any are passed over.
    """
    groups: dict[str, list[str]] = {}
    for name, count in counts.items():
        if count:
            folded = re.sub(r"[\s_]+", "", unicodedata.normalize("NFKC", name).casefold())
            groups.setdefault(folded, []).append(name)
    alike = {}
    for names in groups.values():
        first = max(names, key=counts.get)
        alike |= {name: first for name in names if name != first}
    return alike


def as_pairs(renames: dict[str, str]) -> list[str]:
    """Old name -> new name as values of --rename, OLD=NEW."""
    return [f"{old}={new}" for old, new in renames.items()]


def rename_flags(pairs: Iterable[str]) -> str:
    """The --rename flags of some OLD=NEW, to be pasted into a shell."""
    words = []
    for pair in pairs:
        separator = "=" if pair.startswith("-") else " "  # argparse takes -x for a flag
        words.append(f"--rename{separator}{quoted_name(pair)}")
    return " ".join(words)


def read_renames(
    pairs: Sequence[str], names_by_split: dict[str, Collection[str]]
) -> dict[str, str]:
    """The values of --rename as old name -> new name.

    names_by_split: the classes that each split lists. Raises UserError for a value that is no pair,
    an old name that no split lists, and a new one that train should list and does not.
    """
    listed = sorted(set().union(*names_by_split.values()))
    in_train = names_by_split.get("train")
    renames = {}
    for pair in pairs:
        # a name may hold a = itself
        cuts = [(pair[:i], pair[i + 1 :]) for i, letter in enumerate(pair) if letter == "="]
        if not cuts:
            raise UserError(
                f'--rename {pair!r}: expected OLD=NEW, for example --rename "Date=date"'
            )
        old, new = next((cut for cut in cuts if cut[0] in listed), cuts[0])
        if old not in listed:
            raise UserError(f"--rename {pair!r}: {no_class(old, listed, 'the dataset')}")
        if in_train is not None and not {old, new} & set(in_train):
            raise UserError(f"--rename {pair!r}: {no_class(new, sorted(in_train), 'train')}")
        if not new:
            raise UserError(f"--rename {pair!r}: the new name is empty")
        renames[old] = new
    return renames


def no_class(name: str, listed: Sequence[str], where: str) -> str:
    """A sentence: there is no such class, and which ones there are."""
    near = difflib.get_close_matches(name, listed, n=3, cutoff=0.5)
    near += [other for other in listed if other not in near and is_near(name, other)]
    if near:
        meant = " or ".join(map(repr, near))
        return f"{where} has no class {name!r} (did you mean {meant}?)"
    known = ", ".join(map(repr, listed[:20]))
    return f"{where} has no class {name!r}, but {known or 'none'}"


def class_names_of(data: dict) -> set[str]:
    """The names that a COCO file lists, whatever else is wrong with it."""
    return {entry["name"] for entry in entries_of(data, "categories") if is_named(entry)}


def is_named(category: dict) -> bool:
    return isinstance(category.get("name"), str)


def entries_of(data: dict, key: str) -> list[dict]:
    entries = data.get(key)
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict)]


def rename_classes(data: dict, renames: dict[str, str]) -> int:
    """Rename categories of a COCO file in place; returns how many had one of the old names.

    A category that gets the name of another one becomes that: its annotations get the other's id.
    """
    named = [entry for entry in entries_of(data, "categories") if is_named(entry)]
    # of those that keep their names: renames may swap names, or hand them on
    id_of = {entry["name"]: entry.get("id") for entry in named if entry["name"] not in renames}
    merged = {}  # id -> the id of the category that has the new name already
    count = 0
    for entry in named:
        if entry["name"] not in renames:
            continue
        count += 1
        entry["name"] = renames[entry["name"]]
        own_id = entry.get("id")
        other_id = id_of.setdefault(entry["name"], own_id)
        if other_id != own_id and type(own_id) is int:
            merged[own_id] = other_id
            data["categories"].remove(entry)
    for entry in entries_of(data, "annotations") if merged else ():
        if type(entry.get("category_id")) is int:
            entry["category_id"] = merged.get(entry["category_id"], entry["category_id"])
    return count
