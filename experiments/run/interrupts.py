"""Notes a Ctrl-C beside the KeyboardInterrupt that it raises. Imports nothing of JAX or ours.

Python drops an exception that is raised in a callback of its garbage collector, and JAX has one:
while a program starts, the interrupt may be lost. What is noted is acted on later.
"""

import signal
import sys
import threading
from typing import Any

NOTED: list[int] = []  # a Ctrl-C that nothing has acted on yet


def note() -> bool:
    """Begins to note, where Python's own handler is set.

    Returns:
      Whether it does.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle)
    return ours and signal.getsignal(signal.SIGINT) is _handle


def forget() -> None:
    """Sets Python's own handler again, if it was replaced."""
    if signal.getsignal(signal.SIGINT) is _handle:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    NOTED.clear()


def in_one_line(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """A `sys.excepthook` without a traceback for Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def dropped(unraisable: Any) -> None:
    """A `sys.unraisablehook` without a traceback for a Ctrl-C, which is noted."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _handle(signum: int, frame: object) -> None:
    del frame
    NOTED.append(signum)
    raise KeyboardInterrupt
