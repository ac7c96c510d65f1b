"""Errors of what a run's folder holds: they name the folder, for nothing in it is the user's code.

What can be checked is checked before anything is built. This is the net below: whatever a
constructor, JAX or a library raises about values of somebody's folder ends in a few lines.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from experiments.run.folders import CONFIG, RunError
from experiments.shell.explanations import FULL_ERROR, FolderError, explain

OF_A_CONFIG = (HydraException, InstantiationException, OmegaConfBaseException)
OF_A_FLAG = "flag must be a bool"  # in what Hydra says about `_partial_` and its like
LONGEST = 200  # characters of another program's message


@contextmanager
def content_of(*folders: Path) -> Iterator[None]:
    """Turns errors about the content of runs into one of ours.

    Args:
      *folders: the runs whose files are read, or whose objects are built and called, in the block.

    Raises:
      RunError: names the first of them, and the kind and text of the error. What explains itself
        passes: our own errors, those of the machine (its disk, its memory), and an interrupt.
    """
    try:
        yield
    except Exception as error:
        of_the_machine = isinstance(error, OSError) and error.errno is not None
        if of_the_machine or isinstance(error, RunError | MemoryError):
            raise
        place = " or ".join([str(folders[0]), *(["another of the runs"] if folders[1:] else [])])
        text = explain(error)
        if text is not None and (isinstance(error, OF_A_CONFIG) or OF_A_FLAG in str(error)):
            text = re.sub(r"(; type \+|: \S+=VALUE).*", ": add it there, or give another run", text)
            raise FolderError(f"{place}/{CONFIG}: {text}") from error
        if text is not None:
            raise
        told = " ".join(str(error).split())[:LONGEST]
        raise FolderError(
            f"{place} holds something that cannot be used ({type(error).__name__}: {told}):\n"
            f"give another run; {FULL_ERROR}=1 before the command shows where"
        ) from error
