"""Every method in every dtype on ordinary, empty, tiny and huge columns: the table of the wing.

A row shows that the effective weight is the formula's in float64, rounded to the dtype; that the
lifted function and the one of the effective weights have the same values and the same, finite
gradients; and that the merged weight is the forward's bit for bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.weights.pools import resolved
from jaxpara.weights.precision import mean_size, narrowed, norm
from jaxpara.weights.quant.nf4 import NF4
from tests.recurrence.kit import QUICK

slow = pytest.mark.slow
DTYPES = ("float16", "bfloat16", "float32", "float64")
COLUMNS = 8


def weight(dtype):
    """`[8, 8]`: ordinary, zeros, near the smallest normal number, below it, huge, ordinary."""
    info = jnp.finfo(dtype)
    size = [
        1.0,
        0.0,
        40 * float(info.tiny),
        float(info.tiny) / 16,
        float(info.max) / 4,
        0.3,
        2.0,
        1.0,
    ]
    draw = np.random.default_rng(3).uniform(0.1, 1, (8, COLUMNS))
    draw[1::3] *= -1
    return jnp.asarray(draw * size, dtype)


# The formulas, in float64: of the weight and the parts as they stand in the state.


def low_rank(w, p):
    return w + 2.0 * p["a"] @ p["b"]


def largest(w):
    """The largest magnitude of each column, one for a column of zeros."""
    most = np.max(np.abs(w), 0)
    return np.where(most > 0, most, 1)


def directed(w, p):
    v = low_rank(w, p)
    size = largest(v) * np.sqrt(np.sum((v / largest(v)) ** 2, 0))
    return v * (p["magnitude"] / np.where(size > 0, size, 1))


def rows(w, p):
    out = w.copy()
    out[np.int64(p["rows"])] += 1.5 * p["update"]
    return out


def shards(w, p):
    side = lambda name: p[name][np.int64(p[f"at_{name}"])].reshape(2, -1)  # noqa: E731
    return w + 2 * side("a").T @ side("b")


def grid(w, scale, low, high, offset=0.0):
    return np.clip(np.round((w - offset) / scale), low, high) * scale + offset


def nearest(w, p):
    return grid(w, largest(w) / 7, -7, 7)


def affine(w, p):
    least, most = np.min(w, 0), np.max(w, 0)
    scale = np.where(most > least, most - least, 1) / 15
    return grid(w, scale, -8, 7, least + 8 * scale)


def searched(w, p):
    unit = largest(w)
    found = np.stack([grid(w / unit, s / 7, -7, 7) for s in 1 - 0.04 * np.arange(20)])
    best = np.argmin(np.sum((found - w / unit) ** 2, 1), 0)
    return np.take_along_axis(found, best[None, None], 0)[0] * unit


def thirds(w, p):
    return grid(w, largest(w) * np.maximum(np.mean(np.abs(w) / largest(w), 0), 1e-9), -1, 1)


def learned(w, p):
    return grid(w, p["scale"][0], -7, 7)


def learned_affine(w, p):
    return grid(narrow(low_rank(w, p), p), p["scale"][0], -8, 7, p["offset"][0])


def in_units(w, p):
    scale = p["scale"][0]
    return np.clip(np.round(np.clip(w / scale, -7, 7) + p["a"] @ p["b"]), -7, 7) * scale


def quantiles(w, p):
    levels = np.float64(NF4)
    return levels[np.abs((w / largest(w))[..., None] - levels).argmin(-1)] * largest(w)


def sparse(w, p):
    out = w.copy().reshape(2, 4, COLUMNS)
    np.put_along_axis(out, np.argsort(-np.abs(out), 1, kind="stable")[:, 2:], 0, 1)
    return out.reshape(8, COLUMNS)


def short(w, p):
    fraction, exponent = np.frexp(w)
    return np.ldexp(np.round(fraction * 2**5), exponent - 5)


def narrow(w, p):
    return np.float64(jnp.asarray(w, p["dtype"]))  # each member of a chain gives a weight


def activations(x):
    """Six bits, a scale for each row."""
    unit = jnp.max(jnp.abs(x), -1, keepdims=True).astype(jnp.promote_types(x.dtype, "float32")) / 31
    return (jnp.round(x / unit) * unit).astype(x.dtype)


def six_bits(w, p):
    return grid(w, largest(w) / 31, -31, 31)


# name -> method, its formula, and what is done with what the weight is multiplied with.
TABLE = {
    "number_format": (jp.number_format(jp.weights.FloatFormat(None, 4)), short),
    "dora_inside_fake_quant": (
        jp.chain(jp.dora(rank=2), jp.fake_quant()),
        lambda w, p: nearest(narrow(directed(w, p), p), p),
    ),
    "lora_on_nf4": (
        jp.chain(jp.nf4(), jp.lora(rank=2)),
        lambda w, p: low_rank(narrow(quantiles(w, p), p), p),
    ),
    "easy_quant_by_layer": (jp.easy_quant(steps=0, sigmas=100.0, by="layer"), nearest),
    "lora": (jp.lora(rank=2), low_rank),
    "dora": (jp.dora(rank=2), directed),
    "ia3": (jp.ia3(), lambda w, p: w * p["factor"]),
    "ia3_rows": (jp.ia3(axis=-2), lambda w, p: w * p["factor"][:, None]),
    "paca": (jp.paca(rank=2, alpha=3.0), rows),
    "mos": (jp.mos(rank=2, shards=2), shards),
    "fake_quant": (jp.fake_quant(), nearest),
    "fake_quant_affine": (jp.fake_quant(affine=True, ranges="minmax"), affine),
    "fake_quant_mse": (jp.fake_quant(ranges="mse"), searched),
    "flexq": (jp.flexq(group=None), six_bits, activations),
    "ternary": (jp.ternary(group=8), thirds),
    "rtn": (jp.rtn(), nearest),
    "nf4": (jp.nf4(), quantiles),
    "easy_quant": (jp.easy_quant(steps=0, sigmas=100.0), nearest),
    "lsq": (jp.lsq(), learned),
    "l4q": (jp.l4q(rank=2), learned_affine),
    "lr_qat": (jp.lr_qat(rank=2), in_units),
    "sparse_nm": (jp.sparse_nm(), sparse),
    "bdwp": (jp.bdwp(), sparse),
}


def moved(state, w):
    """The state with every part moved but those that say where a grid lies."""
    draw = np.random.default_rng(8)
    size = largest(np.float64(w))

    def one(keys, leaf):
        name = str(getattr(keys[-1], "key", ""))
        noise = draw.standard_normal(leaf.shape)
        if name in ("magnitude", "factor"):
            return (leaf * (1 + 0.1 * noise)).astype(leaf.dtype)
        if name in ("b", "update"):
            unit = 1 if "lr_qat" in state["w"].method.name else size
            return (leaf + 0.1 * noise * unit).astype(leaf.dtype)
        return leaf + (0.1 * noise).astype(leaf.dtype) if name.startswith("0_b") else leaf

    return jax.tree_util.tree_map_with_path(one, state)


def parts_of(leaf):
    inner = parts_of(leaf.base) if hasattr(leaf.base, "parts") else {}
    return inner | {name: np.float64(part) for name, part in leaf.parts.items()}


def assert_near(found, wanted, dtype, roundings):
    """Column by column, within so many roundings of the dtype, and those of a sum that cancels."""
    info = jnp.finfo(dtype)
    wide = 2.0**-18 if dtype != "float64" else 2.0**-46
    # Numbers below float32's and float64's smallest normal one are zeros on many devices, and so
    # is what is added up.
    least = float(info.smallest_subnormal) if dtype == "float16" else 16 * float(info.tiny)
    found, wanted = np.float64(found), np.float64(wanted)
    assert np.all(np.isfinite(found))
    size = np.max(np.abs(wanted), axis=tuple(range(wanted.ndim - 1)), keepdims=True)
    bound = size * (roundings * float(info.eps) / 2 + wide) + least
    assert np.all(np.abs(found - wanted) <= bound)


@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=() if d == "float16" else slow) for d in DTYPES]
)
@pytest.mark.parametrize("name", TABLE)
def test_every_method_in_every_dtype(name, dtype):
    t, formula, *operand = TABLE[name]
    with jax.enable_x64(dtype == "float64"):
        w = weight(dtype)
        state = moved(t.attach(jax.random.key(0), {"w": w}), w)
        x = jnp.asarray(np.random.default_rng(6).uniform(-1, 1, (3, 8)) / 64, dtype)
        c = np.random.default_rng(7).uniform(-1, 1, (3, COLUMNS))
        train, frozen = jp.split(state, t.trainable(state))

        def loss(train, run):
            y = run(jp.combine(train, frozen), x)
            return jnp.sum(y * c), y

        @functools.partial(jax.jit, compiler_options=QUICK)
        def forward(train):
            seen = operand[0] if operand else lambda x: x
            ways = jp.lift(product), lambda s, x: product(t.effective(s), seen(x))
            both = [jax.grad(loss, has_aux=True)(train, run) for run in ways]
            return both, jp.lift(lambda p: jnp.tanh(p["w"]) * 0 + p["w"])(jp.combine(train, frozen))

        ((ours, y), (theirs, wanted)), whole = forward(train)
        merge = jax.jit(lambda s: t.effective(t.merge(s))["w"], compiler_options=QUICK)
        np.testing.assert_array_equal(flushed(merge(state)), flushed(whole))
        leaf = resolved(state)["w"]
        assert whole.dtype == w.dtype
        parts = {**parts_of(leaf), "dtype": w.dtype}
        assert_near(whole, formula(np.float64(w), parts), dtype, 1.01)
        assert_near(y, wanted, dtype, 8)
        # What a rule multiplies after the product is as exact as the product: below float16's
        # smallest normal number that is nothing, so that column's own gradient is left out.
        scaled = dtype == "float16" and t.members[0].method.scaling is not None
        known = [i for i in range(COLUMNS) if not (scaled and i == 3)]
        jax.tree.map(lambda a, b: assert_near(of(known, a), of(known, b), dtype, 16), ours, theirs)


def product(params, x):
    return x @ params["w"]


def flushed(x):
    """Without what devices may take for zero: below the smallest normal float32 or float64."""
    return np.where(np.abs(x) < jnp.finfo(x.dtype).tiny * (x.dtype != "float16"), 0, np.float64(x))


def of(known, leaf):
    return leaf[..., np.array(known)] if leaf.shape[-1] == COLUMNS else leaf


def test_dora_in_float16_keeps_small_columns_and_long_ones():
    for w in (np.full((8, 4), 5e-5), 5 * np.random.default_rng(0).standard_normal((4096, 4))):
        t, w = jp.dora(rank=2), jnp.asarray(w, jnp.float16)
        state = t.attach(jax.random.key(0), {"w": w})
        assert state["w"].parts["magnitude"].dtype == jnp.float32
        exact = np.linalg.norm(np.float64(w), axis=0)
        np.testing.assert_allclose(state["w"].parts["magnitude"], exact, rtol=1e-6)
        np.testing.assert_array_equal(t.effective(state)["w"], w)
    # Squares in float16 would not do.
    assert not np.all(np.isfinite(np.sum(np.float16(w) ** 2, 0, dtype=np.float16)))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-38, 1e37])
@pytest.mark.parametrize("t", [jp.lsq(), jp.lsq(full=True), jp.lsq(affine=True), jp.l4q(rank=2)])
def test_gradients_of_learned_scales_are_the_formula_for_columns_of_any_size(t, size):
    draw = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
    w = jnp.asarray(draw * np.float32(size))
    state = t.attach(jax.random.key(0), {"w": w})
    c = np.random.default_rng(1).standard_normal((8, 3)).astype(np.float32)
    grads = jax.grad(lambda s: jnp.sum(t.effective(s)["w"] * c), allow_int=True)(state)["w"]
    grid = state["w"].method.settings
    high = 2 ** (grid.bits - 1) - 1
    low = -high - (grid.affine or grid.full)
    v = np.float64(w) / np.float64(state["w"].parts["scale"][0])
    slope = np.where(v < low, low, np.where(v > high, high, np.round(v) - v))
    wanted = np.sum(slope * c, 0)
    found = grads.parts["scale"][0, 0]
    # 1e-38 is no multiple of the smallest scale that one may divide by; it is only finite.
    assert np.all(np.isfinite(found))
    if size != 1e-38:
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_chain_in_few_bits_merges_to_its_forward_bit_for_bit(dtype):
    # The forward is compiled whole, the merge op by op; XLA drops casts in the one alone.
    w = jnp.asarray(np.random.default_rng(8).standard_normal((1024, 512)), dtype)
    t = jp.chain(jp.dora(rank=2), jp.fake_quant())
    state = t.attach(jax.random.key(0), {"w": w})
    train, frozen = jp.split(state, t.trainable(state))
    draw = np.random.default_rng(9)
    state = jp.combine(
        jax.tree.map(lambda a: (a + 0.02 * draw.standard_normal(a.shape)).astype(a.dtype), train),
        frozen,
    )
    merged = t.merge(state)
    run = jp.lift(lambda p, x: (jnp.tanh(x @ p["w"]), p["w"]))
    forward = run(state, w[:3, :1] * jnp.ones((1, 1024), dtype))[1]
    assert forward.dtype == w.dtype == run(merged, jnp.ones((3, 1024), dtype))[1].dtype
    np.testing.assert_array_equal(np.float32(forward), np.float32(t.effective(merged)["w"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrowing_is_rounding_to_nearest_even_with_the_derivative_of_a_cast(dtype):
    draw = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    most = float(jnp.finfo(dtype).max)
    x = np.concatenate([draw[np.abs(draw) < most], np.float32([0, -0.0, 6e-8, 3e-8, 8.9e-8, 5e-5])])
    wanted = np.asarray(jnp.asarray(x, dtype), np.float32)
    found = np.float32(jax.jit(lambda x: narrowed(x, dtype))(x))
    normal = np.abs(x) > jnp.finfo(jnp.float32).tiny
    np.testing.assert_array_equal(found[normal], wanted[normal])
    tangents = jax.jvp(lambda x: narrowed(x, dtype), (x,), (np.ones_like(x),))[1]
    assert tangents.dtype == dtype and np.all(np.float32(tangents) == 1)


def test_norms_and_means_of_any_size_are_those_of_float64():
    draw = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    w = draw * np.float32([1, 0, 1e-30, 1e36, 3e-25])
    exact = np.float64(w)
    np.testing.assert_allclose(norm(w, (0,))[0], np.sqrt(np.sum(exact**2, 0)), rtol=1e-6)
    np.testing.assert_allclose(mean_size(w, (0,))[0], np.mean(np.abs(exact), 0), rtol=1e-6)
    assert np.isinf(np.sum(np.square(w), 0)[3]) and np.sum(np.square(w), 0)[2] == 0


ENDS = [
    jp.rtn(affine=True),
    jp.rtn(affine=True, ranges="mse"),
    jp.fake_quant(bits=2, affine=True, ranges="minmax"),
    jp.fake_quant(bits=8, affine=True, ranges="mse"),
    jp.lsq(bits=2),
    jp.lsq(bits=2, full=True),
    jp.lsq(bits=4),
    jp.lsq(affine=True),
    jp.nf4(),
    jp.nf4(scale_block=256),
    jp.ternary(),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_columns_at_the_end_of_the_range_are_those_of_the_middle(dtype):
    with jax.enable_x64(True):
        for t in ENDS:
            found = []
            for power in (0, jnp.finfo(dtype).maxexp - 1):
                entries = jnp.asarray([[1.75], [-1.75], [0.875], [0.5]], dtype)
                w = entries * jnp.asarray(2.0**power, dtype)
                state = t.attach(jax.random.key(0), {"w": w})
                value = np.float64(jax.jit(t.effective)(state)["w"])
                merged = jax.jit(t.effective)(jax.jit(t.merge)(state))["w"]
                np.testing.assert_array_equal(value, np.float64(merged))
                found.append(value / 2.0**power)
            if t.members[0].method.name.startswith("lsq"):
                # Levels that would be beyond the range are numbers within.
                assert np.all(np.isfinite(found[1])) and found[1][0] > 0 > found[1][1]
            else:
                np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_that_descent_finds_leave_the_largest_numbers_finite(dtype):
    rng = np.random.default_rng(1)
    size = np.where(rng.random((16, 4)) < 0.5, 1, rng.random((16, 4)))
    w = jnp.asarray(
        np.sign(rng.normal(size=size.shape)) * size * float(jnp.finfo(dtype).max), dtype
    )
    for t in (jp.easy_quant(bits=3), jp.easy_quant(bits=8), jp.easy_quant(bits=4, by="layer")):
        value = np.float64(t.effective(t.attach(jax.random.key(0), {"w": w}))["w"])
        assert np.all(np.isfinite(value))
        largest = np.float64(w) == np.max(np.float64(w))
        np.testing.assert_allclose(value[largest], np.float64(w)[largest], rtol=0.2)


def test_the_low_rank_middle_of_a_float16_product_does_not_overflow():
    state = jp.lora(rank=1).attach(jax.random.key(0), {"w": jnp.zeros((4096, 1), jnp.float16)})
    parts = {"a": jnp.ones((4096, 1), jnp.float16), "b": jnp.full((1, 1), 1e-4, jnp.float16)}
    state = {"w": dataclasses.replace(state["w"], parts=parts)}
    x = jnp.full((1, 4096), 100.0, jnp.float16)
    assert not np.isfinite(x @ parts["a"])
    found = jp.lift(lambda p, x: x @ p["w"])(state, x)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(np.float32(found), 81.94, rtol=1e-3)
