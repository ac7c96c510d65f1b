"""Token mixers: they let a position of the decoder see the positions before it.

A mixer is a value, `Mixer(init, start, run, outputs)`; the decoder takes a function
`width -> Mixer`, which the factories here return, so that a mixer can be chosen before the
width is known. Law: `run` over `a ++ b` equals `run` over `a`, then over `b`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxpara.arguments import kind_of
from jaxpara.nn.attention import rotary_attention
from jaxpara.recurrence import cells
from jaxpara.recurrence.scan import newton_scan
from jaxpara.types import Cell, Key, Params


class Mixer(NamedTuple):
    """A token mixer of pure functions.

    Attributes:
      init: `key -> params`.
      start: `(params, batch_size, max_length, dtype) -> state`; `dtype` is the one that the
        decoder computes in.
      run: `(params, state, x[batch, time, width], reset[batch, time] or None) ->
        (state, y[batch, time, outputs])`.
      outputs: size of the last axis of `y`.
    """

    init: Callable[[Key], Params]
    start: Callable[[Params, int, int, Any], Any]
    run: Callable[[Params, Any, jax.Array, jax.Array | None], tuple[Any, jax.Array]]
    outputs: int


def recurrent(
    cell: Callable[..., Cell], *, hidden: int | None = None, solver: Any = None, **options: Any
) -> Callable[[int], Mixer]:
    """A recurrent cell as mixer, solved over time by `newton_scan`.

    The recurrence runs in float32 whatever the decoder computes in; its gradient is the fused
    reverse rule.

    Args:
      cell: a factory `cell(features, hidden, **options) -> Cell`, e.g. `jaxpara.cells.para_gru`.
      hidden: number of units; None takes the width of the decoder.
      solver: a solver of `newton_scan`, e.g. `jaxpara.shooting()`; None lets it choose.
      **options: keyword arguments of `cell`.

    Returns:
      A function from the decoder's width to a `Mixer`, whose state is the cell's carry.

    Raises:
      TypeError: `cell` is no function.

    References: [pararnn].
    """
    if not callable(cell):
        raise TypeError(
            f"recurrent(cell) got {kind_of(cell)}; expected recurrent(CELL) with a factory "
            "(features, hidden) -> Cell that is not called, such as recurrent(jp.cells.para_gru)"
        )
    scan = partial(newton_scan, solver=solver, derivative="reverse")

    def make(width: int) -> Mixer:
        units = width if hidden is None else hidden
        return _from_cell(cell(width, units, **options), units, scan)

    return make


def _from_cell(cell: Cell, outputs: int, scan: Callable[..., Any]) -> Mixer:
    def start(params, batch_size, max_length, dtype):
        del max_length, dtype  # constant memory, and the recurrence keeps its own precision
        return cell.start(params, (batch_size,))

    def run(params, state, x, reset):
        # Time leads inside the scan. x is the smallest array to turn around: gates are wider.
        reset = None if reset is None else reset.T
        state, y = cells.run(cell, params, state, x.swapaxes(0, 1), scan=scan, reset=reset)
        return state, y.swapaxes(0, 1).astype(x.dtype)

    return Mixer(cell.init, start, run, outputs)


def attention(
    *,
    heads: int = 4,
    base: float = 10_000.0,
    prefix: int = 0,
    probabilities: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[int], Mixer]:
    """Causal multi-head attention with rotary positions and a cache of `max_length`.

    Args:
      heads: number of heads; the width must be a multiple of twice this number.
      base: of the rotary angles.
      prefix: number of trained keys and values that every query also sees.
      probabilities: an elementwise function of the softmax before it is multiplied with the
        values, such as `jaxpara.weights.unit_grid(bits=6)`; None: the identity.

    Returns:
      A function from the decoder's width to a `Mixer`.

    Raises:
      ValueError: from that function, if the width does not split into heads of even size, or the
        prefix is negative.

    References: [attention], [rope], [prefix_tuning].
    """
    options: dict[str, Any] = dict(heads=heads, base=base, prefix=prefix)
    options["probabilities"] = probabilities
    return lambda width: Mixer(*rotary_attention(width, **options), outputs=width)
