"""The origin of a row of results: the commit, and the sources that a kernel depends on."""

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A change in these makes earlier results stale.
SOURCES = ("pallas_kernels", "jaxpara/recurrence", "jaxpara/compat.py", "jaxpara/jaxprs.py")
# Sources of `make compile`: its table is valid while these are unchanged.
COMPILED = (
    "pallas_kernels",
    "jaxpara/recurrence/kernel",
    "jaxpara/recurrence/structure/affinity.py",
    "jaxpara/recurrence/structure/flat.py",
    "jaxpara/recurrence/wide.py",
    "jaxpara/compat.py",
    "jaxpara/jaxprs.py",
    "tools/compile_kernels.py",
    "tools/compile_worker.py",
    "tools/kernel_calls.py",
)


def code(sources: Sequence[str] = SOURCES) -> str:
    """Computes a short hash of sources.

    Args:
      sources: files and folders of this repository; by default the kernels and their drivers.

    Returns:
      Twelve digits.
    """
    digest = hashlib.sha256()
    for source in sources:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str:
    """Reads the commit of this checkout, with `-dirty` if files differ.

    Returns:
      The output of `git describe`; without git or a repository, `code-` and `code()`.
    """
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            cwd=ROOT,
        )
    except FileNotFoundError:
        return f"code-{code()}"
    return found.stdout.strip() or f"code-{code()}"


def compiled() -> Path | None:
    """Finds the committed table of `make compile` for these sources, if there is one.

    Returns:
      Its file.
    """
    mark = f"sources {code(COMPILED)}"
    tables = sorted((ROOT / "benchmarks/results").glob("*-compile.md"), reverse=True)
    return next((path for path in tables if mark in path.read_text(encoding="utf-8")), None)


if __name__ == "__main__":
    table = compiled()
    print(table.relative_to(ROOT) if table else "")
