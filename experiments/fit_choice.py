"""Fits the rule of `jp.auto` on this machine: `python -m experiments.fit_choice`.

Measures the speed-up of each path of `newton_scan`, with the reverse rule of training, over
`lax.scan` (forward and backward, with JAX's own derivative). The grid has lengths, widths,
Jacobian block sizes, and gates as arrays of their own or in one input. Writes the points as the
data that the rule looks up.
"""

import datetime
import functools
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import hydra
import jax
from hydra.utils import instantiate
from jax import lax
from omegaconf import DictConfig
from rich.console import Console

import jaxpara as jp
from experiments.contest import choice_map
from experiments.contest.recurrence_problem import both_passes, make_problem, stacked, through
from experiments.contest.timing import measure, prepare
from experiments.run import outputs
from experiments.shell.commandline import command, guarded

# Before the name of a cell of the grid: its gates are cut out of one input.
_STACKED = "stacked_"


def measure_point(
    cell: str, shape: tuple[int, int, int], paths: dict[str, Any], rounds: int, budget_s: float
) -> dict[str, Any]:
    """Measures one point of the map: speed-ups of every path over `lax.scan`."""
    problem = make_problem(cell.removeprefix(_STACKED), *shape)
    problem = stacked(problem) if cell.startswith(_STACKED) else problem
    data = (problem.params, problem.init, problem.gates, problem.cotangent)

    scans = {"scan": lax.scan}
    for name, solver in paths.items():
        scans[name] = functools.partial(jp.newton_scan, solver=solver, derivative="reverse")
    calls = {
        name: prepare(both_passes(through(scan, problem.step))["forward_backward"], *data)
        for name, scan in scans.items()
    }
    timings = measure(calls, rounds=rounds, budget_s=budget_s)
    first = jax.tree.map(lambda gate: gate[0], problem.gates)
    structure = jp.jacobian_structure(
        lambda h, x: problem.step(problem.params, h, x), problem.init, first
    )
    leaves = jax.tree.leaves(problem.init)
    widest = max(gate.size for gate in jax.tree.leaves(first))
    return choice_map.point(
        cell,
        block=structure.size([leaf.shape for leaf in leaves]),
        steps=shape[0],
        elements=sum(leaf.size for leaf in leaves),
        inputs=max(1, widest / max(leaf.size for leaf in leaves)),
        speedup={n: timings["scan"].median / timings[n].median for n in paths},
        spread_ms={n: [t.low * 1e3, t.median * 1e3, t.high * 1e3] for n, t in timings.items()},
    )


def fit(
    grid: dict[str, list[list[int]]],
    paths: dict[str, Any],
    rounds: int,
    budget_s: float,
    output: Path | None,
    console: Console,
) -> None:
    """Measures every point and writes the map.

    Args:
      grid: shapes T, B, D of each cell.
      paths: solvers by name.
      rounds: timings of each.
      budget_s: seconds for each.
      output: a new file; None: the data that `jp.auto` reads.
      console: to report to.

    Raises:
      RunError: the file is there, or cannot be written.
    """
    version = importlib.metadata.version("jax")
    default = choice_map.default(jax.default_backend(), version)
    if output is None:
        outputs.check_writable(default, f"output={default}")
    else:
        outputs.new(output).parent.mkdir(parents=True, exist_ok=True)
    points = []
    for cell, shapes in grid.items():
        for shape in shapes:
            point = measure_point(cell, tuple(shape), paths, rounds, budget_s)
            points.append(point)
            gains = ", ".join(f"{n} {s:.2f}x" for n, s in point["speedup"].items())
            console.print(f"{cell} T, B, D = {shape}: {gains}", highlight=False)
            jax.clear_caches()
    if output is not None:
        outputs.new(output)  # others may have been faster
    written = choice_map.write(
        points,
        output,
        platform=jax.default_backend(),
        device=f"{jax.devices()[0].device_kind}, {platform.machine()}",
        jax=version,
        date=datetime.date.today().isoformat(),
    )
    console.print(f"wrote {len(points)} points to {written}")


@command
@hydra.main(version_base="1.3", config_path="conf", config_name="fit_choice")
def main(config: DictConfig) -> None:
    """Entry of `python -m experiments.fit_choice`."""

    def program():
        settings = instantiate(config, _convert_="all")
        fit(
            settings["grid"],
            settings["paths"],
            settings["rounds"],
            settings["budget_s"],
            Path(settings["output"]) if settings["output"] else None,
            Console(),
        )

    guarded(program, config)


if __name__ == "__main__":
    main()
