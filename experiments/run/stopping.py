"""Handles Ctrl-C, SIGTERM and a scheduler's warning between steps instead of inside one.

A signal in the middle of a step would find the old state donated and the new one not
yet assigned. The first one therefore raises a flag that the loop reads after each
step; a second one acts at once. A scheduler that ends a job sends SIGTERM some seconds
before it kills the process.

A scheduler may also warn before the time is up, with a user signal for which its launcher
has a handler in this process. The handler of submitit queues the job again and exits at once.
`pass_on` passes the signal to it when everything is saved.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from experiments.run import interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def noting() -> Iterator[None]:
    """Notes a Ctrl-C while a command runs, see `interrupts`; one that was lost before ends it.

    Raises:
      KeyboardInterrupt: one was noted while modules were imported.
    """
    if not interrupts.note():
        yield
        return
    try:
        if interrupts.NOTED:
            raise KeyboardInterrupt
        yield
    finally:
        interrupts.forget()


@contextmanager
def stop_signal() -> Iterator[Callable[[], int | None]]:
    """Catches the first Ctrl-C, SIGTERM or awaited warning while the context is open.

    Yields:
      A function that returns the number of the received signal, or None.
    """
    came = list(interrupts.NOTED)
    interrupts.NOTED.clear()

    def which() -> int | None:
        return came[0] if came else None

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers.
        yield which
        return
    previous = {number: signal.getsignal(number) for number in (*SIGNALS, *WARNINGS)}
    for number in WARNINGS:
        if not callable(previous[number]):  # it has no handler here
            del previous[number]

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(signum: int, frame: object) -> None:
        del frame
        came.append(signum)
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield which
    finally:
        restore()


def pass_on(number: int) -> None:
    """Passes a warning to its handler; to be called once everything is saved.

    Args:
      number: of the received signal; any but a warning is ignored.
    """
    if number in WARNINGS:
        signal.raise_signal(signal.Signals(number))
