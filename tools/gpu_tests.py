"""Runs the tests marked `gpu` within a time limit and writes their results; `make gpu` starts it.

The functions of one instruction are tested first, then what users call, then the kernels by
themselves, breadth first: every test with its first parameters, then with its second. Results are
written test by test, so the same command continues where it stopped. A test that passed with the
same sources on the same device is not run again. A test in which the process died is skipped and
counts as failed.
"""

import argparse
import csv
import datetime
import pathlib
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import provenance  # noqa: E402

FIELDS = ("test", "outcome", "seconds", "says", "device", "jax", "code", "commit", "date")
DIED = "died"  # the test was started and did not end
OUT_OF_TIME = 3  # the exit status when tests are left
FIRST = ("test_mosaic_functions.py", "test_platforms.py")  # all of their rows, in this order
MOST_FAILURES = 10  # with more, the device or the build is at fault


def in_order(names: Sequence[str]) -> list[str]:
    """Orders tests: the files of `FIRST`, then each test's first parameters, its second, and so on.

    Args:
      names: pytest's, in its order.

    Returns:
      The same names.
    """
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for name in names:
        function = name.split("[")[0]
        file = pathlib.PurePath(name.split("::")[0]).name
        rank = FIRST.index(file) if file in FIRST else len(FIRST)
        turns.append(((rank, seen[function] if rank == len(FIRST) else 0), name))
        seen[function] += 1
    return [name for _, name in sorted(turns, key=lambda turn: turn[0])]


def outcomes(path: pathlib.Path, code: str, device: str) -> dict[str, str]:
    """Reads the known outcomes of the tests of these sources on this device.

    Args:
      path: of a file that may be missing.
      code: of the sources.
      device: its name.

    Returns:
      Test -> the last outcome.
    """
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if (r["code"], r["device"]) == (code, device)]
    return {row["test"]: row["outcome"] for row in rows}


class Session:
    """A pytest plugin: selects and orders the tests, stops in time, and writes the outcomes.

    `where()` returns the file, and the columns on device and sources that all its rows share. It is
    called when pytest has configured JAX, which must not have been used before.
    """

    def __init__(self, where: Callable[[], tuple[pathlib.Path, dict[str, str]]], seconds: float):
        self.where = where
        self.path = self.running = pathlib.Path()
        self.deadline = time.monotonic() + seconds
        self.over = False
        self.left = 0
        self.failed = 0

    def pytest_sessionstart(self) -> None:
        self.path, self.about = self.where()
        self.running = self.path.with_suffix(".running")
        if self.running.exists():
            self.write(self.running.read_text(encoding="utf-8"), DIED)
            self.running.unlink()
        self.before = outcomes(self.path, self.about["code"], self.about["device"])
        for test, outcome in self.before.items():
            if outcome == DIED:
                self.failed += 1
                print(f"{test}: the process ended while it ran; passed over")

    def write(self, test: str, outcome: str, seconds: float = 0.0, says: str = "") -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            row = {"test": test, "outcome": outcome, "seconds": f"{seconds:.1f}", "says": says}
            writer.writerow(row | self.about)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        done = {t for t, o in self.before.items() if o in ("passed", DIED)}
        named = {item.nodeid: item for item in items}
        config.hook.pytest_deselected(items=[named[name] for name in named if name in done])
        items[:] = [named[name] for name in in_order([*named]) if name not in done]
        self.left = len(items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.write_text(nodeid, encoding="utf-8")  # a killed process leaves it behind

    def pytest_runtest_logfinish(self) -> None:
        self.running.unlink()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.left -= report.when != "teardown"
        self.failed += report.outcome == "failed"
        lines = str(getattr(report.longrepr, "reprcrash", "") or "").strip().splitlines()
        self.write(report.nodeid, report.outcome, report.duration, lines[0][:200] if lines else "")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> None:
        if time.monotonic() > self.deadline:
            self.over = True
            raise item.session.Interrupted("the time is over")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python tools/gpu_tests.py`.

    Args:
      arguments: of the command line; unknown ones go to pytest.

    Returns:
      As `status`.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no test after these")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks/results")
    options, more = parser.parse_known_args(arguments)

    def where() -> tuple[pathlib.Path, dict[str, str]]:
        import jax

        device = jax.devices()[0].device_kind
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        today = datetime.date.today().isoformat()
        options.results.mkdir(parents=True, exist_ok=True)
        about = {"device": device, "jax": jax.__version__, "code": provenance.code()}
        about |= {"commit": provenance.commit(), "date": today}
        return options.results / f"{today}-tests-{name}.csv", about

    session = Session(where, options.seconds)
    call = ["-q", "-m", "gpu", f"--maxfail={MOST_FAILURES}", f"--rootdir={ROOT}", *more]
    return status(session, pytest.main([*call, str(ROOT / "tests")], plugins=[session]))


def status(session: Session, code: int) -> int:
    """Computes the exit status.

    Args:
      session: the finished session.
      code: pytest's.

    Returns:
      0 if all passed, `OUT_OF_TIME` if some are left, 1 otherwise: tests that fail or cannot be
      collected, a pytest that cannot start.
    """
    ran = code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) or session.over
    if session.failed or not ran:
        print(f"{session.failed} failed, {session.left} left, pytest said {code} -> {session.path}")
        return 1
    print(f"{session.left} tests left -> {session.path}")
    return OUT_OF_TIME if session.left else 0


if __name__ == "__main__":
    sys.exit(main())
