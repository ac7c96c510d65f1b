"""`h_t = f(h_{t-1}, x_t, p)`, elementwise, solved over all t in one kernel; and its gradients.

Time-major: inputs and states `[T, B, D]`, initial states `[B, D]`, parameters `[1, D]` or
`[B, D]`, in float32 or a narrower storage type; arithmetic is float32. `vmap` makes B longer.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from pallas_kernels import compat
from pallas_kernels.batches import folded
from pallas_kernels.cell import ElementwiseCell
from pallas_kernels.dispatch import first_that_works
from pallas_kernels.nonlinear_recurrence import reference

Arrays = Sequence[jax.Array]


class Solved(NamedTuple):
    """States and how they were found.

    Attributes:
      states: `[T, B, D]` each.
      iterations: int32 `[B]`, the most that a window of time took; 0 from `"xla"`.
      residual: float32 `[B]`, the largest difference of a chunk's end and the next one's start in
        a window's last pass.
      fallback_steps: int32 `[B]`, steps that the kernel finished one by one.
    """

    states: list[jax.Array]
    iterations: jax.Array
    residual: jax.Array
    fallback_steps: jax.Array


class Gradients(NamedTuple):
    """Cotangents of the operands.

    Attributes:
      init: `[B, D]` each; xs: like the inputs; params: float32 `[B, D]` each.
      fallback_steps: int32 `[B]`, as in `Solved`.
    """

    init: list[jax.Array]
    xs: list[jax.Array]
    params: list[jax.Array]
    fallback_steps: jax.Array


def forward(
    cell: ElementwiseCell,
    init: Arrays,
    xs: Arrays,
    params: Arrays,
    *,
    tol: float | None = None,
    max_iters: int = 8,
    certain: bool = False,
    reverse: bool = False,
    affine: bool = False,
    chunks: int | None = None,
    window: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Solved:
    """Solves the recurrence.

    Args:
      cell: its functions.
      init, xs, params: see the module.
      tol: the largest correction that counts as rounding, relative to an element's recent
        magnitude; None for a few units in the last place, see `certificate`.
      max_iters: passes over a window before it is finished step by step.
      certain: the cell's Jacobian is proved to be the derivative of its step: then a correction
        bounds the error. Otherwise, and where the step rounds its states, a window counts as
        solved when its chunks meet bit for bit.
      reverse: from the last step to the first.
      affine: the step is affine in the state. One correction is exact but for rounding, and is
        judged like others; there is no second correction.
      chunks: of a window, rolled out side by side; None lets the kernel choose.
      window: steps that are solved together; None lets the kernel choose.
      implementation: `"mosaic_gpu"`, `"mosaic_tpu"`, `"xla"` (`lax.scan`), several in order, or
        None for the best of the platform. `"mosaic_tpu_interpret"` and `"mosaic_gpu_interpret"`
        run a kernel's body on any platform, slowly, for tests.

    Returns:
      A `Solved`.

    Raises:
      NoImplementation: none takes the call; it lists every reason.
    """
    call = _dispatched("forward", reference.forward, implementation)

    def run(init: Arrays, xs: Arrays, params: Arrays) -> Any:
        options = {"chunks": chunks, "window": window, "reverse": reverse, "affine": affine}
        options |= {"tol": tol, "max_iters": max_iters, "certain": certain}
        return tuple(call(cell, init, xs, params, **options))

    return Solved(*folded(run)(list(init), list(xs), list(params)))


def backward(
    cell: ElementwiseCell,
    init: Arrays,
    xs: Arrays,
    params: Arrays,
    states: Arrays,
    cotangents: Arrays,
    *,
    reverse: bool = False,
    chunks: int | None = None,
    window: int | None = None,
    implementation: str | Sequence[str] | None = None,
) -> Gradients:
    """Gradients of `sum(states * cotangents)` at the solution.

    Args:
      cell, init, xs, params, reverse, chunks, window, implementation: as for `forward`.
      states: the solution.
      cotangents: of the states, `[T, B, D]` each.

    Returns:
      A `Gradients`; its `params` are not summed over B.

    Raises:
      NoImplementation: none takes the call; it lists every reason.
    """
    call = _dispatched("backward", reference.backward, implementation)

    def run(init: Arrays, timed: Sequence[Arrays], params: Arrays) -> Any:
        options = {"chunks": chunks, "window": window, "reverse": reverse}
        return tuple(call(cell, init, timed[0], params, timed[1], timed[2], **options))

    timed = [list(xs), list(states), list(cotangents)]
    return Gradients(*folded(run)(list(init), timed, list(params)))


FILES: Mapping[str, tuple[str, str]] = {
    "forward_mosaic_gpu": ("gpu", "forward"),
    "forward_mosaic_tpu": ("tpu", "forward"),
    "backward_mosaic_gpu": ("gpu_backward", "backward"),
    "backward_mosaic_tpu": ("tpu_backward", "backward"),
}


def _kernel(which: str, name: str, interpreted: bool, plain: Any) -> Callable[..., Any]:
    """A kernel, imported when it is called: its module may need a newer JAX than this one.

    Without lanes there is nothing to launch: `plain` gives empty arrays of the right shapes.
    """

    def call(cell: ElementwiseCell, init: Arrays, xs: Arrays, *args: Any, **kwargs: Any) -> Any:
        if any(0 in array.shape for array in init):  # of a batch that vmap made, too
            return plain(cell, init, xs, *args, **kwargs)
        file, function = FILES[f"{which}_{name}"]
        module = importlib.import_module(f"{__name__}.{file}")
        if interpreted:
            kwargs["interpret"] = _simulator() if name == "mosaic_gpu" else True
        with jax.enable_x64(False):  # where the user has it on, indices would be 64 bits wide
            return getattr(module, function)(cell, init, xs, *args, **kwargs)

    return call


def _simulator() -> Any:
    simulator = getattr(compat.mosaic_gpu(), "InterpretGPUParams", None)
    if simulator is None:
        raise NotImplementedError("this JAX has no simulator of Mosaic GPU; 0.12 has")
    return simulator()


def _dispatched(which: str, plain: Any, implementation: Any) -> Callable[..., Any]:
    names = ("mosaic_gpu", "mosaic_tpu")
    offered = {name: _kernel(which, name, False, plain) for name in names} | {"xla": plain}
    if implementation is not None:  # interpretation is for those who ask for it by name
        offered |= {f"{name}_interpret": _kernel(which, name, True, plain) for name in names}
    return first_that_works(offered, implementation, platform=jax.default_backend())
