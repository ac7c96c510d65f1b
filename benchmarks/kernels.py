"""Times the recurrence kernels on this machine's device: `python -m benchmarks.kernels`.

It times linear and nonlinear recurrences, forward and with gradients, in float32 and bfloat16
storage, beside `lax.scan` in the same process and the floor of memory traffic; then the paths of
`jp.auto`. Rows are written one by one, so the same command continues where it stopped. Needs no
Hydra.
"""

import argparse
import contextlib
import dataclasses
import datetime
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import chains, provenance, recurrences, rows
from benchmarks.contenders import BACKENDS, Result, contender, refusing, without_counts
from benchmarks.points import (
    ITEMSIZE,
    KERNEL,
    OPS,
    SCAN,
    SOLVER,
    Point,
    crossover,
    fitting,
    grid,
    in_order,
    needs,
)
from benchmarks.report import targets_of, write_report
from jaxpara.recurrence import rule
from pallas_kernels.shapes import GRID, SMOKE, Shape, traffic

PARTS = ("grid", "crossover")
RESULTS = Path(__file__).resolve().parent / "results"

# Relative to the largest entry; a row above it is wrong and gets no ratio.
LARGEST_ERROR = {
    "float32": (2e-4, 2e-3),  # values and gradients
    "bfloat16": (2e-2, 5e-2),  # states and gates' gradients are stored in 8 bits
}


@dataclasses.dataclass
class Machine:
    """The values that all rows share."""

    device: str
    memory: int
    copy_gb_s: float
    jax: str
    commit: str


class Bench:
    """Measures points; keeps the data and the oracle of the current shape."""

    def __init__(self, machine: Machine, *, scan_s: float, sets: int, implementation: str | None):
        self.machine = machine
        self.scan_s = scan_s
        self.sets = sets
        self.implementation = implementation
        self._held: tuple[Any, ...] = ()
        self._step_s: dict[tuple[str, str, str], float] = {}  # lax.scan's, as measured so far

    def row(self, point: Point) -> dict[str, Any]:
        """Measures a point, or says why it was not measured.

        Args:
          point: the point.

        Returns:
          Its row.
        """
        row = self.head(point)
        expected = self._expected_s(point)
        if expected > self.scan_s:
            return row | {"verdict": f"skipped: a run would take about {expected:.0f} s"}
        try:
            return row | self._measured(point)
        except Exception as error:  # a failing point must not end the others
            first = (str(error).strip() or "no message").splitlines()[0]
            return row | {"verdict": f"failed: {type(error).__name__}: {first[:160]}"}

    def head(self, point: Point) -> dict[str, Any]:
        """Fills a row before anything is measured.

        Args:
          point: the point.

        Returns:
          The first and the last columns.
        """
        return rows.key(point) | {
            "backend": self.implementation if point.implementation == KERNEL else "",
            "copy_gb_s": self.machine.copy_gb_s,
            "device": self.machine.device,
            "jax": self.machine.jax,
            "commit": self.machine.commit,
            "date": datetime.date.today().isoformat(),
        }

    def _measured(self, point: Point) -> dict[str, Any]:
        size = ITEMSIZE[point.dtype]
        # The others are too slow to gain from a cache, and take long to compile.
        several = min(self.sets, chains.sets_needed(needs(point)))
        count = several if point.implementation == KERNEL else 1
        operands, true = self._data(point, count)
        consts = recurrences.make(point.op, point.shape.width).consts
        once = contender(point, self.implementation)
        run = jax.jit(chains.chained(once, count, without_counts))
        sets = [tuple(o) for o in operands[:count]]
        began = time.perf_counter()
        fused = point.implementation == SOLVER + "fused"
        with refusing() if fused else contextlib.nullcontext():
            lowered = run.lower(consts, sets)
        compiled = lowered.compile()
        compile_s = time.perf_counter() - began
        results = compiled(consts, sets)
        errors = _errors(results[0], true)
        found = {
            name: None if value is None else int(jnp.max(value))
            for name, value in (
                ("iterations", results[-1].iterations),
                ("fallback_steps", results[-1].fallback_steps),
            )
        }
        del results
        timed = chains.milliseconds(lambda: compiled(consts, sets), repeats=count)
        if point.implementation == SCAN:
            self._step_s[point.op, point.which, point.dtype] = timed.median / 1e3 / point.shape[0]
        moved = traffic(point.shape, recurrences.leaves(point.op), size, point.which)
        floor_ms = moved / self.machine.copy_gb_s / 1e6
        return {
            "verdict": _verdict(errors, point.dtype),
            "ms": timed.median,
            "ms_low": timed.low,
            "ms_high": timed.high,
            "samples": timed.rounds,
            "sets": count,
            "cached": int(count * needs(point) < chains.CACHE_BYTES),
            "compile_s": compile_s,
            "gb_s": moved / timed.median / 1e6,
            "floor_ms": floor_ms,
            "times_floor": timed.median / floor_ms,
            "value_error": errors[0],
            "gradient_error": errors[1],
            **found,
        }

    def _data(self, point: Point, count: int):
        """Makes operands and oracle; reuses them for the same op, storage and shape."""
        name = (point.op, point.dtype, point.shape)
        if not self._held or self._held[0] != name:
            self._held = ()  # before the next ones are made
            recurrence = recurrences.make(point.op, point.shape.width)
            operands = recurrences.data(recurrence, point.shape, point.dtype, count)
            self._held = (name, operands, recurrences.truth(recurrence, operands[0]))
        elif len(self._held[1]) < count:
            recurrence = recurrences.make(point.op, point.shape.width)
            more = recurrences.data(recurrence, point.shape, point.dtype, count)
            self._held = (name, self._held[1][:1] + more[1:], self._held[2])
        return self._held[1:]

    def _expected_s(self, point: Point) -> float:
        """Estimates the seconds of a run of `lax.scan` from shorter ones; 0 for fast paths."""
        if point.implementation != SCAN:
            return 0.0
        guess = 3e-5 if self.machine.device != "cpu" else 1e-6
        step_s = self._step_s.get((point.op, point.which, point.dtype), guess)
        return step_s * point.shape.steps


def _errors(result: Result, true: recurrences.Truth) -> tuple[float, float | None]:
    """Computes the largest error over the largest entry, of the states and of all gradients."""

    def worst(got: Sequence[Any], wanted: Sequence[np.ndarray]) -> float:
        largest = 0.0
        for g, w in zip(got, wanted, strict=True):
            gap = np.abs(recurrences.corner(g) - w).max() / max(np.abs(w).max(), 1e-30)
            largest = max(largest, float(gap) if np.isfinite(gap) else np.inf)
        return largest

    values = worst(result.states, true.states)
    if not result.d_xs:
        return values, None
    gradients = max(worst(result.d_init, true.d_init), worst(result.d_xs, true.d_xs))
    if result.d_params:
        gradients = max(gradients, worst(result.d_params, true.d_consts))
    return values, gradients


def _verdict(errors: tuple[float, float | None], dtype: str) -> str:
    largest = LARGEST_ERROR[dtype]
    if not errors[0] <= largest[0]:  # also for a NaN
        return f"wrong values ({errors[0]:.0e})"
    if errors[1] is not None and not errors[1] <= largest[1]:
        return f"wrong gradients ({errors[1]:.0e})"
    return "ok"


def machine(memory_gb: float | None, copy_bytes: int) -> Machine:
    """Describes this machine and measures its copy bandwidth.

    Args:
      memory_gb: of the device, if JAX does not know it.
      copy_bytes: of the array whose copy is timed.

    Returns:
      The values that all rows share.
    """
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    memory = int(memory_gb * 1e9) if memory_gb else int(stats.get("bytes_limit", 4e9))
    copy_gb_s = chains.copy_gb_s(copy_bytes)
    return Machine(device.device_kind, memory, copy_gb_s, jax.__version__, provenance.commit())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--grid", choices=("full", "smoke"), default="full")
    made.add_argument("--ops", nargs="+", choices=OPS, default=["gru", "lstm", "linear"])
    made.add_argument("--dtypes", nargs="+", choices=list(ITEMSIZE), default=list(ITEMSIZE))
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--implementation", help="of the kernels; default: by platform")
    made.add_argument("--minutes", type=float, default=8.0, help="stop after these; then repeat")
    made.add_argument("--scan-seconds", type=float, default=2.0, help="skip lax.scan above this")
    made.add_argument("--sets", type=int, default=chains.MOST_SETS, help="of rotated inputs")
    made.add_argument("--memory-gb", type=float, help="of the device, if JAX does not know")
    made.add_argument("--retry", action="store_true", help="measure failed rows again")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of rows and tables")
    made.add_argument("--csv", type=Path, help="file of rows; its points are not measured again")
    return made


def main(arguments: Sequence[str] | None = None) -> Path:
    """Entry of `python -m benchmarks.kernels`.

    Args:
      arguments: of the command line.

    Returns:
      The file of rows.
    """
    began = time.perf_counter()
    options = parser().parse_args(arguments)
    smoke = options.grid == "smoke"
    here = machine(options.memory_gb, (16 << 20) if smoke else (1 << 30))
    name = re.sub(r"[^a-z0-9]+", "-", here.device.lower()).strip("-")
    today = datetime.date.today().isoformat()
    path = options.csv or options.results / f"{today}-kernels-{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes: Sequence[Shape] = SMOKE if smoke else GRID
    timed = grid(shapes, options.ops, options.dtypes) if "grid" in options.parts else []
    paths = []  # that jp.auto chooses from
    if "crossover" in options.parts:
        paths = crossover(list(rule.PATHS), *([SMOKE[:1]] if smoke else []))
    points, large = fitting(in_order(timed, paths), here.memory)
    killed = rows.ended(path)
    if killed:
        rows.append(path, killed)
    done = {
        rows.point_of(row)
        for row in rows.read(path)
        if not (options.retry and str(row["verdict"]).startswith("failed"))
    }
    left = [point for point in points if point not in done]
    print(
        f"{here.device}: {here.memory / 1e9:.0f} GB, copy {here.copy_gb_s:.0f} GB/s, an empty call "
        f"{chains.call_us():.0f} us; {len(left)} of {len(points)} points to do, "
        f"{len(large)} need over 60 % of the memory -> {path}",
        flush=True,
    )
    bench = Bench(
        here,
        scan_s=options.scan_seconds,
        sets=min(options.sets, 2) if smoke else options.sets,
        implementation=options.implementation or BACKENDS[jax.default_backend()],
    )
    try:
        for number, point in enumerate(left):
            if time.perf_counter() - began > 60 * options.minutes:
                print(f"{options.minutes:g} minutes are over; {len(left) - number} points left: "
                      "the same command continues")  # fmt: skip
                break
            with rows.running(path, bench.head(point)):
                row = bench.row(point)
                rows.append(path, row)
            print(_line(point, row), flush=True)
            if str(row["verdict"]).startswith("failed") and not _alive():
                print("the device no longer answers: the same command continues after this point")
                break
    finally:
        text = write_report(path, large)
        print("\n".join([*targets_of(path), f"-> {text}"]), flush=True)
    return path


def _alive() -> bool:
    """Whether the device still computes; after some errors it does not, in this process."""
    try:
        return int(jax.jit(lambda x: x + 1)(jnp.zeros((), jnp.int32))) == 1
    except Exception:
        return False


def _line(point: Point, row: dict[str, Any]) -> str:
    what = f"{point.op} {point.dtype} {point.which} {tuple(point.shape)} {point.implementation}"
    if "ms" not in row:
        return f"{what}: {row['verdict']}"
    steps = f", {row['iterations']} iterations" if row["iterations"] is not None else ""
    return (
        f"{what}: {row['ms']:.4g} ms, {row['times_floor']:.2f} x floor{steps}, "
        f"error {row['value_error']:.0e}, {row['verdict']}"
    )


if __name__ == "__main__":
    main()
