"""A matmul with integer weights, dequantised as they are multiplied."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.custom_batching import custom_vmap

from pallas_kernels.dispatch import first_that_works
from pallas_kernels.quantised_dot import reference
from pallas_kernels.quantised_dot.packing import refusal
from pallas_kernels.quantised_dot.reference import integer_dot

__all__ = ["integer_dot", "quantised_dot", "refusal"]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _kernel(run, options: tuple[tuple[str, Any], ...], *operands):
    return _folded(functools.partial(run, bits=dict(options)["bits"]))(*operands)


def _folded(run):
    """With a batching rule: a batch of `x` is more rows; with a batch of weights one by one."""

    @custom_vmap
    def call(x, *weight):
        return run(x, *weight)

    @call.def_vmap
    def _rule(size, batched, *operands):
        if not any(batched[1:]):
            x, *weight = operands
            out = call(x.reshape(-1, x.shape[-1]), *weight)
            return out.reshape(size, x.shape[1], -1), True

        def one(rows):
            left = iter(rows)
            return call(
                *(next(left) if has else a for a, has in zip(operands, batched, strict=True))
            )

        each = [a for a, has in zip(operands, batched, strict=True) if has]
        return lax.map(one, each), True

    return call


@_kernel.defjvp
def _(run, options, primals, tangents):
    plain = functools.partial(reference.quantised_dot, **dict(options))
    out = _kernel(run, options, *primals)
    # What is computed from the integers is computed again where the derivative is transposed.
    return out, jax.jvp(jax.checkpoint(plain), primals, tangents)[1].astype(out.dtype)


def _mosaic_tpu(x, values, scale, offset, **options: Any):
    from pallas_kernels.quantised_dot import tpu  # Pallas takes long to import

    return _kernel(tpu.quantised_dot, tuple(options.items()), *_given(x, values, scale, offset))


def _mosaic_gpu(x, values, scale, offset, **options: Any):
    from pallas_kernels.quantised_dot import gpu  # Pallas takes long to import

    return _kernel(gpu.quantised_dot, tuple(options.items()), *_given(x, values, scale, offset))


def _given(*operands):
    return [a for a in operands if a is not None]


def quantised_dot(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    bits: int,
    precision: Any = None,
    dtype: Any = None,
    implementation: None | str | Sequence[str] = None,
) -> jax.Array:
    """`x @ (values * scale + offset)`, differentiable in `x`, the scale and the offset.

    Args:
      x: `[m, rows]`, floating.
      values: int8 `[rows, columns]`, or packed as uint8.
      scale: `[groups, columns]` or `[groups, 1]`; each is for `rows / groups` consecutive rows.
      offset: as the scale, or None.
      bits: of the integers.
      precision: of the product, as for `jnp.matmul`.
      dtype: of the weight that the integers represent; None: that of the scale.
      implementation: `"mosaic_gpu"`, `"mosaic_tpu"`, `"xla"`, or names in order; None: the
        best for the platform.

    Returns:
      `[m, columns]` in `x`'s dtype or float32, whichever is wider.

    Raises:
      ValueError: an unknown implementation.
      NoImplementation: the implementations that were named cannot take the call.
    """
    known = {
        "mosaic_gpu": _mosaic_gpu,
        "mosaic_tpu": _mosaic_tpu,
        "xla": reference.quantised_dot,
    }
    # No kernel takes an array without rows.
    wanted = implementation if len(x) else "xla"
    run = first_that_works(known, wanted, platform=jax.default_backend())
    return run(x, values, scale, offset, bits=bits, precision=precision, dtype=dtype)
