"""What the tests cost, by wing: printed after each run, beside the last table if there is one.

CPU-seconds, those of compiling included, because they hardly depend on what else a machine does.
`make test ARGS="--write-durations -m 'not slow'"` writes the table anew, and beside it
the list of the test functions that are not cheap, which `make check` leaves out. A run of parts of
the tests prints only the wings that it ran, and is compared with nothing that it did not run whole.
"""

import collections
import csv
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("durations.csv")
LIST = Path(__file__).with_name("dear.txt")
# CPU-seconds: of a test, such as the row of a method in a conformance table, and of a wing, which
# are six minutes on two cores.
A_TEST, A_WING = 4.0, 720.0
CHEAP = 0.4  # of a test of a function, on average: a minute and a half for all of them
SLOWEST = 8  # named after each run


class Cost(NamedTuple):
    """Tests of a wing and their CPU-seconds."""

    tests: int
    cpu_s: float


def now() -> float:
    """CPU-seconds of this process and of the processes that it has waited for."""
    return sum(os.times()[:4])


def wing_of(test: str) -> str:
    """`tests/weights/test_lift.py::test_a[b]` -> `weights`."""
    return test.split("/")[1]


def by_wing(costs: Mapping[str, float]) -> dict[str, Cost]:
    """The sums over wings, of tests by name."""
    sums: dict[str, list[float]] = collections.defaultdict(list)
    for test, cpu_s in costs.items():
        sums[wing_of(test)].append(cpu_s)
    return {wing: Cost(len(each), sum(each)) for wing, each in sorted(sums.items())}


def function_of(test: str) -> str:
    """`tests/weights/test_lift.py::test_a[b]` -> `tests/weights/test_lift.py::test_a`."""
    return test.partition("[")[0]


def dear(costs: Mapping[str, float]) -> list[str]:
    """The functions whose tests cost more than `CHEAP` on average."""
    found: dict[str, list[float]] = collections.defaultdict(list)
    for test, cpu_s in costs.items():
        found[function_of(test)].append(cpu_s)
    return sorted(name for name, each in found.items() if sum(each) / len(each) > CHEAP)


def read(path: Path = TABLE) -> dict[str, Cost]:
    """The committed table, empty where there is none."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {r["wing"]: Cost(int(r["tests"]), float(r["cpu_s"])) for r in csv.DictReader(file)}


def write(costs: Mapping[str, Cost], path: Path = TABLE) -> None:
    """Writes the table."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["wing", "tests", "cpu_s", "python"])
        version = ".".join(platform.python_version_tuple()[:2])
        rows.writerows([w, cost.tests, round(cost.cpu_s), version] for w, cost in costs.items())


def lines(costs: Mapping[str, float], last: Mapping[str, Cost]) -> Iterable[str]:
    """The report on tests by name, beside a table."""
    yield f"{'wing':<12}{'tests':>7}{'CPU s':>8}{'last':>8}{'budget':>8}"
    for wing, cost in by_wing(costs).items():
        before = last.get(wing)
        shown = f"{before.cpu_s:8.0f}" if before and before.tests == cost.tests else f"{'':>8}"
        over = "  over its budget" if cost.cpu_s > A_WING else ""
        yield f"{wing:<12}{cost.tests:>7}{cost.cpu_s:>8.0f}{shown}{A_WING:>8.0f}{over}"
    dear = sorted(((s, test) for test, s in costs.items() if s > A_TEST), reverse=True)
    if dear:
        share = sum(s for s, _ in dear) / sum(costs.values())
        yield f"{len(dear)} of {len(costs)} tests take over {A_TEST:g} CPU s, {share:.0%} of all:"
    yield from (f"{s:8.1f}  {test}" for s, test in dear[:SLOWEST])
