"""Emulated number formats: `round_to(x, format)` is the nearest number that a format has.

Floats by exponent and significand bits, fixed point, integers, and blocks with a shared
power-of-two scale; no global state, and the random modes take a key. Floats are rounded on the
bits of their float32 or float64, so nothing depends on logarithms or on how a device treats
subnormals.
[pychop], [mx]
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpara.sizes import flag, needed, whole
from jaxpara.types import AnyArray, Key
from jaxpara.weights.quant.rounding import Cut, inward, random_bits, rounded

SPECIALS = ("ieee", "nan", "none")


class FloatFormat(NamedTuple):
    """A binary floating-point format.

    Attributes:
      exponent_bits: 1 to 8, to 11 for float64 numbers; None: only the significand is rounded, and
        no number is too large or too small (`explim=0` in [pychop]).
      significand_bits: stored ones, 0 to 23, to 52 for float64; one more is implied.
      subnormals: without them the smallest number beside zero is the smallest normal one.
      specials: what the largest exponent is for. `"ieee"`: only infinities and NaNs; `"nan"`:
        numbers, but for one NaN (the "fn" types); `"none"`: only numbers.
      saturate: numbers beyond the largest become the largest; otherwise they become what the
        format has for it (infinity, NaN; the largest where it has neither).
    """

    exponent_bits: int | None
    significand_bits: int
    subnormals: bool = True
    specials: str = "ieee"
    saturate: bool = False


class FixedFormat(NamedTuple):
    """Multiples of `2^-fraction_bits` from `-2^integer_bits` to just below `2^integer_bits`.

    Attributes:
      integer_bits: before the point, the sign not counted; with `fraction_bits` at most 24, and 53
        for float64 numbers.
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


class _Carrier(NamedTuple):
    """The type in whose bits numbers are rounded.

    Attributes:
      number, whole, signed: float, unsigned and signed integer of one width.
      exponent_bits, significand_bits: as in `FloatFormat`.
    """

    number: Any
    whole: Any
    signed: Any
    exponent_bits: int
    significand_bits: int

    @property
    def width(self) -> int:
        return self.exponent_bits + self.significand_bits + 1

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1


_SINGLE = _Carrier(jnp.float32, jnp.uint32, jnp.int32, 8, 23)
_DOUBLE = _Carrier(jnp.float64, jnp.uint64, jnp.int64, 11, 52)


def _carrier(dtype: Any) -> _Carrier:
    return _DOUBLE if dtype == jnp.float64 else _SINGLE


def checked(number_format: str | Format, dtype: Any = jnp.float64) -> Format:
    """A format whose settings are possible.

    Args:
      number_format: a name of `FORMATS`, or a format.
      dtype: of the numbers that are rounded to it.

    Returns:
      The format.

    Raises:
      ValueError: an unknown name, or bits out of range.
    """
    most = _carrier(dtype)
    wider = "" if most is _DOUBLE else ", or numbers in float64"
    if isinstance(number_format, str):
        if number_format not in FORMATS:
            raise ValueError(f"format {number_format!r}: give one of {', '.join(FORMATS)}")
        return FORMATS[number_format]
    if isinstance(number_format, BlockFormat):
        size = needed(size=number_format.size)
        if size < 1:
            raise ValueError(f"size={size} of a block: give 1 or more")
        element = checked(number_format.element, dtype)
        if isinstance(element, BlockFormat) or largest(element) == math.inf:
            raise ValueError(f"{element} in a block: give its exponent_bits, a number")
        return BlockFormat(element, size)
    if isinstance(number_format, FixedFormat):
        before = needed(integer_bits=number_format.integer_bits)
        after = needed(fraction_bits=number_format.fraction_bits)
        bits, limit = before + after, most.significand_bits + 1
        if not 1 <= bits <= limit:
            raise ValueError(
                f"{number_format} has {bits} bits beside the sign: give 1 to {limit}{wider}"
            )
        return FixedFormat(before, after, flag(symmetric=number_format.symmetric))
    if not isinstance(number_format, FloatFormat):
        raise ValueError(
            f"format {number_format!r}: give a name such as 'bfloat16', or a FloatFormat, "
            "FixedFormat or BlockFormat"
        )
    e = whole(exponent_bits=number_format.exponent_bits)
    m = needed(significand_bits=number_format.significand_bits)
    if not ((e is None or 1 <= e <= most.exponent_bits) and 0 <= m <= most.significand_bits):
        raise ValueError(
            f"{number_format}: give 1 to {most.exponent_bits} exponent, 0 to "
            f"{most.significand_bits} significand bits{wider}"
        )
    number_format = number_format._replace(
        subnormals=flag(subnormals=number_format.subnormals),
        saturate=flag(saturate=number_format.saturate),
    )
    if number_format.specials not in SPECIALS:
        raise ValueError(f"specials={number_format.specials!r}: give one of {SPECIALS}")
    if number_format.specials == "nan" and m == 0:
        raise ValueError("specials='nan' takes one significand, and there is only one")
    if number_format.specials == "ieee" and e == 1:
        raise ValueError("specials='ieee' takes one exponent of two: give exponent_bits=2")
    if number_format.specials != "ieee" and e in (None, most.exponent_bits):
        raise ValueError(
            f"exponents of {'any number of' if e is None else e} bits reach the numbers' own only "
            "with specials='ieee'"
        )
    return number_format._replace(exponent_bits=e, significand_bits=m)


def smallest_exponent(f: FloatFormat) -> int:
    """The exponent of the smallest normal number, where exponents are limited."""
    assert f.exponent_bits is not None
    return 2 - 2 ** (f.exponent_bits - 1)


def largest(f: FloatFormat | FixedFormat) -> float:
    """The largest number of a format.

    Args:
      f: the format.

    Returns:
      The number, exactly; infinity where exponents are not limited.
    """
    if isinstance(f, FixedFormat):
        return 2.0**f.integer_bits - 2.0**-f.fraction_bits
    if f.exponent_bits is None:
        return math.inf
    exponents = 2**f.exponent_bits - (2 if f.specials == "ieee" else 1)
    top = smallest_exponent(f) + exponents - 1
    ulp = 2.0**-f.significand_bits
    return 2.0**top * (2.0 - (2 if f.specials == "nan" else 1) * ulp)


def round_to(
    x: Float[AnyArray, "..."],
    number_format: str | Format,
    *,
    rounding: str = "nearest_even",
    key: Key | None = None,
) -> Float[Array, "..."]:
    """Rounds every number to a number of the format.

    Args:
      x: any shape; float64, float32, bfloat16 or float16.
      number_format: a name of `FORMATS`, or a format.
      rounding: to the nearest, ties to even, away from zero or to zero (`"nearest_even"`,
        `"nearest_away"`, `"nearest_zero"`); `"up"`, `"down"`, to `"zero"` or `"away"` from it;
        to `"odd"` wherever inexact; `"stochastic"`, up with the probability of its distance;
        `"random"`, up or down with equal ones. A number that the format has stays in every mode.
      key: for the last two.

    Returns:
      The same shape and dtype.

    Raises:
      ValueError: an impossible format, or one that the numbers cannot hold, an unknown mode, a
        random mode without a key, or another dtype.

    References: [pychop], [mx].
    """
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"x has dtype {x.dtype}: give float32, float64, bfloat16 or float16")
    f = checked(number_format, x.dtype)
    random = random_bits(rounding, key, x.shape, _carrier(x.dtype).whole)
    return _round(x, random, number_format=f, rounding=rounding)


@functools.partial(jax.jit, static_argnames=("number_format", "rounding"))
def _round(x, random, *, number_format: Format, rounding: str):
    wide = x.astype(_carrier(x.dtype).number)
    if isinstance(number_format, BlockFormat):
        return _blocks(wide, number_format, rounding, random).astype(x.dtype)
    return _elements(wide, number_format, rounding, random).astype(x.dtype)


def _elements(x, f: FloatFormat | FixedFormat, rounding: str, random):
    if isinstance(f, FixedFormat):
        return _fixed(x, f, rounding, random)
    return _float(x, f, rounding, random)


def _parts(x):
    """Sign, exponent of the last bit, and significand of a number: `significand * 2^last`."""
    c = _carrier(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, c.whole)
    one = jnp.ones((), c.whole)
    magnitude = bits & ((one << (c.width - 1)) - 1)
    exponent = (magnitude >> c.significand_bits).astype(jnp.int32)
    implied = jnp.where(exponent > 0, one << c.significand_bits, 0 * one)
    significand = (magnitude & ((one << c.significand_bits) - 1)) | implied
    last = jnp.maximum(exponent, 1) - (c.bias + c.significand_bits)
    return (bits >> (c.width - 1)) == 1, last, significand


def _leading(last, significand):
    """The exponent of the first bit that is one."""
    width = 8 * significand.dtype.itemsize
    return last + (width - 1) - jax.lax.clz(significand).astype(jnp.int32)


def _cut(significand, shift, negative, random) -> Cut:
    # From one bit less than all on nothing is kept; what is cut off is held in units of the rest
    # of the shift, and stays positive, since directed modes ask only whether anything was there.
    most, kind = 8 * significand.dtype.itemsize - 1, significand.dtype
    excess = jnp.clip(shift - most, 0, most).astype(kind)
    shift = jnp.clip(shift, 0, most).astype(kind)
    kept = significand >> shift
    rest = (significand - (kept << shift)) >> excess
    rest = jnp.where((excess > 0) & (significand > 0), jnp.maximum(rest, 1), rest)
    return Cut(kept, rest, shift, negative, random)


def _magnitude(integer, unit):
    """`integer * 2^unit` by its bits; the number holds `integer`, and its last bit `unit`."""
    c = _SINGLE if integer.dtype == jnp.uint32 else _DOUBLE
    exponent = unit.astype(c.signed) << c.significand_bits
    normal = jax.lax.bitcast_convert_type(integer.astype(c.number), c.signed) + exponent
    # A result below the smallest normal number is its own integer in units of the smallest one.
    first = 1 - c.bias
    shift = jnp.clip(unit - (first - c.significand_bits), 0, c.width - 1)
    tiny = (integer << shift.astype(c.whole)).astype(c.signed)
    length = c.width - jax.lax.clz(integer).astype(jnp.int32)
    bits = jnp.where(length + unit <= first, tiny, normal)
    return jax.lax.bitcast_convert_type(jnp.where(integer == 0, 0, bits), c.number)


def _signed(magnitude, negative):
    c = _carrier(magnitude.dtype)
    sign = negative.astype(c.whole) << (c.width - 1)
    return jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(magnitude, c.whole) | sign, c.number
    )


def _unit(f: FloatFormat, last, significand, exponent):
    """The exponent of the last kept bit: of the number's own binade, or of the smallest one."""
    if f.exponent_bits is None:
        return jnp.maximum(_leading(last, significand) - f.significand_bits, last)
    least = smallest_exponent(f)
    unit = jnp.maximum(exponent, least) - f.significand_bits
    return unit if f.subnormals else jnp.where(exponent < least, least, unit)


def _float(x, f: FloatFormat, rounding: str, random):
    negative, last, significand = _parts(x)
    unit = _unit(f, last, significand, last + _carrier(x.dtype).significand_bits)
    c = _cut(significand, unit - last, negative, random)
    magnitude = _magnitude(rounded(c, rounding), unit)
    top = jnp.asarray(largest(f), x.dtype)
    beyond = {"ieee": jnp.inf, "nan": jnp.nan, "none": top}[f.specials]
    back = f.saturate | inward(rounding, negative)
    # Integers compare as their floats do, and NaNs and infinities of x pass below.
    magnitude = jnp.where(magnitude > top, jnp.where(back, top, beyond), magnitude)
    infinite = top if f.saturate else jnp.asarray(beyond, x.dtype)
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
        return padded.reshape(*a.shape[:-1], padded.shape[-1] // f.size, f.size)

    blocks, random = cut(x), None if random is None else cut(random)
    _, last, significand = _parts(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True))
    # floor(log2 of the largest magnitude) by its bits, subnormals included.
    leading = _leading(last, significand)
    element = f.element._replace(saturate=True) if isinstance(f.element, FloatFormat) else f.element
    top = math.frexp(largest(element))[1] - 1
    # The shared scale is an e8m0: -127 to 127. In two factors, so that each is a normal float32.
    scale = jnp.clip(leading - top, -127, 127)
    first, second = scale // 2, scale - scale // 2
    power = functools.partial(_power, _carrier(x.dtype))
    inside = _elements(blocks * power(-first) * power(-second), element, rounding, random)
    result = inside * power(first) * power(second)
    return result.reshape(*x.shape[:-1], columns + missing)[..., :columns]


def _power(c: _Carrier, exponent):
    """`2^exponent` exactly, from -126 to 127."""
    bits = (exponent + c.bias).astype(c.signed) << c.significand_bits
    return jax.lax.bitcast_convert_type(bits, c.number)
