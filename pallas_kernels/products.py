"""What one more step makes of a chunk's product of Jacobians, of its bounds, and of magnitudes."""

import functools
import operator
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import certificate
from pallas_kernels.cell import Arrays


def moved(jacobian: Sequence[Arrays], tangent: Arrays) -> list[jax.Array]:
    """`J v`, from the columns of a Jacobian: `jacobian[j][i]` is d leaf i / d leaf j."""
    columns = [[entry * v for entry in column] for column, v in zip(jacobian, tangent, strict=True)]
    return [functools.reduce(operator.add, parts) for parts in zip(*columns, strict=True)]


def lacked(
    jacobian: Sequence[Arrays],
    columns: Sequence[Arrays],
    pushed: Sequence[Arrays],
    lacking: Arrays,
    most: Sequence[Arrays],
    states: Arrays,
    new: Arrays,
) -> tuple[list[jax.Array], list[list[jax.Array]]]:
    """What the entries of each row of `J P` may lack, for products below the floats are 0.

    Args:
      jacobian, columns, pushed: of J, of P, and of `J P`.
      lacking: what the entries of P may lack, by row.
      most: the largest magnitudes that those of P may have had; 0 where nothing ever led to one.
      states, new: before and after the step.

    Returns:
      What those of `J P` may lack, by row; and at most what they are, by column.
    """
    grown = moved([[jnp.abs(entry) for entry in column] for column in jacobian], lacking)
    # What is a sum of products with 0 lacks nothing: a reset. But a 0 may be an entry below the
    # floats, which counts where it takes a state to almost nothing.
    tallest = functools.reduce(jnp.maximum, map(jnp.abs, states))
    fallen = [(jnp.abs(n) < certificate.FALL * tallest) & (n != 0.0) for n in new]
    leads = [
        [(entry != 0.0) | fell for entry in row]
        for row, fell in zip(zip(*jacobian, strict=True), fallen, strict=True)
    ]
    there = [
        [
            (p != 0.0) | ((lack != 0.0) & (m > 0.0))
            for p, lack, m in zip(c, lacking, ms, strict=True)
        ]
        for c, ms in zip(columns, most, strict=True)
    ]
    led = [[_any(map(operator.and_, row, column)) for row in leads] for column in there]
    # K products and their sum, each of them below the floats.
    step = (len(lacking) + 1) * certificate.LEAST
    rows = zip(zip(*led, strict=True), grown, strict=True)
    lacks = [jnp.where(_any(row), size + step, size) for row, size in rows]
    full = [
        [jnp.abs(p) + jnp.where(at, lack, 0.0) for p, at, lack in zip(c, on, lacks, strict=True)]
        for c, on in zip(pushed, led, strict=True)
    ]
    return lacks, full


def _any(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(operator.or_, parts)


def became(jacobian: Sequence[Arrays], sizes: Arrays, states: Arrays) -> list[jax.Array]:
    """What magnitudes become in a step that leads to `states`, their own included."""
    sizes = moved([[jnp.abs(entry) for entry in column] for column in jacobian], sizes)
    return [jnp.maximum(jnp.abs(new), size) for new, size in zip(states, sizes, strict=True)]
