"""Our GRU kernel beside public ones: `python -m benchmarks.against_pararnn DIR`.

DIR is a checkout of apple/ml-pararnn (its extension built in place) or of bugkira/pararnn-torch;
both call their package `pararnn`, so one run takes one. Needs torch with CUDA beside JAX, in one
process: set XLA_PYTHON_CLIENT_PREALLOCATE=false. All start from projected gates and a zero state,
in float32, each in its own layout; theirs make a fixed number of Newton iterations [pararnn], ours
goes on to a residual of 1e-5. Errors are against float64. Has not been run: no GPU was at hand.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import recurrences, timing
from benchmarks.contenders import BACKENDS, contender
from benchmarks.points import KERNEL, Point
from pallas_kernels.shapes import Shape

GATES = ("update", "reset", "candidate")  # the order of ours, and of both of theirs
ITERATIONS = 3  # the default of both


def channels_first(gates: Sequence[np.ndarray]) -> np.ndarray:
    """`[T, B, D]` each to `[B, D, T, 3]`, as the CUDA kernel reads them.

    Args:
      gates: update, reset, candidate.

    Returns:
      One contiguous array.
    """
    return np.ascontiguousarray(np.stack(gates, -1).transpose(1, 2, 0, 3))


def batch_first(gates: Sequence[np.ndarray]) -> np.ndarray:
    """`[T, B, D]` each to `[B, T, 3 D]`, as the Triton kernel reads them.

    Args:
      gates: update, reset, candidate.

    Returns:
      One contiguous array.
    """
    return np.ascontiguousarray(np.concatenate(gates, -1).transpose(1, 0, 2))


def _cuda(torch: Any, gates: Sequence[np.ndarray], weights: Sequence[np.ndarray]):
    """The fused CUDA kernel: a call, and what makes its result `[T, B, D]`."""
    from pararnn.rnn_cell.gru_diag_mh import GRUDiagMHImpl  # pyright: ignore[reportMissingImports]

    joined = torch.from_numpy(channels_first(gates)).cuda()
    diagonal = torch.from_numpy(np.ascontiguousarray(np.stack(weights, -1))).cuda()
    return (
        lambda: GRUDiagMHImpl._fused_parallel_fwd(diagonal, joined),
        lambda h: h.permute(2, 0, 1),
    )


def _triton(torch: Any, gates: Sequence[np.ndarray], weights: Sequence[np.ndarray]):
    """The fused Triton kernel: a call, and what makes its result `[T, B, D]`."""
    from pararnn.kernels.newton_gru import (  # pyright: ignore[reportMissingImports]
        newton_gru_fused,
    )

    joined = torch.from_numpy(batch_first(gates)).cuda()
    diagonals = [torch.from_numpy(np.ascontiguousarray(w)).cuda() for w in weights]
    return (
        lambda: newton_gru_fused(joined, *diagonals, max_iters=ITERATIONS, omega=1.0),
        lambda h: h.permute(1, 0, 2),
    )


def which(checkout: Path) -> tuple[str, Path, Callable[..., Any]]:
    """What a checkout is.

    Args:
      checkout: its folder.

    Returns:
      A name, the folder to import from, and how to call it.

    Raises:
      SystemExit: it is neither.
    """
    if (checkout / "pararnn/csrc").is_dir():
        return "CUDA (apple/ml-pararnn)", checkout, _cuda
    if (checkout / "src/pararnn/kernels").is_dir():
        return "Triton (bugkira/pararnn-torch)", checkout / "src", _triton
    raise SystemExit(
        f"{checkout} has neither pararnn/csrc (apple/ml-pararnn) nor src/pararnn/kernels "
        "(bugkira/pararnn-torch); give the folder of a checkout of one of them"
    )


def compare(torch: Any, shape: Shape, call: Callable[..., Any]) -> dict[str, float]:
    """Times both on the same gates.

    Args:
      torch: the module.
      shape: T, B, D.
      call: from `which`.

    Returns:
      `theirs_ms`, `ours_ms`, `ratio`, and both errors.
    """
    recurrence = recurrences.make("gru", shape.width)
    (operands,) = recurrences.data(recurrence, shape, "float32")
    true = recurrences.truth(recurrence, operands)
    # jp.cells names its weights; make() sorted them.
    by_name = dict(zip(sorted(GATES), map(np.asarray, recurrence.consts), strict=True))
    gates = [np.asarray(x) for x in operands.xs]
    theirs, layout = call(torch, gates, [by_name[name] for name in GATES])
    theirs_ms = _torch_ms(torch, theirs)
    got = {"theirs": layout(theirs()).cpu().numpy()}

    point = Point("gru", "float32", "forward", shape, KERNEL)
    run = jax.jit(contender(point, BACKENDS[jax.default_backend()]))
    result = run(recurrence.consts, *operands)
    got["ours"] = np.asarray(result.states[0])
    ours = timing.measure(lambda: run(recurrence.consts, *operands))
    size = np.abs(true.states[0]).max()
    return {
        "theirs_ms": theirs_ms,
        "ours_ms": ours.median,
        "ratio": theirs_ms / ours.median,
        **{
            f"{name}_error": float(
                np.abs(recurrences.corner(jax.numpy.asarray(h)) - true.states[0]).max() / size
            )
            for name, h in got.items()
        },
    }


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
    options = parser.parse_args(arguments)
    name, folder, call = which(options.checkout)
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit(
            "torch is not installed here; it is needed beside JAX, with CUDA"
        ) from None
    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        raise SystemExit("both torch and JAX must see the GPU; one of them does not")
    sys.path.insert(0, str(folder))
    print(f"{name} and ours, GRU forward, float32, {jax.devices()[0].device_kind}")
    for steps in options.lengths:
        for batch in options.batches:
            for width in options.widths:
                try:
                    found = compare(torch, Shape(steps, batch, width), call)
                except Exception as error:  # a shape that one of them refuses
                    print(f"T, B, D = {steps}, {batch}, {width}: {type(error).__name__}: {error}")
                    continue
                print(
                    f"T, B, D = {steps}, {batch}, {width}: theirs {found['theirs_ms']:.3g} ms "
                    f"(error {found['theirs_error']:.0e}), ours {found['ours_ms']:.3g} ms "
                    f"(error {found['ours_error']:.0e}): {found['ratio']:.2f} times",
                    flush=True,
                )


if __name__ == "__main__":
    main()
