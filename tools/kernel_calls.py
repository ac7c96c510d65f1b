"""A kernel as a function of arrays, and the shapes of those arrays, for `compile_worker`."""

import importlib
from typing import Any

import jax

from benchmarks import recurrences
from pallas_kernels.shapes import Shape
from tools.compile_kernels import PRODUCTS, STORAGE

MODULES = {"forward": ("gpu", "tpu"), "backward": ("gpu_backward", "tpu_backward")}


def kernel_call(
    target: str, recurrence: str, which: str, storage: str, shape: tuple[int, int, int]
) -> tuple[Any, tuple[Any, ...]]:
    """Makes a call of a backend's kernel on a cell that was prepared from its Python step.

    Args:
      target: `h100` or a TPU.
      recurrence: of `compile_kernels.RECURRENCES` or `PRODUCTS`.
      which: `forward`, `backward` or `product`.
      storage: of `compile_kernels.STORAGE`.
      shape: T, B, D, or m, rows, columns.

    Returns:
      A function of the operands, and their shapes.
    """
    if which == "product":
        return _product(target, PRODUCTS[recurrence], STORAGE[storage][0], shape)
    module = MODULES[which][target != "h100"]
    kernel = getattr(
        importlib.import_module(f"pallas_kernels.nonlinear_recurrence.{module}"), which
    )
    narrow, carried = STORAGE[storage]
    chosen = recurrences.make(recurrence, shape[2])
    prepared = recurrences.prepared(chosen, Shape(*shape), narrow)
    cell = prepared.cell

    def arrays(count, sizes, dtype):
        return [jax.ShapeDtypeStruct(tuple(sizes), dtype) for _ in range(count)]

    init = arrays(cell.states, shape[1:], carried)
    xs, params = jax.eval_shape(
        prepared.operands, chosen.consts, arrays(chosen.leaves.inputs, shape, narrow)
    )
    states = arrays(cell.states, shape, carried)
    if which == "forward":

        def forward(init, xs, params):
            # As for users: the default tolerance, and the proved properties of the step.
            how = {"tol": None, "max_iters": 8}
            known = {"certain": chosen.certain, "affine": chosen.affine}
            return kernel(cell, init, xs, params, **how, **known)

        return forward, (init, xs, params)

    def backward(init, xs, params, states, cotangents):
        return kernel(cell, init, xs, params, states, cotangents)

    return backward, (init, xs, params, states, states)


def _product(
    target: str, bits: int, dtype: str, shape: tuple[int, int, int]
) -> tuple[Any, tuple[Any, ...]]:
    """`x @ (values * scale)` by the kernel of a backend, one scale for 128 rows, packed below 8."""
    m, rows, columns = shape
    backend = "gpu" if target == "h100" else "tpu"
    kernel = importlib.import_module(f"pallas_kernels.quantised_dot.{backend}").quantised_dot
    packed = (rows * bits // 8, columns) if bits < 8 else (rows, columns)
    operands = (
        jax.ShapeDtypeStruct((m, rows), dtype),
        jax.ShapeDtypeStruct(packed, "uint8" if bits < 8 else "int8"),
        jax.ShapeDtypeStruct((rows // 128, columns), "float32"),
    )
    return lambda x, values, scale: kernel(x, values, scale, bits=bits), operands
