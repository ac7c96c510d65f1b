"""The Mosaic GPU kernels' own logistic and tanh: their formulas, and that kernels use them.

The simulator's forms stand on JAX's exp2 and division; on a device two instructions take their
place, good to two units in the last place each (PTX ISA, ex2.approx.ftz and rcp.approx.ftz).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

import tests.kernels.kit as cells
from jaxpara.recurrence.kernel.elementwise import prepare
from pallas_kernels import compat, mosaic, mosaic_functions
from pallas_kernels.nonlinear_recurrence import gpu

simulated = pytest.mark.skipif(
    compat.version() < (0, 12), reason="the simulator of JAX 0.12 runs these kernels"
)
TRUTH = {"logistic": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}
GRID = np.concatenate([s * np.geomspace(1e-20, 15, 40_001) for s in (-1, 1)]).astype(np.float32)


# Largest errors: absolute, and relative, which for the logistic grows with the size of x: its
# exponent is rounded once.
BOUNDS = {
    ("exact", "logistic"): (1.5e-7, lambda x: 3e-7 + 8e-8 * np.abs(x)),
    ("exact", "tanh"): (2e-7, lambda x: 3e-7),
    ("rough", "logistic"): (2e-3, lambda x: np.inf),
    ("rough", "tanh"): (4e-3, lambda x: 4e-3),
}


@pytest.mark.parametrize(("make", "name"), BOUNDS)
def test_logistic_and_tanh_are_as_good_as_they_say(make, name):
    absolute, relative = BOUNDS[make, name]
    wanted = TRUTH[name](GRID.astype(np.float64))
    error = np.abs(np.asarray(getattr(mosaic_functions, make)(True)[name](GRID)) - wanted)
    assert np.all(error < absolute) and np.all(error < relative(GRID) * np.abs(wanted))


@pytest.mark.parametrize("make", ["exact", "rough"])
def test_they_are_right_at_infinities_and_keep_nan_and_the_sign_of_zero(make):
    functions = getattr(mosaic_functions, make)(True)
    ends = jnp.asarray([-jnp.inf, jnp.inf, 0.0, jnp.nan, -1e30, 1e30])
    wanted = {"logistic": [0, 1, 0.5, np.nan, 0, 1], "tanh": [-1, 1, 0, np.nan, -1, 1]}
    for name, values in wanted.items():
        np.testing.assert_array_equal(functions[name](ends), np.asarray(values, np.float32))
    zeros = np.float32([0.0, -0.0])
    np.testing.assert_array_equal(np.signbit(functions["tanh"](zeros)), np.signbit(zeros))


def kernel(make, name, shape, interpret=None):
    """A function in a kernel of its own, on `[n, 16]` values, n a multiple of 8."""
    function = getattr(mosaic_functions, make)(interpret)[name]

    def body(x, out):
        rows = pl.ds(8 * lax.axis_index("i"), 8)
        tile = mosaic.load(x.at[rows], mosaic.tile_layout(16))
        mosaic.store(out.at[rows], function(tile))

    return jax.jit(
        mosaic.launch(
            body,
            out_type=[jax.ShapeDtypeStruct(shape, jnp.float32)],
            scratch=[],
            grid=(shape[0] // 8,),
            grid_names=("i",),
            warpgroups=1,
            interpret=interpret,
        )
    )


def by_kernel(make, name, values, interpret=None):
    run = kernel(make, name, values.shape, interpret)
    return np.asarray(run(jnp.asarray(values))[0], np.float64)


# The ends of their ranges: nearly closed gates, both sides of tanh's two formulas, where exp2 or
# its reciprocal leaves float32, denormal numbers and what is no number.
ENDS = np.concatenate(
    [
        *[s * np.linspace(a, b, 24) for s in (-1, 1) for a, b in ((13, 17.5), (80, 90))],
        [s * x for s in (-1, 1) for x in (0.0, 1e-45, 1e-38, 0.5499, 0.5501, 1.0, 5.0, 1e30)],
        [-np.inf, np.inf, np.nan, -14.0, -16.0, 14.0, -7.0, 7.0, -2.0, 2.0, -0.1, 0.1, -3.0, 3.0],
        [-9.0, 9.0],
    ]
).astype(np.float32).reshape(-1, 16)  # fmt: skip


def assert_good_at_the_ends(make, name, found):
    """Within twice the bounds of the formulas: `ex2` and `rcp` add two units each."""
    absolute, relative = BOUNDS[make, name]
    x = ENDS.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = TRUTH[name](x)
        # Results below 1e-37 may be flushed to zero.
        allowed = np.fmin(2 * absolute, 2 * relative(x) * np.abs(wanted) + 1e-37)
    error = np.abs(found - wanted)
    fine = np.where(np.isfinite(x), error <= allowed, (found == wanted) | np.isnan(x))
    assert np.all(fine), f"{name} of {x[~fine]} is {found[~fine]}, not {wanted[~fine]}"
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
    low = 0 if name == "logistic" else -1
    assert np.nanmin(found) >= low and np.nanmax(found) <= 1


@pytest.mark.parametrize(("make", "name"), BOUNDS)
def test_the_formulas_are_good_at_the_ends_of_their_ranges(make, name):
    function = jax.jit(getattr(mosaic_functions, make)(True)[name])
    assert_good_at_the_ends(make, name, np.asarray(function(ENDS), np.float64))


@simulated
def test_a_kernel_of_one_function_is_good_at_the_ends_of_its_range():
    how = compat.mosaic_gpu().InterpretGPUParams()
    found = by_kernel("exact", "logistic", ENDS, how)
    assert_good_at_the_ends("exact", "logistic", found)
    wrong = np.where(ENDS == -14, 0.0, found)  # what a gate must not be rounded to
    with pytest.raises(AssertionError, match="logistic of .-14"):
        assert_good_at_the_ends("exact", "logistic", wrong)


@pytest.mark.skipif(compat.version() < (0, 11), reason="needs JAX >= 0.11")
@pytest.mark.parametrize(("make", "name"), BOUNDS)
def test_kernels_of_one_function_lower_for_a_gpu(make, name):
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = kernel(make, name, ENDS.shape).trace(jax.ShapeDtypeStruct(ENDS.shape, jnp.float32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu_v2" in text


# The first thing that `make gpu` checks on a device.
@pytest.mark.gpu
@pytest.mark.parametrize(("make", "name"), BOUNDS)
def test_on_a_gpu_logistic_and_tanh_are_good_at_the_ends_of_their_ranges(make, name):
    assert_good_at_the_ends(make, name, by_kernel(make, name, ENDS))


def gru():
    """The GRU of `kernel_cells`, prepared from a Python step."""

    def step(consts, s, x):
        z = jax.nn.sigmoid(x[0] + consts[0] * s[0])
        r = jax.nn.sigmoid(x[1] + consts[1] * s[0])
        c = jnp.tanh(x[2] + consts[2] * (r * s[0]))
        return [(1.0 - z) * s[0] + z * c], []

    row, time = jnp.zeros((1, 16)), jnp.zeros((1, 1, 16))
    return prepare(step, [row[0]] * 3, [row], [time] * 3).cell


def test_a_cell_made_of_other_functions_is_made_of_them_everywhere():
    calls = []

    def counted(name):
        return lambda x: calls.append(name) or getattr(jax.lax, name)(x)

    cell = gru()
    other = cell.using({name: counted(name) for name in TRUTH})
    one = [jnp.full((2, 4), 0.3)]
    given = one, one * 3, one * 3

    def everything(cell):
        return (
            cell.step(*given),
            cell.push(*given, [one]),
            cell.pull(*given, one),
            cell.pull_state(*given, one),
        )

    found, plain = jax.tree.leaves(everything(other)), jax.tree.leaves(everything(cell))
    assert (calls.count("logistic"), calls.count("tanh")) == (4 * 2, 4 * 1)
    for f, p in zip(found, plain, strict=True):
        np.testing.assert_allclose(f, p, rtol=1e-6)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("max_iters", [2, 8])
def test_rough_guesses_change_no_state(max_iters):
    operands = cells.draw(cells.GRU, 40, 1, 16)
    how = compat.mosaic_gpu().InterpretGPUParams(detect_races=True)
    settings = {"tol": None, "max_iters": max_iters, "certain": True, "chunks": 16, "window": 32}
    run = jax.jit(lambda *a: gpu.forward(gru(), *a, interpret=how, **settings))
    states, passes, _, walked = run(operands.init, operands.xs, operands.params)
    assert cells.relative_error(states, cells.oracle(cells.GRU, operands).states) < 1e-6
    if max_iters == 8:  # a rough guess, a pass that corrects, one that counts
        assert passes[0] > 2 and walked[0] == 0
