"""Emulated number formats against ml_dtypes, lists of all their numbers, and definitions."""

import fractions

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.weights.quant.formats import (
    FORMATS,
    BlockFormat,
    FixedFormat,
    FloatFormat,
    largest,
    round_to,
)
from jaxpara.weights.quant.rounding import RANDOM, UP

KEY = jax.random.key(0)
STORED = [name for name in FORMATS if name.startswith(("bfloat", "float"))]
DETERMINISTIC = [mode for mode in UP if mode not in RANDOM]


def storage(name):
    return np.dtype(np.float16 if name == "float16" else getattr(ml_dtypes, name))


def every_bit_pattern(count=1_000_000):
    """Random float32 patterns, subnormals, infinities and NaNs among them, and ordinary numbers."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 2**32, size=count, dtype=np.uint32).view(np.float32)
    ordinary = rng.normal(size=count // 5) * np.exp(rng.uniform(-30, 12, count // 5))
    corners = [0.0, -0.0, 2.0**-149, -(2.0**-127), 464.0, 465.0, 65519.0, 65520.0, np.inf]
    return np.concatenate([patterns, np.asarray([*ordinary, *corners], np.float32)])


def numbers_of(name):
    """Every finite number of a small format, increasing, in float64."""
    dtype = storage(name)
    finite = np.arange(256, dtype=np.uint8)[: 2 ** ml_dtypes.finfo(dtype).bits].view(dtype)
    wide = finite.astype(np.float64)
    return np.unique(wide[np.isfinite(wide)])


@pytest.mark.parametrize("name", STORED)
def test_a_format_rounds_as_its_storage_type_bit_for_bit(name):
    x = every_bit_pattern()
    if ml_dtypes.finfo(storage(name)).bits <= 8:
        # Every number of the format, every tie between two, and their neighbours on both sides.
        have = numbers_of(name)
        have = np.float32([*have, *(have[1:] + have[:-1]) / 2])
        x = np.concatenate([x, have, np.nextafter(have, -np.inf), np.nextafter(have, np.inf)])
    if FORMATS[name].specials == "none":
        # Such a type has no NaN: ml_dtypes stores a zero, an emulation keeps the NaN visible.
        x = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        expected = x.astype(storage(name)).astype(np.float32)
    found = np.asarray(round_to(x, name))
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    np.testing.assert_array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))


SMALL = ["float4_e2m1fn"] + [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("float8_e4m3", "float8_e4m3fn", "float6_e2m3fn")
]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_every_mode_takes_the_neighbour_that_it_says(name, rounding):
    have = numbers_of(name)
    rng = np.random.default_rng(1)
    middles = (have[1:] + have[:-1]) / 2
    x = np.concatenate([have, middles, rng.uniform(have[0], have[-1], 3000)])
    x = np.concatenate([x, rng.uniform(-1, 1, 3000) * have[have > 0][1]]).astype(np.float32)
    # So small that no bit of it is near the last one of the format.
    x = np.concatenate([x, np.float32([1e-12, -1e-12, 1e-30, -1e-30, 1e-42, -(2.0**-149)])])
    wide = x.astype(np.float64)
    low = have[np.clip(np.searchsorted(have, wide, side="right") - 1, 0, len(have) - 1)]
    high = have[np.clip(np.searchsorted(have, wide, side="left"), 0, len(have) - 1)]
    inner, outer = np.where(wide >= 0, low, high), np.where(wide >= 0, high, low)
    near = np.where(wide - low < high - wide, low, high)
    tie = (wide - low == high - wide) & (low != high)
    # A number's place among those of its sign is its pattern without the sign.
    odd = lambda value: np.searchsorted(have[have >= 0], np.abs(value)) % 2 == 1  # noqa: E731
    expected = {
        "nearest_even": np.where(tie, np.where(odd(low), high, low), near),
        "nearest_away": np.where(tie, outer, near),
        "nearest_zero": np.where(tie, inner, near),
        "up": high,
        "down": low,
        "zero": inner,
        "away": outer,
        "odd": np.where(low == high, low, np.where(odd(low), low, high)),
    }[rounding]
    np.testing.assert_array_equal(np.asarray(round_to(x, name, rounding=rounding)), expected)


@pytest.mark.parametrize(
    "name", ["float8_e4m3", "float6_e2m3fn", "bfloat16", "int8", FloatFormat(8, 22)]
)
def test_stochastic_rounding_is_unbiased_and_leaves_what_is_exact(name):
    values = jnp.asarray([1.03, -0.37, 0.0123, 1.5, 0.0, 1e-5, -3.1416])
    count = 40_000
    x = jnp.broadcast_to(values, (count, values.size))
    found = np.asarray(round_to(x, name, rounding="stochastic", key=jax.random.key(3)), np.float64)
    low = np.asarray(round_to(values, name, rounding="down"), np.float64)
    high = np.asarray(round_to(values, name, rounding="up"), np.float64)
    assert np.all((found == low) | (found == high))
    chance = np.where(high > low, (np.asarray(values, np.float64) - low), 0) / np.where(
        high > low, high - low, 1
    )
    # The share of ups is binomial: four standard deviations, and none where the number is exact.
    share = np.where(high > low, found == high, False).mean(0)
    assert np.all(np.abs(share - chance) <= 4 * np.sqrt(chance * (1 - chance) / count) + 1e-12)


def test_random_rounding_goes_up_half_the_time_and_keys_decide():
    x = jnp.full(40_000, 1.03)
    draw = lambda key: round_to(x, "float8_e4m3", rounding="random", key=key)  # noqa: E731
    up = np.asarray(draw(jax.random.key(0))) > 1.03
    assert abs(up.mean() - 0.5) < 4 * 0.5 / np.sqrt(x.size)
    assert np.array_equal(draw(jax.random.key(0)) > 1.03, up)
    assert not np.array_equal(draw(jax.random.key(1)) > 1.03, up)


@pytest.mark.parametrize("rounding", ["nearest_even", "down", "odd"])
@pytest.mark.parametrize("name", ["bfloat16", "int4", "mxfp4"])
def test_rounding_twice_is_rounding_once(name, rounding):
    x = jax.random.normal(jax.random.key(0), (40, 64)) * 3
    once = round_to(x, name, rounding=rounding)
    np.testing.assert_array_equal(round_to(once, name, rounding=rounding), once)
    assert not np.array_equal(once, x)


@pytest.mark.parametrize("integer_bits, fraction_bits", [(3, 0), (7, 0), (2, 5), (0, 7), (10, 14)])
def test_fixed_point_is_rounding_of_a_multiple(integer_bits, fraction_bits):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=20_000) * 2.0**integer_bits).astype(np.float32)
    x = np.concatenate([x, np.arange(-9, 9) / 2.0 ** (fraction_bits + 1)]).astype(np.float32)
    step, top = 2.0**-fraction_bits, 2.0**integer_bits
    expected = np.clip(np.round(x.astype(np.float64) / step) * step, -top, top - step)
    found = round_to(x, FixedFormat(integer_bits, fraction_bits))
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


def test_infinities_saturate_in_fixed_point_and_a_nan_stays():
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
    found = np.asarray(round_to(x, "int8"))
    assert found[0] == 127 and found[1] == -128 and np.isnan(found[2])


def test_blocks_share_a_power_of_two_and_their_elements_saturate():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5, 70)) * np.exp(rng.uniform(-20, 20, (5, 1)))).astype(np.float32)
    x[4] = 0
    expected = np.zeros_like(x)
    for row in range(5):
        for start in range(0, 70, 32):
            block = x[row, start : start + 32].astype(np.float64)
            if block.any():
                # 448 = 1.75 * 2^8 is the largest number of an e4m3 element.
                scale = 2.0 ** (np.floor(np.log2(np.abs(block).max())) - 8)
                inside = np.clip(block / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
                expected[row, start : start + 32] = inside.astype(np.float64) * scale
    np.testing.assert_array_equal(round_to(x, "mxfp8_e4m3"), expected)


def test_without_subnormals_the_smallest_normal_number_follows_zero():
    f = FloatFormat(4, 3, subnormals=False)
    smallest = 2.0**-6
    x = jnp.asarray([0.49, 0.51, -0.51, 0.99, 1.0]) * smallest
    np.testing.assert_array_equal(round_to(x, f), np.asarray([0, 1, -1, 1, 1]) * smallest)
    np.testing.assert_array_equal(round_to(x, f, rounding="zero"), [0, 0, 0, 0, smallest])


def test_overflow_becomes_what_the_format_defines():
    big = jnp.asarray([1e6, -1e6])
    assert np.all(np.isinf(round_to(big, FloatFormat(4, 3))))
    assert np.all(np.isnan(round_to(big, FloatFormat(4, 3, specials="nan"))))
    assert np.all(np.abs(round_to(big, FloatFormat(4, 3, specials="none"))) == 480)
    assert np.all(np.abs(round_to(big, FloatFormat(4, 3, saturate=True))) == 240)
    ends = {"up": [np.inf, -240], "down": [240, -np.inf], "zero": [240, -240], "odd": [240, -240]}
    for rounding, wanted in ends.items():
        np.testing.assert_array_equal(round_to(big, "float8_e4m3", rounding=rounding), wanted)


@pytest.mark.parametrize("name", STORED)
def test_the_largest_number_is_that_of_the_storage_type(name):
    assert largest(FORMATS[name]) == float(ml_dtypes.finfo(storage(name)).max)


def test_narrow_inputs_keep_their_dtype():
    x = jnp.asarray([1.03, 2.2], jnp.bfloat16)
    found = round_to(x, "float8_e4m3fn")
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, round_to(x.astype(jnp.float32), "float8_e4m3fn"))


def test_float64_is_rounded_once():
    exact = fractions.Fraction
    with jax.enable_x64(True):
        draw = np.random.default_rng(2).standard_normal(400) * 2.0 ** np.arange(-150, 50, 0.5)
        # A tie of the format that rounding to float32 on the way would make, and neighbours.
        x = np.concatenate([draw, [1 + 2**-8 + 2.0**-40, 1 + 2**-8, 1 + 2**-8 - 2.0**-40]])
        found = np.asarray(round_to(x, FloatFormat(8, 7)))
        assert found.dtype == np.float64
        for number, near in zip(x, found, strict=True):
            unit = exact(2) ** (max(int(np.floor(np.log2(abs(number)))), -126) - 7)
            assert exact(float(near)) == round(exact(float(number)) / unit) * unit
        assert list(found[-3:]) == [1 + 2**-7, 1.0, 1.0]
        np.testing.assert_array_equal(round_to(x, FloatFormat(11, 52)), x)
        np.testing.assert_array_equal(round_to(x, "float16"), x.astype(np.float16).astype(float))
        wide = np.asarray(round_to(x, FloatFormat(11, 30), rounding="zero"))
        bits = (x.view(np.uint64) >> np.uint64(22)) << np.uint64(22)
        np.testing.assert_array_equal(wide, bits.view(np.float64))
        np.testing.assert_allclose(round_to(x, FixedFormat(20, 30))[-3:], x[-3:], atol=2**-31)
        key = jax.random.key(0)
        drawn = round_to(
            np.full(4000, 1 + 2**-9), FloatFormat(8, 7), rounding="stochastic", key=key
        )
        assert set(np.unique(drawn)) == {1.0, 1 + 2**-7} and abs(np.mean(drawn > 1) - 0.25) < 0.03


def test_a_format_without_a_limit_of_exponents_rounds_the_significand_alone():
    x = every_bit_pattern(20_000)
    x = x[np.isfinite(x)]
    found = np.float64(np.asarray(round_to(x, FloatFormat(None, 7))))
    fraction, exponent = np.frexp(np.float64(x))
    wanted = np.ldexp(np.round(fraction * 2**8), exponent - 8)
    # Beyond the largest float32, and below its last bit, the number itself has no more room.
    wanted = np.float64(np.where(np.abs(wanted) >= 2.0**128, np.sign(x) * np.inf, wanted))
    fine = np.ldexp(1.0, exponent - 8) >= 2.0**-149
    np.testing.assert_array_equal(found[fine], wanted[fine])
    np.testing.assert_array_equal(found[~fine], np.float64(x)[~fine])
    # With float16's exponents the smallest and the largest ones are others.
    limited = np.asarray(round_to(x, FloatFormat(5, 7)))
    assert np.any(limited != found) and np.any(np.isinf(limited) & np.isfinite(found))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_number_formats_of_weights_under_x64(dtype):
    with jax.enable_x64(True):
        w = np.random.default_rng(0).standard_normal((8, 4)).astype(dtype)
        for name in ("float8_e4m3fn", "mxfp4", FloatFormat(None, 4)):
            t = jp.number_format(name)
            state = t.attach(KEY, {"w": w})
            found = t.effective(state)["w"]
            single = np.asarray(w, np.float32)
            assert found.dtype == dtype
            wanted = jp.number_format(name).attach(KEY, {"w": single})
            if dtype == "float32":
                np.testing.assert_array_equal(found, t.effective(wanted)["w"])
            else:  # no tie is near
                np.testing.assert_allclose(found, t.effective(wanted)["w"], rtol=1e-15)


@pytest.mark.untyped
@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: round_to(x, "float9"), "format 'float9': give one of bfloat16, "),
        (lambda x: round_to(x, FloatFormat(9, 3)), "give 1 to 8 exponent, 0 to 23 significand"),
        (lambda x: round_to(x, FloatFormat(11, 52)), "significand bits, or numbers in float64"),
        (lambda x: round_to(x, FloatFormat(12, 3)), "give 1 to 8 exponent"),
        (lambda x: round_to(x, FloatFormat(None, 3, specials="none")), "only\n?.*specials='ieee'"),
        (lambda x: round_to(x, BlockFormat(FloatFormat(None, 3))), "give its exponent_bits"),
        (lambda x: jp.number_format(FloatFormat(11, 52)).attach(KEY, {"w": x}), "in float64"),
        (lambda x: round_to(x, FloatFormat(4, 3, specials="inf")), "give one of .'ieee', 'nan'"),
        (lambda x: round_to(x, FloatFormat(4, 0, specials="nan")), "there is only one"),
        (lambda x: round_to(x, FloatFormat(1, 3)), "give exponent_bits=2"),
        (lambda x: round_to(x, FloatFormat(8, 3, specials="none")), "only with specials='ieee'"),
        (lambda x: round_to(x, FixedFormat(20, 20)), "40 bits beside the sign: give 1 to 24"),
        (lambda x: round_to(x, BlockFormat(FORMATS["int4"], 0)), "size=0 of a block"),
        (lambda x: round_to(x, "int8", rounding="even"), "rounding='even': give one of 'nearest_e"),
        (lambda x: round_to(x, "int8", rounding="random"), "give key=jax.random.key"),
        (lambda x: round_to(x.astype(jnp.int32), "int8"), "dtype int32: give float32"),
        (lambda x: jp.number_format("int8", rounding="even"), "give one of 'nearest_even'"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 3)))


def stacked(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


CONTEXTS = {
    "matmul": (lambda p, x: x @ p["w"], {"w": (32, 6)}, (3, 32)),
    "scan": (stacked, {"layers": (4, 32, 32)}, (3, 32)),
    "embedding": (lambda p, x: p["table"][jnp.arange(5)] * x[:1, :6], {"table": (9, 6)}, (3, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float8_e4m3fn", "mxfp4", "int4"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_lifted_function_is_that_of_the_rounded_weights(name, context):
    f, shapes, inputs = CONTEXTS[context]
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    # Beyond the range of int4 in places, so that the mask of the gradient matters.
    params = {
        n: 4 * jax.random.normal(k, shape)
        for (n, shape), k in zip(shapes.items(), keys, strict=False)
    }
    x = jax.random.normal(keys[-1], inputs)
    t = jp.number_format(name)
    state = t.attach(keys[0], params)
    total = lambda f: lambda s: jnp.sum(jnp.sin(f(s, x)))  # noqa: E731
    value, grad = jax.value_and_grad(total(jp.lift(f)))(state)
    expected, by_hand = jax.value_and_grad(total(lambda s, x: f(t.effective(s), x)))(state)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_gradient_passes_straight_through_inside_the_range_alone():
    w = jnp.asarray([[0.3, 9.0], [-9.0, -7.7]])
    t = jp.number_format("int4")
    state = t.attach(jax.random.key(0), {"w": w})
    grad = jax.grad(lambda s: jnp.sum(t.effective(s)["w"] * jnp.asarray([[1.0, 2], [3, 4]])))(state)
    # The format ends at -8 and 7; the mask is symmetric at 7.
    np.testing.assert_array_equal(grad["w"].base, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(t.effective(state)["w"], [[0, 7], [-8, -8]])


def test_blocks_of_a_weight_run_along_its_contraction():
    w = jnp.concatenate([jnp.full((32, 1), 1.0), jnp.full((32, 1), 1000.0)], axis=1)
    t = jp.number_format("mxfp4")
    dense = t.effective(t.attach(jax.random.key(0), {"w": w}))["w"]
    np.testing.assert_array_equal(dense[:, 0], 1.0)  # its own scale, whatever its neighbour's
