"""A kernel as a function of arrays, and the shapes of those arrays, for `compile_worker`."""

import importlib
from typing import Any

import jax

from tools.compile_kernels import ROOT, STORAGE

MODULES = {"forward": ("gpu", "tpu"), "backward": ("gpu_backward", "tpu_backward")}


def cell_of(recurrence: str) -> tuple[Any, bool]:
    """The prepared cell of a recurrence, and whether it is affine in the state."""
    import sys

    sys.path.insert(0, str(ROOT / "tests"))
    import kernel_cells as k

    cases = {"linear": k.AFFINE, "linear2": k.AFFINE2, "gru": k.GRU, "lstm": k.LSTM}
    case = cases.get(recurrence, k.STRANGE)
    return case.cell, case.affine


def kernel_call(
    target: str, recurrence: str, which: str, storage: str, shape: tuple[int, int, int]
) -> tuple[Any, tuple[Any, ...]]:
    """One kernel of a backend, with its operands as shapes.

    Args:
      target: `h100` or a TPU.
      recurrence: of `compile_kernels.RECURRENCES`.
      which: `forward` or `backward`.
      storage: of `compile_kernels.STORAGE`.
      shape: T, B, D.

    Returns:
      A function of the operands, and their shapes.
    """
    module = MODULES[which][target != "h100"]
    kernel = getattr(
        importlib.import_module(f"pallas_kernels.nonlinear_recurrence.{module}"), which
    )
    cell, affine = cell_of(recurrence)
    narrow, carried = STORAGE[storage]
    steps, batch, width = shape

    def arrays(count, sizes, dtype):
        return [jax.ShapeDtypeStruct(sizes, dtype) for _ in range(count)]

    init = arrays(cell.states, (batch, width), carried)
    xs = arrays(cell.inputs, (steps, batch, width), narrow)
    params = arrays(cell.params, (1, width), "float32")
    states = arrays(cell.states, (steps, batch, width), carried)
    if which == "forward":

        def forward(init, xs, params):
            return kernel(cell, init, xs, params, tol=1e-5, max_iters=8, affine=affine)

        return forward, (init, xs, params)

    def backward(init, xs, params, states, cotangents):
        return kernel(cell, init, xs, params, states, cotangents)

    return backward, (init, xs, params, states, states)
