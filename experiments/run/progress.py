"""The progress line of training: redrawn on a terminal, printed now and then elsewhere."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from experiments.run.plain_files import printable_lines
from experiments.run.tables import cell


class Status(NamedTuple):
    """The contents of the progress line.

    Attributes:
      step: steps done.
      steps: steps in all.
      loss: recent mean in nats per token.
      bits_per_byte: the same in bits; None if the task is not about text.
      tokens_per_second: recent, without evaluations.
      seconds_left: of training, at that speed.
    """

    step: int
    steps: int
    loss: float
    bits_per_byte: float | None
    tokens_per_second: float
    seconds_left: float


class Progress(NamedTuple):
    """Where messages go while training runs.

    Attributes:
      update: `Status -> None`, cheap enough to call at every step.
      say: `text -> None`, prints a line of its own.
    """

    update: Callable[[Status], None]
    say: Callable[[str], None]


def clock(seconds: float) -> str:
    """Formats a duration as `m:ss` or `h:mm:ss`.

    Args:
      seconds: not negative; infinite if not known yet.

    Returns:
      The text.
    """
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def describe(status: Status) -> str:
    """Formats the line, without the step.

    Args:
      status: what to show.

    Returns:
      Loss, bits per byte, tokens per second and time left.
    """
    bits = "" if status.bits_per_byte is None else f"{status.bits_per_byte:.3f} bits/byte  "
    return (
        f"loss {status.loss:.3f}  {bits}"
        f"{status.tokens_per_second:,.0f} tokens/s  {clock(status.seconds_left)} left"
    )


@contextmanager
def plain(
    *, every_seconds: float = 5.0, write: Callable[[str], None] = print
) -> Iterator[Progress]:
    """Plain lines, for files and pipes.

    Args:
      every_seconds: least time between two lines; the last step is always shown.
      write: prints one line.

    Yields:
      The progress.
    """
    last = -every_seconds + time.monotonic()

    def update(status: Status) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_seconds or status.step == status.steps:
            last = now
            write(f"step {status.step}/{status.steps}  {describe(status)}")

    yield Progress(update, write)


@contextmanager
def live(console: Console, *, label: str) -> Iterator[Progress]:
    """One line with a bar, redrawn in place on a terminal.

    Args:
      console: where to draw.
      label: shown before the step.

    Yields:
      The progress.
    """
    columns = (
        TextColumn("{task.description} {task.fields[step]}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[status]}"),
    )
    with RichProgress(*columns, console=console, refresh_per_second=4) as bar:
        # Without a total the bar pulses: the first evaluation and the first step compile.
        task = bar.add_task(label, total=None, step="", status="compiling")

        def update(status: Status) -> None:
            bar.update(
                task,
                completed=status.step,
                total=status.steps,
                step=f"{status.step}/{status.steps}",
                status=describe(status),
            )

        def say(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False)

        yield Progress(update, say)


@contextmanager
def progress(*, label: str, every_seconds: float = 5.0) -> Iterator[Progress]:
    """Selects a terminal line or plain lines by where stdout goes.

    Args:
      label: shown before the step on a terminal.
      every_seconds: least time between two plain lines.

    Yields:
      The progress.
    """
    console = Console()
    chosen = (
        live(console, label=cell(label))
        if console.is_terminal
        else plain(every_seconds=every_seconds, write=lambda text: print(text, flush=True))
    )
    with chosen as opened:
        yield Progress(opened.update, lambda text: opened.say(printable_lines(text)))
