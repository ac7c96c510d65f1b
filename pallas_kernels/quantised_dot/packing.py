"""Small integers in bytes: four of two bits, two of four bits, four of six bits in three bytes.

Integers that are packed together are a half or a quarter of the rows apart, not side by side. A
block of bytes then unpacks to blocks of consecutive rows, without interleaving.
"""

import jax
import jax.numpy as jnp

WIDTHS = (2, 4, 6, 8)
# Rows of a group, rows of a half of packed ones, and columns: kernels take multiples of it.
KERNEL_SIZES = 128


def width(bits: int) -> int:
    """The bits that an integer of `bits` bits takes up when it is packed.

    Args:
      bits: 1 to 8.

    Returns:
      2, 4, 6 or 8.

    Raises:
      ValueError: more than 8 bits, or less than 1.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: give 1 to 8")
    return next(have for have in WIDTHS if bits <= have)


def packs(rows: int, bits: int) -> bool:
    """Whether this many rows of integers can be packed: a whole number of times what goes together.

    Args:
      rows: of the weight.
      bits: of its integers.

    Returns:
      False too where packing would save nothing, from 7 bits on.
    """
    return width(bits) < 8 and rows % (2 if width(bits) == 4 else 4) == 0


def rows_of(packed_rows: int, bits: int) -> int:
    """The rows that packed rows hold.

    Args:
      packed_rows: of the bytes.
      bits: of the integers.

    Returns:
      Their number.
    """
    return packed_rows * 8 // width(bits)


def refusal(shape: tuple[int, ...], *, groups: int, packed: bool, bits: int) -> str:
    """Why the kernels leave a weight to XLA.

    Args:
      shape: rows and columns of the integers as they are kept.
      groups: of rows that share a scale.
      packed: whether they are bytes that hold several.
      bits: of the integers.

    Returns:
      One line; empty where the kernels take it.
    """
    if packed and width(bits) != 4:
        return f"{bits} bits packed, and kernels unpack two in a byte"
    rows = rows_of(shape[0], bits) if packed else shape[0]
    sizes = rows // groups, rows // 2 if packed else rows, shape[1]
    if any(size % KERNEL_SIZES for size in sizes):
        each = f"groups of {sizes[0]} of {rows} rows, {shape[1]} columns"
        halves = f" (packed, of {2 * KERNEL_SIZES} rows)" if packed else ""
        return f"{each}, and kernels need multiples of {KERNEL_SIZES}{halves}"
    return ""


def pack(values: jax.Array, bits: int) -> jax.Array:
    """Integers as bytes.

    Args:
      values: int8 `[.., rows, columns]` that fit into `bits` bits with their sign.
      bits: 1 to 6.

    Returns:
      uint8 `[.., rows * width(bits) / 8, columns]`.

    Raises:
      ValueError: the rows cannot be packed.
    """
    rows, wide = values.shape[-2], width(bits)
    if not packs(rows, bits):
        raise ValueError(
            f"{rows} rows of {bits} bits cannot be packed: 2 to 4 bits need an even number of rows "
            "(2 bits and 5 or 6 a multiple of 4), and from 7 bits on there is nothing to save"
        )
    unsigned = values.astype(jnp.uint8) & (2**wide - 1)
    count = 2 if wide == 4 else 4
    parts = jnp.split(unsigned, count, axis=-2)
    if wide < 6:
        out = parts[0]
        for i in range(1, count):
            out = out | (parts[i] << (wide * i))
        return out
    a, b, c, d = parts
    planes = (a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2))
    return jnp.concatenate(planes, axis=-2)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """Undoes `pack`.

    Args:
      packed: uint8 `[.., rows * width(bits) / 8, columns]`.
      bits: of the integers.

    Returns:
      int8 `[.., rows, columns]`.
    """
    wide = width(bits)
    if wide == 6:
        x, y, z = jnp.split(packed, 3, axis=-2)
        parts = [x, (x >> 6) | (y << 2), (y >> 4) | (z << 4), z >> 2]
    else:
        parts = [packed >> (wide * i) for i in range(8 // wide)]
    sign = 2 ** (wide - 1)
    unsigned = jnp.concatenate(parts, axis=-2) & (2**wide - 1)
    return ((unsigned ^ sign).astype(jnp.int8) - sign).astype(jnp.int8)
