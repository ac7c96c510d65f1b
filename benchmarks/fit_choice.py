"""Fits the map of `jp.auto` to the rows of a benchmark: `python -m benchmarks.fit_choice CSV`.

A point of the map holds the speed-up of each path of `newton_scan` over `lax.scan`, with gradients
and in float32. `python -m experiments.fit_choice` measures such a map directly; this command needs
no Hydra and no second run on the device.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.points import SCAN, SOLVER
from benchmarks.recurrences import leaves
from benchmarks.report import Measured, speed_up
from experiments.contest import choice_map


def points(measured: Measured) -> list[dict[str, Any]]:
    """Selects the points of the map: shapes with correct rows of `lax.scan` and of some path.

    Args:
      measured: the rows.

    Returns:
      Points as `jaxpara.recurrence.rule` reads them, by cell and size.
    """
    found: dict[tuple[Any, ...], tuple[dict[str, Any], dict[str, Any]]] = {}
    for point, row in sorted(measured.items()):
        gain = speed_up(measured, point)
        if not point.implementation.startswith(SOLVER) or gain is None:
            continue
        scan = measured[point._replace(implementation=SCAN)]
        speedup, spread = found.setdefault((point.op, point.shape), ({}, {"scan": _spread(scan)}))
        name = point.implementation.removeprefix(SOLVER)
        speedup[name], spread[name] = gain, _spread(row)
    return [
        choice_map.point(
            op,
            block=leaves(op).states,
            steps=shape.steps,
            elements=leaves(op).states * shape.batch * shape.width,
            speedup=speedup,
            spread_ms=spread,
        )
        for (op, shape), (speedup, spread) in found.items()
    ]


def _spread(row: dict[str, Any]) -> list[float]:
    return [row["ms_low"], row["ms"], row["ms_high"]]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Entry of `python -m benchmarks.fit_choice`.

    Args:
      arguments: of the command line.

    Returns:
      The file of the map.

    Raises:
      SystemExit: the rows hold no point, or are from several devices.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("csv", type=Path, help="rows of benchmarks.kernels")
    parser.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="gpu")
    parser.add_argument("--output", type=Path, help="default: what jp.auto reads")
    options = parser.parse_args(arguments)
    read = rows.read(options.csv)
    made = points({rows.point_of(row): row for row in read})
    if not made:
        parser.error(
            f"{options.csv} has no newton_scan row beside a lax.scan row of the same point; run "
            "`python -m benchmarks.kernels --parts crossover` until they are there"
        )
    devices = sorted({str(row["device"]) for row in read})
    if len(devices) > 1:
        parser.error(f"{options.csv} mixes devices {devices}; a map is for one")
    output = choice_map.write(
        made,
        options.output,
        platform=options.platform,
        device=devices[0],
        jax=str(read[0]["jax"]),
        date=str(read[0]["date"]),
    )
    print(f"wrote {len(made)} points to {output}")
    return output


if __name__ == "__main__":
    main()
