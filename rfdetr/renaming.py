"""Class names that mean the same although they differ: telling them, and `--rename "Date=date"`."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from rfdetr.console import UserError, warn
from rfdetr.ids import whole_id
from rfdetr.text import quoted_name

STYLE = "case, blanks, _ or -"  # in words: what is probably not meant to tell names apart
LETTERS = 4  # of a name; in shorter ones one edit makes another word
AT_ONCE = "All --rename act at once, on the names in the files"


@dataclass(frozen=True)
class Renames:
    """What --rename asks for: all of it at once, of the names in the files.

    new_of: old name -> new name; listed: the classes that the files list.
    """

    new_of: dict[str, str] = field(default_factory=dict)
    listed: frozenset[str] = frozenset()

    def more(self, meant: dict[str, str]) -> list[str]:
        """The OLD=NEW that also give classes of today's names their new ones."""
        pairs = {}
        for name, new in meant.items():
            olds = [old for old in sorted(self.listed) if self.new_of.get(old, old) == name]
            pairs |= dict.fromkeys(olds or [name], new)
        changed = {old: new for old, new in pairs.items() if old != new}
        return as_pairs(changed or pairs)

    def replaced(self, names: Collection[str]) -> list[str]:
        """The given OLD=NEW in whose place `more` puts others for classes of these names."""
        return as_pairs({old: new for old, new in self.new_of.items() if new in names})

    def flags(self, meant: dict[str, str]) -> str:
        """The --rename flags of `more`, and in place of which they are."""
        return rename_flags(self.more(meant)) + self.in_place(meant)

    def choices(self, meant: dict[str, list[str]]) -> str:
        """As `flags`, of what suggest_renames tells; those to choose among with "or"."""
        parts = [rename_flags(self.more(certain_renames(meant)))]
        for name, others in meant.items():
            if len(others) > 1:
                parts.append(" or ".join(rename_flags(self.more({name: one})) for one in others))
        return "; ".join(part for part in parts if part) + self.in_place(meant)

    def in_place(self, names: Collection[str]) -> str:
        """What to add to the flags where given ones have to go."""
        replaced = rename_flags(self.replaced(names))
        return f" (in place of {replaced})" if replaced else ""


NO_RENAMES = Renames()


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


def certain_renames(meant: dict[str, list[str]]) -> dict[str, str]:
    """The names that can mean one other alone -> that."""
    return {name: others[0] for name, others in meant.items() if len(others) == 1}


def alike_classes(counts: dict[str, int]) -> dict[str, str]:
    """Classes whose names differ from another's in STYLE alone -> the most frequent such.

    counts: class name -> its objects; classes without any are passed over.
    """
    groups: dict[str, list[str]] = {}
    for name, count in counts.items():
        if count:
            folded = unicodedata.normalize("NFKC", name).casefold()
            folded = re.sub(r"[\s_]+|(?<=\w)-(?=\w)", "", folded)  # CD4- is another name than CD4
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


def read_renames(pairs: Sequence[str], names_by_split: dict[str, Collection[str]]) -> Renames:
    """What the values of --rename ask for; warns of a new name that is itself renamed.

    names_by_split: the classes that each split lists. Raises UserError for a value that is no pair,
    an old name that no split lists or that is given twice, and a new one that train should list and
    does not.
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
            message = f"--rename {pair!r}: {no_class(old, listed, 'the dataset')}"
            before = [one for one, its_new in renames.items() if its_new == old]
            if before:
                flags = rename_flags(as_pairs(dict.fromkeys(before, new)))
                message += f". {AT_ONCE}: in place of both give {flags}"
            raise UserError(message)
        if not new:
            raise UserError(f"--rename {pair!r}: the new name is empty")
        if renames.get(old, new) != new:
            raise UserError(
                f"--rename {pair!r}: {old!r} is renamed to {renames[old]!r} already; give one of "
                "the two"
            )
        renames[old] = new
    if in_train is not None:
        names = {renames.get(name, name) for name in in_train} | set(in_train)
        for old, new in renames.items():
            if new not in names:
                pair = f"{old}={new}"
                raise UserError(f"--rename {pair!r}: {no_class(new, sorted(names), 'train')}")
    warn_of_chains(renames)
    return Renames(renames, frozenset(listed))


def warn_of_chains(renames: dict[str, str]) -> None:
    """Warn where a class gets a name that another one loses, unless they swap their names."""
    last = {}  # old name -> that at the end of its chain
    for old, new in renames.items():
        passed = {old}
        while new in renames and new not in passed:
            passed.add(new)
            new = renames[new]
        if new not in passed and len(passed) > 1:
            last[old] = new
    if not last:
        return
    became = ", ".join(f"{old!r} is now {renames[old]!r}, not {new!r}" for old, new in last.items())
    flags = rename_flags(as_pairs(last))
    replaced = rename_flags(as_pairs({old: renames[old] for old in last}))
    warn(f"{AT_ONCE}: {became}. If the latter is meant, give {flags} in place of {replaced}")


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
        own_id = whole_id(entry.get("id"))
        other_id = whole_id(id_of.setdefault(entry["name"], own_id))
        if None not in (own_id, other_id) and own_id != other_id:
            merged[own_id] = other_id
            data["categories"].remove(entry)
    for entry in entries_of(data, "annotations") if merged else ():
        category_id = whole_id(entry.get("category_id"))
        entry["category_id"] = merged.get(category_id, entry.get("category_id"))
    return count
