"""Weights that are computed from parts: what stands in a parameter tree instead of an array.

    effective = f(base, parts)                                      any method
    effective = base + scale * (product of the factors)             an additive one

Axes of a weight are counted from its end, since leading axes (layers of a stacked
leaf, experts, heads) are batches. A method says along which of them each of its parts
runs; whoever slices the weight then slices its parts, and builds nothing.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[int | str, ...]
"""The axes of a part: negative numbers are axes of the weight, names are its own."""


class Factors(NamedTuple):
    """What an additive method adds: `scale` times the product of arrays over their own axes.

    Attributes:
      scale: a number.
      terms: `(array, axes)`; summed over the axes that are names.
    """

    scale: float
    terms: tuple[tuple[jax.Array, Axes], ...]


class Method(NamedTuple):
    """One way to compute a weight; equal settings make equal, hashable methods.

    Attributes:
      name: for reports.
      settings: a hashable value, handed to every function below.
      init: `(settings, key, base) -> (base, parts)`, the base as it is kept; must leave the
        effective weight as it is, or as close as the method allows.
      effective: `(settings, dense base, parts) -> dense`; None for additive methods.
      factors: `(settings, parts, ndim) -> Factors`; None for the others.
      axes: `(settings, ndim) -> axes of each part`.
      separable: `(settings, ndim) -> axes` along which a slice of the effective weight is
        computed from slices alone.
      freezes: whether the base is left as it is while the parts are trained.
      merge: `(settings, dense base, parts) -> Weight | dense`, what is deployed; None means
        the effective weight.
    """

    name: str
    settings: Any
    init: Callable[..., tuple[Any, dict[str, jax.Array]]]
    effective: Callable[..., jax.Array] | None
    factors: Callable[..., Factors] | None
    axes: Callable[..., Mapping[str, Axes]]
    separable: Callable[..., frozenset[int]]
    freezes: bool
    merge: Callable[..., Any] | None = None


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("base", "parts"), meta_fields=("method",)
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight that is computed from a base and parts.

    Attributes:
      base: an array, or another such weight.
      parts: arrays of the method.
      method: see `Method`.
    """

    base: Any
    parts: dict[str, jax.Array]
    method: Method


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is a `Weight`, as `is_leaf` of `jax.tree` functions."""
    return isinstance(leaf, Weight)


def shape_of(weight: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or of what a `Weight` computes."""
    if is_weight(weight):
        return jax.eval_shape(dense, weight)
    return jax.ShapeDtypeStruct(jnp.shape(weight), jnp.result_type(weight))


def dense(weight: Any) -> jax.Array:
    """The array that a weight stands for: the definition, and the oracle.

    Args:
      weight: an array or a `Weight`.

    Returns:
      The effective weight.
    """
    if not is_weight(weight):
        return weight
    base, method = jnp.asarray(dense(weight.base)), weight.method
    if method.effective is not None:
        return method.effective(method.settings, base, weight.parts)
    assert method.factors is not None
    factors = method.factors(method.settings, weight.parts, base.ndim)
    whole = tuple(range(-base.ndim, 0))
    added = factors.scale * contract(factors, whole).astype(base.dtype)
    # The product is rounded before the sum in every program: a fused multiply-add in one and not
    # in another would put a quantiser that follows on two sides of a tie.
    return base + lax.optimization_barrier(added)


def contract(
    factors: Factors,
    out: Axes,
    *,
    operand: tuple[jax.Array, Axes] | None = None,
    **options: Any,
) -> jax.Array:
    """Multiplies factors, and an operand if there is one, term by term.

    The term that shares most summed axes with what is there comes first, so that
    `x A B` is `(x A) B` where `x` runs along the axes of `A` and `(x B^T) A^T` where it runs
    along those of `B`.

    Args:
      factors: their scale is left out.
      out: axes of the result.
      operand: an array and its axes, which may have names of their own.
      options: for `jnp.einsum`.

    Returns:
      The product over the axes `out`.
    """
    terms = list(factors.terms)
    if operand is None:
        now, axes = terms.pop(0)
    else:
        now, axes = operand
    while terms:
        summed = [axis for axis in axes if axis not in out]
        terms.sort(key=lambda term: -sum(axis in summed for axis in term[1]))
        term, along = terms.pop(0)
        later = {*out, *(axis for _, other in terms for axis in other)}
        kept = tuple(dict.fromkeys(a for a in (*axes, *along) if a in later))
        now, axes = _einsum((now, axes), (term, along), kept, **options), kept
    return _einsum((now, axes), None, out, **options) if axes != out else now


def _einsum(a, b, out: Axes, **options: Any) -> jax.Array:
    operands = [a] if b is None else [a, b]
    names = dict.fromkeys(axis for _, axes in operands for axis in axes)
    letters = dict(zip(names, string.ascii_letters, strict=False))
    word = lambda axes: "".join(letters[axis] for axis in axes)  # noqa: E731
    spec = ",".join(word(axes) for _, axes in operands) + "->" + word(out)
    return jnp.einsum(spec, *(array for array, _ in operands), **options)


def cut(weight: Any, axis: int, one: Callable[[jax.Array, int], jax.Array]) -> Any | None:
    """Slices a weight by slicing what it is made of.

    Args:
      weight: an array or a `Weight`.
      axis: of the weight, counted from its end.
      one: `(array, position of the axis) -> slice`; may drop the axis if it is a leading one.

    Returns:
      The sliced weight, or None if the method cannot be sliced along this axis.
    """
    if not is_weight(weight):
        return one(weight, weight.ndim + axis)
    method, ndim = weight.method, len(shape_of(weight).shape)
    if axis not in method.separable(method.settings, ndim):
        return None
    base = cut(weight.base, axis, one)
    if base is None:
        return None
    axes = method.axes(method.settings, ndim)
    parts = {
        name: one(part, axes[name].index(axis)) if axis in axes[name] else part
        for name, part in weight.parts.items()
    }
    return Weight(base, parts, method)
