"""A matmul with integer weights as XLA does it: what the kernels must equal."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantised_dot.packing import unpack


def quantised_dot(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    bits: int,
    precision=None,
    dtype: Any = None,
) -> jax.Array:
    """`x @ (values * scale + offset)`, the scales after the sum where that costs less.

    Args:
      x: `[m, rows]`, floating.
      values: int8 `[rows, columns]`, or packed as uint8.
      scale: `[groups, columns]` or `[groups, 1]`; each is for `rows / groups` consecutive rows.
      offset: as the scale, or None.
      bits: of the integers.
      precision: of the product, as for `jnp.matmul`.
      dtype: of the weight that the integers represent; None: that of the scale. Where the weight
        is built, it is not rounded to less than that.

    Returns:
      `[m, columns]` in `x`'s dtype or float32, whichever is wider.
    """
    if values.dtype == jnp.uint8:
        values = unpack(values, bits)
    (rows, columns), groups, m = values.shape, scale.shape[0], x.shape[0]
    out = jnp.promote_types(x.dtype, jnp.float32)
    options = {"precision": precision, "preferred_element_type": out}
    weights = values.reshape(groups, rows // groups, columns)
    if groups > 1 and m * groups > rows:
        # A sum a group would be larger than the weight itself.
        dense = weights.astype(out) * scale[:, None].astype(out)
        if offset is not None:
            dense = dense + offset[:, None].astype(out)
        dtype = jnp.promote_types(x.dtype, scale.dtype if dtype is None else dtype)
        return jnp.matmul(x, dense.reshape(rows, columns).astype(dtype), **options)
    # Integers of 8 bits are exact in every floating dtype down to bfloat16. The groups come first:
    # XLA has no product of bfloat16 with float32 sums on a CPU whose batch is another axis.
    parts = jnp.swapaxes(x.reshape(m, groups, rows // groups), 0, 1)
    sums = jnp.matmul(parts, weights.astype(x.dtype), **options)
    total = jnp.sum(sums * scale[:, None].astype(out), axis=0)
    return with_offset(total, x, offset)


def with_offset(product: jax.Array, x: jax.Array, offset: jax.Array | None) -> jax.Array:
    """Adds what the offsets contribute: of each group, the offset times the sum of `x`.

    Args:
      product: `[m, columns]`.
      x: `[m, rows]`.
      offset: `[groups, columns]`, `[groups, 1]`, or None.

    Returns:
      `[m, columns]`.
    """
    if offset is None:
        return product
    sums = x.reshape(len(x), len(offset), x.shape[1] // len(offset)).sum(-1, dtype=product.dtype)
    offset = wide(offset, product.shape[1]).astype(product.dtype)
    return product + jnp.matmul(sums, offset, precision="highest")


# Rows whose products of two int8 numbers cannot overflow an int32.
_EXACT = 2**16


def integer_dot(
    x: jax.Array,
    x_scale: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    bits: int,
) -> jax.Array:
    """A matmul of integers with integers, summed exactly in int32 over up to `_EXACT` rows.

    Longer groups are sums of such sums.

    Args:
      x: int8 `[m, rows]`.
      x_scale: `[m, groups]`: `x` represents `x * x_scale`.
      values, scale, offset, bits: as for `quantised_dot`.

    Returns:
      `[m, columns]` in the dtype of `x_scale`.
    """
    if values.dtype == jnp.uint8:
        values = unpack(values, bits)
    (rows, columns), groups, m = values.shape, x_scale.shape[1], x.shape[0]
    parts = x.reshape(m, groups, rows // groups)
    weights = values.reshape(groups, rows // groups, columns)
    scales = x_scale[:, :, None] * scale
    total = jnp.zeros((m, columns), x_scale.dtype)
    for begin in range(0, rows // groups, _EXACT):
        some = slice(begin, begin + _EXACT)
        sums = jnp.einsum(
            "mgk,gkn->mgn", parts[:, :, some], weights[:, some], preferred_element_type=jnp.int32
        )
        total = total + jnp.sum(sums.astype(x_scale.dtype) * scales, axis=1)
    # sum (q s + o) x = s sum q x + o sum x, x being an integer times a scale.
    own = (parts * x_scale[:, :, None]).reshape(m, rows)
    return with_offset(total, own, offset)


def wide(scale: jax.Array, columns: int) -> jax.Array:
    """Scales for every column, from scales for all of them."""
    return jnp.broadcast_to(scale, (scale.shape[0], columns))
