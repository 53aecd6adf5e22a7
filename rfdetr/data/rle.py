"""COCO RLEs in NumPy: whether they are sound, and where their pixels lie.

An RLE is {"size": [height, width], "counts": runs}: lengths of pixels unset and set in turn, down
one column after the other. Compressed, the runs are a text (pycocotools' maskApi.c, rleFrString).
Many are looked at together, which is what makes it as fast as reading the JSON.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

AT_ONCE = 1000  # RLEs that are decoded together
CHARACTER = 48  # offset of the five bits that a character of a text holds
SHIFTED_BITS = 30  # more than these the shifts of the C code do not hold


def run_sums(texts: list[str], at_once: int = AT_ONCE) -> dict[str, int]:
    """text -> the sum of the runs of this compressed RLE; -1 where it is not sound.

    Sound are texts of whole numbers whose runs are not negative, nor, but for the first and last
    one, empty: empty runs make pycocotools' merge write beyond its memory.
    """
    sums = dict.fromkeys(texts, -1)
    # the last number of the others has no end
    ended = [text for text in sums if text.isascii() and "0" <= text[-1:] <= "O"]
    for part in chunks(ended, at_once):
        runs, first, wrong = decode_runs(part)
        wrong |= runs < 0
        inside = np.ones(len(runs), dtype=bool)
        inside[first] = False
        inside[first - 1] = False  # the last run of the text before; of the first one, -1
        wrong |= (runs == 0) & inside
        totals = np.add.reduceat(runs, first)
        totals[np.logical_or.reduceat(wrong, first)] = -1
        sums |= zip(part, totals.tolist())
    return sums


def chunks(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def decode_runs(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the runs of all these texts one after another, where each text's begin, which cannot be).

    A number has five bits a character, lowest first. Bit 5 says that it goes on, bit 4 of its last
    character is the sign. From the fourth number of a text on, each is the difference to the run
    two before.
    """
    joined = "".join(texts).encode()
    # what is below CHARACTER wraps around to more than six bits
    bits = np.frombuffer(joined, np.uint8) - np.uint8(CHARACTER)
    ends = np.flatnonzero(bits < 32)  # the last character of each number
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    shift = 5 * (np.arange(len(bits)) - np.repeat(starts, lengths))
    digits = (bits & 31).astype(np.int64) << np.minimum(shift, SHIFTED_BITS)
    sign = (bits[ends] >> 4 & 1).astype(np.int64)
    numbers = np.add.reduceat(digits, starts)
    numbers -= sign << np.minimum(5 * lengths, SHIFTED_BITS)
    text_ends = np.cumsum([len(text) for text in texts])
    first = np.append(0, np.searchsorted(ends, text_ends)[:-1])
    runs = add_up_differences(numbers, first)
    wrong = (5 * lengths > SHIFTED_BITS) | (np.maximum.reduceat(bits, starts) > 63)
    return runs, first, wrong


def add_up_differences(numbers: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The runs of texts from their numbers; `first`: where each text's begin."""
    runs = numbers.copy()
    index = np.arange(len(runs)) - np.repeat(first, np.diff(np.append(first, len(runs))))
    # Every other run of a text is the sum of the numbers up to it: from its second one on the
    # even ones, from its third one on the odd ones. Its first run stands for itself.
    for start in (1, 2):
        chain = np.flatnonzero((index >= start) & (index % 2 == start % 2))
        begins = np.flatnonzero(index[chain] == start)
        totals = np.cumsum(runs[chain])
        before = totals[begins] - runs[chain[begins]]
        runs[chain] = totals - np.repeat(before, np.diff(np.append(begins, len(chain))))
    return runs


def rle_extents(rles: list[dict], at_once: int = AT_ONCE) -> list[tuple[int, int, int, int] | None]:
    """(left, top, right, bottom) in pixels of each sound RLE; None where no pixel is set."""
    extents: list[tuple | None] = [None] * len(rles)
    compressed = [index for index, rle in enumerate(rles) if type(rle["counts"]) is str]
    plain = [index for index, rle in enumerate(rles) if type(rle["counts"]) is not str]
    for indices in chunks(compressed, at_once):
        runs, first, _ = decode_runs([rles[index]["counts"] for index in indices])
        set_extents(extents, rles, indices, runs, first)
    for indices in chunks(plain, at_once):
        counts = [np.array(rles[index]["counts"], np.int64) for index in indices]
        first = np.cumsum([0, *(len(runs) for runs in counts[:-1])])
        set_extents(extents, rles, indices, np.concatenate(counts), first)
    return extents


def is_blank(rle: dict) -> bool:
    """Whether a sound RLE sets no pixel."""
    runs = runs_of(rle) if type(rle["counts"]) is str else rle["counts"]
    return not any(runs[1::2])


def columns_of(rle: dict, left: int, right: int) -> np.ndarray:
    """(H, right - left) bool: the columns from `left` on of a sound compressed RLE; memory is taken
    for these alone.
    """
    runs = runs_of(rle)
    height = rle["size"][0]
    borders = np.cumsum(np.append(0, runs)).clip(left * height, right * height)
    is_set = np.arange(len(runs)) % 2 == 1
    return is_set.repeat(np.diff(borders)).reshape(right - left, height).T


def runs_of(rle: dict) -> np.ndarray:
    """The runs of one sound compressed RLE."""
    counts = rle["counts"]
    return decode_runs([counts.decode("ascii") if isinstance(counts, bytes) else counts])[0]


def outermost_pixels(rle: dict) -> list[tuple[int, int]]:
    """(column, row) of the highest, the lowest and the rightmost set pixel of a sound compressed
    RLE, of which one is set; of several highest or lowest the leftmost.
    """
    height = rle["size"][0]
    ends = np.cumsum(runs_of(rle))
    first = ends[:-1:2]  # numbers of set pixels, down one column after the other
    last = ends[1::2] - 1
    is_set = first <= last
    first = first[is_set]
    last = last[is_set]
    next_column = (first // height + 1) * height
    next_column = next_column[next_column <= last]
    tops = np.sort(np.append(first, next_column))
    feet = np.sort(np.append(last, next_column - 1))
    highest = tops[np.argmin(tops % height)]
    lowest = feet[np.argmax(feet % height)]
    return [(int(one // height), int(one % height)) for one in (highest, lowest, last[-1])]


def set_extents(
    extents: list, rles: list[dict], indices: list[int], runs: np.ndarray, first: np.ndarray
) -> None:
    """Set the extents at `indices`, whose RLEs have these runs, each its own from `first` on."""
    heights = np.array([rles[index]["size"][0] for index in indices])
    for index, extent in zip(indices, extents_of_runs(runs, first, heights)):
        left, _, right, _ = extent
        if left < right:
            extents[index] = tuple(extent)


def extents_of_runs(runs: np.ndarray, first: np.ndarray, heights: np.ndarray) -> list[list[int]]:
    """[left, top, right, bottom] around the set pixels of each RLE; left > right where none is set.

    runs: of all of them; first: where each one's begin; heights: of their images.
    """
    lengths = np.diff(np.append(first, len(runs)))
    ends = np.cumsum(runs)
    ends -= np.repeat(ends[first] - runs[first], lengths)
    starts = ends - runs
    height = np.repeat(heights, lengths)
    index = np.arange(len(runs)) - np.repeat(first, lengths)
    is_set = (index % 2 == 1) & (runs > 0)
    left = starts // height
    right = (ends - 1) // height
    several_columns = right > left
    top = np.where(several_columns, 0, starts - left * height)
    bottom = np.where(several_columns, height, ends - right * height)
    far = np.iinfo(np.int64).max
    columns = [
        np.minimum.reduceat(np.where(is_set, left, far), first),
        np.minimum.reduceat(np.where(is_set, top, far), first),
        np.maximum.reduceat(np.where(is_set, right + 1, -1), first),
        np.maximum.reduceat(np.where(is_set, bottom, -1), first),
    ]
    return np.stack(columns, axis=1).tolist()
