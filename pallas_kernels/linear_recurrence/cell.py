"""The affine step as a cell: inputs are the K*K entries of A, row by row, then the K of b."""

import functools
import operator

from pallas_kernels.cell import ElementwiseCell

LARGEST = 4  # of K: beyond it the products of A no longer fit into registers


def _dot(left, right):
    return functools.reduce(operator.add, map(operator.mul, left, right))


@functools.cache
def affine_cell(size: int) -> ElementwiseCell:
    """`s' = A s + b` on `size` states.

    Args:
      size: K, from 1 to 4.

    Returns:
      The cell; it has `size * size + size` inputs and no parameters.

    Raises:
      ValueError: another size.
    """
    if not 1 <= size <= LARGEST:
        raise ValueError(f"size is {size}; expected 1 to {LARGEST} states")
    every = range(size)

    def row(x, i):
        return x[size * i : size * (i + 1)]

    def column(x, j):
        return [x[size * i + j] for i in every]

    def step(s, x, p):
        del p
        return [_dot(row(x, i), s) + x[size * size + i] for i in every]

    def push(s, x, p, columns):
        return step(s, x, p), [[_dot(row(x, i), c) for i in every] for c in columns]

    def pull_state(s, x, p, g):
        del s, p
        return [_dot(column(x, j), g) for j in every]

    def pull(s, x, p, g):
        return pull_state(s, x, p, g), [*(g[i] * s[j] for i in every for j in every), *g], []

    return ElementwiseCell(size, size * size + size, 0, step, push, pull, pull_state)
