"""Ctrl-C between steps instead of inside one.

An interrupt in the middle of a step would find the old state donated and the new
one not yet assigned. The first Ctrl-C therefore raises a flag that the loop reads
after each step; a second one interrupts at once.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Catches the first Ctrl-C while the context is open.

    Yields:
      A function that says whether Ctrl-C was pressed.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere nobody presses keys.
        yield pressed.is_set
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: object) -> None:
        del signum, frame
        pressed.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
