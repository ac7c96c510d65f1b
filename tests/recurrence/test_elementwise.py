"""What a kernel is given of a user's step: values and derivatives are JAX's own.

Oracle: the step itself, its `jax.jvp` for every tangent of the state, and its `jax.vjp`. The
prepared functions are called on a tile of another shape than the state's, as a kernel calls them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

import jaxpara as jp
from jaxpara.recurrence.kernel.elementwise import prepare
from jaxpara.recurrence.kernel.replay import TABLE, UnsupportedCell
from pallas_kernels.compat import version as pallas_version
from pallas_kernels.nonlinear_recurrence import gpu, gpu_backward, tpu
from tests.recurrence.kit import QUICK

STATE = (2, 3)
TIME = 2
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def the_same_numbers_in_whatever_order_tests_run():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


WEIGHTS = normal(3)


def case(*outputs):
    """A cell of one state and two inputs from its equation."""
    (equation,) = outputs
    return lambda a, s, x: ([equation(a, s[0], *x)], [])


@jax.custom_vjp
def straight(h):
    return jnp.sign(h)


straight.defvjp(lambda h: (jnp.sign(h), h), lambda h, g: (g * (jnp.abs(h) < 1),))


def three_states(a, s, x):
    p, q, r = s
    p = jnp.tanh(a * r + x[0])
    return [p, jnp.where(p > 0, q, p * r), 0.5 * q + x[1] * jnp.cos(p)], []


ZOO = {
    "where": case(lambda a, h, x, y: jnp.where(h > x, a * h, y)),
    "clip": case(lambda a, h, x, y: jnp.clip(a * h + x, -0.5, 0.5) + y),
    "softplus": case(lambda a, h, x, y: jax.nn.softplus(a * h + x) * y),
    "silu": case(lambda a, h, x, y: jax.nn.silu(a * h + x) + y),
    "gelu": case(lambda a, h, x, y: jax.nn.gelu(a * h + x) + y),
    "relu": case(lambda a, h, x, y: jax.nn.relu(a * h + x) - y),
    "elu": case(lambda a, h, x, y: jax.nn.elu(a * h + x) - y),
    "log_sigmoid": case(lambda a, h, x, y: jax.nn.log_sigmoid(a * h + x) - y),
    "logaddexp": case(lambda a, h, x, y: jnp.logaddexp(h, x) - y),
    "power": case(lambda a, h, x, y: (1.1 + jnp.tanh(a * h + x)) ** 1.5 + y**2),
    "odd_power": case(lambda a, h, x, y: (1.1 + jnp.tanh(a * h + x)) ** -0.3 + y),
    "cube": case(lambda a, h, x, y: jnp.tanh(h) ** 3 + (2 + jnp.tanh(y)) ** -2),
    "reciprocal": case(lambda a, h, x, y: 1 / (2 + jnp.cos(a * h + x)) + y),
    "roots": case(lambda a, h, x, y: jnp.sqrt(1 + h * h) * lax.rsqrt(2 + jnp.sin(x)) - y),
    "stop_gradient": case(lambda a, h, x, y: lax.stop_gradient(h) * x + y * h),
    "small": case(lambda a, h, x, y: jnp.log1p(1e-3 * h * h) + jnp.expm1(1e-3 * h) + x * y),
    "finite": case(lambda a, h, x, y: jnp.where(jnp.isfinite(h) & (x < 1), h, y) - jnp.abs(h)),
    "remat": case(jax.checkpoint(lambda a, h, x, y: jnp.tanh(a * h + x) * jnp.exp2(y))),
    "custom_vjp": case(lambda a, h, x, y: straight(h + x) * y),
    "constant": case(lambda a, h, x, y: x * jnp.sign(y) + a),
    "logic": case(lambda a, h, x, y: jnp.where((h <= x) | ~(x > y) ^ (y < 0), a * h, y * h)),
    "clamp": case(lambda a, h, x, y: lax.clamp(-0.7, a * h + x, 0.9) + jnp.square(h) * y),
    "tan": case(lambda a, h, x, y: jnp.tan(jnp.tanh(a * h)) + jnp.log(2 + jnp.sin(y)) * x),
    "three_states": three_states,
}


# Apart: JAX rounds its tangents too, so that they are not linear.
ROUNDED = case(lambda a, h, x, y: lax.reduce_precision(a * h + x, 8, 7) + y)


def check(step, consts, state, xs, tolerance=4e-7):
    """Values, tangents and cotangents of one time step, one tile row more than the state has."""
    prepared = prepare(step, consts, state, xs)
    cell, count = prepared.cell, len(state)
    inputs, params = prepared.operands(consts, xs)
    assert (cell.states, cell.inputs, cell.params) == (count, len(inputs), len(params))
    x = [leaf[1] for leaf in xs]

    def tile(arrays):
        wide = [jnp.broadcast_to(a, prepared.rows(state)[0].shape) for a in arrays]
        return [jnp.concatenate([a, a[:1]]).T for a in wide]

    def close(found, wanted):
        found = prepared.leaves([f.T[:-1] for f in found])
        for f, w in zip(found, wanted, strict=True):
            scale = max(1.0, float(jnp.max(jnp.abs(w))))
            assert jnp.max(jnp.abs(f - w)) <= tolerance * scale

    only = lambda *s: list(step(consts, list(s), x)[0])  # noqa: E731
    args = tile(prepared.rows(state)), tile([i[1] for i in inputs]), tile(params)
    new, pull = jax.vjp(only, *state)
    close(cell.step(*args), new)
    columns = [[jnp.cos(s + j) for s in state] for j in range(count)]
    moved, pushed = cell.push(*args, [tile(prepared.rows(c)) for c in columns])
    close(moved, new)
    units = [[jnp.full_like(s, i == j) for j, s in enumerate(state)] for i in range(count)]
    rows = [pull(unit) for unit in units]
    for column, found in zip(columns, pushed, strict=True):
        close(found, [sum(r * c for r, c in zip(row, column, strict=True)) for row in rows])
    cotangents = [jnp.sin(1 + s) for s in state]
    close(cell.pull_state(*args, tile(prepared.rows(cotangents))), pull(cotangents))

    def reached(d_inputs, d_params):
        """What the kernel's cotangents, summed as a kernel sums them, mean to the user."""
        rows = [jnp.stack([jnp.zeros_like(d.T[:-1]), d.T[:-1]]) for d in d_inputs]
        sums = [d.T[:-1] for d in d_params]
        total = lambda d, p: d.sum(0, keepdims=True) if p.shape[0] == 1 else d  # noqa: E731
        sums = list(map(total, sums, params))
        cast = lambda d, like: d.astype(like.dtype)  # noqa: E731
        return jax.vjp(prepared.operands, consts, xs)[1](
            (list(map(cast, rows, inputs)), list(map(cast, sums, params)))
        )

    d_states, d_inputs, d_params = cell.pull(*args, tile(prepared.rows(cotangents)))
    close(d_states, pull(cotangents))
    found = reached(d_inputs, d_params)
    whole = lambda c, xs: list(step(c, state, [leaf[1] for leaf in xs])[0])  # noqa: E731
    wanted = jax.vjp(whole, consts, xs)[1](cotangents)
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if f.dtype != jax.dtypes.float0:
            scale = max(1.0, float(jnp.max(jnp.abs(w))))
            assert jnp.max(jnp.abs(f - w)) <= 2 * tolerance * scale


EVERYDAY = ("where", "softplus", "odd_power", "custom_vjp", "three_states", "gru")


def rows_of(names):
    """Names as rows of a table; `make check` runs the everyday ones."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if name in EVERYDAY else slow) for name in names]


WRITTEN = {
    "log1p": np.log1p,
    "expm1": np.expm1,
    "tan": np.tan,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_function_that_is_written_out_is_good_relative_to_its_value(name):
    # Compiled: XLA simplifies (1 + x) - 1, and with it the usual correction of a logarithm.
    size = np.concatenate([np.geomspace(1e-30, 0.24, 400), np.linspace(0.24, 0.999, 400)])
    x = np.concatenate([-size, size]).astype(np.float32)
    found = np.float64(jax.jit(lambda x: TABLE[name]({}, x), compiler_options=QUICK)(x))
    wanted = WRITTEN[name](np.float64(x))
    assert np.max(np.abs(found / wanted - 1)) < 4e-7
    zeros = np.float32([0.0, -0.0])
    if wanted[0] < 0 < wanted[-1]:  # odd to first order: so are its zeros
        assert list(np.signbit(TABLE[name]({}, zeros))) == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", rows_of(ZOO))
def test_a_prepared_step_has_the_values_and_derivatives_of_the_step(name):
    count = 3 if name == "three_states" else 1
    state = [normal(*STATE) for _ in range(count)]
    step = lambda consts, s, x: ZOO[name](consts[0], s, x)  # noqa: E731
    check(step, [WEIGHTS], state, [normal(TIME, *STATE), normal(TIME, *STATE)])


PLATFORMS = {
    "tpu": ({"device_kind": "TPU v5 lite", "num_cores": 1}, "@tpu_custom_call", tpu, tpu),
    "cuda": ({"device_kind": "NVIDIA H100", "num_cores": 132}, "@mosaic_gpu_v2", gpu, gpu_backward),
}


@pytest.mark.slow
@pytest.mark.parametrize("platform", PLATFORMS)
def test_whatever_is_prepared_lowers_for_an_accelerator_forward_and_backward(platform):
    # Nothing that `prepare` takes may fail in a compiler: there it would be too late to step aside.
    if platform == "cuda" and pallas_version() < (0, 11):
        pytest.skip("Mosaic GPU kernels need JAX 0.11")
    about, call, solving, pulling = PLATFORMS[platform]
    one_state = [name for name in ZOO if name != "three_states"]

    def step(consts, s, x):
        steps = [*(ZOO[name] for name in one_state), ROUNDED]
        return [sum(f(consts[0], s, x)[0][0] for f in steps)], []

    def both(consts, state, xs, g):
        prepared = prepare(step, consts, state, xs)
        inputs, params = prepared.operands(consts, xs)
        operands = (prepared.rows(state), inputs, params)
        states = solving.forward(prepared.cell, *operands, tol=1e-6, max_iters=8)[0]
        return pulling.backward(prepared.cell, *operands, states, g)

    rows = [jax.ShapeDtypeStruct((64, 2, 128), jnp.float32)]
    start, row = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 128), (128,)))
    device = AbstractDevice(platform={"cuda": "gpu"}.get(platform, platform), **about)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(both).trace([row], [start], 2 * rows, rows)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count(call) >= 2


def primitives(jaxpr):
    """Names of all equations, those of inner jaxprs too."""
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found |= primitives(inner) if hasattr(inner, "eqns") else set()
    return found


def test_the_steps_above_hold_every_operation_that_kernels_know():
    found = set()
    for name, step in {**ZOO, "rounded": ROUNDED}.items():
        count = 3 if name == "three_states" else 1

        def pulled(state, xs, step=step):
            new, pull = jax.vjp(lambda s: step(WEIGHTS, s, xs)[0], state)
            return pull([jnp.cos(leaf) for leaf in new])

        rows = [jnp.ones(STATE)]
        found |= primitives(jax.make_jaxpr(pulled)(count * rows, 2 * rows).jaxpr)
    identity = {"copy", "copy_p", "optimization_barrier", "pcast", "pvary"}
    of_newer_jax = {"one_minus_square"}
    assert set(TABLE) - found <= identity | of_newer_jax


def test_a_rounding_that_the_step_asks_for_is_done():
    step = lambda consts, s, x: ROUNDED(consts[0], s, x)  # noqa: E731
    state, xs = [normal(*STATE)], [normal(TIME, *STATE), normal(TIME, *STATE)]
    prepared = prepare(step, [WEIGHTS], state, xs)
    inputs, params = prepared.operands([WEIGHTS], xs)
    row = [i[1] for i in inputs]
    (found,) = prepared.cell.step(prepared.rows(state), row, params)
    (wanted,), _ = step([WEIGHTS], state, [x[1] for x in xs])
    np.testing.assert_array_equal(found, wanted)


CELLS = {
    "gru": jp.cells.para_gru(4, 3),
    "gru_clipped": jp.cells.para_gru(4, 3, clip=0.3),
    "lstm": jp.cells.para_lstm(4, 3),
    "slstm": jp.cells.slstm(4, 3),
    "elman": jp.cells.elman(4, 3),
    "mingru": jp.cells.min_gru(4, 3),
    "linear": jp.cells.linear(4, 3),
}


@pytest.mark.parametrize("reset", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", rows_of(CELLS))
def test_the_elementwise_cells_are_prepared_with_and_without_resets(name, reset):
    cell = CELLS[name]
    params = cell.init(jax.random.key(1))
    gates = [*cell.project(params, normal(TIME, 2, 4))]
    state = jax.tree.map(lambda s: s + normal(*s.shape), cell.start(params, (2,)))
    if name == "slstm":
        state = (state[0], jnp.abs(state[1]), *state[2:])
    leaves, tree = jax.tree.flatten(state)
    weights, kind = jax.tree.flatten(params)

    def step(consts, s, x):
        params = jax.tree.unflatten(kind, consts[: len(weights)])
        f = lambda carry, x: cell.step(params, carry, tuple(x))  # noqa: E731
        x_t = list(x)
        if reset:
            f, x_t = jp.with_reset(f, jax.tree.unflatten(tree, consts[len(weights) :])), x
            carry, y = f(jax.tree.unflatten(tree, s), (x_t[0], x_t[1:]))
        else:
            carry, y = f(jax.tree.unflatten(tree, s), x_t)
        return jax.tree.leaves(carry), [y]

    begin = [0.3 * normal(*leaf.shape) for leaf in leaves]
    flags = [jnp.asarray([[True, False], [False, True]])] if reset else []
    check(step, [*weights, *begin], leaves, flags + gates, tolerance=1e-6)
    prepared = prepare(step, [*weights, *begin], leaves, flags + gates)
    inputs, params = prepared.operands([*weights, *begin], flags + gates)
    # Gates travel as they are, the flags as bfloat16; only the cell's weights are parameters.
    assert [i.dtype for i in inputs].count(jnp.bfloat16) == int(reset)
    assert len(inputs) == len(gates) + int(reset)
    recurrent = [p for p in params if p.shape == (1, 3)]
    assert len(recurrent) == len(jax.tree.leaves(params)) - (len(begin) if reset else 0)


def test_bfloat16_storage_and_carry_round_like_lax_scan():
    def step(consts, s, x):
        h = s[0].astype(jnp.float32)
        return [jnp.tanh(h * consts[0] + x[0].astype(jnp.float32)).astype(s[0].dtype)], []

    gates = normal(TIME, *STATE).astype(jnp.bfloat16)
    wide = [normal(*STATE)]
    prepared = prepare(step, [WEIGHTS], wide, [gates])
    (inputs,), (params,) = prepared.operands([WEIGHTS], [gates])
    assert inputs.dtype == jnp.bfloat16 and params.shape == (1, 3)
    (found,) = prepared.cell.step(wide, [inputs[0]], [params])
    assert jnp.max(jnp.abs(found - step([WEIGHTS], wide, [gates[0]])[0][0])) < 2e-7

    narrow = [wide[0].astype(jnp.bfloat16)]
    cell = prepare(step, [WEIGHTS], narrow, [gates]).cell
    found = cell.step(narrow, [inputs[0]], [jnp.broadcast_to(WEIGHTS, STATE)])
    assert found[0].dtype == jnp.float32
    wanted = step([WEIGHTS], narrow, [gates[0]])[0][0]
    np.testing.assert_array_equal(found[0], wanted.astype(jnp.float32))


def test_what_surrounding_transforms_know_is_hoisted_even_out_of_an_inner_jit():
    table = jnp.arange(6.0).reshape(2, 3)

    def loss(weights, h, xs):
        inner = jax.jit(lambda h: h * weights[0] + table[1])
        step = lambda consts, s, x: ([jnp.tanh(inner(s[0]) * x[0])], [])  # noqa: E731
        prepared = prepare(step, [], [h], [xs])
        inputs, params = prepared.operands([], [xs])
        assert [p.shape for p in params] == [(1, 3), (1, 3)]
        return jnp.sum(prepared.cell.step(prepared.rows([h]), [i[0] for i in inputs], params)[0])

    def direct(weights, h, xs):
        return jnp.sum(jnp.tanh((h * weights[0] + table[1]) * xs[0]))

    args = normal(2, 3), normal(*STATE), normal(TIME, *STATE)
    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*args) for f in (loss, direct))
    for f, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-5, atol=1e-6)


def test_channels_are_merged_as_far_as_constants_allow():
    def shapes(state, const):
        step = lambda consts, s, x: ([jnp.tanh(s[0] * consts[0] + x[0])], [])  # noqa: E731
        prepared = prepare(step, [jnp.ones(const)], [jnp.ones(state)], [jnp.ones(TIME)])
        (inputs,), (param,) = prepared.operands([jnp.ones(const)], [jnp.ones(TIME)])
        assert inputs.shape[1:] == prepared.rows([jnp.ones(state)])[0].shape
        return prepared.rows([jnp.ones(state)])[0].shape, param.shape

    assert shapes((2, 4, 3), (4, 3)) == ((2, 12), (1, 12))
    assert shapes((2, 4, 3), (2, 1, 3)) == ((8, 3), (8, 3))
    assert shapes((2, 4, 3), ()) == ((2, 12), (1, 12))
    assert shapes((3,), (3,)) == ((1, 3), (1, 3))
    assert shapes((), ()) == ((1, 1), (1, 1))


MATRIX = normal(3, 3)
REJECTED = {
    "dot_general": lambda h, x: jnp.tanh(h @ MATRIX + x),
    "reduce_sum": lambda h, x: h * jnp.mean(x * h),
    "rev": lambda h, x: h[::-1] + x,
    "sort": lambda h, x: jnp.sort(h) + x,
    "erf": lambda h, x: lax.erf(h) + x,
    "pow": lambda h, x: (2 + jnp.tanh(h)) ** x,
    "scan": lambda h, x: lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h + x), h),
    "convert_element_type": lambda h, x: h.astype(jnp.int32) + x,
    "reduce_precision": lambda h, x: lax.reduce_precision(h, 4, 3) + x,
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_step_that_kernels_cannot_run_is_named_with_primitive_and_line(name):
    step = lambda consts, s, x: ([REJECTED[name](s[0], x[0])], [])  # noqa: E731
    with pytest.raises(UnsupportedCell, match=rf"{name}.*test_elementwise.py:\d+") as found:
        prepare(step, [], [normal(*STATE)], [normal(TIME, *STATE)])
    assert name in found.value.primitive and "test_elementwise" in found.value.line


def test_leaves_of_unequal_shapes_or_of_other_types_are_refused():
    step = lambda consts, s, x: (s, [])  # noqa: E731
    with pytest.raises(UnsupportedCell, match="unequal shapes"):
        prepare(step, [], [jnp.ones(3), jnp.ones(2)], [])
    with jax.enable_x64(True), pytest.raises(UnsupportedCell, match="float64"):
        prepare(step, [], [jnp.ones(3, jnp.float64)], [])
    with pytest.raises(UnsupportedCell, match="without elements"):
        prepare(step, [], [jnp.ones((2, 0))], [])
    with pytest.raises(UnsupportedCell, match="float32 and bfloat16"):
        prepare(step, [], [jnp.ones(3), jnp.ones(3, jnp.bfloat16)], [])
    with pytest.raises(UnsupportedCell, match="changes with time"):
        prepare(step, [], [jnp.ones(3)], [jnp.ones(TIME)])
