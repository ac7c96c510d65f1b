"""Every notebook runs from top to bottom in under a minute; its own assertions are the test.

What it showed when it was last run is kept with it.
"""

import copy
import time

import nbformat
import pytest

from tools.notebooks import NOTEBOOKS, code_of, execute, faults


def test_there_are_notebooks():
    names = {path.stem for path in NOTEBOOKS}
    assert {"first_steps", "newton_scan", "state_tracking", "bring_your_own_flax"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom_in_under_a_minute(path):
    began, cpu = time.perf_counter(), _children_seconds()
    notebook = execute(path)
    elapsed = time.perf_counter() - began
    # Its own minute: on a loaded machine the wall clock also counts what others did.
    seconds = min(elapsed, _children_seconds() - cpu) if cpu is not None else elapsed
    assert seconds < 60, f"{path.name} took {seconds:.0f} s"
    asserted = [cell for cell in code_of(notebook) if "assert " in cell.source]
    assert asserted, f"{path.name} claims nothing that could fail"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_can_be_read_without_being_run(path):
    assert faults(nbformat.read(path, as_version=4)) == []


def test_what_cannot_be_read_is_found():
    sound = nbformat.read(NOTEBOOKS[0], as_version=4)

    def spoilt(spoil):
        notebook = copy.deepcopy(sound)
        spoil(notebook, code_of(notebook))
        return "; ".join(faults(notebook))

    def stripped(notebook, cells):
        for cell in cells:
            cell.outputs, cell.execution_count = [], None

    def warned(notebook, cells):
        cells[-1].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="!"))

    def said(text):
        return lambda notebook, cells: cells[-1].outputs.append(
            nbformat.v4.new_output("stream", text=text)
        )

    assert "its code has changed" in spoilt(lambda _, cells: cells[0].update(source=""))
    assert "not run from top to bottom; it shows no figure" in spoilt(stripped)
    assert "failed or warned" in spoilt(warned)
    assert "folder of the machine" in spoilt(said("/home/me/x"))
    assert "bytes; expected at most" in spoilt(said("x" * 300_000))


def _children_seconds():
    """CPU seconds of finished child processes, or None where the platform does not say."""
    try:
        import resource
    except ImportError:
        return None
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
