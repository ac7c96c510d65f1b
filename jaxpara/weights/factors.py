"""Products of the factors of an additive weight, over axes that have names.

    added = scale * (product of the factors)

Axes of a weight are counted from its end, since leading axes (layers of a stacked leaf, experts,
heads) are batches. A factor says along which of them it runs.
"""

import string
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpara.weights.precision import wide

Axes = tuple[Hashable, ...]
"""The axes of a part: negative numbers are axes of the weight, names are its own."""


class Pick(NamedTuple):
    """A factor of zeros and ones that is never built: entry `(i, k)` is one where `index[k] == i`.

    Attributes:
      index: integers, distinct along the last axis.
      names: axes of the index, the last one a name that counts what is picked.
      axis: of the weight, where it is picked.
      size: of that axis.
    """

    index: jax.Array
    names: Axes
    axis: int
    size: int

    @property
    def axes(self) -> Axes:
        """Axes of the matrix."""
        return (*self.names[:-1], self.axis, self.names[-1])

    def matrix(self, dtype: Any) -> jax.Array:
        """The zeros and ones."""
        return jnp.swapaxes(jax.nn.one_hot(self.index, self.size, dtype=dtype), -1, -2)


class Term(NamedTuple):
    """A factor that is an array."""

    array: jax.Array
    axes: Axes


class Factors(NamedTuple):
    """What an additive method adds: `scale` times the product of factors over their own axes.

    Attributes:
      scale: a number.
      terms: summed over the axes that are names; none adds nothing.
    """

    scale: float
    terms: tuple[Term | Pick, ...]


def product(factors: Factors, over: Axes) -> jax.Array:
    """What an additive method adds, in float32 or wider."""

    def one(term):
        return term if isinstance(term, Pick) else term._replace(array=wide(term.array))

    return factors.scale * contract(factors._replace(terms=tuple(map(one, factors.terms))), over)


def spread(term: Term, over: Axes) -> jax.Array:
    """An array with its axes where `over` has them, and axes of size one for the others."""
    order = sorted(range(len(term.axes)), key=lambda i: over.index(term.axes[i]))
    array = term.array.transpose(order)
    sizes = {term.axes[i]: size for i, size in zip(order, array.shape, strict=True)}
    return array.reshape([sizes.get(axis, 1) for axis in over])


def contract(
    factors: Factors,
    out: Axes,
    *,
    operand: tuple[jax.Array, Axes] | None = None,
    **options: Any,
) -> jax.Array:
    """Multiplies factors, and an operand if there is one, term by term.

    The term that shares most summed axes with the operand comes first, so that
    `x A B` is `(x A) B` where `x` runs along the axes of `A` and `(x B^T) A^T` where it runs
    along those of `B`.

    Args:
      factors: their scale is left out.
      out: axes of the result.
      operand: an array and its axes, which may have names of their own.
      options: for `jnp.einsum`.

    Returns:
      The product over the axes `out`; in float32 with an operand of float16.
    """
    terms = list(factors.terms)
    if operand is None:
        first = next(term for term in terms if isinstance(term, Term))
        terms = [term for term in terms if term is not first]
        now, axes = first
    else:
        now, axes = operand
        if now.dtype == jnp.float16:
            # `x A` may be beyond float16 where `(x A) B` is not.
            options = {**options, "preferred_element_type": jnp.float32}
    while terms:
        summed = [axis for axis in axes if axis not in out]
        # A pick whose own two axes are not there yet has nothing to pick from.
        terms.sort(
            key=lambda term: (
                isinstance(term, Pick) and not {*term.axes[-2:]} & {*axes},
                -sum(axis in summed for axis in term.axes),
            )
        )
        term = terms.pop(0)
        if isinstance(term, Pick):
            if not (term.axis in axes and term.axis in out):
                now, axes = _picked(now, axes, term)
                continue
            term = Term(term.matrix(now.dtype), term.axes)
        if now.dtype == jnp.float32 and term.array.dtype == jnp.float16:
            term = term._replace(array=wide(term.array))
        later = {*out, *(axis for other in terms for axis in other.axes)}
        kept = tuple(dict.fromkeys(a for a in (*axes, *term.axes) if a in later))
        now, axes = _einsum((now, axes), term, kept, **options), kept
    return _einsum((now, axes), None, out, **options) if axes != out else now


def _picked(now: jax.Array, axes: Axes, pick: Pick) -> tuple[jax.Array, Axes]:
    """The product with a pick: entries are taken along its axis, or put back there."""
    *lead, name = pick.names
    inner = tuple(axis for axis in axes if axis not in lead)
    old, new = (pick.axis, name) if pick.axis in inner else (name, pick.axis)
    at = inner.index(old)

    def one(now, index):
        if new == name:
            return jnp.take(now, index, at, mode="clip")
        zeros = jnp.zeros((*now.shape[:at], pick.size, *now.shape[at + 1 :]), now.dtype)
        return zeros.at[(*(slice(None),) * at, index)].add(now, unique_indices=True)

    run, remaining = one, axes
    # The first leading axis is the outermost map: wrap from the last one.
    places = []
    for axis in lead:
        places.append(remaining.index(axis) if axis in remaining else None)
        remaining = tuple(a for a in remaining if a != axis)
    for place in reversed(places):
        run = jax.vmap(run, (place, 0))
    return run(now, pick.index), (*lead, *(new if axis == old else axis for axis in inner))


def _einsum(a, b, out: Axes, **options: Any) -> jax.Array:
    operands = [a] if b is None else [a, b]
    names = dict.fromkeys(axis for _, axes in operands for axis in axes)
    letters = dict(zip(names, string.ascii_letters, strict=False))
    word = lambda axes: "".join(letters[axis] for axis in axes)  # noqa: E731
    spec = ",".join(word(axes) for _, axes in operands) + "->" + word(out)
    return jnp.einsum(spec, *(array for array, _ in operands), **options)
