"""Number formats, emulated in float32: `round_to(x, format)` is the nearest number that it has.

Floats by exponent and significand bits, fixed point, integers, and blocks with a shared
power-of-two scale; no global state, and the random modes take a key. Floats are rounded on the
bits of their float32, so nothing depends on logarithms or on how a device treats subnormals.
[pychop] [mx]
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpara.types import Key
from jaxpara.weights.quant.rounding import Cut, inward, random_bits, rounded

SPECIALS = ("ieee", "nan", "none")


class FloatFormat(NamedTuple):
    """A binary floating-point format.

    Attributes:
      exponent_bits: 1 to 8.
      significand_bits: stored ones, 0 to 23; one more is implied.
      subnormals: without them the smallest number beside zero is the smallest normal one.
      specials: what the largest exponent is for. `"ieee"`: infinities and NaNs alone; `"nan"`:
        numbers, but for one NaN (the "fn" types); `"none"`: numbers alone.
      saturate: numbers beyond the largest become the largest; otherwise they become what the
        format has for it (infinity, NaN; the largest where it has neither).
    """

    exponent_bits: int
    significand_bits: int
    subnormals: bool = True
    specials: str = "ieee"
    saturate: bool = False


class FixedFormat(NamedTuple):
    """Multiples of `2^-fraction_bits` from `-2^integer_bits` to just below `2^integer_bits`.

    Attributes:
      integer_bits: before the point, the sign not counted; with `fraction_bits` at most 24.
      fraction_bits: after it.
      symmetric: leave out the most negative number.
    """

    integer_bits: int
    fraction_bits: int = 0
    symmetric: bool = False


class BlockFormat(NamedTuple):
    """Blocks along the last axis that share a power of two, each element in a format of its own.

    Attributes:
      element: of the elements; what exceeds it saturates.
      size: of a block; a shorter one may end a row.
    """

    element: FloatFormat | FixedFormat
    size: int = 32


Format = FloatFormat | FixedFormat | BlockFormat

# By the names of their storage types in ml_dtypes, which round the same.
FORMATS: dict[str, Format] = {
    "bfloat16": FloatFormat(8, 7),
    "float16": FloatFormat(5, 10),
    "float8_e5m2": FloatFormat(5, 2),
    "float8_e4m3": FloatFormat(4, 3),
    "float8_e3m4": FloatFormat(3, 4),
    "float8_e4m3fn": FloatFormat(4, 3, specials="nan"),
    "float6_e3m2fn": FloatFormat(3, 2, specials="none"),
    "float6_e2m3fn": FloatFormat(2, 3, specials="none"),
    "float4_e2m1fn": FloatFormat(2, 1, specials="none"),
    "int8": FixedFormat(7),
    "int4": FixedFormat(3),
    "mxfp8_e4m3": BlockFormat(FloatFormat(4, 3, specials="nan")),
    "mxfp8_e5m2": BlockFormat(FloatFormat(5, 2)),
    "mxfp6_e3m2": BlockFormat(FloatFormat(3, 2, specials="none")),
    "mxfp6_e2m3": BlockFormat(FloatFormat(2, 3, specials="none")),
    "mxfp4": BlockFormat(FloatFormat(2, 1, specials="none")),
    "mxint8": BlockFormat(FixedFormat(1, 6, symmetric=True)),
}


def checked(number_format: str | Format) -> Format:
    """A format whose settings are possible.

    Args:
      number_format: a name of `FORMATS`, or a format.

    Returns:
      The format.

    Raises:
      ValueError: an unknown name, or bits out of range.
    """
    if isinstance(number_format, str):
        if number_format not in FORMATS:
            raise ValueError(f"format {number_format!r}: give one of {', '.join(FORMATS)}")
        return FORMATS[number_format]
    if isinstance(number_format, BlockFormat):
        if number_format.size < 1:
            raise ValueError(f"size={number_format.size} of a block: give 1 or more")
        checked(number_format.element)
    elif isinstance(number_format, FixedFormat):
        bits = number_format.integer_bits + number_format.fraction_bits
        if not 1 <= bits <= 24:
            raise ValueError(f"{number_format} has {bits} bits beside the sign: give 1 to 24")
    else:
        e, m = number_format.exponent_bits, number_format.significand_bits
        if not (1 <= e <= 8 and 0 <= m <= 23):
            raise ValueError(f"{number_format}: give 1 to 8 exponent, 0 to 23 significand bits")
        if number_format.specials not in SPECIALS:
            raise ValueError(f"specials={number_format.specials!r}: give one of {SPECIALS}")
        if number_format.specials == "nan" and m == 0:
            raise ValueError("specials='nan' takes one significand, and there is only one")
        if number_format.specials == "ieee" and e == 1:
            raise ValueError("specials='ieee' takes one exponent of two: give exponent_bits=2")
        if number_format.specials != "ieee" and e == 8:
            raise ValueError("exponents of 8 bits reach float32's own only with specials='ieee'")
    return number_format


def smallest_exponent(f: FloatFormat) -> int:
    """The exponent of the smallest normal number."""
    return 2 - 2 ** (f.exponent_bits - 1)


def largest(f: FloatFormat | FixedFormat) -> float:
    """The largest number of a format.

    Args:
      f: the format.

    Returns:
      The number, exactly.
    """
    if isinstance(f, FixedFormat):
        return 2.0**f.integer_bits - 2.0**-f.fraction_bits
    exponents = 2**f.exponent_bits - (2 if f.specials == "ieee" else 1)
    top = smallest_exponent(f) + exponents - 1
    ulp = 2.0**-f.significand_bits
    return 2.0**top * (2.0 - (2 if f.specials == "nan" else 1) * ulp)


def round_to(
    x: Float[Array, "..."],
    number_format: str | Format,
    *,
    rounding: str = "nearest_even",
    key: Key | None = None,
) -> Float[Array, "..."]:
    """Rounds every number to one that a format has.

    Args:
      x: any shape; float32, bfloat16 or float16.
      number_format: a name of `FORMATS`, or a format.
      rounding: to the nearest, ties to even, away from zero or to zero (`"nearest_even"`,
        `"nearest_away"`, `"nearest_zero"`); `"up"`, `"down"`, to `"zero"` or `"away"` from it;
        to `"odd"` wherever inexact; `"stochastic"`, up with the probability of its distance;
        `"random"`, up or down with equal ones. A number that the format has stays in every mode.
      key: for the last two.

    Returns:
      The same shape and dtype.

    Raises:
      ValueError: an impossible format, an unknown mode, a random mode without a key, or a dtype
        that float32 does not hold.

    References: [pychop] [mx].
    """
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"x has dtype {x.dtype}: give float32, bfloat16 or float16")
    random = random_bits(rounding, key, x.shape)
    return _round(x, random, number_format=checked(number_format), rounding=rounding)


@functools.partial(jax.jit, static_argnames=("number_format", "rounding"))
def _round(x, random, *, number_format: Format, rounding: str):
    wide = x.astype(jnp.float32)
    if isinstance(number_format, BlockFormat):
        return _blocks(wide, number_format, rounding, random).astype(x.dtype)
    return _elements(wide, number_format, rounding, random).astype(x.dtype)


def _elements(x, f: FloatFormat | FixedFormat, rounding: str, random):
    if isinstance(f, FixedFormat):
        return _fixed(x, f, rounding, random)
    return _float(x, f, rounding, random)


def _parts(x):
    """Sign, exponent of the last bit, and significand of a float32: `significand * 2^last`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> 23).astype(jnp.int32)
    implied = jnp.where(exponent > 0, jnp.uint32(1) << 23, jnp.uint32(0))
    return (bits >> 31) == 1, jnp.maximum(exponent, 1) - 150, (magnitude & 0x7FFFFF) | implied


def _cut(significand, shift, negative, random) -> Cut:
    # From 31 bits on nothing is kept; what is cut off is held in units of 2^-31 of the shift, and
    # stays positive, since directed modes ask only whether anything was there.
    excess = jnp.clip(shift - 31, 0, 31).astype(jnp.uint32)
    shift = jnp.clip(shift, 0, 31).astype(jnp.uint32)
    kept = significand >> shift
    rest = (significand - (kept << shift)) >> excess
    rest = jnp.where((excess > 0) & (significand > 0), jnp.maximum(rest, 1), rest)
    return Cut(kept, rest, shift, negative, random)


def _magnitude(integer, unit):
    """`integer * 2^unit` as float32 by its bits; `integer` up to 2^24, `unit` at least -149."""
    normal = jax.lax.bitcast_convert_type(integer.astype(jnp.float32), jnp.int32) + (unit << 23)
    # A result below the smallest normal float32 is its own integer in units of 2^-149.
    length = 32 - jax.lax.clz(integer).astype(jnp.int32)
    tiny = (integer << jnp.clip(unit + 149, 0, 31).astype(jnp.uint32)).astype(jnp.int32)
    bits = jnp.where(length + unit <= -126, tiny, normal)
    return jax.lax.bitcast_convert_type(jnp.where(integer == 0, 0, bits), jnp.float32)


def _signed(magnitude, negative):
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits | (negative.astype(jnp.uint32) << 31), jnp.float32)


def _float(x, f: FloatFormat, rounding: str, random):
    negative, last, significand = _parts(x)
    least = smallest_exponent(f)
    # The unit of the last kept bit: that of the number's own binade, or of the smallest one.
    unit = jnp.maximum(last + 23, least) - f.significand_bits
    if not f.subnormals:
        unit = jnp.where(last + 23 < least, least, unit)
    c = _cut(significand, unit - last, negative, random)
    magnitude = _magnitude(rounded(c, rounding), unit)
    top = jnp.float32(largest(f))
    beyond = {"ieee": jnp.inf, "nan": jnp.nan, "none": top}[f.specials]
    back = f.saturate | inward(rounding, negative)
    # Integers compare as their floats do, and NaNs and infinities of x pass below.
    magnitude = jnp.where(magnitude > top, jnp.where(back, top, beyond), magnitude)
    infinite = top if f.saturate else jnp.float32(beyond)
    magnitude = jnp.where(jnp.isinf(x), infinite, magnitude)
    return jnp.where(jnp.isnan(x), x, _signed(magnitude, negative))


def _fixed(x, f: FixedFormat, rounding: str, random):
    negative, last, significand = _parts(x)
    unit = jnp.full_like(last, -f.fraction_bits)
    c = _cut(significand, unit - last, negative, random)
    # Where the number's own last bit is above the unit it is a multiple of it already.
    magnitude = jnp.where(last >= unit, jnp.abs(x), _magnitude(rounded(c, rounding), unit))
    value = _signed(magnitude, negative)
    low = -(2.0**f.integer_bits) if not f.symmetric else -largest(f)
    # Clipping takes infinities to the ends; a NaN stays one.
    return jnp.clip(value, low, largest(f))


def _blocks(x, f: BlockFormat, rounding: str, random):
    columns = x.shape[-1]
    missing = -columns % f.size

    def cut(a):
        padded = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        return padded.reshape(*a.shape[:-1], -1, f.size)

    blocks, random = cut(x), None if random is None else cut(random)
    _, last, significand = _parts(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True))
    # floor(log2 of the largest magnitude) by its bits, subnormals included.
    leading = last + 31 - jax.lax.clz(significand).astype(jnp.int32)
    element = f.element._replace(saturate=True) if isinstance(f.element, FloatFormat) else f.element
    top = math.frexp(largest(element))[1] - 1
    # The shared scale is an e8m0: -127 to 127. In two factors, so that each is a normal float32.
    scale = jnp.clip(leading - top, -127, 127)
    first, second = scale // 2, scale - scale // 2
    inside = _elements(blocks * _power(-first) * _power(-second), element, rounding, random)
    result = inside * _power(first) * _power(second)
    return result.reshape(*x.shape[:-1], -1)[..., :columns]


def _power(exponent):
    """`2^exponent` exactly, from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
