"""A corpus is two byte strings that share no file: training and validation.

The split is by *file* and exact duplicates are dropped before it, so that no
validation file was seen in training.
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8


class Corpus(NamedTuple):
    """Bytes to train on and bytes to be judged by.

    Attributes:
      train: training bytes, files joined by a newline.
      validation: validation bytes, files joined by a newline.
      train_files: names of the training files, in the order joined.
      validation_files: names of the validation files, in the order joined.
      source: one line that says where the bytes are from.
    """

    train: UInt8[np.ndarray, " train_bytes"]
    validation: UInt8[np.ndarray, " validation_bytes"]
    train_files: Sequence[str]
    validation_files: Sequence[str]
    source: str


def distinct_names(files: Mapping[str, bytes], names: Sequence[str]) -> list[str]:
    """Drops names whose content is empty or equals that of an earlier name.

    Args:
      files: content by name.
      names: the names in the order in which the first one wins.

    Returns:
      The names that remain, in the same order.
    """
    first: dict[bytes, str] = {}
    for name in names:
        first.setdefault(files[name], name)
    return [name for content, name in first.items() if content]


def split_by_file(
    files: Mapping[str, bytes], *, validation_fraction: float, seed: int, source: str
) -> Corpus:
    """Splits distinct files into training and validation with a fixed shuffle.

    Args:
      files: content by name; duplicates are dropped here.
      validation_fraction: share of the *files*, strictly between 0 and 1.
      seed: of the shuffle; the split depends on nothing else.
      source: one line for people, kept in the corpus.

    Returns:
      The corpus. Both sides hold at least one file.

    Raises:
      ValueError: fewer than two distinct files, or a fraction outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"validation_fraction={validation_fraction} must lie strictly between 0 and 1: "
            "it is the share of files held out, for example data.validation_fraction=0.05"
        )
    shuffled = sorted(files)
    random.Random(seed).shuffle(shuffled)
    names = distinct_names(files, shuffled)
    if len(names) < 2:
        raise ValueError(
            f"{source}: {len(files)} files of which {len(names)} distinct and non-empty; "
            "a split by file needs at least 2. Point data.root at a folder with more files"
        )
    held_out = min(max(1, round(validation_fraction * len(names))), len(names) - 1)

    def joined(part: Sequence[str]) -> np.ndarray:
        return np.frombuffer(b"\n".join(files[name] for name in part), np.uint8)

    validation, train = names[:held_out], names[held_out:]
    return Corpus(joined(train), joined(validation), tuple(train), tuple(validation), source)
