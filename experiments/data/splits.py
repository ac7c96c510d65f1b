"""Splits by document, never by position; no content is on both sides.

`shuffled` holds out a fixed share of the documents at hand. The other two hash one document at a
time, so adding documents moves none of the old ones. `by_content` sends equal contents to the same
side; `by_name` holds out the same files of two versions of a library.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Sides(NamedTuple):
    """Names of documents.

    Attributes:
      train: to train on; no content appears twice in the two sides together.
      validation: held out.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]


# (documents by name, held-out fraction, seed) -> sides
Split = Callable[[Mapping[str, bytes], float, int], Sides]


def distinct_names(documents: Mapping[str, bytes], names: Sequence[str]) -> list[str]:
    """Drops names whose content is empty or equals that of an earlier name.

    Args:
      documents: content by name.
      names: in order; of equal contents the first name is kept.

    Returns:
      The names that remain, in the same order.
    """
    first: dict[bytes, str] = {}
    for name in names:
        first.setdefault(documents[name], name)
    return [name for content, name in first.items() if content]


def share(content: bytes, seed: int) -> float:
    """Hashes content and seed to a number in [0, 1), the same on every machine.

    Args:
      content: of a document, or its name.
      seed: of the split.

    Returns:
      The number, uniform over contents; a document is held out if it is below the fraction.
    """
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def shuffled(documents: Mapping[str, bytes], fraction: float, seed: int) -> Sides:
    """Holds out the first of a fixed shuffle.

    Args:
      documents: content by name; duplicates are dropped here.
      fraction: share of the distinct documents, strictly between 0 and 1.
      seed: of the shuffle; the split depends on nothing else.

    Returns:
      The sides, in the order of the shuffle. Both hold at least one document.

    Raises:
      ValueError: fewer than two distinct documents, or a fraction outside (0, 1).
    """
    order = sorted(documents)
    random.Random(seed).shuffle(order)
    names = _at_least_two(documents, order, fraction)
    held_out = min(max(1, round(fraction * len(names))), len(names) - 1)
    return Sides(tuple(names[held_out:]), tuple(names[:held_out]))


def by_content(documents: Mapping[str, bytes], fraction: float, seed: int) -> Sides:
    """Holds out documents by a hash of their content.

    Args:
      documents: content by name; duplicates are dropped here.
      fraction: expected share of the documents, strictly between 0 and 1.
      seed: another seed holds out others.

    Returns:
      The sides, in the order of the names. Both hold at least one document: if the hash leaves
      one side empty, that side gets the nearest.

    Raises:
      ValueError: fewer than two distinct documents, or a fraction outside (0, 1).
    """
    names = _at_least_two(documents, sorted(documents), fraction)
    return _by_share(names, {name: share(documents[name], seed) for name in names}, fraction)


def by_name(documents: Mapping[str, bytes], fraction: float, seed: int) -> Sides:
    """Holds out documents by a hash of their names, so that versions can be compared.

    Args:
      documents: content by name; duplicates are dropped here.
      fraction: expected share of the documents, strictly between 0 and 1.
      seed: another seed holds out others.

    Returns:
      The sides, as from `by_content`. Of equal contents the name with the smallest hash wins.

    Raises:
      ValueError: fewer than two distinct documents, or a fraction outside (0, 1).
    """
    shares = {name: share(name.encode(), seed) for name in documents}
    names = _at_least_two(documents, sorted(documents, key=shares.__getitem__), fraction)
    return _by_share(sorted(names), shares, fraction)


def _by_share(names: list[str], shares: Mapping[str, float], fraction: float) -> Sides:
    held_out = {name for name in names if shares[name] < fraction}
    if not held_out:
        held_out = {min(names, key=shares.__getitem__)}
    if len(held_out) == len(names):
        held_out.remove(max(names, key=shares.__getitem__))
    return Sides(
        tuple(name for name in names if name not in held_out),
        tuple(name for name in names if name in held_out),
    )


def check_fraction(fraction: float) -> None:
    """Refuses a number that is not a share.

    Args:
      fraction: held out.

    Raises:
      ValueError: outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"validation_fraction={fraction} must be strictly between 0 and 1: "
            "it is the share held out, for example data.validation_fraction=0.05"
        )


def _at_least_two(documents: Mapping[str, bytes], order: list[str], fraction: float) -> list[str]:
    check_fraction(fraction)
    names = distinct_names(documents, order)
    if len(names) < 2:
        raise ValueError(
            f"{len(documents)} documents, {len(names)} of them distinct and non-empty; "
            "a split by document needs at least 2: one to train on, one to evaluate on. "
            "Give more documents or, for a text of many lines, cut it at line ends (\\n) with "
            "data=text data.piece_size=N, N far below its size"
        )
    return names
