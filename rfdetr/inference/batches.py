"""Images and frames in batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor


def in_batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter; none for no items."""
    while batch := list(itertools.islice(items, size)):
        yield batch


def one_ahead(batches: Iterator[list]) -> Iterator[list]:
    """The same lists; a thread makes the next one while the last is worked on."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
