"""Derivatives that overflow or underflow on their way to an ordinary number, and ours that do not.

`x / y` has the derivative `-x * y**-2` in JAX, and in float32 `y**-2` is 0 from 1.8e19 on.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core

import jaxpara as jp
from jaxpara import compat, jaxprs
from jaxpara.recurrence.kernel.elementwise import prepare
from jaxpara.recurrence.structure import safe_derivatives, true_derivative
from tests.recurrence.kit import QUICK

F32, F64 = jnp.float32, jnp.float64


def derivative_safe(function):
    """`function` of arrays, as a solver differentiates it."""

    def run(*args):
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
        flat = core.jaxpr_as_fun(safe_derivatives.safe(closed))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), flat)

    return run


# Every primitive that the proof of `true_derivative` takes for continuous: these are measured,
EACH = {
    "abs": lax.abs,
    "acos": lax.acos,
    "acosh": lax.acosh,
    "asin": lax.asin,
    "asinh": lax.asinh,
    "atan": lax.atan,
    "atanh": lax.atanh,
    "cbrt": lax.cbrt,
    "cos": lax.cos,
    "cosh": lax.cosh,
    "erf": lax.erf,
    "erf_inv": lax.erf_inv,
    "erfc": lax.erfc,
    "exp": lax.exp,
    "exp2": lax.exp2,
    "expm1": lax.expm1,
    "lgamma": lax.lgamma,
    "log": lax.log,
    "log1p": lax.log1p,
    "log2": jnp.log2,
    "logistic": lax.logistic,
    "neg": lax.neg,
    "one_minus_square": lambda x: (1 - x) * (1 + x),
    "rsqrt": lax.rsqrt,
    "sin": lax.sin,
    "sinh": lax.sinh,
    "sqrt": lax.sqrt,
    "square": lax.square,
    "tan": lax.tan,
    "tanh": lax.tanh,
} | {
    f"integer_pow {n}": functools.partial(lambda n, x: lax.integer_pow(x, n), n)
    for n in (-7, -4, -3, -2, -1, 2, 3, 5)
}
EACH |= {
    f"pow {p}": functools.partial(lambda p, x: x ** x.dtype.type(p), p)
    for p in (-2.5, -1.5, -0.5, -0.1, 0.1, 0.5, 1.5, 2.5)
}
PAIRS = {
    "add": lax.add,
    "div": lax.div,
    "max": lax.max,
    "min": lax.min,
    "mul": lax.mul,
    "pow": lax.pow,
    "sub": lax.sub,
}
# and these move numbers, add them up or multiply them.
PLAIN = """
    add_any broadcast_in_dim clamp complex concatenate conj conv_general_dilated copy copy_p
    cumlogsumexp cumprod cumsum dot_general dynamic_slice dynamic_update_slice expand_dims fft
    gather imag layout_constraint mesh_cast optimization_barrier pad pcast pvary real reduce_prod
    reduce_sum reduce_window_sum reshape reshard rev scatter scatter-add scatter_add select_n
    sharding_constraint slice split squeeze stack tile transpose triangular_solve unstack
""".split()


def test_the_table_holds_every_continuous_primitive():
    measured = {name.split()[0] for name in EACH | PAIRS}
    assert measured.isdisjoint(PLAIN)
    assert measured.union(PLAIN) == true_derivative._CONTINUOUS
    assert measured >= set(safe_derivatives._RULES)


SIZES = np.float32(10.0) ** np.arange(-37, 37.5, 0.5, np.float32)
POINTS = np.concatenate([-SIZES[::-1], SIZES])


def pushed(function, points, moving):
    """Values, and tangents where one operand moves by itself: what a relative change makes."""

    def one(*x):
        return jax.jvp(function, x, tuple(v if i == moving else 0 * v for i, v in enumerate(x)))

    return [np.asarray(a, np.float64) for a in jax.jit(jax.vmap(one))(*points)]


def worst(function, points, moving=0):
    """The largest error of a tangent, in what it or the value is."""
    points = [jnp.asarray(p) for p in points]
    value, tangent = pushed(function, points, moving)
    with jax.enable_x64(True):
        exact = pushed(function, [p.astype(F64) for p in points], moving)
    tiny, huge = np.finfo(np.float32).tiny, np.finfo(np.float32).max / 4
    with np.errstate(all="ignore"):
        size = np.maximum(*np.abs(exact))
        ordinary = np.isfinite(value) & (np.abs(exact[0]) > tiny) & (size < huge)
        error = np.abs(tangent - exact[1]) / size
    assert ordinary.sum() > 20
    return np.where(np.isnan(error), np.inf, error)[ordinary].max()


@pytest.mark.parametrize("name", EACH)
def test_a_derivative_is_there_where_the_value_is(name):
    # XLA's exp2 loses 2e-6 for arguments near 127.
    assert worst(derivative_safe(EACH[name]), [POINTS]) < (3e-6 if name == "exp2" else 1e-6)


@pytest.mark.parametrize("moving", [0, 1])
@pytest.mark.parametrize("name", PAIRS)
def test_so_are_both_of_a_pair(name, moving):
    assert worst(derivative_safe(PAIRS[name]), pairs(name), moving) < 1e-6


def pairs(name):
    # As exponents only what is left of float32's range.
    others = np.linspace(-4, 4, 33, dtype=np.float32) if name == "pow" else POINTS[::3]
    return [p.ravel() for p in np.meshgrid(POINTS[::3], others)]


# The error of JAX's own rule, for each of ours: all of the derivative, or what it is beside the
# value of 44 at 1e19. Newer versions of JAX have other rules for the areas.
LOST = {"rsqrt": 0.4, "integer_pow -1": 0.4, "integer_pow -4": 0.4, "pow -0.5": 0.4, "div": 0.4}
LOST |= {"pow": 0.4} | ({"acosh": 0.02} if compat.RELEASE < (0, 11) else {})
LOST |= {"asinh": 0.02} if compat.RELEASE < (0, 12) else {}


@pytest.mark.parametrize("name", LOST)
def test_jax_loses_it(name):
    """What the rules are for: one that fails here is no longer needed."""
    if name in PAIRS:
        assert min(worst(PAIRS[name], pairs(name), moving) for moving in (0, 1)) > LOST[name]
    else:
        assert worst(EACH[name], [POINTS]) > LOST[name]


def test_every_rule_is_needed_by_one_of_the_supported_versions():
    kinds = {name.split()[0] for name in LOST} | {"asinh", "acosh"}
    assert kinds == set(safe_derivatives._RULES)


RULED = {name: f for name, f in EACH.items() if name.split()[0] in safe_derivatives._RULES}


@pytest.mark.parametrize("name", [*RULED, "div", "pow"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_are_the_same_bit_for_bit(name, dtype):
    if name in RULED:
        function, points = RULED[name], [POINTS]
    else:
        function, points = PAIRS[name], np.meshgrid(POINTS[::3], POINTS[::3])
    args = [jnp.asarray(p, dtype) for p in points]
    found, wanted = jax.jit(derivative_safe(function))(*args), jax.jit(function)(*args)
    assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


UNTOUCHED = {
    "no such equation": lambda x, n, z: jnp.tanh(x) * x**3 + jnp.sqrt(x),
    "a fixed denominator": lambda x, n, z: x / 3,
    "integers": lambda x, n, z: x * lax.div(n, n),
    "complex numbers": lambda x, n, z: (1 / z, lax.rsqrt(z), x),
    "a rule of the user's": lambda x, n, z: _ruled(x),
}


@jax.custom_jvp
def _ruled(x):
    return 1 / x


_ruled.defjvps(lambda t, ans, x: t)


@pytest.mark.parametrize("name", UNTOUCHED)
def test_other_programs_stay_the_same_object(name):
    closed = jax.make_jaxpr(UNTOUCHED[name])(F32(2), 3, 1j)
    assert safe_derivatives.safe(closed) is closed


NESTED = {
    "itself": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda h: lax.scan(lambda c, x: (f(c), None), h, None, length=1)[0],
    "while": lambda f: lambda h: lax.fori_loop(0, 1, lambda i, c: f(c), h),
    "while of unknown length": lambda f: (
        lambda h: lax.while_loop(
            lambda c: c[1] < 1, lambda c: (f(c[0]), c[1] + 1), (h, jnp.sum(0 * h))
        )[0]
    ),
    "cond": lambda f: lambda h: lax.cond(jnp.sum(h) > 0, f, lambda h: h, h),
    "vmap": jax.vmap,
}


@pytest.mark.parametrize("name", NESTED)
def test_inside_of_other_equations(name):
    step = NESTED[name](lambda h: h / (h + F32(1e20)))
    h = jnp.full(3, 1e20, F32)
    closed = jax.make_jaxpr(step)(h)
    changed = safe_derivatives.safe(closed)
    assert jaxprs.contains(changed, safe_derivatives.ours)
    assert safe_derivatives.safe(changed) is changed
    modes = [jax.jacfwd] if name == "while of unknown length" else [jax.jacfwd, jax.jacrev]
    for mode in modes:
        found = mode(lambda h: core.jaxpr_as_fun(changed)(h)[0])(h)
        np.testing.assert_allclose(found, 2.5e-21 * np.eye(3), rtol=1e-6)


def test_second_derivatives():
    def every(x, y):
        powers = x**-3, x**-1.5, x**y, lax.rsqrt(x), 1 / x, x / y
        return jnp.stack([*powers, jnp.arcsinh(x), jnp.arccosh(x)])

    point = F32(1.7), F32(-0.6)
    for mode in (jax.jacfwd, jax.jacrev):
        found = mode(jax.jacrev(derivative_safe(every), (0, 1)), (0, 1))(*point)
        wanted = mode(jax.jacrev(every, (0, 1)), (0, 1))(*point)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


# Uptake near its balance: the true Jacobian is nearly 1, and less by rate / size where a term is
# lost. name: size of the state, uptake in units of the rate.
UPTAKE = {
    "div": (1e20, lambda h, k: h / (h + k)),
    "reciprocal": (1.0, lambda h, k: (1e20 * h) * lax.integer_pow(1e20 * (h + k), -1)),
    "integer_pow": (1.0, lambda h, k: h * h * (1e30 * lax.integer_pow(1e15 * (h + k), -2))),
    "pow": (1e15, lambda h, k: h * (h * h + k * h) ** h.dtype.type(-0.5)),
    "rsqrt": (1e15, lambda h, k: h * lax.rsqrt(h * h + k * h)),
}
SOLVERS = {
    "newton": jp.newton(),
    "quasi_newton": jp.quasi_newton(),
    "jacobi": jp.jacobi(),
    "shooting": jp.shooting(),
    "shooting, eight chunks": jp.shooting(chunks=8),
    "fused": jp.fused(implementation="xla"),
}


@functools.cache
def uptake(row, steps=2000, lanes=32):
    size, law = UPTAKE[row]
    rng = np.random.default_rng(0)
    rate = np.float32(rng.uniform(0.05, 0.9, lanes) * size)
    half = np.float32(10 ** rng.uniform(-5, -2, lanes) * size)
    drift = 10 ** rng.uniform(-6.8, -6.2, lanes) * size

    def f(rate, half):
        return lambda h, x: ((h + (x - rate * law(h, half))),) * 2

    with jax.enable_x64(True):
        wide = rate.astype(np.float64), half.astype(np.float64)
        balance = wide[0] * law(jnp.full(lanes, size, F64), wide[1]) + drift
        xs = np.broadcast_to(np.float32(balance), (steps, lanes))
        begin = jnp.full(lanes, size, F64)
        exact = jax.jit(lambda h, x: lax.scan(f(*wide), h, x)[1])(begin, xs.astype(np.float64))
    init = jnp.full(lanes, size, F32)
    # Compiled as the solves are: it rounds `integer_pow` differently where it is optimised.
    plain = jax.jit(lambda h, x: lax.scan(f(rate, half), h, x)[1], compiler_options=QUICK)(init, xs)
    return f(rate, half), init, xs, np.asarray(plain, np.float64), np.asarray(exact)


CASES = [
    pytest.param(row, solver, marks=() if solver == "newton" or row == "div" else pytest.mark.slow)
    for row in UPTAKE
    for solver in SOLVERS
]


@pytest.mark.parametrize(("row", "solver"), CASES)
def test_a_certified_solve_arrives_where_lax_scan_does(row, solver):
    f, init, xs, plain, exact = uptake(row)
    solver = SOLVERS[solver]
    run = jax.jit(lambda h, x: jp.solve_scan(f, h, x, solver=solver), compiler_options=QUICK)
    (_, states), _ = run(init, xs)
    error, lost = np.abs(states - exact).max(), np.abs(plain - exact).max()
    allowed = 1e-5 * np.abs(exact).max() + 2 * lost
    assert error <= allowed, f"{error:.3g} off, {allowed:.3g} allowed"


@pytest.mark.parametrize("derivative", [None, "reverse"])
@pytest.mark.parametrize("solver", ["auto", "newton", "shooting", "fused", "sequential"])
def test_the_gradient_of_a_rational_step_is_finite(solver, derivative):
    """At the large input `(k h)**2` is infinite, and the step and its true derivative are 0."""
    solvers = SOLVERS | {"auto": jp.auto(), "sequential": jp.sequential()}
    xs = np.sin(np.arange(64, dtype=np.float32)) * np.float32(1e-8)
    xs[20] = 1e12

    def loss(scan, w, init, xs):
        def f(h, x):
            h = w * h / (1 + (1e8 * h) ** 2) + x
            return h, h

        return jnp.sum(scan(f, init, xs)[1] * jnp.cos(jnp.arange(64))[:, None]) * 1e8

    scan = functools.partial(jp.newton_scan, solver=solvers[solver], derivative=derivative)
    args = F32(1.5), jnp.full(3, 4e-9, F32), jnp.stack([xs] * 3, 1)
    found = jax.jit(jax.grad(functools.partial(loss, scan), (0, 1, 2)))(*args)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in args]
        exact = jax.jit(jax.grad(functools.partial(loss, lax.scan), (0, 1, 2)))(*wide)
    for ours, wanted in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_kernels_take_a_step_apart_as_before():
    """By its primitives: which are affine, and which fixed exponents have no logarithm."""

    def step(consts, state, x):
        (h,) = state
        return [safe(h, consts[0], x[0])], []

    like = [jax.ShapeDtypeStruct((4,), F32)], [jax.ShapeDtypeStruct((9, 4), F32)]
    safe = derivative_safe(lambda h, c, x: h / c + x / (1 + x))
    assert prepare(step, [jax.ShapeDtypeStruct((), F32)], *like).affine
    safe = derivative_safe(lambda h, c, x: c * (2 + h * h) ** -1.5 + x)
    assert not prepare(step, [jax.ShapeDtypeStruct((), F32)], *like).affine


@pytest.mark.parametrize("name", ["asinh", "acosh"])
def test_the_square_of_a_float16_does_not_overflow(name):
    points = np.asarray([1.5, 10.0, 31.0, 33.0, 300.0, 1000.0, 60000.0], np.float16)
    found = jax.vmap(jax.grad(derivative_safe(EACH[name])))(points)
    exact = 1 / np.sqrt(points.astype(np.float64) ** 2 + (1 if name == "asinh" else -1))
    np.testing.assert_allclose(np.float64(found), exact, rtol=3e-3)  # three roundings of float16


def test_second_derivatives_of_integer_powers_are_there_at_zero():
    powers = jnp.asarray([0, 2])
    f = derivative_safe(lambda x: jnp.sum(jnp.power(x, powers)))
    assert jax.grad(jax.grad(f))(F32(0.0)) == 2.0 and jax.jacfwd(jax.grad(f))(F32(0.0)) == 2.0
