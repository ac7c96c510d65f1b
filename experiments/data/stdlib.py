"""The source text of the running Python's standard library, read as bytes.

It is on every machine that can run this file, so an experiment needs no network.
The text moves with the Python version; whatever is compared with it (baselines)
is therefore computed in the same run.
"""

import sys
import sysconfig
from pathlib import Path

from experiments.data.corpus import Data, Sampler, from_documents
from experiments.data.splits import Split, shuffled
from experiments.data.windows import RANDOM

# Third-party packages are not the standard library; test folders are repetitive
# and make compressors look better than they are on source code.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


def python_files(root: Path) -> dict[str, bytes]:
    """Reads every `*.py` under a folder that is not in an excluded folder.

    Args:
      root: the folder.

    Returns:
      Content by path relative to `root`, in sorted order. Unreadable files are skipped.
    """
    files = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if EXCLUDED_FOLDERS.isdisjoint(name.parts[:-1]):
            try:
                files[name.as_posix()] = path.read_bytes()
            except OSError:
                continue
    return files


def load(
    *,
    root: str | None = None,
    validation_fraction: float = 0.05,
    seed: int = 0,
    split: Split = shuffled,
    sampler: Sampler = RANDOM,
    tokenizer: str | None = None,
    prefetch: int = 2,
) -> Data:
    """Loads Python source text, split by file into training and validation.

    Args:
      root: folder to read; None is the standard library of the running Python.
      validation_fraction: share of the files held out.
      seed: of the split, apart from the seed of the training run, so that runs
        with different seeds are judged by the same bytes.
      split: `splits.shuffled`, or `splits.by_name`, which holds out the same files
        whatever the version of Python.
      sampler: how batches are cut, `windows.RANDOM` or `packing.PACKED`.
      tokenizer: a file of the library tokenizers; None is bytes.
      prefetch: batches made ahead.

    Returns:
      The data.

    Raises:
      FileNotFoundError: the folder is missing or holds no Python source text.
      ValueError: too few distinct files to split.
    """
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.root={str(folder)!r} is not a folder: give data.root=FOLDER "
            "with *.py files in it"
        )
    files = python_files(folder)
    if not files:
        raise FileNotFoundError(
            f"no *.py file in {str(folder)!r}, the source text of {sys.executable}. "
            "Some Pythons ship without it (zipped or compiled only): use another "
            "interpreter, or give data.root=FOLDER with *.py files in it"
        )
    version = ".".join(map(str, sys.version_info[:3]))
    return from_documents(
        files,
        source=str(folder) if root is not None else f"standard library of Python {version}",
        split=split,
        validation_fraction=validation_fraction,
        seed=seed,
        sampler=sampler,
        tokenizer=tokenizer,
        prefetch=prefetch,
    )
