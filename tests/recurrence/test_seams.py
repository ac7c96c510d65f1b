"""What a user may bring: a cell, a mixer, a solver of one's own; nothing to inherit or register."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpara as jp
from jaxpara.recurrence.solve.sequential import sequential

KEY = jax.random.key(0)


def leaky(features, hidden):
    """h' = 0.9 h + tanh(x W + h / 2): a cell that jaxpara does not have."""

    def step(params, h, x):
        h = 0.9 * h + jnp.tanh(x + 0.5 * h)
        return h, h

    return jp.Cell(
        init=lambda key: {"kernel": jax.random.normal(key, (features, hidden)) / features**0.5},
        start=lambda params, batch: jnp.zeros((*batch, hidden)),
        project=lambda params, x: x @ params["kernel"],
        step=step,
    )


def test_a_cell_of_ones_own_runs_like_its_loop():
    cell = leaky(3, 4)
    params, x = cell.init(KEY), jax.random.normal(KEY, (20, 2, 3))
    carry, ys = jp.cells.run(cell, params, cell.start(params, (2,)), x)
    h, exact = np.zeros((2, 4)), []
    for x_t in np.asarray(x, np.float64):
        h = 0.9 * h + np.tanh(x_t @ np.asarray(params["kernel"], np.float64) + 0.5 * h)
        exact.append(h)
    np.testing.assert_allclose(ys, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(carry, exact[-1], rtol=1e-5, atol=1e-5)


def test_a_cell_of_ones_own_is_a_mixer():
    mixer = jp.nn.mixers.recurrent(leaky)
    model = jp.nn.decoder(11, 8, 2, mixer=mixer, mlp_hidden=8)
    params = jax.eval_shape(model.init, KEY)
    assert jax.eval_shape(model.apply, params, jnp.arange(10).reshape(2, 5)).shape == (2, 5, 11)


def running_sum(width):
    """y_t = x_1 + ... + x_t; documents do not restart it."""

    def run(params, state, x, reset):
        assert reset is None
        y = state[:, None] + jnp.cumsum(x, axis=1)
        return y[:, -1], y

    return jp.nn.Mixer(
        init=lambda key: {},
        start=lambda params, batch, max_length, dtype: jnp.zeros((batch, width), dtype),
        run=run,
        outputs=width,
    )


@pytest.mark.slow
def test_a_mixer_of_ones_own_makes_a_causal_model_that_decodes():
    model = jp.nn.decoder(11, 8, 2, mixer=running_sum, mlp_hidden=8)
    params, tokens = model.init(KEY), jnp.arange(10).reshape(2, 5)
    logits = model.apply(params, tokens)
    assert model.run is not None and model.start is not None
    state = model.start(params, 2, 5)
    for t in range(5):
        state, one = model.run(params, state, tokens[:, t : t + 1])
        np.testing.assert_allclose(one[:, 0], logits[:, t], rtol=1e-5, atol=1e-5)
    late = model.apply(params, tokens.at[:, 3].add(1))
    np.testing.assert_array_equal(late[:, :3], logits[:, :3])
    assert not np.allclose(late[:, 3:], logits[:, 3:])


def step(h, x):
    h = jnp.tanh(0.9 * h + x)
    return h, h


def test_a_solver_of_ones_own_is_called_and_differentiated():
    called = []

    def mine(system, settings, guess=None):
        called.append(system.length)
        return sequential(system, settings, guess)

    xs, h = jax.random.normal(KEY, (12, 3)), jnp.ones(3)

    def loss(scan):
        return lambda h: jnp.sum(scan(step, h, xs)[1] ** 2)

    def through_mine(f, init, xs):
        return jp.newton_scan(f, init, xs, solver=jp.Solver(mine))

    got, exact = jax.grad(loss(through_mine))(h), jax.grad(loss(jax.lax.scan))(h)
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    assert set(called) == {12}


@pytest.mark.parametrize(
    ("f", "shape", "kind"),
    [
        (step, (2, 3), jp.structure.Diagonal),
        (lambda h, x: (jnp.tanh(h @ jnp.ones((3, 3)) + x), None), (2, 3), jp.structure.Dense),
    ],
)
def test_a_proved_structure_is_a_structure_and_the_choice_holds_it(f, shape, kind):
    h = jnp.ones(shape)
    found = jp.jacobian_structure(f, h, h)
    assert isinstance(found, jp.Structure) and isinstance(found, kind)
    choice = jp.explain_choice(f, h, jnp.ones((16, *shape)), solver=jp.shooting())
    assert isinstance(choice, jp.Choice) and choice.structure == found
    assert choice.length == 16 and str(choice).startswith("shooting, implicit adjoint")


def test_the_choice_says_what_makes_a_step_sequential():
    def printing(h, x):
        jax.debug.print("{h}", h=h[0])
        return step(h, x)

    choice = jp.explain_choice(printing, jnp.ones(3), jnp.ones((4, 3)), solver=jp.shooting())
    assert choice.solver is None
    assert str(choice).startswith("lax.scan with its own derivative: the step has side effects")


def test_the_info_of_a_solve_names_what_the_documents_say():
    xs = jax.random.normal(KEY, (64, 3))
    _, info = jp.solve_scan(step, jnp.ones(3), xs, solver=jp.shooting(chunks=8))
    assert isinstance(info, jp.SolveInfo)
    assert info.converged and 1 <= info.iterations <= 8 and info.fallback_steps == 0
    assert info.starts.shape == (8, 3)
    _, again = jp.solve_scan(step, jnp.ones(3), xs, solver=jp.shooting(chunks=8), guess=info.starts)
    assert again.iterations == 1


def test_the_info_of_a_solve_prints_as_one_line():
    def solve(xs):
        return jp.solve_scan(step, jnp.ones(3), xs, solver=jp.shooting(chunks=8))[1]

    xs = jax.random.normal(KEY, (64, 3))
    text = repr(solve(xs))
    assert text.startswith("SolveInfo(converged=True, iterations=") and "\n" not in text
    assert text.endswith("starts=float32[8,3])")
    assert "converged=bool[5]" in repr(jax.vmap(solve)(jnp.stack([xs] * 5)))
    assert "residual=float32[]" in repr(jax.eval_shape(solve, xs))
    assert len(jax.tree.leaves(solve(xs))) == 5 and solve(xs)._replace(starts=None).starts is None
