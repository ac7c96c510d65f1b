"""Ctrl-C and SIGTERM between steps instead of inside one.

A signal in the middle of a step would find the old state donated and the new one not
yet assigned. The first one therefore raises a flag that the loop reads after each
step; a second one acts at once. A scheduler that ends a job sends SIGTERM some seconds
before it kills.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signal() -> Iterator[Callable[[], int | None]]:
    """Catches the first Ctrl-C or SIGTERM while the context is open.

    Yields:
      A function that gives the number of the signal that came, or None.
    """
    came: list[int] = []

    def which() -> int | None:
        return came[0] if came else None

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere nobody presses keys.
        yield which
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(signum: int, frame: object) -> None:
        del frame
        came.append(signum)
        restore()

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield which
    finally:
        restore()
