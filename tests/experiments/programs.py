"""Commands run in this process, where starting one of their own would cost seconds."""

import os
import sys

from experiments.sweep import sweeps
from tests.experiments import sweep_program


def ending(program, folder, *arguments):
    """What a program's `main`, called in a folder, ends with: None, a code or a message."""
    before, place = sys.argv, os.getcwd()
    sys.argv = [f"{program.__name__}.py", *map(str, arguments)]
    os.chdir(folder)
    try:
        program.main()
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
        os.chdir(place)
    return None


def call(program, folder, *arguments):
    """The exit code of a program; the message that it ends with is on stderr."""
    code = ending(program, folder, *arguments)
    if isinstance(code, str):
        print(code, file=sys.stderr)
        return 1
    return code or 0


def sweep(folder, *arguments):
    """Runs a sweep of `sweep_program` in this process; returns its exit code."""
    before, cwd = sys.argv, os.getcwd()
    sys.argv = [sweep_program.__file__, *arguments]
    os.chdir(folder)
    try:
        sweeps.start(sweep_program.compose)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
        os.chdir(cwd)
    return 0


def statuses(text):
    """The table's status of each job, by its overrides."""
    return {
        line.split("│")[2].strip(): line.split("│")[3].strip()
        for line in text.splitlines()
        if line.startswith("│")
    }


def everything(folder):
    """All files with their contents and times."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
