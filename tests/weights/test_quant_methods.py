"""Ranges, ternary weights, NF4, rounding once and EasyQuant: each against a slow oracle."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.weights.quant.easy import descent
from jaxpara.weights.quant.grid import Grid
from jaxpara.weights.quant.nf4 import NF4
from jaxpara.weights.weight import Weight
from tests.recurrence.kit import QUICK
from tests.weights.kit import CONTEXTS, attached, effective

slow = pytest.mark.slow


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def columns(w, group):
    """Slices of a stack `[layers, rows, columns]` that share a scale."""
    for layer in range(w.shape[0]):
        for start in range(0, w.shape[1], group):
            for column in range(w.shape[2]):
                yield layer, slice(start, start + group), column


def on_grid(w, least, most, bits, affine):
    """The nearest points of a grid between two ends, in float64."""
    q = 2 ** (bits - 1) - 1
    if affine:
        scale, low = (most - least) / (2**bits - 1), -q - 1
        offset = least - low * scale
    else:
        scale, offset, low = max(abs(least), abs(most)) / q, 0.0, -q
    return np.clip(np.round((w - offset) / scale), low, q) * scale + offset


@pytest.mark.parametrize("bits", [pytest.param(2, marks=slow), 4, pytest.param(8, marks=slow)])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ranges", ["absmax", "minmax", "mse"])
def test_a_grid_covers_its_range_as_a_loop_in_float64_does(ranges, affine, bits):
    w = normal(0, 2, 12, 3) + 0.3  # not symmetric: the ranges differ
    found = effective(jp.fake_quant(bits=bits, affine=affine, ranges=ranges, group=6), w)
    for index in columns(w, 6):
        own = np.float64(w[index])
        largest = np.max(np.abs(own))
        minmax = ranges == "minmax" or (ranges == "mse" and affine)
        ends = (own.min(), own.max()) if minmax else (-largest, largest)
        candidates = [on_grid(own, *ends, bits, affine)]
        if ranges == "mse":
            middle, half = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
            candidates = [
                on_grid(own, middle - share * half, middle + share * half, bits, affine)
                for share in 1 - 0.04 * np.arange(20)
            ]
        wanted = min(candidates, key=lambda c: np.sum((c - own) ** 2))
        # scale, offset and their product are rounded to float32: ulps of the largest entry
        np.testing.assert_allclose(found[index], wanted, atol=2e-6 * largest)


@slow
def test_searched_ranges_are_no_worse_and_keep_constants():
    w = normal(0, 64, 8)
    for affine in (False, True):
        errors = [
            np.sum((effective(jp.fake_quant(bits=3, affine=affine, ranges=r), w) - w) ** 2)
            for r in ("mse", "minmax")
        ]
        assert errors[0] < 0.9 * errors[1]
    same = np.full((4, 3), 0.7, np.float32)
    found = effective(jp.fake_quant(affine=True, ranges="minmax"), same)
    np.testing.assert_array_equal(found, same)


@pytest.mark.parametrize("group", [None, pytest.param(4, marks=slow)])
def test_ternary_weights_are_the_sign_or_nothing_times_the_mean_magnitude(group):
    w = normal(1, 2, 8, 3)
    found = effective(jp.ternary(group=group), w)
    for layer, rows, column in columns(w, group or 8):
        shared = w[layer] if group is None else w[layer, rows, column]
        scale = np.mean(np.abs(np.float64(shared)))
        wanted = scale * np.clip(np.round(w[layer, rows, column] / scale), -1, 1)
        # the mean is summed in float32
        np.testing.assert_allclose(found[layer, rows, column], wanted, rtol=1e-6)
    merged = jp.ternary(group=group).merge(attached(jp.ternary(group=group), w))["w"]
    assert set(np.unique(merged.base)) == {-1, 0, 1}
    assert jp.weights.pack({"w": merged})["w"].base.shape == (2, 2, 3)  # four in a byte


def test_the_levels_of_nf4_are_those_of_its_definition():
    # Quantiles at even steps of probability, 8 above zero and 7 below, over the largest one.
    far, quantile = 0.9677083, statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(far, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(far, 0.5, 8)[:-1]]
    np.testing.assert_allclose(NF4, sorted([*above, 0, *below]) / np.float64(above[0]), atol=2e-7)


def test_nf4_takes_the_nearest_level_of_each_block():
    w = normal(2, 2, 10, 3)
    state = attached(jp.nf4(block=4), w)
    assert state["w"].base.dtype == jnp.uint8 and state["w"].base.shape == (2, 5, 3)
    found = np.asarray(jp.nf4(block=4).effective(state)["w"])
    levels = np.float64(NF4)
    for index in columns(w, 4):  # the last block of a column is shorter
        scale = np.max(np.abs(w[index]))
        nearest = np.argmin(np.abs(w[index][:, None] / scale - levels), axis=1)
        np.testing.assert_allclose(found[index], scale * levels[nearest], rtol=1e-6)
    odd = effective(jp.nf4(), w[:, :9])  # an odd number of rows is not packed
    assert odd.shape == (2, 9, 3) and np.mean(np.abs(odd - w[:, :9])) < 0.1


def test_scales_of_nf4_in_bytes_are_those_of_a_loop():
    with jax.enable_x64(True):
        w = np.float64(normal(2, 2, 10, 9)) * (1 + np.arange(9))
        t = jp.nf4(block=4, scale_block=8)
        state = attached(t, w)["w"]
        assert {name: (p.shape, p.dtype.name) for name, p in state.parts.items()} == {
            "scale": ((2, 3, 1, 9), "int8"),
            "step": ((2, 4), "float64"),
            "mean": ((2,), "float64"),
        }
        once, wanted, levels = np.zeros_like(w), np.zeros_like(w), np.float64(NF4)
        for layer in range(2):
            # 27 scales, row by row of blocks: steps for 8, 8, 8 and the 3 that are left.
            places = [(slice(i, i + 4), j) for i in range(0, 10, 4) for j in range(9)]
            scales = [np.max(np.abs(w[layer][place])) for place in places]
            mean = sum(scales) / 27
            for start in range(0, 27, 8):
                group = range(start, min(start + 8, 27))
                step = max(abs(scales[i] - mean) for i in group) / 127
                for i in group:
                    q = round((scales[i] - mean) / step)
                    assert abs(q) <= 127 and state.parts["scale"][layer].reshape(27)[i] == q
                    near = np.abs(w[layer][places[i]][:, None] / scales[i] - levels).argmin(1)
                    once[layer][places[i]] = scales[i] * levels[near]
                    wanted[layer][places[i]] = (mean + q * step) * levels[near]
        found = jax.jit(t.effective, compiler_options=QUICK)({"w": state})["w"]
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)
        # The second rounding costs little: half a step of 127.
        assert 0 < np.max(np.abs(once - wanted)) < np.max(np.abs(w)) / 254 * (1 + 1e-9)


def leaves_trained(t):
    """Of a weight and a bias that is frozen with it."""
    whole = {"w": normal(0, 8, 4), "bias": normal(1, 4)}
    state = jax.jit(t.attach, compiler_options=QUICK)(jax.random.key(0), whole)
    mask = jax.tree_util.tree_leaves_with_path(t.trainable(state))
    return {jp.tree.path_of(keys) for keys, train in mask if train}


@slow
def test_on_a_frozen_base_adapters_train_or_else_the_scales():
    bytewise = jp.nf4(scale_block=256)
    for base in (jp.nf4(), bytewise, jp.rtn(), jp.rtn(affine=True), jp.easy_quant()):
        adapted = jp.chain(base, jp.lora(rank=2))
        assert leaves_trained(adapted) == {"w/parts/a", "w/parts/b"}
        state = attached(adapted, normal(0, 8, 4))
        np.testing.assert_array_equal(
            adapted.effective(state)["w"], base.effective({"w": state["w"].base})["w"]
        )
    assert leaves_trained(jp.nf4()) == leaves_trained(jp.rtn()) == {"w/parts/scale"}
    assert leaves_trained(bytewise) == {"w/parts/step", "w/parts/mean"}
    assert leaves_trained(jp.easy_quant()) == {"w/parts/scale", "w/parts/outliers"}


@pytest.mark.parametrize("bits", [4, *(pytest.param(b, marks=slow) for b in (2, 6, 8))])
def test_rounding_once_gives_what_fake_quantisation_trains_on(bits):
    w = normal(3, 2, 8, 3)
    for options in ({}, {"affine": True, "ranges": "minmax", "group": 4}):
        once = attached(jp.rtn(bits=bits, **options), w)["w"]
        assert once.base.dtype == (jnp.int8 if bits == 8 else jnp.uint8)
        wanted = effective(jp.fake_quant(bits=bits, **options), w)
        np.testing.assert_array_equal(effective(jp.rtn(bits=bits, **options), w), wanted)


def heavy(seed, *shape):
    """A weight with outliers."""
    w = normal(seed, *shape)
    w[tuple(np.random.default_rng(seed).integers(0, n, 6) for n in shape)] *= 12
    return w


def test_easy_quant_keeps_outliers_and_is_never_worse_than_rounding_to_nearest():
    w = heavy(4, 64, 16)
    t = jp.easy_quant(bits=3, share=0.05)
    found, rounded = effective(t, w), effective(jp.rtn(bits=3), w)
    outliers = np.abs(w) >= 3 * np.std(w)
    assert 4 <= np.sum(outliers) <= 20
    np.testing.assert_array_equal(found[outliers], w[outliers])
    rest = np.where(outliers, 0, w)
    by_column = np.sum((found - w) ** 2, 0)
    assert np.all(by_column <= np.sum((rounded - w) ** 2, 0) * (1 + 1e-6))
    assert np.sum(by_column) < 0.5 * np.sum((rounded - w) ** 2)
    # The scales are at a minimum for their own integers: E(s) is a parabola there.
    state = attached(t, w)["w"]
    scale = np.float64(state.parts["scale"][0])
    values = np.round(np.where(outliers, 0, found) / scale)
    best = np.sum(rest * values, 0) / np.sum(values**2, 0)
    errors = [np.sum((values * s - rest) ** 2, 0) for s in (scale, best)]
    assert np.all(errors[0] <= errors[1] * (1 + 1e-5))


@slow
def test_easy_quant_does_not_depend_on_the_order_of_channels():
    w, order = heavy(5, 64, 16), np.random.default_rng(0).permutation(16)
    t = jp.easy_quant(share=0.05)
    np.testing.assert_array_equal(effective(t, w[:, order]), effective(t, w)[:, order])


def test_the_gradient_of_a_scale_is_a_finite_difference_between_jumps_of_the_grid():
    with jax.enable_x64(True):
        w = jnp.asarray(np.float64(normal(6, 16, 3)))
        grid, scale = Grid(4), jnp.full((1, 1, 3), 0.31)
        step = 1e-7  # no entry is as near to a jump
        error, slope, curvature = descent(grid, w, scale)
        up, down = (descent(grid, w, scale + sign * step) for sign in (1, -1))
        np.testing.assert_allclose(slope, (up[0] - down[0]) / (2 * step), rtol=1e-6)
        np.testing.assert_allclose(curvature, (up[1] - down[1]) / (2 * step), rtol=1e-6)
        values = np.clip(np.round(w / 0.31), -7, 7)
        np.testing.assert_allclose(error[0, 0], np.sum((0.31 * values - w) ** 2, 0), rtol=1e-12)


LIFTED = {
    "minmax": jp.fake_quant(affine=True, ranges="minmax"),
    "mse": jp.fake_quant(ranges="mse", group=4),
    "ternary": jp.ternary(),
    "nf4": jp.nf4(block=3),
    "nf4_in_bytes": jp.nf4(block=3, scale_block=7),
    "easy_quant": jp.easy_quant(share=0.2, sigmas=1.0),
    "easy_quant_by_layer": jp.easy_quant(share=0.2, sigmas=1.0, by="layer"),
    "lora_on_rtn": jp.chain(jp.rtn(), jp.lora(rank=2)),
}
# What goes the same way through `lift` is shown once; fake_quant is in test_lift's table, and what
# has a rule of its own in test_adapters_lift.
LIFTED_IN = dict.fromkeys(LIFTED, ("scan_of_remat",))
LIFTED_IN |= dict.fromkeys(("nf4", "easy_quant"), ("scan_of_remat", "embedding", "experts"))
QUICK_ONES = {("lora_on_rtn", "scan_of_remat")}


@pytest.mark.parametrize(
    ("name", "context"),
    [
        pytest.param(name, context, marks=() if (name, context) in QUICK_ONES else slow)
        for name, contexts in LIFTED_IN.items()
        for context in contexts
    ],
)
def test_lifted_is_the_function_of_the_effective_weights(name, context):
    t, case = LIFTED[name], CONTEXTS[context]
    with jax.enable_x64(True):
        state = attached(t, case.w)
        train, frozen = jp.split(state, t.trainable(state))

        def both(run):
            def loss(train):
                out = run(jp.combine(train, frozen))
                return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

            return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(train)

        function = lambda p: case.function(p["w"], case.x)  # noqa: E731
        found, wanted = both(jp.lift(function)), both(lambda s: function(t.effective(s)))
        assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(found[1]))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, wanted
        )
        merged = t.merge(state)
        for tree in (merged, jp.weights.pack(merged)):
            np.testing.assert_allclose(
                jax.tree.leaves(jp.lift(function)(tree))[0],
                jax.tree.leaves(function(t.effective(state)))[0],
                rtol=1e-9,
                atol=1e-12,
            )


FROZEN = {
    "l4q": jp.l4q(rank=2),
    "lr_qat": jp.lr_qat(rank=2, downcast="fixed8"),
    "qlora": jp.chain(jp.nf4(), jp.lora(rank=2)),
    "qlora_on_integers": jp.chain(jp.rtn(), jp.lora(rank=2)),
}


@slow
@pytest.mark.parametrize("name", FROZEN)
def test_no_weight_that_was_computed_is_kept_for_the_backward_pass(name):
    t, stack, x = FROZEN[name], normal(0, 3, 32, 32), normal(1, 2, 32)
    state = attached(t, stack)
    train, frozen = jp.split(state, t.trainable(state))
    step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    run = jp.lift(lambda p: jax.lax.scan(step, x, p["w"])[0])
    kept = jax.vjp(lambda train: run(jp.combine(train, frozen)), train)[1]
    large = [leaf for leaf in jax.tree.leaves(kept) if leaf.size >= 32 * 32]
    held = [leaf for leaf in jax.tree.leaves(frozen) if leaf.size >= 32 * 32]
    assert len(held) == 1 and len(large) <= 1  # the frozen weight as it is stored, and no other
    assert all(leaf.dtype == held[0].dtype for leaf in large)
    jax.tree.map(np.testing.assert_array_equal, large, held[: len(large)])


def moved(t, state):
    """Scales and offsets that are no longer where they began."""
    w, draw = state["w"], np.random.default_rng(7)
    parts = {
        name: 0.9 * part + 0.01 * draw.standard_normal(part.shape).astype(np.float32)
        for name, part in w.parts.items()
    }
    return {"w": Weight(w.base, parts, w.method)}


MERGED = {
    "minmax": jp.fake_quant(affine=True, ranges="minmax"),
    "mse": jp.fake_quant(affine=True, ranges="mse", group=256),
    "ternary": jp.ternary(),
    "lsq_with_offsets": jp.lsq(affine=True, group=256),
    "lora_of_an_odd_scale": jp.chain(jp.lora(rank=2, alpha=3.1), jp.fake_quant()),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "minmax" else slow) for n in MERGED]
)
def test_merged_integers_reproduce_the_forward_bit_for_bit(name):
    # A million entries, ties among them; the forward is compiled whole, the merge op by op.
    w = normal(8, 1024, 1024)
    w[1::2] = np.round(w[1::2] * 8) / 8
    t = MERGED[name]
    state = attached(t, w)
    if name == "lora_of_an_odd_scale":
        lora = state["w"].base
        lora = Weight(lora.base, {**lora.parts, "b": 0.05 * normal(9, 2, 1024)}, lora.method)
        state = {"w": Weight(lora, {}, state["w"].method)}
    elif name == "lsq_with_offsets":
        state = moved(t, state)
    merged = t.merge(state)
    assert merged["w"].base.dtype == jnp.int8 and len(np.unique(merged["w"].base)) > 2
    forward = jp.lift(lambda p, x: (jnp.tanh(x @ p["w"]), p["w"]))(state, w[:3])[1]
    np.testing.assert_array_equal(forward, t.effective(merged)["w"])
    np.testing.assert_array_equal(forward, t.effective(jp.weights.pack(merged))["w"])


@slow
def test_nf4_in_bytes_merged_is_the_forward_bit_for_bit():
    w, t = normal(8, 4096, 64), jp.nf4(scale_block=256)
    state = attached(t, w)
    forward = jp.lift(lambda p, x: (jnp.tanh(x @ p["w"]), p["w"]))(state, w.T)[1]
    np.testing.assert_array_equal(forward, t.effective(t.merge(state))["w"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.fake_quant(ranges="max"), "ranges='max': expected one of absmax, minmax, mse"),
        (lambda: jp.fake_quant(ranges="absmean"), "expected one of absmax"),
        (lambda: jp.fake_quant(activations=1), "activations=1: give 2 to 8 bits, or None"),
        (lambda: jp.rtn(bits=9), "bits=9: give 2 to 8"),
        (lambda: jp.nf4(block=0), "block=0, scale_block=None: give at least 1"),
        (lambda: jp.nf4(scale_block=0), "scale_block=0: give at least 1"),
        (lambda: jp.easy_quant(share=0.0), r"share=0.0, .*a share in \(0, 1\]"),
        (lambda: attached(jp.rtn(group=5), normal(0, 8, 3)), "group=5 does not divide the 8 rows"),
        (lambda: attached(jp.ternary(group=3), normal(0, 8, 3)), "group=3 does not divide"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
