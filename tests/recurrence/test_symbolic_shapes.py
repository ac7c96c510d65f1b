"""`jax.export` with symbolic batch and length: values and gradients are those of `lax.scan`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxpara as jp
from tests.recurrence.kit import QUICK

WIDTH = 4
SOLVERS = {
    "auto": None,
    "sequential": jp.sequential(),
    "shooting": jp.shooting(chunks=3),
    "chunked": jp.newton(linear="chunked"),
    "linear sequential": jp.newton(linear="sequential"),
    "associative": jp.newton(linear="associative"),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(max_iters=7),
    "fused": jp.fused(),
    "fused in XLA": jp.fused(implementation="xla"),
}
FULL, PER_CHANNEL = "full", "per channel"


def drawn(*shape):
    return 0.6 * np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def loss(scan, weights, xs):
    """A recurrence with a dense or a diagonal Jacobian, by the shape of its weights."""

    def step(carry, x):
        h, kept = carry
        h = jnp.tanh((h @ weights if weights.ndim == 2 else h * weights) + x)
        return (h, 0.5 * kept + x), h * x

    (h, kept), ys = scan(step, (jnp.sin(xs[0]), jnp.zeros_like(xs[0])), xs)
    return jnp.sum(jnp.sin(h)) + jnp.sum(kept**2), ys


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


@functools.cache
def both(scan):
    return jax.value_and_grad(lambda *args: loss(scan, *args), (0, 1), has_aux=True)


def exported(solver, derivative, weights, shape):
    """Exports with that symbolic shape of `xs`; its last axis is that of the weights."""
    axes = export.symbolic_shape(shape)
    scan = lambda *args: jp.newton_scan(*args, solver=solver, derivative=derivative)  # noqa: E731
    arguments = (jax.ShapeDtypeStruct((axes[-1],) * weights.ndim, np.float32),)
    arguments += (jax.ShapeDtypeStruct(axes, np.float32),)
    return export.export(jax.jit(both(scan)))(*arguments)


def assert_close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(b).max()))


def assert_equals_lax_scan(compiled, weights, *shapes):
    call = quick(compiled.call)
    for shape in shapes:
        xs = drawn(*shape)
        assert_close(call(weights, xs), quick(both(lax.scan))(weights, xs))


ROWS = [
    (solver, None if i % 2 else "reverse", (FULL, PER_CHANNEL)[i // 2 % 2])
    for i, solver in enumerate(SOLVERS)
]
EVERYDAY = list(SOLVERS).index("shooting")
ROWS += [("shooting", None, FULL)]


@pytest.mark.parametrize(
    ("solver", "derivative", "kind"),
    [pytest.param(*r, marks=() if i == EVERYDAY else pytest.mark.slow) for i, r in enumerate(ROWS)],
)
def test_symbolic_batch_is_solved_in_parallel(solver, derivative, kind):
    weights = drawn(WIDTH, WIDTH) if kind == FULL else drawn(WIDTH)
    compiled = exported(SOLVERS[solver], derivative, weights, f"6, b, {WIDTH}")
    assert_equals_lax_scan(compiled, weights, (6, 1, WIDTH), (6, 3, WIDTH))


@pytest.mark.parametrize("solver", ["auto", "shooting"])
def test_symbolic_length_runs_step_by_step(solver):
    weights = drawn(WIDTH)
    compiled = exported(SOLVERS[solver], None, weights, "t, b, d")
    assert_equals_lax_scan(compiled, weights, (1, 2, WIDTH), (9, 3, WIDTH))


@pytest.mark.parametrize("solver", SOLVERS)
def test_choice_explains_symbolic_shapes(solver):
    reasons = []

    def explained(f, init, xs):
        reasons.append(jp.explain_choice(f, init, xs, solver=SOLVERS[solver]))
        return lax.scan(f, init, xs)

    def run(shape, *weights):
        axes = export.symbolic_shape(shape)
        leaves = [jax.ShapeDtypeStruct(w(axes), np.float32) for w in weights]
        leaves.append(jax.ShapeDtypeStruct(axes, np.float32))
        jax.eval_shape(lambda *args: loss(explained, *args), *leaves)
        return reasons.pop()

    length = run("t, b, d", lambda axes: axes[-1:])
    assert length.solver is None and "the length is symbolic (t)" in str(length)
    width = run("6, b, d", lambda axes: (axes[-1], axes[-1]))
    assert width.solver is None and "couples d entries" in str(width)
    batch = run("6, b, d", lambda axes: axes[-1:])
    assert isinstance(batch.structure, jp.structure.Diagonal)
    if SOLVERS[solver] is not None:
        # There is no kernel for a CPU.
        ours = jp.shooting() if solver == "fused" else SOLVERS[solver]
        assert batch.solver.solve == ours.solve
        assert ("for the platform 'cpu'" in str(batch)) == (solver == "fused")


def test_sharded_time_of_symbolic_length_is_refused():
    mesh = jax.make_mesh((2,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    solver = jp.shooting(axis="time")
    spec = jax.P("time")

    @jax.jit
    def run(xs):
        local = lambda xs: jp.newton_scan(lambda h, x: (h * x, h), 1.0, xs, solver=solver)[1]  # noqa: E731
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(xs)

    with pytest.raises(ValueError, match="the length is symbolic"):
        run.trace(jax.ShapeDtypeStruct(export.symbolic_shape("2*t"), np.float32))


def test_gradient_of_an_exported_solve_equals_lax_scan():
    weights, shape = drawn(WIDTH), export.symbolic_shape(f"6, b, {WIDTH}")
    solve = lambda w, xs: loss(lambda *a: jp.newton_scan(*a, solver=jp.shooting()), w, xs)[0]  # noqa: E731
    compiled = export.export(jax.jit(solve))(
        jax.ShapeDtypeStruct((WIDTH,), np.float32), jax.ShapeDtypeStruct(shape, np.float32)
    )
    backward = quick(compiled.vjp().call)
    for batch in (1, 3):
        xs = drawn(6, batch, WIDTH)
        _, wanted = quick(both(lax.scan))(weights, xs)
        assert_close(backward(weights, xs, jnp.float32(1.0)), wanted)
