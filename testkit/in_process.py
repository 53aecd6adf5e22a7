"""A script's main in the process of the tests."""

from __future__ import annotations

import contextlib
import io
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def restored_signals() -> Iterator[None]:
    """Put back the signal handlers that a script sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def output_of(main: Callable[[list[str]], None], *words: object) -> str:
    """What a script prints to stdout.  Raises what its main raises."""
    printed = io.StringIO()
    with restored_signals(), contextlib.redirect_stdout(printed):
        main([str(word) for word in words])
    return printed.getvalue()
