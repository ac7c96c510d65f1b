"""`lift(f)(state) == f(effective(state))` in values and gradients, context by context.

Each context also says how the weight is used there: by a rule or densified.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.weights.lift import report
from tests.recurrence.kit import QUICK
from tests.weights.kit import CONTEXTS, DENSE, STACK, W, X, layers, normal


def perturbed(state):
    """The state with every float moved, so that no part is zero."""
    leaves, structure = jax.tree.flatten(state)
    moved = [leaf + 0.5 * normal(i + 20, *leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


def attached(t, params):
    return perturbed(t.attach(jax.random.key(0), params))


def assert_close(found, wanted, tolerance=1e-12):
    """Within `tolerance` of the largest magnitude; identities are checked in float64."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        worst = np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0)
        assert worst <= tolerance * max(np.max(np.abs(b), initial=0), 1e-3)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def total(out):
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))


TRANSFORMS = {
    "lora": jp.lora(rank=2),
    "fake_quant": jp.fake_quant(bits=4),
    "lora_inside_fake_quant": jp.chain(jp.lora(rank=2), jp.fake_quant(bits=4)),
    "lora_on_fake_quant": jp.chain(jp.fake_quant(bits=4), jp.lora(rank=2)),
}


MANY = [("lora", context) for context in CONTEXTS] + [
    (name, context)
    for name in ("fake_quant", "lora_inside_fake_quant", "lora_on_fake_quant")
    for context in (
        "scan_of_remat",
        "fori_loop_over_layers",
        "embedding",
        "sliced_fused_qkv",
        "experts",
        "weight_norm",
    )
]


@pytest.mark.parametrize(("name", "context"), MANY)
def test_lifted_is_the_function_of_the_effective_weights(name, context):
    t, case = TRANSFORMS[name], CONTEXTS[context]

    def function(params, x):
        return case.function(params["w"], x)

    state = attached(t, {"w": case.w})

    def both(run):
        def loss(state):
            out = run(state)
            return total(out), out

        return jax.value_and_grad(loss, has_aux=True) if case.differentiable else loss

    ours = both(lambda s: jp.lift(function)(s, case.x))
    theirs = both(lambda s: function(t.effective(s), case.x))
    # Compiling is all that this costs: what runs for microseconds need not be optimised.
    found, wanted = (jax.jit(run, compiler_options=QUICK)(state) for run in (ours, theirs))
    assert_close(found, wanted)
    uses = [(use.primitive, use.how) for use in t.report(state, function, case.x).uses]
    if name == "lora":
        assert uses == list(case.uses)
    elif name != "lora_on_fake_quant":
        assert uses and all(how == DENSE for _, how in uses)


def test_bfloat16_casts_round_the_parts_instead_of_the_sum():
    function = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)  # noqa: E731
    t = jp.lora(rank=2)
    state = attached(t, {"w": W})
    found, wanted = jp.lift(function)(state, X), function(t.effective(state), X)
    assert found.dtype == jnp.bfloat16
    # One rounding of the sum against one of each term: a few ulp of bfloat16, 2^-8 each.
    np.testing.assert_allclose(
        np.float32(found), np.float32(wanted), atol=4 * 2**-8 * np.max(np.abs(wanted))
    )


@pytest.mark.slow
def test_jvp_vmap_and_second_derivatives():
    t = jp.lora(rank=2)
    state = attached(t, {"w": STACK})
    function = lambda p, x: lax.scan(layers, x, p["w"])[0]  # noqa: E731
    ours, theirs = jp.lift(function), lambda s, x: function(t.effective(s), x)

    def everything(run):
        loss = lambda s: total(run(s, X))  # noqa: E731
        hvp = jax.grad(lambda s: total(jax.grad(loss)(s)))(state)
        rows = jax.vmap(run, in_axes=(None, 0))(state, jnp.stack([X, -X]))
        tangent = jax.jvp(loss, (state,), (state,))[1]
        return hvp, rows, tangent

    assert_close(everything(ours), everything(theirs))


def test_a_second_call_compiles_nothing_and_traces_nothing():
    traces = []

    def function(params, x, *, activation):
        traces.append(1)
        return activation(x @ params["w"])

    t = jp.lora(rank=2)
    run = jp.lift(function)
    first, second = attached(t, {"w": W}), attached(jp.lora(rank=2), {"w": W + 1})
    run(first, X, activation=jnp.tanh)
    assert len(traces) == 1
    run(second, X, activation=jnp.tanh)
    assert len(traces) == 1  # equal settings make equal signatures
    run(second, X, activation=jnp.sin)
    assert len(traces) == 2


def test_another_type_or_setting_is_another_signature():
    state = attached(jp.lora(rank=2), {"w": W})
    traces = []

    def function(params, x, kind):
        traces.append(1)
        size = 7.0 if kind is True else 1 / kind
        return size * jnp.arange(3.0).astype(float) + jnp.sum(x @ params["w"]) * 0

    run = jp.lift(function)
    kinds = (1, True, 1.0, -0.0, 0.0, np.int64(1), True, 1, -0.0)
    found = [float(run(state, X, kind)[1]) for kind in kinds]
    assert found == [1, 7, 1, -np.inf, np.inf, 1, 7, 1, -np.inf]
    assert len(traces) == 4  # of int, bool, float and int64
    # Settings that a trace depends on; the arrays are the same.
    x = jnp.ones((2, 8), jnp.float32)
    state = attached(jp.lora(rank=2), {"w": jnp.ones((8, 6), jnp.float32)})
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state)
    for x64, dtype in ((True, jnp.float64), (False, jnp.float32), (True, jnp.float64)):
        with jax.enable_x64(x64):
            assert run(state, x, 1).dtype == dtype
    assert len(traces) == 6


def test_values_of_a_surrounding_transform_reach_the_function():
    t = jp.lora(rank=2)
    state = attached(t, {"w": W})

    def loss(scale, run):
        return total(run(lambda p, x: scale * (x @ p["w"])))

    ours = jax.grad(lambda s: loss(s, lambda f: jp.lift(f)(state, X)))(1.5)
    theirs = jax.grad(lambda s: loss(s, lambda f: f(t.effective(state), X)))(1.5)
    assert_close(ours, theirs)


def test_callbacks_and_keys_pass_through():
    seen = []

    def function(params, key, x):
        jax.debug.callback(lambda v: seen.append(float(v)), jnp.sum(x))
        return x @ params["w"] * jax.random.bernoulli(key, 0.5, x.shape[:1])[:, None]

    t = jp.lora(rank=2)
    state = attached(t, {"w": W})
    found = jp.lift(function)(state, jax.random.key(3), X)
    jax.effects_barrier()
    assert len(seen) == 1
    assert_close(found, function(t.effective(state), jax.random.key(3), X))


def test_without_weights_the_function_is_called_as_it_is():
    assert jp.lift(lambda p, x: type(p).__name__ + x)({"w": 1}, "!") == "dict!"


def test_an_input_that_cannot_be_compared_is_refused():
    class Unhashable:
        __hash__ = None

    state = attached(jp.lora(rank=2), {"w": W})
    with pytest.raises(TypeError, match="Unhashable is neither an array nor hashable; bind it"):
        jp.lift(lambda p, x, y: x @ p["w"])(state, X, Unhashable())


def test_the_report_names_leaves_methods_and_uses():
    t = jp.chain(jp.fake_quant(bits=4, where="w"), jp.lora(rank=2, where="w"))
    state = t.attach(jax.random.key(0), {"w": W, "bias": W[0]})
    shown = str(t.report(state, jp.lift(lambda p, x: x @ p["w"] + p["bias"]), X))
    assert "w [8, 8] fake_quant(bits=4) > lora(rank=2): dot_general: rule" in shown
    assert "1 leaves; 32 numbers in parts, 64 in bases" in shown
    assert "not used" in str(report(lambda p: p["bias"], state))
    # Numbers, not the bytes that they are packed into.
    for t in (jp.nf4(block=8), jp.rtn(bits=2)):
        state = t.merge(t.attach(jax.random.key(0), {"w": W}))
        assert "64 in bases" in str(t.report(jp.weights.pack(state), lambda p: p["w"]))


def layered_memory(run, *arguments):
    return jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_the_gradient_of_an_adapted_scan_needs_no_more_memory_than_the_one_by_hand():
    depth, width, batch, rank = 16, 128, 16, 4
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    w, x = f32(depth, width, width), f32(batch, width)
    a, b = f32(depth, width, rank), f32(depth, rank, width)

    def by_hand(ab, w, x):
        def body(h, row):
            w, a, b = row
            return jnp.tanh(h @ w + 2 * ((h @ a) @ b)), None

        return jnp.sum(lax.scan(body, x, (w, *ab))[0] ** 2)

    hand = layered_memory(jax.grad(by_hand), (a, b), w, x)
    function = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]  # noqa: E731

    def lifted(t):
        state = jax.eval_shape(t.attach, jax.random.key(0), {"w": w})
        train, frozen = jp.split(state, t.trainable(state))
        loss = lambda train, frozen, x: jnp.sum(  # noqa: E731
            jp.lift(function)(jp.combine(train, frozen), x) ** 2
        )
        return layered_memory(jax.grad(loss), train, frozen, x)

    assert lifted(jp.lora(rank=rank)) <= 1.1 * hand
    # Inside a quantiser the dense weight of one layer exists for a moment, never all of them.
    one, all_layers = 4 * width * width, 4 * width * width * depth
    inside = lifted(jp.chain(jp.lora(rank=rank), jp.fake_quant()))
    assert inside <= hand + 8 * one < hand + all_layers
