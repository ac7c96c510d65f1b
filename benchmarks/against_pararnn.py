"""Times our GRU kernels beside public ones: `python -m benchmarks.against_pararnn DIR`.

DIR is a checkout of apple/ml-pararnn (its extension built in place) or of bugkira/pararnn-torch.
Both call their package `pararnn`, so a run takes only one of them. It needs torch with CUDA beside
JAX in one process: set XLA_PYTHON_CLIENT_PREALLOCATE=false. All start from projected gates and a
zero state in float32, each in its own layout. Theirs make a fixed number of Newton iterations
[pararnn], ours run to a residual of 1e-5. Backward, each ends at the cotangents of gates and
weights: theirs by the fused adjoint (CUDA) or a scan and a fused vjp (Triton), the rest in torch,
as in their layers. Errors are against float64.

**It has not been run on a GPU.** It is written from their sources as of November 2026 and tested
on stand-ins with their signatures and layouts.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import chains, recurrences
from benchmarks.contenders import BACKENDS, contender
from benchmarks.points import KERNEL, Point
from pallas_kernels.shapes import PASSES, Shape

Gates = Sequence[np.ndarray]
GATES = ("update", "reset", "candidate")  # the order of ours, and of both of theirs
ITERATIONS = 3  # the default of both


def channels_first(gates: Sequence[np.ndarray]) -> np.ndarray:
    """Converts three `[T, B, D]` to `[B, D, T, 3]`, as the CUDA kernel reads them.

    Args:
      gates: update, reset, candidate.

    Returns:
      One contiguous array.
    """
    return np.ascontiguousarray(np.stack(gates, -1).transpose(1, 2, 0, 3))


def batch_first(gates: Sequence[np.ndarray]) -> np.ndarray:
    """Converts three `[T, B, D]` to `[B, T, 3 D]`, as the Triton kernel reads them.

    Args:
      gates: update, reset, candidate.

    Returns:
      One contiguous array.
    """
    return np.ascontiguousarray(np.concatenate(gates, -1).transpose(1, 0, 2))


class Rival(NamedTuple):
    """Calls into other people's kernels, on the device, in their own layouts.

    Attributes:
      forward: returns the states.
      backward: from the states to the cotangents of gates and weights.
      states: from the result of `forward` to `[T, B, D]`.
      gates: from the result of `backward` to three `[T, B, D]`.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]
    states: Callable[[Any], Any]
    gates: Callable[[Any], Sequence[Any]]


def _before(torch: Any, h: Any, axis: int) -> Any:
    """Shifts states to those before each step, along `axis`, starting at zero."""
    last = h.shape[axis] - 1
    return torch.cat([torch.zeros_like(h.narrow(axis, 0, 1)), h.narrow(axis, 0, last)], axis)


def _step(torch: Any, h: Any, gates: Sequence[Any], weights: Sequence[Any]):
    """Computes update, reset and candidate of a step from `h`."""
    (x_z, x_r, x_n), (w_z, w_r, w_n) = gates, weights
    z, r = torch.sigmoid(x_z + w_z * h), torch.sigmoid(x_r + w_r * h)
    return z, r, torch.tanh(x_n + w_n * (h * r))


def jacobian(torch: Any, h: Any, gates: Sequence[Any], weights: Sequence[Any]) -> Any:
    """Computes `dh'/dh` of a GRU step.

    Args:
      torch: the module.
      h: states before the step.
      gates, weights: update, reset, candidate, of shapes that broadcast.

    Returns:
      As `h`.
    """
    w_z, w_r, w_n = weights
    z, r, n = _step(torch, h, gates, weights)
    through = z * (1 - n * n) * w_n * (r + h * r * (1 - r) * w_r)
    return 1 - z + (n - h) * z * (1 - z) * w_z + through


def pulled(torch: Any, h: Any, gates: Sequence[Any], weights: Sequence[Any], g: Any, over: Any):
    """Computes the cotangents of a GRU step's gates and weights.

    Args:
      torch: the module.
      h: states before the step.
      gates, weights: as for `jacobian`.
      g: cotangents of the new states, all later steps included.
      over: axes of batch and time, over which those of the weights are summed.

    Returns:
      Three arrays as `h`, and three `[D]`.
    """
    z, r, n = _step(torch, h, gates, weights)
    d_n = g * z * (1 - n * n)
    d_z = g * (n - h) * z * (1 - z)
    d_r = d_n * weights[2] * h * r * (1 - r)
    return (d_z, d_r, d_n), tuple(d.sum(over) for d in (d_z * h, d_r * h, d_n * h * r))


def _cuda(torch: Any, gates: Gates, weights: Gates, cotangents: np.ndarray) -> Rival:
    """The fused CUDA kernels: states `[B, D, T]`, gates `[B, D, T, 3]`, weights `[D, 3]`."""
    from pararnn.rnn_cell.gru_diag_mh import GRUDiagMHImpl  # pyright: ignore[reportMissingImports]

    joined = torch.from_numpy(channels_first(gates)).cuda()
    diagonal = torch.from_numpy(np.ascontiguousarray(np.stack(weights, -1))).cuda()
    given = torch.from_numpy(np.ascontiguousarray(cotangents.transpose(1, 2, 0))).cuda()
    columns = [w[:, None] for w in diagonal.unbind(-1)]

    def backward(h):
        total = GRUDiagMHImpl._fused_parallel_bwd(given, h, diagonal, joined)
        return pulled(torch, _before(torch, h, 2), joined.unbind(-1), columns, total, (0, 2))

    return Rival(
        lambda: GRUDiagMHImpl._fused_parallel_fwd(diagonal, joined),
        backward,
        lambda h: h.permute(2, 0, 1),
        lambda found: [d.permute(2, 0, 1) for d in found[0]],
    )


def _triton(torch: Any, gates: Gates, weights: Gates, cotangents: np.ndarray) -> Rival:
    """The fused Triton kernels: states `[B, T, D]`, gates `[B, T, 3 D]`, weights `[D]` each."""
    from pararnn.kernels import scan_diag_triton  # pyright: ignore[reportMissingImports]
    from pararnn.kernels.vjp_gru import (  # pyright: ignore[reportMissingImports]
        gru_recurrence_vjp,
    )

    try:  # in later versions
        from pararnn.kernels.custom_ops import (  # pyright: ignore[reportMissingImports]
            newton_gru_fused,
        )
    except ImportError:
        from pararnn.kernels.newton_gru import (  # pyright: ignore[reportMissingImports]
            newton_gru_fused,
        )

    joined = torch.from_numpy(batch_first(gates)).cuda()
    diagonals = [torch.from_numpy(np.ascontiguousarray(w)).cuda() for w in weights]
    given = torch.from_numpy(np.ascontiguousarray(cotangents.transpose(1, 0, 2))).cuda()
    width = given.shape[-1]

    def split(array):
        return [array.narrow(-1, i * width, width) for i in range(3)]

    def backward(h):
        before = _before(torch, h, 1)
        slopes = jacobian(torch, before, split(joined), diagonals)
        # Backwards in time, each adjoint meets the Jacobian of the step after its own.
        slopes = _before(torch, slopes.flip(1), 1)
        total = scan_diag_triton(slopes, given.flip(1).contiguous()).flip(1).contiguous()
        return gru_recurrence_vjp(before, joined, *diagonals, total)

    return Rival(
        lambda: newton_gru_fused(joined, *diagonals, max_iters=ITERATIONS, omega=1.0),
        backward,
        lambda h: h.permute(1, 0, 2),
        lambda found: [d.permute(1, 0, 2) for d in split(found[0])],
    )


def rival_in(checkout: Path) -> tuple[str, Path, Callable[..., Any]]:
    """Recognises a checkout.

    Args:
      checkout: its folder.

    Returns:
      A name, the folder to import from, and the call.

    Raises:
      SystemExit: it is neither of the two.
    """
    if (checkout / "pararnn/csrc").is_dir():
        return "CUDA (apple/ml-pararnn)", checkout, _cuda
    if (checkout / "src/pararnn/kernels").is_dir():
        return "Triton (bugkira/pararnn-torch)", checkout / "src", _triton
    raise SystemExit(
        f"{checkout} has neither pararnn/csrc (apple/ml-pararnn) nor src/pararnn/kernels "
        "(bugkira/pararnn-torch); give the folder of a checkout of one of them"
    )


def compare(torch: Any, shape: Shape, call: Callable[..., Rival], which: str) -> dict[str, float]:
    """Times both on the same gates.

    Args:
      torch: the module.
      shape: T, B, D.
      call: from `rival_in`.
      which: `forward`, or `forward_backward`: states, then cotangents of gates and weights.

    Returns:
      `theirs_ms`, `ours_ms`, `ratio`, and both errors: of states, or of the gates' cotangents.
    """
    recurrence = recurrences.make("gru", shape.width)
    (operands,) = recurrences.data(recurrence, shape, "float32")
    true = recurrences.truth(recurrence, operands)
    # jp.cells names its weights; make() sorted them.
    by_name = dict(zip(sorted(GATES), map(np.asarray, recurrence.consts), strict=True))
    gates = [np.asarray(x) for x in operands.xs]
    weights = [by_name[name] for name in GATES]
    rival = call(torch, gates, weights, np.asarray(operands.cotangents[0]))
    run = jax.jit(
        contender(Point("gru", "float32", which, shape, KERNEL), BACKENDS[jax.default_backend()])
    )
    result = run(recurrence.consts, *operands)
    if which == "forward":
        theirs, wanted = rival.forward, true.states
        found = {"theirs": [rival.states(theirs())], "ours": result.states}
    else:
        theirs, wanted = (lambda: rival.backward(rival.forward())), true.d_xs
        found = {"theirs": rival.gates(theirs()), "ours": result.d_xs}
    theirs_ms = _torch_ms(torch, theirs)
    ours = chains.milliseconds(lambda: run(recurrence.consts, *operands))
    errors = {
        f"{name}_error": max(
            float(np.abs(recurrences.corner(_on_host(g)) - w).max() / np.abs(w).max())
            for g, w in zip(got, wanted, strict=True)
        )
        for name, got in found.items()
    }
    times = {"theirs_ms": theirs_ms, "ours_ms": ours.median, "ratio": theirs_ms / ours.median}
    return times | errors


def _on_host(array: Any) -> jax.Array:
    """A tensor of theirs, or an array of ours."""
    return array if isinstance(array, jax.Array) else jax.numpy.asarray(array.cpu().numpy())


def _torch_ms(torch: Any, call: Callable[[], Any], samples: int = 15, calls: int = 10) -> float:
    """Median milliseconds by device events, after a warm-up that compiles."""
    for _ in range(3):
        call()
    taken = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / calls)
    return float(np.median(taken))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m benchmarks.against_pararnn`.

    Args:
      arguments: of the command line.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    options = parser.parse_args(arguments)
    name, folder, call = rival_in(options.checkout)
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("torch is not installed: install it with CUDA, beside JAX") from None
    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        raise SystemExit("both torch and JAX must see the GPU; one of them does not")
    sys.path.insert(0, str(folder))
    print(f"{name} and ours, GRU, float32, {jax.devices()[0].device_kind}")
    every = itertools.product(options.lengths, options.batches, options.widths, options.passes)
    for *sizes, which in every:
        shape = Shape(*sizes)
        what = f"{which} T, B, D = {', '.join(map(str, shape))}"
        try:
            found = compare(torch, shape, call, which)
        except Exception as error:  # a shape that one of them refuses
            print(f"{what}: {type(error).__name__}: {error}")
            continue
        print(
            f"{what}: theirs {found['theirs_ms']:.3g} ms (error {found['theirs_error']:.0e}), ours "
            f"{found['ours_ms']:.3g} ms (error {found['ours_error']:.0e}): {found['ratio']:.2f} "
            "times",
            flush=True,
        )


if __name__ == "__main__":
    main()
