"""`newton_scan` under the transformations and in the surroundings that `lax.scan` knows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.scan_checks import (
    H0,
    SHOOTING,
    SOLVERS,
    XS,
    assert_is_lax_scan,
    assert_runs_agree,
    assert_same,
    ours,
    quick,
    step,
)


@pytest.mark.slow
def test_gradients_reach_what_the_step_closes_over():
    def loss(w, scan):
        shift = jnp.sin(w)

        @jax.jit
        def inner(v):
            def f(h, x):
                h = jnp.tanh(v * h + shift * x)
                return h, h * w

            return jnp.sum(scan(f, H0, XS)[1])

        return inner(w**2)

    w = jnp.float32(0.7)

    def every(scan):
        def run(w):
            along = jax.linearize(lambda w: loss(w, scan), w)[1](w)
            rows = jax.vmap(lambda w: loss(w, scan))(jnp.stack([w, 2 * w]))
            return jax.grad(loss)(w, scan), rows, jax.hessian(loss)(w, scan), along

        return run

    assert_runs_agree(every, w, tolerance=1e-5)


def test_closing_over_integer_arrays_and_tables():
    table, order = jnp.arange(10.0).reshape(5, 2) / 9, jnp.array([1, 0])

    def f(h, i):
        h = jnp.tanh(0.5 * h[order] + table[i])
        return h, table[i]

    assert_is_lax_scan(f, H0, jnp.array([0, 4, 2, 2, 1]))


@pytest.mark.slow
def test_a_scan_in_a_scan():
    def outer(scan):
        def row(h, x):
            h, ys = scan(step, h, x)
            return h, jnp.sum(ys)

        return lambda h, xs: scan(row, h, xs)

    xs = np.stack([XS, -XS, 0.5 * XS])
    loss = lambda scan: lambda h, x: jnp.sum(outer(scan)(h, x)[1])  # noqa: E731
    assert_runs_agree(lambda scan: jax.value_and_grad(loss(scan), (0, 1)), H0, xs)


def test_nested_vmap_and_an_unmapped_init():
    xs = np.stack([np.stack([XS, -XS]), np.stack([0.1 * XS, 2 * XS]), np.stack([XS, XS])])
    for axes in ((None, 0), (0, None)):

        def twice(scan, axes=axes):
            run = functools.partial(scan, step)
            return jax.vmap(jax.vmap(run, in_axes=axes), in_axes=(None, 0))

        h = H0 if axes[0] is None else np.stack([H0, 2 * H0])
        x = xs if axes[0] is None else xs[:, 0]
        assert_runs_agree(twice, h, x)


def test_gradients_with_respect_to_one_thing_only():
    def loss(scan):
        return lambda w, h, x: jnp.sum(
            scan(lambda h, x: (jnp.tanh(w * h + x), w * h), h, x)[1] ** 2
        )

    def each(scan):
        return lambda *args: [jax.grad(loss(scan), which)(*args) for which in range(3)]

    assert_runs_agree(each, jnp.float32(0.6), H0, XS)


@pytest.mark.parametrize("solver", [jp.shooting(), jp.newton()])
def test_gradients_with_respect_to_inputs_that_enter_one_leaf_alone(solver):
    # The other leaf then has a constant zero on the right-hand side of the linear solve.
    def step(carry, x):
        v, tired = carry
        return (0.9 * v + x - tired, 0.97 * tired + 0.1 * jnp.tanh(v)), v

    init = (jnp.zeros(3), jnp.zeros(3))
    xs = jnp.linspace(0, 1, 15).reshape(5, 3)

    def loss(scan):
        return lambda xs: jnp.sum(scan(step, init, xs)[1] ** 2)

    ours = functools.partial(jp.newton_scan, solver=solver)
    found, wanted = quick(lambda xs: [jax.grad(loss(scan))(xs) for scan in (ours, lax.scan)])(xs)
    # Sixteen units of the largest: small entries are differences of large ones.
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.max(np.abs(wanted)))


def test_checkpoint_policies():
    policy = jax.checkpoint_policies.nothing_saveable
    loss = lambda scan: lambda h: jnp.sum(scan(step, h, XS)[1])  # noqa: E731
    found = quick(jax.grad(jax.checkpoint(loss(ours), policy=policy)))(H0)
    assert_same(found, quick(jax.grad(loss(lax.scan)))(H0))


def test_disable_jit_runs_the_plain_loop():
    with jax.disable_jit():
        assert_same(jp.newton_scan(step, H0, XS, solver=SHOOTING), lax.scan(step, H0, XS))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_may_call_python_for_a_value(solver):
    def f(h, x):
        half = jax.pure_callback(lambda v: np.float32(0.5) * v, h, h, vmap_method="sequential")
        return (jnp.tanh(half + x),) * 2

    found = jp.newton_scan(f, H0, XS, solver=SOLVERS[solver])
    assert_same(found, lax.scan(f, H0, XS))
    assert "pure_callback" in jp.explain_choice(f, H0, XS, solver=SOLVERS[solver]).reason


@pytest.mark.parametrize("solver", SOLVERS)
def test_strict_promotion_finds_nothing_to_promote(solver):
    own = SOLVERS[solver]
    # A cell of its own: what has been traced before is not traced again.
    f = lambda h, x: (jnp.sin(0.5 * h + x),) * 2  # noqa: E731
    init = jnp.full_like(XS[0], 0.3)
    slope = lambda scan: jax.grad(lambda h: jnp.sum(scan(f, h, XS)[1]))  # noqa: E731
    with jax.numpy_dtype_promotion("strict"):
        assert_runs_agree(slope, init, scan=functools.partial(ours, solver=own))


@pytest.mark.parametrize(
    "solver",
    ["shooting", *(pytest.param(s, marks=pytest.mark.slow) for s in SOLVERS if s != "shooting")],
)
def test_no_tracer_outlives_its_trace(solver):
    own = SOLVERS[solver]
    f = lambda h, x: (jnp.cos(0.5 * h + x),) * 2  # noqa: E731
    init = jnp.full_like(XS[0], 0.3)
    with jax.checking_leaks():
        found = quick(lambda h: jp.newton_scan(f, h, XS, solver=own))(init)
    assert_same(found, lax.scan(f, init, XS))


@pytest.mark.parametrize("solver", SOLVERS)
def test_callbacks_happen_once_a_step_and_in_order(solver):
    seen = []

    def f(h, x):
        jax.debug.callback(lambda i: seen.append(int(i)), x[0], ordered=True)
        return 0.5 * h + x[1], h

    steps = np.stack([np.arange(6.0), np.ones(6)], 1).astype(np.float32)
    jax.block_until_ready(jp.newton_scan(f, jnp.float32(0), steps, solver=SOLVERS[solver]))
    jax.effects_barrier()
    assert seen == [0, 1, 2, 3, 4, 5]
    choice = jp.explain_choice(f, jnp.float32(0), steps, solver=SOLVERS[solver])
    assert "side effects" in str(choice)


@jax.custom_vjp
def doubled_cotangent(x):
    return jnp.sin(x)


doubled_cotangent.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


@pytest.mark.parametrize("solver", ["shooting", "sequential"])
def test_a_custom_vjp_in_the_step_is_respected(solver):
    def f(h, x):
        h = doubled_cotangent(0.4 * h + x)
        return h, h * x

    def run(scan):
        return lambda h, x: jnp.sum(scan(f, h, x)[1])

    mine = functools.partial(ours, solver=SOLVERS[solver])
    assert_runs_agree(lambda scan: jax.value_and_grad(run(scan), (0, 1)), H0, XS, scan=mine)
    for scan in (mine, lax.scan):
        with pytest.raises(TypeError, match="can't apply forward-mode"):
            jax.jvp(run(scan), (H0, XS), (H0, XS))


def test_a_second_eager_call_compiles_nothing():
    from jaxpara.recurrence.scan import jaxpara_solve

    def f(h, x):
        h = jnp.sin(h + x)
        return h, h

    first = jp.newton_scan(f, H0, XS, solver=SHOOTING)
    entries = jaxpara_solve._cache_size()
    events = []

    def listen(name, seconds, **kwargs):
        if name.endswith("backend_compile_duration"):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert_same(jp.newton_scan(f, H0, XS, solver=jp.shooting(chunks=3)), first)
        assert jaxpara_solve._cache_size() == entries
        assert not events
        jp.newton_scan(f, H0, XS[:5], solver=SHOOTING)
        assert events, "the listener hears nothing, so this test proves nothing"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_donated_arguments():
    run = jax.jit(lambda h, x: jp.newton_scan(step, h, x, solver=SHOOTING), donate_argnums=(0, 1))
    assert_same(run(jnp.asarray(H0), jnp.asarray(XS)), lax.scan(step, H0, XS))


@pytest.mark.slow
def test_data_sharded_over_a_mesh_axis():
    """Plain solvers inside a shard_map over batches, whose constants are replicated."""
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    h, x = np.stack([H0, -H0]), np.stack([XS, -XS], axis=1)

    def loss(scan):
        def local(w, h, x):
            out = scan(lambda h, x: (jnp.tanh(w * h + x), h * w), h, x)[1]
            return lax.psum(jnp.sum(out**2), "data")

        return local

    whole = lambda w, h, x: jnp.sum(  # noqa: E731
        lax.scan(lambda h, x: (jnp.tanh(w * h + x), h * w), h, x)[1] ** 2
    )
    w = jnp.array([0.6, 0.4])
    wanted = quick(jax.value_and_grad(whole, (0, 1, 2)))(w, h, x)
    for solver in SOLVERS.values():
        for derivative in (None, "reverse"):
            scan = functools.partial(jp.newton_scan, solver=solver, derivative=derivative)
            run = jax.shard_map(
                loss(scan), mesh=mesh, in_specs=(P(), P("data"), P(None, "data")), out_specs=P()
            )
            found = quick(jax.value_and_grad(run, (0, 1, 2)))(w, h, x)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                # A device's sums are added up last: another order, of terms that cancel.
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def of_shared_inputs(h, x):
    return jnp.tanh(0.5 * h + x), h


def of_a_shared_leaf(carry, x):
    h, shared = carry
    return (jnp.tanh(0.5 * h + shared + x), 0.9 * shared + 0.1), h


@pytest.mark.parametrize("derivative", [None, "reverse"])
@pytest.mark.parametrize("name", ["newton", "shooting"])
def test_leaves_may_vary_over_different_mesh_axes(name, derivative):
    # States of every device's own and inputs, or a part of the state, that are the same on all.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    h, xs = jnp.linspace(0, 1, 4), jnp.linspace(-1, 1, 40)
    ours = functools.partial(jp.newton_scan, solver=SOLVERS[name], derivative=derivative)

    def gradients(scan, in_mesh):
        def local(h, xs):
            shared = scan(of_shared_inputs, h, xs)[1]
            own = scan(of_a_shared_leaf, (h, jnp.float32(0.2)), xs[:, None] * jnp.ones_like(h))[1]
            return shared * own

        if in_mesh:
            P = jax.sharding.PartitionSpec
            specs = {"in_specs": (P("data"), P()), "out_specs": P(None, "data")}
            local = jax.shard_map(local, mesh=mesh, **specs)
        return jax.grad(lambda h, xs: jnp.sum(local(h, xs)), (0, 1))(h, xs)

    @quick
    def every(h, xs):
        return gradients(lax.scan, False), gradients(lax.scan, True), gradients(ours, True)

    wanted, *others = every(h, xs)
    for found in others:
        for a, b in zip(found, wanted, strict=True):
            # As between devices above: sums of terms that cancel, in another order.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


W10 = jnp.eye(10) * 0.5 + 0.05


def by_cond(h, x):
    return lax.cond(jnp.sum(h) > 0, jnp.sin, jnp.cos, W10 @ h + x), None


def by_switch_in_a_loop(h, x):
    def turn(i, h):
        return lax.switch(i % 3, [jnp.sin, jnp.cos, jnp.tanh], W10 @ h + x)

    return lax.fori_loop(0, 2, turn, h), None


def by_a_loop_of_unknown_length(h, x):
    return lax.while_loop(lambda v: jnp.sum(v) > 1.0, lambda v: 0.6 * (W10 @ v), jnp.sin(h) + x), h


@pytest.mark.slow
@pytest.mark.parametrize("f", [by_cond, by_switch_in_a_loop])
@pytest.mark.parametrize("name", ["newton", "shooting"])
def test_second_order_through_a_step_that_branches(f, name):
    h, xs = 0.3 * jnp.ones(10), jnp.linspace(-1, 1, 6)

    def second(scan):
        loss = lambda h: jnp.sum(scan(f, h, xs)[0] ** 2)  # noqa: E731
        along = jnp.linspace(0.5, 1.5, 10)
        slope = lambda h: jnp.vdot(jax.grad(loss)(h), along)  # noqa: E731
        pushed = lambda h: jax.jvp(loss, (h,), (along,))[1]  # noqa: E731
        return quick(
            lambda h: (
                jax.grad(slope)(h),
                jax.grad(pushed)(h),
                jax.jvp(pushed, (h,), (along,))[1],
                jax.jvp(jax.grad(loss), (h,), (along,))[1],
            )
        )(h)

    solver = {"newton": jp.newton(), "shooting": jp.shooting()}[name]
    found = second(functools.partial(jp.newton_scan, solver=solver))
    for a, b in zip(found, second(lax.scan), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_the_gradient_of_a_tangent_through_a_step_that_branches():
    def pushed(scan):
        loss = lambda h: jnp.sum(scan(by_cond, h, jnp.linspace(-1, 1, 3))[0] ** 2)  # noqa: E731
        return jax.grad(lambda h: jax.jvp(loss, (h,), (jnp.ones(10),))[1])

    newton = functools.partial(jp.newton_scan, solver=jp.newton())
    assert_runs_agree(pushed, 0.3 * jnp.ones(10), scan=newton, tolerance=2e-5)


@pytest.mark.slow
def test_a_loop_of_unknown_length_has_tangents_as_in_lax_scan():
    h, xs = 0.3 * jnp.ones(10), jnp.linspace(0, 1, 6)

    def pushed(scan):
        # Every state but the first: the loop contracts, so that the last depends on h by 1e-5.
        states = lambda h: scan(by_a_loop_of_unknown_length, h, xs)[1][1:]  # noqa: E731
        loss = lambda h: jnp.sum(states(h) ** 2)  # noqa: E731
        first = lambda h: jax.jvp(loss, (h,), (jnp.ones(10),))[1]  # noqa: E731
        return quick(lambda h: (first(h), jax.jvp(first, (h,), (h,))[1]))(h)

    found = pushed(functools.partial(jp.newton_scan, solver=jp.newton()))
    for a, b in zip(found, pushed(lax.scan), strict=True):
        assert abs(b) > 0.01
        np.testing.assert_allclose(a, b, rtol=2e-5)


@pytest.mark.parametrize("narrow", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("derivative", [None, "reverse"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_leaves_of_two_types_that_see_each_other_are_differentiated(solver, derivative, narrow):
    def f(carry, x):
        wide, rest = carry
        rest = (0.5 * rest.astype(jnp.float32) + wide).astype(narrow)
        wide = jnp.tanh(0.5 * wide + x) + 0.1 * rest.astype(jnp.float32)
        return (wide, rest), (wide, rest)

    def loss(scan):
        def value(h, x):
            ys = scan(f, (h, jnp.zeros(2, narrow)), x)[1]
            return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in ys)

        return jax.grad(value, (0, 1))

    run = functools.partial(ours, solver=SOLVERS[solver], derivative=derivative)
    assert_runs_agree(loss, H0, XS, scan=run, tolerance=4 * float(jnp.finfo(narrow).eps))
