"""A leaf of a parameter tree instead of an array: a weight that is computed from parts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpara.tree import short
from jaxpara.weights.factors import product, spread
from jaxpara.weights.method import Method
from jaxpara.weights.precision import narrowed, unfused, wide
from jaxpara.weights.unlifted import Unlifted


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("base", "parts"),
    meta_fields=("method", "shared"),
)
@dataclasses.dataclass(frozen=True, repr=False)
class Weight(Unlifted):
    """A weight that is computed from a base and parts.

    Attributes:
      base: an array, or another such weight.
      parts: arrays of the method.
      method: see `Method`.
      shared: `(name of a part, name of its pool)` for parts that are not here but in a pool.
    """

    base: Any
    parts: dict[str, Any]
    method: Method
    shared: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        shared = f", shared={self.shared}" if self.shared else ""
        parts = f"base={short(self.base)}, parts={short(self.parts)}"
        return f"Weight({self.method.name}: {parts}{shared})"


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is a `Weight`, as `is_leaf` of `jax.tree` functions."""
    return isinstance(leaf, Weight)


def shape_of(weight: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or of what a `Weight` computes."""
    if is_weight(weight):
        return jax.eval_shape(dense, weight)
    return jax.ShapeDtypeStruct(jnp.shape(weight), jnp.result_type(weight))


def dense(weight: Any) -> Any:
    """The array that a weight represents: the definition, and the oracle.

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
    factors = method.factors(method.settings, weight.parts, base.shape)
    whole, total = tuple(range(-base.ndim, 0)), wide(base)
    if factors.terms:
        # The product is rounded before the sum in every program: a fused multiply-add in one and
        # not in another would put a quantiser that follows on two sides of a tie.
        total = total + unfused(product(factors, whole))
    if method.scaling is not None:
        scaling = method.scaling(method.settings, base, weight.parts)
        total = total * spread(scaling, whole).astype(total.dtype)
    return narrowed(total, base.dtype)


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
