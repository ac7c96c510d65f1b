"""Logistic and tanh in few instructions, for cells in Mosaic GPU kernels.

The compiler makes 17 instructions of `1 / (1 + exp(-x))` and 16 of `tanh`. Most of them handle
denormal numbers and arguments that cannot occur here. Written on the GPU's own `ex2` and `rcp` they
take 4 and 13, and are good to two or three units in the last place (the logistic of a large
negative x to 8e-8 |x|, relatively). The `rough` functions are good to 1e-3 in 3 and 1 instructions.
They serve to guess where chunks of time start, never for what is returned.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import mosaic_gpu
from pallas_kernels.mosaic import row_layout, tile_layout

_LOG2_E = 1.4426950408889634
# tanh(x) = x (1 + u (c0 + c1 u + c2 u^2 + c3 u^3)), u = x^2, within 4e-8 of it for |x| < _NEAR.
_NEAR = 0.55
_SERIES = (-0.33332947, 0.13320725, -0.0526718, 0.01643755)


def exact(interpret: Any = None) -> Mapping[str, Callable[[jax.Array], jax.Array]]:
    """By the name of their primitive: functions for `ElementwiseCell.using`.

    Args:
      interpret: not None in the simulator, which knows no instruction of a GPU; then the same
        formulas use JAX's `exp2` and division.

    Returns:
      `logistic` and `tanh`, to float32 rounding, and tanh's derivative given tanh.
    """
    if interpret is None:
        exp2 = lambda x: _emitted(lambda a: a.exp2(approx=True), x)  # noqa: E731
        reciprocal = lambda x: _emitted(_reciprocal, x)  # noqa: E731
    else:
        exp2, reciprocal = lax.exp2, lambda x: 1.0 / x

    def logistic(x: jax.Array) -> jax.Array:
        return reciprocal(1.0 + exp2(-_LOG2_E * x))

    def tanh(x: jax.Array) -> jax.Array:
        # Right at infinities, too: 1 - 2 / (1 + inf) and 1 - 2 / (1 + 0).
        far = 1.0 - 2.0 * reciprocal(1.0 + exp2(2.0 * _LOG2_E * x))
        u = x * x
        series = _SERIES[3]
        for c in _SERIES[2::-1]:
            series = series * u + c
        return jnp.where(jnp.abs(x) < _NEAR, x * (series * u + 1.0), far)  # -0 stays -0

    # One fused multiply-add, which rounds once.
    return {"logistic": logistic, "tanh": tanh, "one_minus_square": lambda x: 1.0 - x * x}


def rough(interpret: Any = None) -> Mapping[str, Callable[[jax.Array], jax.Array]]:
    """The same to about 1e-3, on one instruction, `tanh.approx`.

    Args:
      interpret: as for `exact`; the simulator rounds to as many digits.

    Returns:
      What `exact` returns.
    """

    def tanh(x: jax.Array) -> jax.Array:
        if interpret is None:
            return _emitted(lambda a: a.tanh(approx=True), x)
        return jnp.tanh(x).astype(jnp.bfloat16).astype(jnp.float32)

    return {
        "logistic": lambda x: 0.5 * tanh(0.5 * x) + 0.5,
        "tanh": tanh,
        "one_minus_square": lambda x: 1.0 - x * x,
    }


def _emitted(emit: Callable[[Any], Any], x: jax.Array) -> jax.Array:
    """What Mosaic GPU's own method makes of registers, in the layout that the kernels use."""
    gpu = mosaic_gpu()
    layout = (tile_layout if x.ndim == 2 else row_layout)(x.shape[-1])
    result = gpu.ShapeDtypeStruct(x.shape, jnp.float32, layout)
    inline = gpu.inline_mgpu(arg_types=(layout,), return_type=result)
    return inline(lambda _, registers: emit(registers))(gpu.layout_cast(x, layout))


def _reciprocal(x: Any) -> Any:
    """Without the scaling of denormal numbers and of those near the largest, in Mosaic's terms."""
    lift = getattr(x, "_lift_fast_instr", None)
    return 1.0 / x if lift is None else x._pointwise(lift("rcp.approx.ftz.f32"))
