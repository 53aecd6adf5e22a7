"""COCO RLEs in NumPy: whether they are sound, and where their pixels lie."""

from __future__ import annotations

import numpy as np


def run_sums(texts: list[str], at_once: int = 1000) -> dict[str, int]:
    """text -> sum of the runs of that compressed COCO RLE; -1 where it is none, or a run is negative or empty.

    Empty runs (the first and the last may be) make pycocotools' merge write beyond its memory.
    """
    sums = dict.fromkeys(texts, -1)
    whole = [
        text for text in sums if text.isascii() and "0" <= text[-1:] <= "O"
    ]  # the last number ends
    for part in (whole[i : i + at_once] for i in range(0, len(whole), at_once)):
        runs, first, wrong = _decode_runs(part)
        wrong |= runs < 0
        inside = np.ones(len(runs), dtype=bool)
        inside[first] = inside[first - 1] = False  # -1: the last of the text before
        wrong |= (runs == 0) & inside
        totals = np.where(np.logical_or.reduceat(wrong, first), -1, np.add.reduceat(runs, first))
        sums |= zip(part, totals.tolist())
    return sums


def _decode_runs(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the runs of all these compressed RLEs, where each text's first one is, which runs no RLE may have).

    Numbers of 5 bits a character, lowest first, offset 48; bit 5: goes on; bit 4 of the last: sign. From the fourth on
    a number is the difference to the run two before.  Source of the format: pycocotools' maskApi.c, rleFrString.
    """
    chars = np.frombuffer("".join(texts).encode(), np.uint8) - np.uint8(
        48
    )  # what is below 48 comes out above 63
    ends = np.flatnonzero(chars < 32)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    shift = 5 * (np.arange(len(chars)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((chars & 31).astype(np.int64) << np.minimum(shift, 30), starts)
    runs -= (chars[ends] >> 4 & 1).astype(np.int64) << np.minimum(5 * lengths, 30)
    first = np.append(0, np.searchsorted(ends, np.cumsum([len(text) for text in texts]))[:-1])
    place = np.arange(len(runs)) - np.repeat(
        first, np.diff(np.append(first, len(runs)))
    )  # in its own text
    for start in (
        1,
        2,
    ):  # every other run of a text, from this one on, is the sum of those up to it
        chain = np.flatnonzero((place >= start) & (place % 2 == start % 2))
        begins = np.flatnonzero(place[chain] == start)
        totals = np.cumsum(runs[chain])
        before = totals[begins] - runs[chain[begins]]
        runs[chain] = totals - np.repeat(before, np.diff(np.append(begins, len(chain))))
    # 30 bits: the C code's shifts hold no more
    wrong = (lengths > 6) | (np.maximum.reduceat(chars, starts) > 63)
    return runs, first, wrong


def rle_extents(rles: list[dict], at_once: int = 1000) -> list[tuple[int, int, int, int] | None]:
    """(left, top, right, bottom) in pixels of each sound RLE; None where no pixel is set."""
    extents: list[tuple | None] = [None] * len(rles)
    packed = [index for index, rle in enumerate(rles) if type(rle["counts"]) is str]
    plain = [index for index, rle in enumerate(rles) if type(rle["counts"]) is not str]
    for kind, numbers in ((str, packed), (list, plain)):
        for part in (numbers[i : i + at_once] for i in range(0, len(numbers), at_once)):
            counts = [rles[index]["counts"] for index in part]
            if kind is str:
                runs, first, _ = _decode_runs(counts)
            else:
                runs = np.concatenate([np.array(one, np.int64) for one in counts])
                first = np.cumsum([0, *map(len, counts[:-1])])
            heights = np.array([rles[index]["size"][0] for index in part])
            for index, extent in zip(part, _extents(runs, first, heights)):
                extents[index] = tuple(extent) if extent[0] < extent[2] else None
    return extents


def _extents(runs: np.ndarray, first: np.ndarray, heights: np.ndarray) -> list[list[int]]:
    """[left, top, right, bottom] around the set pixels of RLEs, whose runs go down the columns; left > right: none.

    runs: of all of them; first: where each one's begin; heights: of their images.
    """
    lengths = np.diff(np.append(first, len(runs)))
    ends = np.cumsum(runs)
    ends -= np.repeat(ends[first] - runs[first], lengths)
    starts = ends - runs
    height = np.repeat(heights, lengths)
    set_runs = ((np.arange(len(runs)) - np.repeat(first, lengths)) % 2 == 1) & (runs > 0)
    left = starts // height
    right = (ends - 1) // height
    several = right > left  # columns
    top = np.where(several, 0, starts - left * height)
    bottom = np.where(several, height, ends - right * height)
    far = np.iinfo(np.int64).max
    lows = [np.minimum.reduceat(np.where(set_runs, side, far), first) for side in (left, top)]
    highs = [
        np.maximum.reduceat(np.where(set_runs, side, -1), first) for side in (right + 1, bottom)
    ]
    return np.stack([*lows, *highs], axis=1).tolist()
