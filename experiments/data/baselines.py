"""Baselines: what compressors reach on the same bytes, in bits per byte.

A model that has learned something beats the entropy of single bytes; one that has
learned a lot beats compressors. Unlike the model, compressors see only the validation
text. Every run computes them anew.
"""

import importlib
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8


def unigram(text: UInt8[np.ndarray, " bytes"]) -> float:
    """Computes the entropy of single bytes, `-sum_b p_b log2 p_b`, fitted on the text itself.

    Args:
      text: the bytes; not empty.

    Returns:
      Bits per byte.
    """
    counts = np.bincount(text, minlength=256)
    p = counts[counts > 0] / len(text)
    return float(-(p * np.log2(p)).sum())


def gzip_9(text: UInt8[np.ndarray, " bytes"]) -> float:
    """Computes the size of the text under `gzip -9`.

    Args:
      text: the bytes; not empty.

    Returns:
      Bits per byte, with gzip's header.

    Raises:
      ImportError: this Python was built without zlib.
    """
    zlib = importlib.import_module("zlib")
    # 16 + window bits asks zlib for gzip's own wrapper.
    packer = zlib.compressobj(level=9, wbits=16 + zlib.MAX_WBITS)
    size = len(packer.compress(text.tobytes())) + len(packer.flush())
    return 8 * size / len(text)


def xz_9e(text: UInt8[np.ndarray, " bytes"]) -> float:
    """Computes the size of the text under `xz -9e`.

    Args:
      text: the bytes; not empty.

    Returns:
      Bits per byte, with xz's header.

    Raises:
      ImportError: this Python was built without lzma.
    """
    lzma = importlib.import_module("lzma")
    packed = lzma.compress(text.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    return 8 * len(packed) / len(text)


METHODS: dict[str, Callable[[np.ndarray], float]] = {
    "unigram": unigram,
    "gzip -9": gzip_9,
    "xz -9e": xz_9e,
}


def baselines(text: UInt8[np.ndarray, " bytes"]) -> dict[str, float | None]:
    """Computes all baselines of a text.

    Args:
      text: the bytes; not empty.

    Returns:
      Bits per byte by method; None if this Python lacks the module. Tables say so.
    """
    table: dict[str, float | None] = {}
    for name, method in METHODS.items():
        try:
            table[name] = method(text)
        except ImportError:
            table[name] = None
    return table
