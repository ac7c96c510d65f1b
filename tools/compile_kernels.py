"""Compiles every kernel ahead of time, with no device: `make compile`.

Targets are H100 (sm_90a) and TPU v5e and v6e, with the compilers of JAX's own plugins. Prints and
writes the resources of each kernel: registers, spills and shared memory, or VMEM. Fails if a kernel
does not compile, or spills registers with up to two states. Says nothing about speed or values.

Each target is compiled in its own process, which is restarted after a kernel that crashed or hung
it. Only that process, `compile_worker.py`, imports JAX.
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a file, in an environment that may not hold jaxpara

from benchmarks import provenance  # noqa: E402
from pallas_kernels.shapes import COMPILED, Shape  # noqa: E402

TARGETS = ("h100", "v5e", "v6e")
# States of each; `three` is a cell without a kernel of its own, `slstm` the largest of jp.cells.
RECURRENCES = {"linear": 1, "linear2": 2, "gru": 1, "lstm": 2, "three": 3, "slstm": 4}
PASSES = ("forward", "backward")
PRODUCTS = {"int8": 8, "int4": 4}  # bits of the weights of quantised_dot
PRODUCT = Shape(256, 4096, 4096)  # rows of x, rows and columns of the weight
# Of the inputs and of the states; a layer of jp.nn keeps a float32 carry under bfloat16 inputs.
STORAGE = {
    "f32": ("float32", "float32"),
    "bf16": ("bfloat16", "bfloat16"),
    "mixed": ("bfloat16", "float32"),
}
# No device is used: neither its address nor exclusive access is needed.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
OLDEST = (3, 12)  # the oldest Python of the JAX with these compilers
SECONDS = 240  # after which a kernel counts as not compiling
FEW_STATES = 2  # up to which a spill is a failure
COLUMNS = (
    "kernel",
    "storage",
    "T, B, D or m, rows, columns",
    "registers",
    "spill bytes",
    "stack bytes",
    "shared KiB",
    "VMEM KiB",
    "lower s",
    "compile s",
    "verdict",
)


class Job(NamedTuple):
    """One kernel at one shape, for one target."""

    target: str
    recurrence: str
    which: str
    storage: str
    shape: Shape

    @property
    def name(self) -> str:
        """Its name in the table and for `--only`."""
        return f"{self.recurrence} {self.which}"


def jobs(targets: Sequence[str], only: str = "") -> list[Job]:
    """Lists the jobs: everything at the first shape, and float32 where blocks differ.

    Args:
      targets: of `TARGETS`.
      only: words that name, storage or target must contain, all of them.

    Returns:
      The jobs, target by target.
    """
    first, *others = COMPILED
    found = []
    for target in targets:
        for recurrence in RECURRENCES:
            for which in PASSES:
                found += [Job(target, recurrence, which, s, first) for s in STORAGE]
                # A TPU cannot hold the arrays of the largest shape.
                fitting = others if target == "h100" else others[:1]
                found += [Job(target, recurrence, which, "f32", shape) for shape in fitting]
        found += [Job(target, weights, "product", "bf16", PRODUCT) for weights in PRODUCTS]
    return [
        job
        for job in found
        if all(word in f"{job.target} {job.name} {job.storage}".split() for word in only.split())
    ]


def work(target: str, wanted: Sequence[Job]) -> Iterator[dict]:
    """Yields the results of one target's jobs, in order; a process that dies is replaced.

    Args:
      target: of all jobs.
      wanted: the jobs.

    Yields:
      The result of `compile_worker.compiled` for each, or `{"error": ...}`.
    """
    left = list(wanted)
    while left:
        with tempfile.TemporaryFile("w+") as complaints:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "tools/compile_worker.py"), target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                encoding="utf-8",
                errors="replace",
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
            )
            assert process.stdin and process.stdout
            json.dump({"seconds": SECONDS, "jobs": [job._asdict() for job in left]}, process.stdin)
            process.stdin.close()
            for line in process.stdout:
                if line.startswith("{"):
                    left.pop(0)
                    yield json.loads(line)
            code = process.wait()
            if not left:
                return
            complaints.seek(0)
            last = [x for x in complaints.read().splitlines() if x.strip()][-1:] or [""]
            if code == 1:  # an exception outside of any kernel: the compiler is missing
                for _ in left:
                    yield {"error": last[0][:300]}
                return
            why = f"nothing after {SECONDS} s" if code == -14 else f"the compiler died ({code})"
            left.pop(0)
            yield {"error": f"{why}: {last[0][:200]}"}


def verdict(job: Job, result: dict) -> str:
    """Returns `ok`, or why this kernel fails the run.

    Args:
      job: the kernel.
      result: what the worker found.

    Returns:
      One line.
    """
    if "error" in result:
        return result["error"]
    states = RECURRENCES.get(job.recurrence, 0)
    if result.get("spill_bytes") and states <= FEW_STATES:
        return f"spills {result['spill_bytes']} bytes with {states} state(s)"
    return "ok"


def row(job: Job, result: dict) -> list[str]:
    """Formats a line of the table.

    Args:
      job: the kernel.
      result: what the worker found.

    Returns:
      A text for each of `COLUMNS`.
    """

    def show(key, form="{}"):
        return form.format(result[key]) if result.get(key) is not None else ""

    return [
        job.name,
        job.storage,
        f"{job.shape.steps}, {job.shape.batch}, {job.shape.width}",
        show("registers"),
        show("spill_bytes"),
        show("stack_bytes"),
        show("shared_kib", "{:.1f}"),
        show("vmem_kib", "{:.0f}"),
        show("lower_s", "{:.1f}"),
        show("compile_s", "{:.1f}"),
        verdict(job, result).replace("|", "/").replace("\n", " "),
    ]


def report(results: Sequence[tuple[Job, dict]], versions: str) -> str:
    """Formats the table, with a section for each target.

    Args:
      results: all of them.
      versions: of the compilers, in one line.

    Returns:
      Markdown.
    """
    failed = [job for job, result in results if verdict(job, result) != "ok"]
    lines = [
        f"# Kernels compiled ahead of time, {datetime.date.today().isoformat()}",
        "",
        f"{versions}. By `make compile`; no device was present, nothing was run. "
        f"{len(results) - len(failed)} of {len(results)} kernels compile as they should.",
    ]
    for target in TARGETS:
        rows = [row(job, result) for job, result in results if job.target == target]
        if rows:
            # A column that is empty for this target is left out.
            kept = [i for i in range(len(COLUMNS)) if any(r[i] for r in rows)]
            lines += ["", f"## {target}", "", "| " + " | ".join(COLUMNS[i] for i in kept) + " |"]
            lines += ["|---" * len(kept) + "|"]
            lines += ["| " + " | ".join(r[i] for i in kept) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `make compile`.

    Args:
      arguments: of the command line.

    Returns:
      The exit status: 1 if a kernel failed.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help='words, e.g. "gru backward bf16"')
    parser.add_argument("--output", type=pathlib.Path, help="file for the table")
    options = parser.parse_args(arguments)
    if sys.version_info < OLDEST:
        parser.error(f"this is Python {sys.version.split()[0]}; JAX >= 0.12 needs 3.12 or newer")
    wanted = jobs(options.targets, options.only)
    if not wanted:
        parser.error(f"--only {options.only!r} names no kernel; names are like 'gru forward f32'")
    results: list[tuple[Job, dict]] = []
    for target in options.targets:
        mine = [job for job in wanted if job.target == target]
        for job, result in zip(mine, work(target, mine), strict=True):
            results.append((job, result))
            print(f"{target}: " + ", ".join(x for x in row(job, result) if x), flush=True)
    text = report(results, _versions())
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    bad = [job for job, result in results if verdict(job, result) != "ok"]
    print(f"{len(results) - len(bad)} of {len(results)} kernels compile as they should")
    return 1 if bad else 0


def _versions() -> str:
    """Describes the versions of the compilers and of the sources."""
    names = ("jax", "jax-cuda12-plugin", "libtpu")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    made_of = f"commit {provenance.commit()}, sources {provenance.code(provenance.COMPILED)}"
    return f"Python {sys.version.split()[0]}, {', '.join(found)}, {made_of}"


if __name__ == "__main__":
    sys.exit(main())
