"""Integers packed and multiplied as they are, and activations quantised with the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.weights.quant.activations import activation_integers
from pallas_kernels.quantised_dot import packing, reference
from tests.recurrence.kit import QUICK

slow = pytest.mark.slow


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(seed, bits, *shape):
    q = 2 ** (bits - 1) - 1
    return np.random.default_rng(seed).integers(-q - 1, q + 1, shape).astype(np.int8)


def quick(function, *args):
    return jax.jit(function, compiler_options=QUICK)(*args)


@pytest.mark.parametrize("bits", range(1, 7))
def test_packing_is_undone_by_unpacking_and_its_size_is_that_of_the_bits(bits):
    wide = packing.width(bits)
    for rows in (8, 12):
        values = integers(0, max(wide, 2), 2, rows, 3)
        packed = quick(lambda v: packing.pack(v, bits), values)
        assert packed.dtype == jnp.uint8 and packed.shape == (2, rows * wide // 8, 3)
        assert packing.rows_of(packed.shape[1], bits) == rows
        found = quick(lambda p: packing.unpack(p, bits), packed)
        assert found.dtype == jnp.int8
        np.testing.assert_array_equal(found, values)


def test_six_bits_are_laid_out_as_a_loop_over_bits_lays_them():
    values = integers(1, 6, 8, 1)
    bits = [[int(v) >> i & 1 for i in range(6)] for v in values[:, 0]]
    for i in range(2):  # rows i, i + 2, i + 4, i + 6 stand in bytes i, i + 2, i + 4
        stream = sum((bits[i + 2 * part] for part in range(4)), [])
        wanted = [sum(b << n for n, b in enumerate(stream[8 * j : 8 * j + 8])) for j in range(3)]
        np.testing.assert_array_equal(packing.pack(jnp.asarray(values), 6)[i::2, 0], wanted)


def case(bits, groups, affine, *, rows=12, columns=5, m=3, exact=False):
    """Operands; with `exact` every product and sum is an integer below 2^24."""
    values = integers(2, bits, rows, columns)
    if exact:
        draw = np.random.default_rng(3)
        x = draw.integers(-20, 21, (m, rows)).astype(np.float32)
        scale, offset = (
            draw.integers(1, 4, (groups, columns)).astype(np.float32) for _ in range(2)
        )
    else:
        x, offset = normal(4, m, rows), normal(5, groups, columns)
        scale = 0.1 + np.abs(normal(6, groups, columns))
    return x, values, scale, offset if affine else None


def dense(values, scale, offset):
    each = values.shape[0] // scale.shape[0]
    w = np.float64(values) * np.repeat(np.float64(scale), each, 0)
    return w if offset is None else w + np.repeat(np.float64(offset), each, 0)


CASES = [(bits, groups, groups > 1) for bits in (2, 4, 6, 8) for groups in (1, 3)]


@pytest.mark.parametrize(
    ("bits", "groups", "affine"),
    [pytest.param(*c, marks=() if c == (4, 3, True) else slow) for c in CASES],
)
@pytest.mark.parametrize("m", [3, 40])  # few rows: scales after the sums; many: before them
def test_the_product_is_that_of_the_dequantised_weight(bits, groups, affine, m):
    for exact in (True, False):
        x, values, scale, offset = case(bits, groups, affine, m=m, exact=exact)
        wanted = np.float64(x) @ dense(values, scale, offset)
        stored = [values, packing.pack(jnp.asarray(values), bits)] if bits < 8 else [values]
        for held in stored:
            found = quick(
                lambda x, held, s, o: reference.quantised_dot(x, held, s, o, bits=bits),
                x,
                held,
                scale,
                offset,
            )
            if exact:
                np.testing.assert_array_equal(found, wanted)
            else:
                np.testing.assert_allclose(
                    found, wanted, rtol=1e-5, atol=2e-6 * np.abs(wanted).max()
                )


def test_a_matmul_of_integers_with_a_zero_point_is_the_dequantised_one_exactly():
    x, values, scale, offset = case(6, 3, True, exact=True)
    ints = integers(7, 6, *x.shape)
    own = np.random.default_rng(8).integers(1, 4, (3, 3)).astype(np.float32)
    found = reference.integer_dot(ints, own, values, scale, offset, bits=6)
    whole = np.float64(ints) * np.repeat(own, 4, 1)
    np.testing.assert_array_equal(found, whole @ dense(values, scale, offset))


@pytest.mark.parametrize("rows", [2**16, 140_000, 300_001])
def test_a_matmul_of_integers_does_not_overflow(rows):
    x, values = jnp.full((1, rows), -128, jnp.int8), jnp.full((rows, 1), -128, jnp.int8)
    one = jnp.ones((1, 1))
    found = reference.integer_dot(x, one, values, one, bits=8)
    np.testing.assert_allclose(found, 2**14 * rows, rtol=1e-6)


@pytest.mark.untyped
def test_an_integer_weight_runs_or_is_refused_by_shape():
    x, values, scale, offset = case(4, 3, True)
    w = jp.weights.quantised_array(values, scale[:, None], offset[:, None], bits=4)
    wanted = np.float64(x) @ dense(values, scale, offset)
    packed = jp.weights.pack({"w": w})["w"]
    assert packed.base.shape == (6, 5) and np.array_equal(w.base, values)
    for weight in (w, packed):
        found = jp.weights.quantised_dot(x, weight)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        lifted = jp.lift(lambda p, x: p["w"].T @ x.T)({"w": weight}, x)
        np.testing.assert_allclose(lifted, wanted.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected scale .* of shape \(groups, 1, 5\)"):
        jp.weights.quantised_array(values, scale, bits=4)
    with pytest.raises(ValueError, match="one scale for all columns goes with one group"):
        jp.weights.quantised_array(values, scale[:, None, :1], bits=4)
    with pytest.raises(TypeError, match="needs a weight of integers with scales.* got ndarray"):
        jp.weights.quantised_dot(x, values)
    with pytest.raises(TypeError, match=r"Weight of nf4\(block=64\)"):
        jp.weights.quantised_dot(x, jp.nf4().attach(jax.random.key(0), {"w": x})["w"])
    stacked = jp.weights.quantised_array(values[None], scale[None, :, None], bits=4)
    with pytest.raises(ValueError, match="3 axes and needs 2: use jax.vmap"):
        jp.weights.quantised_dot(x, stacked)
    with pytest.raises(ValueError, match="implementation='cuda' is not known here"):
        jp.weights.quantised_dot(x, w, implementation="cuda")
    with pytest.raises(ValueError, match="7 rows of 4 bits cannot be packed"):
        packing.pack(jnp.zeros((7, 2), jnp.int8), 4)
    with pytest.raises(ValueError, match="bits=9: give 1 to 8"):
        packing.width(9)


def fake(x, bits, groups):
    """Rows of activations on their grid, in a loop."""
    q, out = 2 ** (bits - 1) - 1, np.zeros(x.shape)
    each = x.shape[-1] // groups
    for index in np.ndindex(*x.shape[:-1], groups):
        where = (*index[:-1], slice(index[-1] * each, (index[-1] + 1) * each))
        scale = max(np.max(np.abs(np.float64(x[where]))) / q, 1e-30)
        out[where] = np.clip(np.round(x[where] / scale), -q, q) * scale
    return out


def attached(t, params):
    return t.attach(jax.random.key(0), params)


def test_w6a6_is_the_product_of_both_on_their_grids_before_and_after_merging():
    w, x = normal(0, 12, 5), normal(1, 2, 3, 12)
    t = jp.flexq(group=4)
    state = attached(t, {"w": w})
    wanted = fake(x, 6, 3) @ np.float64(t.effective(state)["w"])
    function = lambda p, x: x @ p["w"]  # noqa: E731
    merged = jp.weights.pack(t.merge(state))
    assert merged["w"].base.dtype == jnp.uint8 and merged["w"].base.shape == (9, 5)
    for tree in (state, merged):
        found = jp.lift(function)(tree, x)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
        uses = [(use.primitive, use.how) for use in t.report(tree, function, x).uses]
        assert uses == [("dot_general", "rule")]
    assert np.max(np.abs(wanted - x @ np.float64(w))) > 0.01  # it does quantise


def test_w6a6_on_integers_equals_the_float_product_bit_for_bit_where_sums_fit():
    # Magnitudes up to 31 in every group: all scales are one.
    w, x = np.float32(integers(0, 6, 256, 8)), np.float32(integers(1, 6, 4, 256))
    w, x = np.clip(w, -31, 31), np.clip(x, -31, 31)
    w[::128], x[:, ::128] = 31, -31
    t = jp.flexq()
    state = attached(t, {"w": w})
    function = lambda p, x: x @ p["w"]  # noqa: E731
    wanted = np.int64(x) @ np.int64(w)
    assert 2**12 < np.max(np.abs(wanted)) < 2**24
    for tree in (state, t.merge(state)):
        np.testing.assert_array_equal(jp.lift(function)(tree, x), wanted)


@slow
def test_w6a6_in_bfloat16_is_that_of_float32_to_its_rounding():
    w, x = normal(0, 256, 8), jnp.asarray(normal(1, 4, 256), jnp.bfloat16)
    t = jp.flexq()
    state = attached(t, {"w": w})
    function = lambda p, x: x @ p["w"].astype(x.dtype)  # noqa: E731
    wanted = fake(np.float64(np.float32(x)), 6, 2) @ np.float64(t.effective(state)["w"])
    size = np.max(np.abs(wanted))
    # Before merging both factors are rounded to 8 bits, afterwards nothing but the result is.
    for tree, error in ((state, 2**-7), (t.merge(state), 2**-8)):
        found = jp.lift(function)(tree, x)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(found), wanted, atol=error * size)


@slow
def test_gradients_of_w6a6_are_those_of_the_two_factors_straight_through():
    w, x, g = normal(0, 12, 5), normal(1, 3, 12), normal(2, 3, 5)
    t = jp.fake_quant(bits=6, activations=6, group=4)
    state = attached(t, {"w": w})
    loss = jp.lift(lambda p, x: jnp.sum(g * (x @ p["w"])))
    d_state, d_x = jax.grad(loss, argnums=(0, 1))(state, x)
    quantised = np.float64(t.effective(state)["w"])
    np.testing.assert_allclose(d_x, g @ quantised.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_state["w"].base, fake(x, 6, 3).T @ g, rtol=1e-5, atol=1e-5)
    after = jax.grad(loss, argnums=1)(t.merge(state), x)
    np.testing.assert_allclose(after, g @ quantised.T, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_product_with_integers_are_those_of_the_dense_product():
    x, values, scale, offset = case(4, 3, True)
    g = normal(9, 3, 5)

    def ours(x, scale, offset):
        w = jp.weights.quantised_array(values, scale[:, None], offset[:, None], bits=4)
        return jnp.sum(g * jp.weights.quantised_dot(x, w))

    def theirs(x, scale, offset):
        w = jnp.repeat(scale, 4, 0) * values + jnp.repeat(offset, 4, 0)
        return jnp.sum(g * (x @ w))

    found, wanted = (quick(jax.grad(f, (0, 1, 2)), x, scale, offset) for f in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_sensitive_leaves_keep_eight_bits_and_what_no_rule_takes_is_reported():
    params = {"up": normal(0, 8, 8), "down": normal(1, 8, 8)}
    x = normal(2, 3, 8)
    t = jp.flexq(group=None, sensitive="down")
    state = attached(t, params)
    w = t.effective(state)
    for name, bits in (("up", 6), ("down", 8)):
        found = jp.lift(lambda p, x, name=name: x @ p[name])(state, x)
        wanted = fake(x, bits, 1) @ np.float64(w[name])
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # The other axis of a tied weight is no contraction of the grid: the weight alone is quantised.
    tied = lambda p, x: x @ p["up"].T  # noqa: E731
    assert [u.how for u in t.report(state, tied, x).uses] == ["densified"]
    np.testing.assert_allclose(jp.lift(tied)(state, x), x @ w["up"].T, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="where='gate' selects none"):
        attached(jp.flexq(group=None, sensitive="gate"), params)


@slow
def test_stacked_layers_and_experts_quantise_their_own_activations():
    w, x = normal(0, 2, 8, 4), normal(1, 2, 3, 8)
    t = jp.fake_quant(bits=6, activations=6, group=4)
    state = attached(t, {"w": w})
    effective = np.float64(t.effective(state)["w"])
    experts = lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"])  # noqa: E731
    layers = lambda p, x: jax.lax.scan(lambda c, s: (c, s[0] @ s[1]), 0.0, (x, p["w"]))[1]  # noqa: E731
    for function in (experts, layers):
        for tree in (state, t.merge(state), jp.weights.pack(t.merge(state))):
            found = jp.lift(function)(tree, x)
            np.testing.assert_allclose(found, fake(x, 6, 2) @ effective, rtol=1e-5, atol=1e-5)
            assert [u.how for u in t.report(tree, function, x).uses] == ["rule"]


@slow
def test_activations_of_zero_stay_zero():
    values, scale = activation_integers(jnp.zeros((2, 8)), 6, 2)
    assert not np.any(values) and np.all(scale > 0)


def test_the_unit_grid_has_both_ends_and_rounds_to_the_nearest_step():
    p = np.concatenate([np.random.default_rng(0).random(200), [0, 1, 0.5 / 63, 0.51 / 63]])
    p = np.float32(p)
    on_grid = jp.weights.unit_grid(bits=6)
    found = np.asarray(on_grid(p))
    nearest = [min(range(64), key=lambda k: abs(k / 63 - x)) for x in np.float64(p[:-2])]
    # A compiler may divide by multiplying: one rounding more.
    np.testing.assert_allclose(found[:-2], np.array(nearest) / 63, rtol=2e-7)
    np.testing.assert_allclose(found[-1], 1 / 63, rtol=2e-7)
    assert on_grid(np.float32([0.49 / 63])) == 0
    for bits in range(2, 17):
        np.testing.assert_array_equal(jp.weights.unit_grid(bits=bits)(np.float32([0, 1])), [0, 1])
    np.testing.assert_array_equal(on_grid(found), found)
    weights = normal(1, len(p))
    grad = jax.grad(lambda p: jnp.sum(weights * on_grid(p)))(p)
    np.testing.assert_array_equal(grad, weights)
    narrow = on_grid(jnp.asarray(p, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="bits=1: give 2 to 16"):
        jp.weights.unit_grid(bits=1)


@pytest.mark.parametrize("merged", [False, True])
def test_an_operand_without_rows_has_a_product_without_rows(merged):
    w, empty = normal(0, 8, 4), np.zeros((0, 8), np.float32)
    for options in ({}, {"activations": 8}, {"group": 4}, {"group": 4, "activations": 8}):
        t = jp.fake_quant(affine=True, **options)
        state = t.attach(jax.random.key(0), {"w": w})
        state = t.merge(state) if merged else state
        run = jp.lift(lambda p, x: x @ p["w"])
        assert run(state, empty).shape == (0, 4)
        loss = lambda s, run=run: jnp.sum(run(s, empty))  # noqa: E731
        slopes = jax.grad(loss, allow_int=True)(state)["w"]
        assert all(np.all(s == 0) for s in jax.tree.leaves(slopes) if s.dtype == np.float32)
        if merged:
            assert jp.weights.quantised_dot(np.zeros((2, 0, 8), np.float32), state["w"]).size == 0


@pytest.mark.parametrize("m", [1, 2, 8, 64])
@pytest.mark.parametrize("affine", [False, True])
def test_bfloat16_rows_of_any_number_are_multiplied_with_groups(m, affine):
    t = jp.fake_quant(bits=8, group=4, affine=affine)
    merged = t.merge(t.attach(jax.random.key(0), {"w": normal(0, 16, 6)}))
    x = jnp.asarray(normal(1, m, 16), jnp.bfloat16)
    wanted = np.float64(x) @ np.float64(t.effective(merged)["w"])
    run = jax.jit(lambda x: jp.weights.quantised_dot(x, merged["w"]))
    for found in (run(x), jp.lift(lambda p, x: x @ p["w"])(merged, x)):
        # Float32's error although the operand has 8 bits: the weight is not rounded to its dtype.
        np.testing.assert_allclose(found, wanted, atol=4e-6 * np.max(np.abs(wanted)))
    (slope,) = jax.vjp(run, x)[1](jnp.ones((m, 6), jnp.float32))
    exact = np.ones((m, 6)) @ np.float64(t.effective(merged)["w"]).T
    np.testing.assert_allclose(np.float32(slope), exact, atol=2**-7 * np.max(np.abs(exact)))


def test_a_cast_weight_is_rounded_as_in_the_dense_product():
    t = jp.fake_quant(bits=8, group=4)
    merged = t.merge(t.attach(jax.random.key(0), {"w": normal(0, 16, 6)}))
    x = jnp.asarray(normal(1, 64, 16), jnp.bfloat16)
    cast = jp.lift(
        lambda p, x: jnp.matmul(x, p["w"].astype(x.dtype), preferred_element_type="float32")
    )
    dense = np.float64(np.asarray(jnp.asarray(t.effective(merged)["w"], jnp.bfloat16), np.float32))
    wanted = np.float64(x) @ dense
    np.testing.assert_allclose(cast(merged, x), wanted, atol=4e-6 * np.max(np.abs(wanted)))


def test_the_report_says_what_no_kernel_takes():
    def said(t, rows, columns, pack=True):
        shape = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
        merged = jax.eval_shape(lambda w: t.merge(t.attach(jax.random.key(0), {"w": w})), shape)
        merged = jax.eval_shape(jp.weights.pack, merged) if pack else merged
        return str(t.report(merged, lambda p, x: x @ p["w"], jnp.ones((1, rows))))

    assert "by XLA: 6 bits packed, and kernels unpack two in a byte" in said(
        jp.fake_quant(bits=6), 256, 128
    )
    assert "by XLA: 2 bits packed" in said(jp.fake_quant(bits=2), 256, 128)
    assert (
        "128 of 128 rows, 128 columns, and kernels need multiples of 128 (packed, of 256"
        in said(jp.fake_quant(bits=4), 128, 128)
    )
    assert "groups of 64 of 256 rows" in said(jp.fake_quant(bits=8, group=64), 256, 128)
    assert "100 columns, and kernels need" in said(jp.fake_quant(bits=8), 256, 100)
    assert "integers with integers, by XLA" in said(jp.flexq(), 256, 128)
    for bits, pack in ((4, True), (8, True), (6, False)):
        assert said(jp.fake_quant(bits=bits), 256, 128, pack).endswith("dot_general: rule")


def test_integers_may_stand_for_a_weight_of_another_dtype_than_their_scale():
    values, scale = np.arange(-8, 8, dtype=np.int8).reshape(4, 4), normal(0, 1, 1, 4)
    w = jp.weights.quantised_array(values, scale, dtype=jnp.bfloat16)
    found = jp.fake_quant().effective({"w": w})["w"]
    exact = jnp.asarray(values * scale[0], jnp.bfloat16)
    assert found.dtype == jnp.bfloat16 and w.parts["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(np.float32(found), np.float32(exact))
