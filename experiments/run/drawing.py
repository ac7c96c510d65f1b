"""The figure that everything here is drawn on: its words are shown as they are."""

import functools
from collections.abc import Callable
from typing import Any

import matplotlib.figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter


class Figure(matplotlib.figure.Figure):
    """A figure of matplotlib in which no title, label or legend is read as a formula.

    A run may be called `a$x^$`. Only the numbers at ticks, which matplotlib writes itself, may be
    formulas. What cannot be printed is shown as U+FFFD.
    """

    def draw(self, renderer: Any) -> None:
        """Draws; called by matplotlib for every format."""
        ticks: set[int] = set()
        for axis in (axis for axes in self.axes for axis in (axes.xaxis, axes.yaxis)):
            words = axis.get_major_formatter()
            if isinstance(words, FuncFormatter):  # of given labels
                words.func = functools.partial(_plain_label, words.func)
            else:
                ticks |= {id(label) for label in axis.get_ticklabels(which="both")}
        for text in self.findobj(Text):
            if id(text) not in ticks:
                text.set_parse_math(False)
                text.set_text(plain(text.get_text()))
        super().draw(renderer)


def plain(text: str) -> str:
    """Replaces what cannot be printed.

    Args:
      text: of any origin.

    Returns:
      Text with line ends, and nothing else that has no picture.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _plain_label(label: Callable[..., str], value: float, position: int | None = None) -> str:
    return plain(label(value, position))
