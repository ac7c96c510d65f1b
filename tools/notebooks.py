"""Runs the notebooks and saves their outputs: `make notebooks ARGS=write`, then commit them.

A notebook holds its outputs, so that it can be read without an installation, and a digest of the
code that made them. A test fails if the code has changed since.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DIGEST = "code_sha256"
LARGEST = 300_000  # bytes of a notebook with its pictures


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Lists the code cells."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: nbformat.NotebookNode) -> str:
    """Computes the digest of the code, in order."""
    text = "\0".join(cell.source for cell in code_of(notebook))
    return hashlib.sha256(text.encode()).hexdigest()


def execute(path: Path) -> nbformat.NotebookNode:
    """Runs a notebook from top to bottom, in the folder in which a reader would start Jupyter.

    Args:
      path: of the notebook.

    Returns:
      The notebook with its outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed; it holds the traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    return notebook


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Lists the faults of a saved notebook.

    Args:
      notebook: as read.

    Returns:
      A line for each; empty if there is none.
    """
    cells = code_of(notebook)
    found = []
    if notebook.metadata.get(DIGEST) != digest(notebook):
        found.append("its code has changed: `make notebooks ARGS=write` runs it again")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("it was not run from top to bottom")
    outputs = [output for cell in cells for output in cell.outputs]
    if any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs):
        found.append("a cell failed or warned")
    if not any("image/png" in o.get("data", {}) for o in outputs):
        found.append("it shows no figure")
    text = nbformat.writes(notebook)
    if re.search(r"/(?:home|root|Users|tmp|work)/", text):
        found.append("it names a folder of the machine that ran it")
    if len(text) > LARGEST:
        found.append(f"it has {len(text)} bytes; expected at most {LARGEST}")
    return found


def main(paths: Sequence[Path] = NOTEBOOKS) -> int:
    """Runs and writes notebooks.

    Args:
      paths: of the notebooks.

    Returns:
      An exit status: 1 if one of them has a fault; the files are written in any case.
    """
    status = 0
    for path in paths:
        notebook = execute(path)
        for cell in code_of(notebook):
            cell.metadata = {}  # when it ran
        notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, DIGEST: digest(notebook)}
        nbformat.write(notebook, path)
        said = faults(notebook)
        status |= bool(said)
        print(path.relative_to(ROOT), "; ".join(said) or "ok", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]] or NOTEBOOKS))
