"""What a row of results is of: the commit, and the sources that decide what a kernel does."""

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A change in these makes earlier results those of another program.
SOURCES = ("pallas_kernels", "jaxpara/recurrence", "jaxpara/compat.py", "jaxpara/jaxprs.py")


def code() -> str:
    """A short hash of the sources of the kernels and of what drives them.

    Returns:
      Twelve digits.
    """
    digest = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit of this checkout, with `-dirty` if files differ.

    Returns:
      What `git describe` says; where there is no git or no repository, `code-` and `code()`.
    """
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    except FileNotFoundError:
        return f"code-{code()}"
    return found.stdout.strip() or f"code-{code()}"
