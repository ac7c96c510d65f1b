"""Faults, injected."""

from pathlib import Path

import numpy as np


def flip(path: Path, rng: np.random.Generator) -> None:
    """Flips one bit of a file.

    Args:
      path: of a file that is not empty.
      rng: chooses the bit.
    """
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
