"""Makes tables and targets from `benchmarks.kernels`: `python -m benchmarks.report CSV`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.points import ITEMSIZE, KERNEL, OPS, SCAN, SOLVER, Point
from benchmarks.recurrences import leaves
from pallas_kernels.shapes import traffic

COLUMNS = (
    "T, B, D",
    "ms (quartiles)",
    "GB/s",
    "of copy",
    "x floor",
    "lax.scan ms",
    "x lax.scan",
    "iterations",
    "error, values / gradients",
    "compile s",
    "verdict",
)

Measured = dict[Point, dict[str, Any]]


def write_report(path: Path, large: Sequence[Point] = ()) -> Path:
    """Writes the tables beside the rows.

    Args:
      path: of the rows.
      large: points left out because of their size.

    Returns:
      The Markdown file.
    """
    measured = {rows.point_of(row): row for row in rows.read(path)}
    output = path.with_suffix(".md")
    output.write_text("\n".join(report(measured, large, path.name)) + "\n", encoding="utf-8")
    return output


def targets_of(path: Path) -> list[str]:
    """Lists each target, and whether the rows of a file meet it.

    Args:
      path: of the rows.

    Returns:
      One line for each target.
    """
    return targets({rows.point_of(row): row for row in rows.read(path)})


def report(measured: Measured, large: Sequence[Point], source: str) -> list[str]:
    """Formats the report, line by line.

    Args:
      measured: the rows.
      large: points left out because of their size.
      source: name of their file.

    Returns:
      Markdown.
    """
    if not measured:
        return ["Nothing was measured."]
    some = next(iter(measured.values()))
    commits = sorted({str(row["commit"]) for row in measured.values()})
    backends = sorted({str(row["backend"]) for row in measured.values() if row["backend"]})
    lines = [
        f"# Recurrence kernels on {some['device']}",
        "",
        f"JAX {some['jax']}, commit {', '.join(commits)}, {some['date']}; kernels of "
        f"{' and '.join(backends) or 'none'}; rows in {source}, by "
        "`python -m benchmarks.kernels`. The floor is the time that a copy of the same number of "
        "bytes (inputs and states, each moved once) takes at the measured bandwidth of "
        f"{some['copy_gb_s']:.0f} GB/s. Errors are the largest difference from float64 over the "
        "largest entry, in a corner of the batch. All inputs and results of a row marked * may lie "
        "in the second-level cache: its floor is not that of memory.",
        "",
        "## Targets",
        "",
        *(f"- {line}" for line in targets(measured)),
    ]
    for op in OPS:
        for dtype in ("float32", "bfloat16"):
            for which in ("forward", "forward_backward"):
                lines += _table(measured, op, dtype, which)
    lines += _paths(measured)
    if large:
        names = sorted({(p.op, p.dtype, p.which, *p.shape) for p in large})
        lines += ["", "## Left out: over 60 % of the device's memory", ""]
        lines += [f"- {op} {dtype} {which}: {t}, {b}, {d}" for op, dtype, which, t, b, d in names]
    return lines


def _table(measured: Measured, op: str, dtype: str, which: str) -> list[str]:
    points = [
        p
        for p in measured
        if (p.op, p.dtype, p.which, p.implementation) == (op, dtype, which, KERNEL)
    ]
    if not points:
        return []
    lines = ["", f"## {op}, {dtype}, {which.replace('_', ' + ')}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for point in sorted(points, key=lambda p: p.shape):
        row, scan = measured[point], measured.get(point._replace(implementation=SCAN), {})
        shape = ", ".join(map(str, point.shape)) + (" *" if row["cached"] else "")
        if row["ms"] is None:
            lines.append(f"| {shape} |" + " |" * (len(COLUMNS) - 2) + f" {row['verdict']} |")
            continue
        ratio = speed_up(measured, point)
        steps = "" if row["iterations"] is None else f"{row['iterations']:.0f}"
        if row["fallback_steps"]:
            steps += f" + {row['fallback_steps']:.0f} steps"
        errors = f"{row['value_error']:.0e}"
        if row["gradient_error"] is not None:
            errors += f" / {row['gradient_error']:.0e}"
        scan_ms = f"{scan['ms']:.4g}" if scan.get("ms") else str(scan.get("verdict", ""))
        cells = [
            shape,
            f"{row['ms']:.3g} ({row['ms_low']:.3g}, {row['ms_high']:.3g})",
            f"{row['gb_s']:.0f}",
            f"{100 * row['gb_s'] / row['copy_gb_s']:.0f} %",
            f"{row['times_floor']:.2f}",
            scan_ms,
            "" if ratio is None else f"{ratio:.3g}",
            steps,
            errors,
            f"{row['compile_s']:.1f}",
            str(row["verdict"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _paths(measured: Measured) -> list[str]:
    names = sorted({p.implementation for p in measured if p.implementation.startswith(SOLVER)})
    if not names:
        return []
    head = ["cell", "T, B, D", *(name.removeprefix(SOLVER) for name in names)]
    lines = ["", "## What `jp.auto` chooses from, times `lax.scan` with gradients, float32", ""]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    shapes = sorted({(p.op, p.shape) for p in measured if p.implementation in names})
    for op, shape in shapes:
        cells = []
        for name in names:
            point = Point(op, "float32", "forward_backward", shape, name)
            ratio = speed_up(measured, point)
            verdict = measured.get(point, {}).get("verdict", "")
            mark = " *" if measured.get(point, {}).get("cached") else ""
            cells.append(f"{ratio:.3g}{mark}" if ratio else str("" if verdict == "ok" else verdict))
        lines.append("| " + " | ".join([op, ", ".join(map(str, shape)), *cells]) + " |")
    return lines


def speed_up(measured: Measured, point: Point) -> float | None:
    """Computes the speed-up over `lax.scan` at the same point, if both are correct.

    Args:
      measured: the rows.
      point: any but `lax.scan`'s.

    Returns:
      A ratio of medians, or None.
    """
    row, scan = measured.get(point), measured.get(point._replace(implementation=SCAN))
    if not row or not scan or row["verdict"] != "ok" or scan["verdict"] != "ok":
        return None
    return scan["ms"] / row["ms"]


def targets(measured: Measured) -> list[str]:
    """Lists each target, and whether it is met.

    Args:
      measured: the rows.

    Returns:
      One line for each target.
    """
    kernels = [p for p, row in measured.items() if p.implementation == KERNEL]
    found = []
    for dtype in ("float32", "bfloat16"):
        linear = [p for p in kernels if p.op == "linear" and p.dtype == dtype]
        rest = [p for p in kernels if p.op in ("gru", "lstm") and p.dtype == dtype]
        share = lambda p: measured[p]["gb_s"] / measured[p]["copy_gb_s"]  # noqa: E731
        found += [
            _judged(
                f"linear_recurrence {dtype}: 85 % of copy bandwidth at B D >= 16384",
                measured,
                [p for p in linear if _channels(p) >= 16384],
                share,
                lambda value: value >= 0.85,
                min,
            ),
            _judged(
                f"linear_recurrence {dtype}: 60 % of copy bandwidth at B D = 2048, T >= 8192",
                measured,
                [p for p in linear if _channels(p) == 2048 and p.shape.steps >= 8192],
                share,
                lambda value: value >= 0.6,
                min,
            ),
            _judged(
                f"nonlinear_recurrence {dtype}: forward within 2.5 floors at B D, T >= 2048",
                measured,
                [p for p in rest if _large(p) and p.which == "forward"],
                lambda p: measured[p]["times_floor"],
                lambda value: value <= 2.5,
                max,
            ),
            _judged(
                f"nonlinear_recurrence {dtype}: backward within 3 floors at B D, T >= 2048",
                measured,
                [p for p in rest if _large(p) and p.which == "forward_backward"],
                lambda p: backward_floors(measured, p),
                lambda value: value <= 3.0,
                max,
            ),
        ]
    ratios = {p: speed_up(measured, p) for p in kernels if p.op in ("gru", "lstm")}
    known = {p: r for p, r in ratios.items() if r}
    if not known:
        found.append("665 times lax.scan at the best point: not measured")
    else:
        best = max(known, key=lambda p: known[p])
        met = "met" if known[best] >= 665 else "NOT met"
        found.append(
            f"665 times lax.scan at the best point: {met}, {known[best]:.0f} at {_name(best)}"
        )
    return found


def backward_floors(measured: Measured, point: Point) -> float | None:
    """Computes the time of the backward pass in units of its floor: gradients minus forward.

    Args:
      measured: the rows.
      point: of `forward_backward`.

    Returns:
      A number, or None if the forward pass was not measured.
    """
    both, forward = measured[point], measured.get(point._replace(which="forward"))
    if not forward or forward["ms"] is None or both["ms"] is None:
        return None
    moved = traffic(point.shape, leaves(point.op), ITEMSIZE[point.dtype], "backward")
    return (both["ms"] - forward["ms"]) / (moved / both["copy_gb_s"] / 1e6)


def _judged(
    text: str,
    measured: Measured,
    points: Sequence[Point],
    value: Callable[[Point], float | None],
    good: Callable[[float], bool],
    worst: Callable[..., Point],
) -> str:
    """Checks a target over all its points; a wrong row does not meet it."""
    if not points:
        return f"{text}: not measured"
    wrong = [p for p in points if measured[p]["verdict"] != "ok"]
    values = {p: v for p in points if p not in wrong and (v := value(p)) is not None}
    if not values and not wrong:
        return f"{text}: not measured"
    met = [p for p, v in values.items() if good(v)]
    state = "met" if len(met) == len(values) and not wrong else "NOT met"
    line = f"{text}: {state}, {len(met)} of {len(values) + len(wrong)} points"
    if values:
        at = worst(values, key=lambda p: values[p])
        line += f"; worst {values[at]:.2f} at {_name(at)}"
    if wrong:
        line += f"; {measured[wrong[0]]['verdict']} at {_name(wrong[0])}"
    return line


def _channels(point: Point) -> int:
    return point.shape.batch * point.shape.width


def _large(point: Point) -> bool:
    return _channels(point) >= 2048 and point.shape.steps >= 2048


def _name(point: Point) -> str:
    return f"{point.op} {point.which} {', '.join(map(str, point.shape))}"


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
