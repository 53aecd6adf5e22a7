"""Images and frames in batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator


def in_batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; none for no items."""
    while batch := list(itertools.islice(items, size)):
        yield batch
