"""solver x structure x {values, jvp, grad, vmap, checkpoint, grad of grad, reverse, reset}.

Every entry is compared with `lax.scan` in float64, derivatives with backpropagation
through it. The cells are mild, so parallel solvers must iterate and may not fall back.
Columns that can share a program do, and of the dear columns each solver has one structure at least:
compiling is all that these tests cost.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from tests.recurrence.kit import (
    CASES,
    EVERYDAY,
    QUICK,
    SOLVERS,
    TIME,
    assert_close,
    cotangents,
    in_float64,
    weighted,
)

TABLE = {
    **SOLVERS,
    "shooting_default": jp.shooting(),
    "newton_chunked": jp.newton(linear="chunked"),  # `newton` takes "sequential" on a CPU
}
KERNEL = jp.fused(chunks=5, implementation="mosaic_tpu_interpret")
RESETS = np.arange(TIME) % 7 == 3


@functools.cache
def data(structure):
    case = CASES[structure]
    rng = np.random.default_rng(len(structure))
    args = case.draw(rng)
    moves = jax.tree.map(lambda a: 0.5 * rng.standard_normal(np.shape(a)).astype(np.float32), args)
    return case, args, moves, cotangents(case, args)


def value(solve, case, weights, reverse=False, reset=None):
    """`args -> (loss, (outputs, info))` through one scan."""

    def run(params, init, xs):
        f, inputs = case.step(params), xs
        if reset is not None:
            f, inputs = jp.with_reset(f, init), (reset, xs)
        out, info = solve(f, init, inputs, reverse=reverse)
        return weighted(out, weights), (out, info)

    return run


def every(function):
    """Value and gradients, without the diagnostics."""
    loss = lambda *args: (lambda v, aux: (v, aux[0]))(*function(*args))  # noqa: E731
    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


def values_and_jvp(solve, case, weights, moves):
    run = lambda *args: value(solve, case, weights)(*args)[1]  # noqa: E731
    return lambda *args: jax.jvp(run, args, moves, has_aux=True)


def grad_vmap_checkpoint(solve, case, weights, moves):
    """Two sequences of different initial states and inputs, one set of parameters."""

    def run(params, init, xs):
        rows = jax.tree.map(lambda a: jnp.stack([a, -0.5 * a]), (init, xs))
        function = every(jax.checkpoint(value(solve, case, weights)))
        return jax.vmap(function, in_axes=(None, 0, 0))(params, *rows)

    return run


def grad_of_grad(solve, case, weights, moves):
    """The Hessian of a squared loss applied to `moves`."""

    def directional(*args):
        run = value(solve, case, weights)
        grads = jax.grad(lambda *a: run(*a)[0] ** 2, argnums=(0, 1, 2))(*args)
        return weighted(grads, moves)

    return jax.grad(directional, argnums=(0, 1, 2))


def reset_reverse(solve, case, weights, moves):
    """Restarts in both directions."""

    def run(*args):
        forwards = value(solve, case, weights, reset=RESETS)
        backwards = value(solve, case, weights, reverse=True, reset=RESETS)
        return every(forwards)(*args), backwards(*args)[0]

    return run


def reverse(solve, case, weights, moves):
    return every(value(solve, case, weights, reverse=True))


COLUMNS = {
    column.__name__: column
    for column in (values_and_jvp, grad_vmap_checkpoint, grad_of_grad, reset_reverse, reverse)
}


@functools.cache
def oracle(structure, column):
    case, args, moves, weights = data(structure)

    def function(args, moves, weights):
        sequential = lambda *a, **k: (lax.scan(*a, **k), ())  # noqa: E731
        return COLUMNS[column](sequential, case, weights, moves)(*args)

    return in_float64(function, args, moves, weights)


def assert_equals_the_oracle(structure, column, solver, derivative=None):
    case, args, moves, weights = data(structure)
    solve = functools.partial(jp.solve_scan, solver=solver, derivative=derivative)
    run = jax.jit(COLUMNS[column](solve, case, weights, moves), compiler_options=QUICK)
    found, wanted = run(*args), oracle(structure, column)
    if column == "values_and_jvp":
        *found, info = found
        wanted = wanted[:2]
        assert_iterated(info, solver)
    # Second derivatives sum T^2 rounded terms.
    assert_close(tuple(found), tuple(wanted), 5e-6 if column == "grad_of_grad" else 2e-6)


def assert_iterated(info, solver):
    assert info.converged
    assert info.fallback_steps == 0
    if solver not in (jp.sequential(), jp.auto()):
        # Even Jacobi needs no more than one iteration a step and one to confirm.
        assert 0 < info.iterations <= TIME + 1
        assert info.residual < 1e-6
    else:
        assert info.iterations == 0


# Programs of several seconds each. Shooting and Newton have all structures in them; another solver,
# which differs from them in its iterations only or is one of them by another name, has one in turn.
# So it is with every program of a solver that is not an everyday one, except for its values.
DEAR = ("grad_vmap_checkpoint", "grad_of_grad", "reset_reverse")
WHOLE = ("shooting", "newton")


def rows():
    for (s, solver), (k, structure), (c, column) in itertools.product(
        enumerate(TABLE), enumerate(CASES), enumerate(COLUMNS)
    ):
        dear = column in DEAR
        slow = dear or solver not in EVERYDAY
        every = solver in WHOLE or not slow or column == "values_and_jvp"
        if every or (s + c) % len(CASES) == k:
            marks = pytest.mark.slow if slow else ()
            yield pytest.param(solver, structure, column, marks=marks)


def test_every_pair_of_solver_structure_and_column_has_a_row():
    chosen = [row.values for row in rows()]
    for places, names in (
        ((0, 1), (TABLE, CASES)),
        ((0, 2), (TABLE, COLUMNS)),
        ((1, 2), (CASES, COLUMNS)),
    ):
        found = {tuple(row[place] for place in places) for row in chosen}
        assert found == set(itertools.product(*names))


@pytest.mark.parametrize(("solver", "structure", "column"), list(rows()))
def test_every_solver_gives_what_lax_scan_gives(solver, structure, column):
    assert_equals_the_oracle(structure, column, TABLE[solver])


# Both solvers with every structure, in one column or the other.
REVERSE = [
    (solver, structure, ("grad_vmap_checkpoint", "reset_reverse")[(s + k) % 2])
    for s, solver in enumerate(("shooting", "sequential"))
    for k, structure in enumerate(CASES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "structure", "column"), REVERSE)
def test_the_fused_reverse_rule_gives_the_same_gradients(solver, structure, column):
    assert_equals_the_oracle(structure, column, SOLVERS[solver], "reverse")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("structure", "column", "derivative"),
    [
        ("two_leaves", "grad_of_grad", None),
        ("two_leaves", "values_and_jvp", None),
        ("diagonal", "reverse", "reverse"),
        ("two_leaves", "grad_vmap_checkpoint", "reverse"),
    ],
)
def test_an_interpreted_kernel_serves_every_transform(structure, column, derivative):
    assert_equals_the_oracle(structure, column, KERNEL, derivative)


@pytest.mark.parametrize("structure", CASES)
def test_the_structure_is_the_one_that_the_row_names(structure):
    case, (params, init, xs), _, _ = data(structure)
    choice = jp.explain_choice(case.step(params), init, xs, solver=jp.shooting())
    assert isinstance(choice.structure, case.structure)
