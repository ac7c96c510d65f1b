"""Integers with their scales, in a parameter tree in place of a float weight."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Shaped

from jaxpara.types import AnyArray
from jaxpara.weights.method import Method, computed
from jaxpara.weights.precision import multiplied_as, narrowed, wide
from jaxpara.weights.quant.activations import (
    NOT_QUANTISED,
    activation_integers,
    fake_activations,
)
from jaxpara.weights.quant.grid import Grid, Parts, dequantised, make_grid, never_zero
from jaxpara.weights.weight import Weight, is_weight
from pallas_kernels import quantised_dot as kernels
from pallas_kernels.quantised_dot.packing import pack as pack_values
from pallas_kernels.quantised_dot.packing import packs, unpack


class Stored(NamedTuple):
    """How integers are read.

    Attributes:
      grid: of the integers.
      activations: bits of what they are multiplied with; None: it is not quantised.
      ranges: from which the grid was fitted, where a method does it once.
      dtype: by name, of the weight that the integers represent; None: that of the scale.
    """

    grid: Grid
    activations: int | None = None
    ranges: str | None = None
    dtype: str | None = None


def part_axes(grid: Grid, ndim: int):
    """The axes of scales and offsets, for `Method.axes`."""
    # They have one axis more: groups and entries of a group take the place of the axis -2.
    along = (*range(-ndim, -2), "groups", "entry", "all" if grid.per_tensor else -1)
    return {"scale": along, "offset": along}


def separable(grid: Grid, ndim: int) -> frozenset[int]:
    """Batches, and output channels unless all share one scale."""
    return frozenset(range(-ndim, -2)) | (frozenset() if grid.per_tensor else frozenset({-1}))


def stored_values(grid: Grid, values: jax.Array) -> jax.Array:
    """Integers as int8, whether they are packed (uint8) or not."""
    return unpack(values, grid.bits) if values.dtype == jnp.uint8 else values


def packed_values(grid: Grid, values: jax.Array) -> jax.Array:
    """Integers packed if their rows allow it, as int8 otherwise."""
    return pack_values(values, grid.bits) if packs(values.shape[-2], grid.bits) else values


def stored_effective(stored: Stored, base: jax.Array, parts: Parts) -> jax.Array:
    """The numbers that stored integers represent, in the dtype of the weight."""
    whole = dequantised(stored.grid, stored_values(stored.grid, base), parts)
    return narrowed(whole, _dtype_of(stored, parts))


def _dtype_of(stored: Stored, parts: Parts) -> Any:
    return jnp.dtype(stored.dtype or parts["scale"].dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _integer_product(stored: Stored, x: jax.Array, base: jax.Array, parts: Parts) -> jax.Array:
    scale, offset = _by_group(parts)
    assert stored.activations is not None
    values, own = activation_integers(x, stored.activations, scale.shape[0])
    return kernels.integer_dot(values, own, base, scale, offset, bits=stored.grid.bits)


@_integer_product.defjvp
def _(stored: Stored, primals, tangents):
    x, base, parts = primals
    out = _integer_product(stored, x, base, parts)

    # Straight through both roundings: the derivative of the product of what they stand for. What
    # is computed from the integers is computed again where the derivative is transposed.
    @jax.checkpoint
    def smooth(x, parts):
        assert stored.activations is not None
        w = stored_effective(stored, base, parts)
        x = x.astype(multiplied_as(x.dtype, w.dtype))
        own = fake_activations(x, stored.activations, parts["scale"].shape[0])
        return jnp.matmul(own, w, preferred_element_type=out.dtype)

    return out, jax.jvp(smooth, (x, parts), (tangents[0], tangents[2]))[1]


def _by_group(parts: Parts) -> tuple[jax.Array, jax.Array | None]:
    offset = wide(parts["offset"][:, 0]) if "offset" in parts else None
    return never_zero(wide(parts["scale"][:, 0])), offset


def stored_product(
    stored: Stored,
    x: jax.Array,
    base: jax.Array,
    parts: Parts,
    cast: Any = None,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    implementation: Any = None,
) -> jax.Array:
    """`x @ W` on the integers themselves, for `Method.product`."""
    own = _dtype_of(stored, parts)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(multiplied_as(x.dtype, own))
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if stored.activations is not None:
        out: Any = _integer_product(stored, flat, base, parts)
    else:

        @jax.checkpoint  # the backward pass unpacks and converts the integers again
        def run(flat, base, parts):
            return kernels.quantised_dot(
                flat,
                base,
                *_by_group(parts),
                bits=stored.grid.bits,
                precision=precision,
                dtype=own if cast is None else cast(jnp.zeros((), own)).dtype,
                implementation=implementation,
            )

        out = run(flat, base, parts)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _remark(stored: Stored, weight: Weight) -> str:
    """Why no kernel multiplies with these integers, on whatever device."""
    if stored.activations is not None:
        return "integers with integers, by XLA"
    base = weight.base
    reason = kernels.refusal(
        base.shape[-2:],
        groups=weight.parts["scale"].shape[-3],
        packed=base.dtype == jnp.uint8,
        bits=stored.grid.bits,
    )
    return reason and f"by XLA: {reason}"


def _axes(stored: Stored, ndim: int):
    return part_axes(stored.grid, ndim)


def _separable(stored: Stored, ndim: int):
    return separable(stored.grid, ndim)


def store(
    grid: Grid,
    values: jax.Array,
    parts: Parts,
    activations: int | None = None,
    *,
    dtype: Any = None,
) -> Weight:
    """A weight held as integers.

    Args:
      grid: the grid.
      values: `[.., rows, columns]`, int8, or packed as uint8.
      parts: `scale`, and `offset` if the grid is affine.
      activations: bits of what it is multiplied with, or None.
      dtype: of the weight; None: that of the scale.

    Returns:
      A weight that represents `values * scale + offset`.
    """
    more = "" if activations is None else f", activations={activations}"
    stored = Stored(grid, activations, None, None if dtype is None else jnp.dtype(dtype).name)
    method = stored_method(f"int{grid.bits}{more}", stored, None)  # merged, never attached
    return Weight(values, parts, method)


def stored_method(name: str, stored: Stored, init: Any, merge: Any = None) -> Method:
    """The method of a weight that is held as integers and does not change.

    Args:
      name: for reports.
      stored: how the integers are read.
      init, merge: as in `Method`.

    Returns:
      The method.
    """
    return computed(
        name,
        stored,
        init=init,
        effective=stored_effective,
        axes=_axes,
        separable=_separable,
        freezes=True,
        merge=merge,
        product=stored_product,
        remark=_remark,
        beyond="" if stored.activations is None else NOT_QUANTISED,
    )


def quantised_array(
    values: Int8[AnyArray, "*lead rows columns"],
    scale: Float[AnyArray, "*lead groups 1 columns"],
    offset: Float[AnyArray, "*lead groups 1 columns"] | None = None,
    *,
    bits: int = 8,
    dtype: Any = None,
) -> Weight:
    """Makes a weight of integers with scales, as `merge` does of a quantised weight.

    Args:
      values: within the range of `bits`.
      scale: one for each of equal groups of consecutive rows, and for each column or for all.
      offset: as the scale; None for a grid that is symmetric.
      bits: 2 to 8.
      dtype: of the weight; None: that of the scale.

    Returns:
      A weight that represents `values * scale + offset`, with the fields `base` (the values) and
      `parts` (scale and offset). `lift` runs it, `jp.weights.pack` packs it.

    Raises:
      ValueError: the shapes do not fit together, or the bits are out of range.
    """
    *lead, rows, columns = values.shape
    fits = scale.ndim == values.ndim + 1 and scale.shape[:-3] == tuple(lead)
    fits = fits and scale.shape[-2] == 1 and scale.shape[-1] in (1, columns)
    if not fits or rows % scale.shape[-3] or (offset is not None and offset.shape != scale.shape):
        raise ValueError(
            f"quantised_array got values {values.shape}, scale {scale.shape} and offset "
            f"{None if offset is None else offset.shape}: expected scale and offset of shape "
            f"({''.join(f'{n}, ' for n in lead)}groups, 1, {columns}) with groups dividing {rows}"
        )
    per_tensor = scale.shape[-1] == 1 and columns > 1
    if per_tensor and scale.shape[-3] > 1:
        raise ValueError(f"scale {scale.shape}: one scale for all columns goes with one group")
    group = None if scale.shape[-3] == 1 else rows // scale.shape[-3]
    grid = make_grid(bits, group, per_tensor, offset is not None)
    parts = {"scale": scale} if offset is None else {"scale": scale, "offset": offset}
    parts = jax.tree.map(jnp.asarray, parts)
    return store(grid, jnp.asarray(values), parts, dtype=dtype)


def quantised_dot(
    x: Shaped[AnyArray, "*batch rows"],
    weight: Weight,
    *,
    implementation: None | str | Sequence[str] = None,
) -> Float[Array, "*batch columns"]:
    """`x @ W` with a weight of integers, which are dequantised as they are multiplied.

    `lift` calls it where a function multiplies with such a weight. It may be differentiated.
    Kernels for GPUs and TPUs take rows, groups and columns in multiples of 128 and, of packed
    integers, those of 3 and 4 bits; XLA takes all others, and `t.report` says so. They have not
    run on a GPU or a TPU yet.

    Args:
      x: the operand.
      weight: of two axes, from `merge`, `pack` or `quantised_array`, or one that `rtn` attached.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", or names in order of preference; None: the
        best for the platform. Ignored where the activations are quantised too: that is a product
        of integers.

    Returns:
      The product in float32, or in `x`'s dtype if that is wider.

    Raises:
      TypeError: the weight holds no integers.
      ValueError: the weight does not have two axes.

    References: [flexq].
    """
    if not is_weight(weight) or not isinstance(weight.method.settings, Stored):
        raise TypeError(
            "quantised_dot needs a weight of integers with scales, as merge or "
            f"jp.weights.quantised_array gives it, and got {type(weight).__name__}"
            + (f" of {weight.method.name}" if is_weight(weight) else "")
        )
    if weight.base.ndim != 2:
        raise ValueError(
            f"quantised_dot got a weight with {weight.base.ndim} axes and needs 2: use jax.vmap"
        )
    options = {"implementation": implementation}
    x = jnp.asarray(x)
    return stored_product(weight.method.settings, x, weight.base, weight.parts, **options)


def pack(tree: Any) -> Any:
    """Packs merged integers: of 2 bits four in a byte, of 4 two in a byte, of 6 four in three.

    Args:
      tree: of parameters, as `merge` gives it.

    Returns:
      The tree, in which the same weights hold fewer bytes; `lift` runs it with the same results.
      Weights whose rows do not divide (by 2 for 3 or 4 bits, by 4 for the others) and weights of 7
      or 8 bits stay as they are.
    """

    def one(leaf):
        if not is_weight(leaf):
            return leaf
        base, stored = one(leaf.base), leaf.method.settings
        if isinstance(stored, Stored) and base.dtype == jnp.int8:
            base = packed_values(stored.grid, base)
        return dataclasses.replace(leaf, base=base)

    return jax.tree.map(one, tree, is_leaf=is_weight)
