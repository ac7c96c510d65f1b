"""Meshes of JAX's default kind: values, gradients and shardings are those of `lax.scan`."""

import contextlib
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxpara as jp
from jaxpara.recurrence.solve import explicit_meshes
from tests.recurrence.kit import QUICK

TIME, BATCH, WIDTH = 6, 4, 4
SOLVERS = {
    "auto": None,
    "sequential": jp.sequential(),
    "shooting": jp.shooting(chunks=3),
    "chunked": jp.newton(linear="chunked"),
    "linear sequential": jp.newton(linear="sequential"),
    "associative": jp.newton(linear="associative"),
    "linear kernel": jp.newton(linear="kernel"),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(max_iters=TIME + 1),
    "fused": jp.fused(),
    "fused in XLA": jp.fused(implementation="xla"),
}
BOTH, ONE, PAIR = P("data", "model"), P("data", None), P(("data", "model"), None)


@functools.cache
def mesh(kind=AxisType.Explicit):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


def drawn(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def placed(spec, kind=AxisType.Explicit):
    """`(h, xs, b)` with the carry sharded so, and the parameters along its channels."""
    h, xs, b = drawn(BATCH, WIDTH), drawn(TIME, BATCH, WIDTH), drawn(WIDTH)
    on = lambda a, *parts: jax.device_put(a, NamedSharding(mesh(kind), P(*parts)))  # noqa: E731
    return on(h, *spec), on(xs, None, *spec), on(b, spec[1])


def step(b):
    def f(h, x):
        h = 0.9 * jnp.tanh(h * b + x)
        return h, jax.nn.relu(h) * x

    return f


def run(scan, h, xs, b):
    return scan(step(b), h, xs)


def ours(solver="shooting", derivative=None):
    return functools.partial(jp.newton_scan, solver=SOLVERS[solver], derivative=derivative)


def total(tree):
    floats = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
    return sum(jnp.sum(jnp.sin(a.astype(jnp.float32))) for a in floats)


def values_and_gradients(run):
    def loss(*args):
        out = run(*args)
        return total(out), out

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)


def forward_and_second(run):
    def both(*args):
        along = jax.jvp(run, args, args)[1]
        inner = jax.grad(lambda *args: total(run(*args)), (0, 1, 2))
        return along, jax.grad(lambda *args: total(inner(*args)), (0, 1, 2))(*args)

    return both


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def spec_of(array):
    spec = tuple(array.sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def assert_same(found, wanted, tolerance=2e-6, shardings=True):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert not shardings or spec_of(a) == spec_of(b)
        a, b = (np.asarray(leaf, np.float64) for leaf in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@functools.cache
def oracle(make, spec, kind):
    args = placed(spec, kind)
    with jax.set_mesh(mesh(kind)):
        return args, quick(make(functools.partial(run, lax.scan)))(*args)


TABLE = [(solver, BOTH, AxisType.Explicit, True, values_and_gradients) for solver in SOLVERS]
TABLE += [
    ("shooting", spec, kind, context, values_and_gradients)
    for spec, kind, context in (
        (ONE, AxisType.Explicit, True),
        (PAIR, AxisType.Explicit, True),
        (BOTH, AxisType.Explicit, False),
        (ONE, AxisType.Auto, True),
        (BOTH, AxisType.Auto, False),
    )
]
# Shooting by both rules, every other solver by one or the other in turn.
BY, TURNS = {"shooting": (None, "reverse")}, ((None,), ("reverse",))
ROWS = [(*row, rule) for k, row in enumerate(TABLE) for rule in BY.get(row[0], TURNS[k % 2])]
ROWS += [
    (solver, BOTH, AxisType.Explicit, True, forward_and_second, None)
    for solver in ("shooting", "sequential", "associative")
]
# Compiling is all of their time: `make check` runs some rows of the table.
EVERYDAY = [row for row in ROWS if row[0] == "shooting" and row[4] is values_and_gradients][::2]


@pytest.mark.parametrize(
    ("solver", "spec", "kind", "context", "make", "derivative"),
    [pytest.param(*row, marks=() if row in EVERYDAY else pytest.mark.slow) for row in ROWS],
)
def test_sharded_solves_equal_lax_scan(solver, spec, kind, context, make, derivative):
    args, wanted = oracle(make, spec, kind)
    scan = functools.partial(run, ours(solver, derivative))
    with jax.set_mesh(mesh(kind)) if context else contextlib.nullcontext():
        found = quick(make(scan))(*args)
    # Where axes are Auto the compiler places results as it likes.
    assert_same(found, wanted, shardings=kind == AxisType.Explicit)


@pytest.mark.slow
def test_eager_calls_equal_lax_scan():
    args, wanted = oracle(values_and_gradients, BOTH, AxisType.Explicit)
    with jax.set_mesh(mesh()):
        assert_same(values_and_gradients(functools.partial(run, ours()))(*args), wanted)
    (out, info) = jp.solve_scan(step(args[2]), *args[:2], solver=SOLVERS["shooting"])
    assert_same(out, wanted[0][1])
    assert info.converged and spec_of(info.starts) == (None, "data", "model")
    again = jp.solve_scan(step(args[2]), *args[:2], solver=SOLVERS["shooting"], guess=info.starts)
    assert_same(again[0], wanted[0][1])


def test_without_auto_axes_jax_refuses_the_solve(monkeypatch):
    h, xs, b = placed(BOTH)
    monkeypatch.setattr(explicit_meshes, "explicit_mesh", lambda avals: None)
    with pytest.raises(Exception, match="shard"):
        # Another step, so that no compilation of the other tests is found.
        ours()(lambda h, x: (jnp.tanh(h * b + 2 * x), h), h, xs)


def reverse(scan, h, xs, b):
    return scan(step(b), h, xs, reverse=True)


def no_inputs(scan, h, xs, b):
    return scan(lambda h, _: (jnp.tanh(1.1 * h + b), h), h, None, 5)


def counter(scan, h, xs, b):
    def f(carry, x):
        h, n = carry
        return (h * b + x * (n % 3), n + 1), (h, n)

    return scan(f, (h, jnp.zeros((), jnp.int32)), xs)


def key_carry(scan, h, xs, b):
    def f(carry, x):
        h, key = carry
        key, now = jax.random.split(key)
        h = jnp.tanh(h * b + x) + 0.1 * jax.random.normal(now, h.shape, out_sharding=BOTH)
        return (h, key), h

    (h, key), ys = scan(f, (h, jax.random.key(0)), xs)
    return h, jax.random.key_data(key), ys


def half(scan, h, xs, b):
    h, xs, b = (a.astype(jnp.bfloat16) for a in (h, xs, b))
    return scan(step(b), h, xs)


def replicated_carry(scan, h, xs, b):
    f = lambda h, x: (jnp.tanh(h + jax.reshard(x, P(None, None))), h)  # noqa: E731
    return scan(f, jax.reshard(h, P(None, None)), xs)


def replicated_inputs(scan, h, xs, b):
    f = lambda h, x: (jnp.tanh(h * b + jax.reshard(x, BOTH)), h)  # noqa: E731
    return scan(f, h, jax.reshard(xs, P(None, None, None)))


def rematerialised(scan, h, xs, b):
    return jax.checkpoint(lambda h, xs, b: scan(jax.checkpoint(step(b)), h, xs))(h, xs, b)


def over_lanes(scan, h, xs, b):
    return jax.vmap(lambda h, xs: scan(step(b), h, xs), (0, 1), (0, 1))(h, xs)


def over_layers(scan, h, xs, b):
    layer = lambda xs, scale: (scan(step(b * scale), h, xs)[1], scale)  # noqa: E731
    return lax.scan(layer, xs, jnp.array([1.0, 0.5]))


def inside_a_scan(scan, h, xs, b):
    return scan(lambda h, x: scan(step(b), h, jnp.stack([x, x / 2])), h, xs)


def own_rule(scan, h, xs, b):
    half_tanh = jax.custom_vjp(lambda h: jnp.tanh(h) / 2)
    rule = lambda h, g: (g * (1 - jnp.tanh(h) ** 2) / 2,)  # noqa: E731
    half_tanh.defvjp(lambda h: (jnp.tanh(h) / 2, h), rule)
    return scan(lambda h, x: (half_tanh(h) * b + x, half_tanh(h)), h, xs)


def dense(scan, h, xs, b):
    weights = jnp.outer(b, jnp.cos(jnp.arange(WIDTH)))
    f = lambda h, x: (jnp.tanh(jnp.dot(h, weights, out_sharding=BOTH) + x), h)  # noqa: E731
    return scan(f, h, xs)


def two_leaves(scan, h, xs, b):
    def f(carry, x):
        h, mean = carry
        h = jnp.tanh(h * b + x + mean[:, None])
        return (h, 0.5 * mean + jnp.mean(h, axis=1)), mean

    return scan(f, (h, jnp.sum(h, axis=1)), xs)


def resets(scan, h, xs, b):
    return scan(jp.with_reset(step(b), jnp.zeros_like(h)), h, (jnp.arange(TIME) == 3, xs))


def manual_axes(scan, h, xs, b):
    specs = BOTH, P(None, *BOTH), P("model")
    local = jax.shard_map(functools.partial(run, scan), in_specs=specs, out_specs=specs[:2])
    return local(h, xs, b)


def branches(scan, h, xs, b):
    f = lambda h, x: (lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, h * b) + x, h)  # noqa: E731
    return scan(f, h, xs)


def some_axes_manual(scan, h, xs, b):
    specs = P("data"), P(None, "data"), P()
    axes = {"data"}
    local = jax.shard_map(
        functools.partial(run, scan), in_specs=specs, out_specs=specs[:2], axis_names=axes
    )
    return local(h, xs, b)


PARALLEL = [
    *(reverse, no_inputs, counter, key_carry, half, replicated_carry, replicated_inputs, own_rule),
    *(rematerialised, over_lanes, over_layers, inside_a_scan, dense, two_leaves, resets),
    manual_axes,
]
STEP_BY_STEP = {branches: "does not batch the step", some_axes_manual: "inside a shard_map"}


OFTEN = {reverse, counter, half, over_lanes, dense, manual_axes, *STEP_BY_STEP}


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run, marks=() if run in OFTEN else pytest.mark.slow, id=run.__name__)
        for run in (*PARALLEL, *STEP_BY_STEP)
    ],
)
def test_steps_of_every_kind_equal_lax_scan(run):
    args, choices = placed(BOTH), []

    def explained(f, *args, **settings):
        choices.append(jp.explain_choice(f, *args, solver=SOLVERS["shooting"], **settings))
        return ours()(f, *args, **settings)

    with jax.set_mesh(mesh()):
        both = lambda *a: [values_and_gradients(functools.partial(run, s))(*a) for s in scans]  # noqa: E731
        scans = explained, lax.scan
        found, wanted = quick(both)(*args)
    # bfloat16 rounds at 4e-3 each step, in another order in the adjoint.
    assert_same(found, wanted, 2e-2 if run is half else 2e-6)
    if run in STEP_BY_STEP:
        assert choices[0].solver is None and STEP_BY_STEP[run] in choices[0].reason
    else:
        assert choices[0].solver is SOLVERS["shooting"]


def test_donated_buffers_equal_lax_scan():
    args, wanted = oracle(values_and_gradients, BOTH, AxisType.Explicit)
    h, xs = (jax.device_put(jnp.array(a, copy=True), a.sharding) for a in args[:2])
    with jax.set_mesh(mesh()):
        scan = jax.jit(functools.partial(run, ours()), donate_argnums=(0, 1))
        assert_same(scan(h, xs, args[2]), wanted[0][1])


def test_time_sharded_inputs_are_refused_as_by_lax_scan():
    xs = jax.device_put(drawn(TIME, BATCH), NamedSharding(mesh(), P("data", None)))
    for scan in (lax.scan, ours()):
        with pytest.raises(ValueError, match="0th dimension of all xs should be replicated"):
            scan(lambda h, x: (h + x, h), jnp.zeros(BATCH), xs)


def test_no_kernel_is_chosen_for_sharded_arrays():
    h, xs, b = placed(BOTH)
    choice = jp.explain_choice(step(b), h, xs, solver=jp.auto(platform="tpu"))
    assert "sharded over the mesh axes" in choice.reason
    assert (
        "no kernel"
        not in jp.explain_choice(
            step(jnp.asarray(drawn(WIDTH))),
            drawn(BATCH, WIDTH),
            drawn(TIME, BATCH, WIDTH),
            solver=jp.auto(platform="tpu"),
        ).reason
    )


@pytest.mark.parametrize(
    ("implementation", "blocks"),
    [
        ("chunked", False),
        pytest.param("sequential", True, marks=pytest.mark.slow),
        pytest.param("associative", True, marks=pytest.mark.slow),
        pytest.param("chunked", True, marks=pytest.mark.slow),
    ],
)
def test_linear_recurrences_keep_the_sharding_of_their_inputs(implementation, blocks):
    h, xs, _ = placed(ONE if blocks else BOTH)
    a = 0.3 * jnp.sin(xs[..., None] - xs[..., None, :]) if blocks else jnp.sin(xs)

    def oracle(h, xs, a):
        def f(h, inputs):
            a, x = inputs
            h = (jnp.sum(a * h[:, None], axis=-1) if blocks else a * h) + x
            return h, h

        return lax.scan(f, h, (a, xs))[1]

    def found(h, xs, a):
        return jp.linear_recurrence(a, xs, h, implementation=implementation)

    with jax.set_mesh(mesh()):
        both = quick(lambda *args: [values_and_gradients(f)(*args) for f in (found, oracle)])
        assert_same(*both(h, xs, a))


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_flax_layers_equal_those_of_flax(framework):
    h, _, _ = placed(ONE)
    x = jax.device_put(drawn(BATCH, TIME, WIDTH), NamedSharding(mesh(), P("data", None, None)))
    flax = pytest.importorskip("flax")
    bridge = importlib.import_module(f"jaxpara.{framework}")
    if framework == "linen":
        cell = flax.linen.GRUCell(WIDTH)
        layers = bridge.RNN(cell, solver=SOLVERS["shooting"]), flax.linen.RNN(cell)
    else:
        cell = flax.nnx.SimpleCell(WIDTH, WIDTH, rngs=flax.nnx.Rngs(0))
        layers = bridge.RNN(cell, solver=SOLVERS["shooting"]), flax.nnx.RNN(cell)

    def found(layer):
        parts = flax.nnx.split(layer) if framework == "nnx" else ()

        def solve(h, x):
            if parts:
                # Variables must be made at the trace level at which a layer changes them.
                fresh = jax.tree.map(lambda leaf: leaf, parts[1])
                return flax.nnx.merge(parts[0], fresh)(x, initial_carry=h)
            params = flax.linen.RNN(cell).init(jax.random.key(0), x, initial_carry=h)
            return layer.apply(params, x, initial_carry=h)

        return jax.value_and_grad(lambda *args: total(solve(*args)), (0, 1))

    with jax.set_mesh(mesh()):
        runs = [found(layer) for layer in layers]
        assert_same(*quick(lambda *args: [run(*args) for run in runs])(h, x))
