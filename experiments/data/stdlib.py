"""The source text of the running Python's standard library, read as bytes.

It is on every machine that can run this file, so an experiment needs no network.
The text depends on the Python version, so each run computes its own baselines.
"""

import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.data.corpus import Data, Sampler, from_documents
from experiments.data.splits import Split, shuffled
from experiments.data.windows import RANDOM

# Third-party packages are not the standard library; test folders are repetitive
# and make compressors look better than they are on source code.
NOT_THE_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})
EXCLUDED_FOLDERS = NOT_THE_LIBRARY | {"test", "tests", "idle_test"}


def python_files(root: Path, *, also: Sequence[str] = ()) -> dict[str, bytes]:
    """Reads every `*.py` under a folder that is not in an excluded folder.

    Args:
      root: the folder.
      also: folders at its top that are not excluded, including folders of tests in them.

    Returns:
      Content by path relative to `root`, in sorted order. Unreadable files are skipped.
    """
    files = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        excluded = NOT_THE_LIBRARY if name.parts[0] in also else EXCLUDED_FOLDERS
        # Reading a pipe or a device may never end.
        if excluded.isdisjoint(name.parts[:-1]) and path.is_file():
            try:
                files[name.as_posix()] = path.read_bytes()
            except OSError:
                continue
    return files


def part(files: Mapping[str, bytes], folders: Sequence[str]) -> dict[str, bytes]:
    """Selects the files of some folders, without contents that are also outside them.

    Args:
      files: content by path.
      folders: at the top.

    Returns:
      Content by path; none of it is in the other files.

    Raises:
      FileNotFoundError: no file of a folder is left.
    """
    inside = {path: text for path, text in files.items() if path.split("/")[0] in folders}
    outside = {text for path, text in files.items() if path not in inside}
    kept = {path: text for path, text in inside.items() if text not in outside}
    for folder in folders:
        if not any(path.startswith(f"{folder}/") for path in kept):
            there = sorted({path.split("/")[0] for path in files if "/" in path})
            raise FileNotFoundError(
                f"there is no *.py file in the folder {folder!r}, which some Pythons leave out; "
                f"choose others of the folders {', '.join(there)}"
            )
    return kept


def load(
    *,
    root: str | None = None,
    only: Sequence[str] = (),
    without: Sequence[str] = (),
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
      only: folders at its top to read, and no others; a folder of tests may be named. Contents
        that are also elsewhere are left out, see `part`.
      without: folders at its top that are not read.
      validation_fraction: share of the files held out.
      seed: of the split, separate from the seed of the run: runs with different seeds are
        evaluated on the same bytes.
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
    files = python_files(folder, also=only)
    if files and only:
        files = part(files, only)
    files = {path: text for path, text in files.items() if path.split("/")[0] not in without}
    if not files:
        raise FileNotFoundError(
            f"no *.py file in {str(folder)!r}, the source text of {sys.executable}. "
            "Some Pythons ship without it (zipped or compiled only): use another "
            "interpreter, or give data.root=FOLDER with *.py files in it"
        )
    version = ".".join(map(str, sys.version_info[:3]))
    source = str(folder) if root is not None else f"standard library of Python {version}"
    if only:
        source += f", its {' and '.join(only)}"
    if without:
        source += f" without {' and '.join(without)}"
    return from_documents(
        files,
        source=source,
        split=split,
        validation_fraction=validation_fraction,
        seed=seed,
        sampler=sampler,
        tokenizer=tokenizer,
        prefetch=prefetch,
    )
