"""Every primitive's rule, alone and in random chains, against a measured Jacobian.

A rule may say too much and never too little: where the measured derivative of an
output entry by an input entry is not zero, the axis pattern must allow the pair and
the element set must contain it. Rules that can be exact are checked to be.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.interpreters import ad

from jaxpara import compat, jaxprs
from jaxpara.recurrence.structure import axis_moves
from jaxpara.recurrence.structure.axis_patterns import axis_patterns, element_sets
from jaxpara.recurrence.structure.custom_vjps import RULES
from jaxpara.recurrence.structure.propagate import propagate

SHAPE = (2, 3, 4)
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2)), jnp.float32)
INDEX = jnp.array([2, 0, 1])


def conv(h, groups):
    weights = jnp.ones((3, 3 // groups, 3)) * 0.3
    return lax.conv_general_dilated(h, weights, (1,), "SAME", feature_group_count=groups)


BATCH = jnp.zeros((2, 1, 1))


def spread(h):
    """[2, 3, 3]: a positive definite matrix for each row."""
    return jnp.einsum("bij,bkj->bik", h, h) + 3.0 * jnp.eye(3)


@jax.custom_vjp
def own_backward(h):
    return jnp.sin(h)


own_backward.defvjp(lambda h: (jnp.sin(h), h), lambda h, g: (g * jnp.cos(h),))


@jax.custom_vjp
def own_reduction(h):
    return h.sum(1)


def _own_reduction_backward(h, g):
    return (jnp.broadcast_to(g[:, None], h.shape),)


own_reduction.defvjp(lambda h: (h.sum(1), h), _own_reduction_backward)


@jax.custom_vjp
def own_turn(h):
    return h.transpose(1, 0, 2)[..., ::-1]


own_turn.defvjp(lambda h: (own_turn(h), None), lambda _, g: (g[..., ::-1].transpose(1, 0, 2),))
OWN = ("own backward", "own backward of a reduction", "own backward that turns")

# name -> function, are element sets exact?, pairs (output axis, input axis) that must be kept
OPS = {
    "neg": (jnp.negative, True, {(0, 0), (1, 1), (2, 2)}),
    "mul": (lambda h: h * KERNEL.T, True, {(0, 0), (1, 1), (2, 2)}),
    "size one operands": (lambda h: lax.mul(h, h[:1] * 0 + h[:, :1]), False, {(2, 2)}),
    "scalar operand": (lambda h: h + h[0, 0, 0], True, set()),
    "where": (lambda h: jnp.where(h > 0, h, -h), True, {(0, 0), (1, 1), (2, 2)}),
    "clip": (lambda h: jnp.clip(h, -9, 9), True, {(0, 0), (1, 1), (2, 2)}),
    "broadcast": (lambda h: jnp.broadcast_to(h, (5, *SHAPE)), True, {(1, 0), (2, 1), (3, 2)}),
    "broadcast one": (lambda h: jnp.broadcast_to(h[:, :1], SHAPE), True, {(0, 0), (2, 2)}),
    "transpose": (lambda h: h.transpose(2, 0, 1), True, {(0, 2), (1, 0), (2, 1)}),
    "squeeze": (lambda h: h[:, 1:2].squeeze(1), True, {(0, 0), (1, 2)}),
    "expand": (lambda h: h[:, None, :, None], True, {(0, 0), (2, 1), (4, 2)}),
    "merge": (lambda h: h.reshape(6, 4), True, {(1, 2)}),
    "merge and split": (
        lambda h: jnp.sin(h.reshape(2, 12)).reshape(2, 3, 4), True, {(0, 0), (1, 1), (2, 2)}
    ),
    "split another way": (lambda h: h.reshape(2, 4, 3), True, {(0, 0)}),
    "reshape in another order": (
        lambda h: lax.reshape(h, (4, 6), dimensions=(2, 0, 1)), True, {(0, 2)}
    ),
    "flatten": (lambda h: h.reshape(-1), True, set()),
    "sum": (lambda h: h.sum(1), True, {(0, 0), (1, 2)}),
    "max": (lambda h: h.max((0, 2)), False, {(0, 1)}),
    "prod": (lambda h: h.prod(2), False, {(0, 0), (1, 1)}),
    "logsumexp": (lambda h: jax.nn.logsumexp(h, 0), True, {(0, 1), (1, 2)}),
    "dot": (lambda h: h @ KERNEL[:, 0], True, {(0, 0), (1, 1)}),
    "dot from the right": (lambda h: KERNEL[:, :, 0] @ h, True, {(0, 0), (2, 2)}),
    "dot in a batch": (
        lambda h: jnp.einsum("bhd,hde->bhe", h, KERNEL.transpose(1, 0, 2)), True, {(0, 0), (1, 1)}
    ),
    "dot with itself": (lambda h: jnp.einsum("bhd,bgd->bhg", h, h), False, {(0, 0)}),
    "outer": (lambda h: jnp.einsum("bhd,e->ebhd", h, KERNEL[0, 0]), True, {(1, 0), (2, 1), (3, 2)}),
    "slice": (lambda h: h[:, 1:, ::2], True, {(0, 0)}),
    "flip": (lambda h: jnp.flip(h, 1), True, {(0, 0), (2, 2)}),
    "roll": (lambda h: jnp.roll(h, 1, 2), True, {(0, 0), (1, 1)}),
    "concatenate": (lambda h: jnp.concatenate([h[:, 1:], h], 1), True, {(0, 0), (2, 2)}),
    "split": (lambda h: jnp.split(h, 2, 2)[1], True, {(0, 0), (1, 1)}),
    "pad": (
        lambda h: lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0), (-1, 2, 1))), True, {(0, 0)}
    ),
    "pad by a value": (lambda h: lax.pad(h, h[0, 0, 0], ((0, 0, 0), (1, 0, 0), (0, 0, 0))), False,
                       set()),
    "tile": (lambda h: jnp.tile(h, (1, 2, 1)), False, {(0, 0), (2, 2)}),
    "repeat": (lambda h: jnp.repeat(h, 2, 1), False, {(0, 0), (2, 2)}),
    "dynamic_slice": (
        lambda h: lax.dynamic_slice(h, (0, INDEX[0], 0), (2, 1, 4)), False, {(0, 0), (2, 2)}
    ),
    "dynamic_update_slice": (
        lambda h: lax.dynamic_update_slice(h, h[:, :1] * 2, (0, INDEX[2], 0)), False,
        {(0, 0), (2, 2)},
    ),
    "gather rows": (lambda h: h[:, INDEX], False, {(0, 0), (2, 2)}),
    "gather pairs": (lambda h: h[jnp.array([0, 1, 0]), INDEX], False, {(1, 2)}),
    "take along an axis": (
        lambda h: jnp.take_along_axis(h, jnp.argsort(h, 2), 2), False, {(0, 0), (1, 1)}
    ),
    "scatter": (lambda h: h.at[:, INDEX[:2]].set(h[:, :2] * 3), False, {(0, 0), (2, 2)}),
    "scatter add": (lambda h: h.at[:, INDEX].add(h), False, {(0, 0), (2, 2)}),
    "segment sum": (
        lambda h: jax.ops.segment_sum(h, jnp.array([1, 0]), 2), False, {(1, 1), (2, 2)}
    ),
    "sort": (lambda h: jnp.sort(h, 1), False, {(0, 0), (2, 2)}),
    "top_k": (lambda h: lax.top_k(h, 2)[0], False, set()),
    "cumsum": (lambda h: jnp.cumsum(h, 2), True, {(0, 0), (1, 1)}),
    "cumsum backwards": (lambda h: lax.cumsum(h, 1, reverse=True), True, {(0, 0), (2, 2)}),
    "cumprod": (lambda h: jnp.cumprod(h, 2), False, {(0, 0), (1, 1)}),
    "cummax": (lambda h: lax.cummax(h, 0), False, {(1, 1), (2, 2)}),
    "window": (
        lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 1, 2), (1, 1, 1), "SAME"), False,
        {(0, 0), (1, 1)},
    ),
    "convolution": (lambda h: conv(h, 1), False, {(0, 0)}),
    "channelwise convolution": (lambda h: conv(h, 3), False, {(0, 0), (1, 1)}),
    "solve": (lambda h: jnp.linalg.solve(jnp.eye(3) + jnp.tri(3), h), False, {(0, 0)}),
    "solve by own matrices": (lambda h: jnp.linalg.solve(spread(h), h), False, {(0, 0)}),
    "triangular solve": (
        lambda h: lax.linalg.triangular_solve(1.0 + spread(h), h, left_side=True), False, {(0, 0)}
    ),
    "triangular solve of columns": (
        lambda h: lax.linalg.triangular_solve(BATCH + jnp.tri(3), h, left_side=True), False,
        {(0, 0), (2, 2)},
    ),
    "triangular solve of rows": (
        lambda h: lax.linalg.triangular_solve(0.5 + jnp.eye(4) + jnp.zeros((2, 4, 4)), h), False,
        {(0, 0), (1, 1)},
    ),
    "tridiagonal solve": (
        lambda h: lax.linalg.tridiagonal_solve(*[3.0 * i + h[..., 0] for i in (0, 1, 0)], h),
        False, {(0, 0)},
    ),
    "cholesky": (lambda h: lax.linalg.cholesky(spread(h)), False, {(0, 0)}),
    "eigenvalues": (lambda h: jnp.linalg.eigh(spread(h))[0], False, {(0, 0)}),
    "qr": (lambda h: jnp.linalg.qr(h.mT)[1], False, {(0, 0)}),
    "singular values": (lambda h: jnp.linalg.svd(h, compute_uv=False), False, {(0, 0)}),
    "inverse": (lambda h: jnp.linalg.inv(spread(h)), False, {(0, 0)}),
    "fft": (lambda h: jnp.fft.fft(h, axis=1).real, False, {(0, 0), (2, 2)}),
    "rfft there and back": (lambda h: jnp.fft.irfft(jnp.fft.rfft(h), 4), False, {(0, 0), (1, 1)}),
    "fft of two axes": (lambda h: jnp.fft.fft2(h).real, False, {(0, 0)}),
    "stack": (lambda h: jnp.stack([h[:, 0], 2 * h[:, 2]], 1), True, {(0, 0), (2, 2)}),
    "stack in front": (lambda h: jnp.stack([h, jnp.sin(h)]), True, {(1, 0), (2, 1), (3, 2)}),
    "unstack": (lambda h: jnp.unstack(h, axis=1)[2], True, {(0, 0), (1, 2)}),
    "max pooling": (
        lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME"), False,
        {(0, 0), (2, 2)},
    ),
    "special functions": (
        lambda h: jax.scipy.special.i0e(h) + lax.igamma(1 + h * h, 2 + h * h), True,
        {(0, 0), (1, 1), (2, 2)},
    ),
    "checkpoint name": (
        lambda h: checkpoint_name(jnp.sin(h), "s"), True,
        {(0, 0), (1, 1), (2, 2)},
    ),
    "own backward": (lambda h: own_backward(h), False, {(0, 0), (1, 1), (2, 2)}),
    "own backward of a reduction": (lambda h: own_reduction(h), False, {(0, 0), (1, 2)}),
    "own backward that turns": (lambda h: own_turn(h), False, {(0, 1), (1, 0)}),
    "map over rows": (lambda h: lax.map(lambda v: v[::-1] * v, h), False, {(0, 0), (2, 2)}),
    "scan down the rows": (
        lambda h: lax.scan(lambda c, v: (c + v, c * v), h[0], h)[1], False, {(1, 1), (2, 2)}
    ),
    "associative scan": (
        lambda h: lax.associative_scan(lambda a, b: a + b, h, axis=2), True, {(0, 0), (1, 1)}
    ),
}  # fmt: skip


def analysed(f):
    """What the two domains say of d f / d input."""
    closed = jax.make_jaxpr(f)(jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    linear, reached = compat.jvp_jaxpr(closed, [True])
    if not reached[0]:
        return None, None
    count = int(np.prod(SHAPE))
    start = {0: ((0,), (1,), (2,))}
    axes = propagate(linear, [None, start], axis_patterns([SHAPE], set()), RULES)[-1]
    every = np.eye(count, dtype=bool).reshape(*SHAPE, count)
    elements = propagate(linear, [None, every], element_sets(count), RULES)[-1]
    return axes, elements


@functools.cache
def measured():
    """For each function the entries whose derivative was not zero somewhere: [*out, *in]."""
    functions = {name: f for name, (f, _, _) in OPS.items()}
    functions |= {seed: chain(seed) for seed in CHAINS}

    @jax.jit  # one compilation for all
    def run(h):
        mode = {name: jax.jacrev if name in OWN else jax.jacfwd for name in functions}
        jacobians = [jax.vmap(mode[name](f))(h) for name, f in functions.items()]
        return [(jac != 0).any(0) for jac in jacobians]

    h = jax.random.normal(jax.random.key(3), (2, *SHAPE))
    return dict(zip(functions, jax.device_get(run(h)), strict=True))


def assert_covered(name, f):
    axes, elements = analysed(f)
    jac = measured()[name]
    if axes is None:
        assert not jac.any()
        return axes, elements, jac
    ndim = jac.ndim - 3
    at = np.argwhere(jac)
    for p, entry in enumerate(axes[0]):
        sizes = [-q if q < 0 else SHAPE[q] for q in entry]
        assert np.prod(sizes, dtype=int) == jac.shape[p]
        for q, index in zip(entry, np.unravel_index(at[:, p], sizes or [1]), strict=False):
            if q >= 0:
                np.testing.assert_array_equal(index, at[:, ndim + q])
    assert not (jac & ~elements.reshape(jac.shape)).any()
    return axes, elements, jac


@pytest.mark.parametrize("name", OPS)
def test_a_rule_covers_the_derivative_and_keeps_the_axes_it_should(name):
    f, exact, kept = OPS[name]
    axes, elements, jac = assert_covered(name, f)
    found = {(p, entry[0]) for p, entry in enumerate(axes[0]) if len(entry) == 1}
    assert kept <= found
    if exact:
        np.testing.assert_array_equal(elements.reshape(jac.shape), jac)


CHAIN = [
    jnp.tanh,
    lambda h: h * KERNEL.T,
    lambda h: jnp.flip(h, 1),
    lambda h: jnp.roll(h, 1, 2),
    lambda h: h - h.mean(0),
    lambda h: h.reshape(2, 12).at[:, 3].set(0.5).reshape(SHAPE),
    lambda h: h.reshape(6, 4).reshape(SHAPE),
    lambda h: h.reshape(4, 6).T.reshape(SHAPE),
    lambda h: jnp.where(h > 0, h, h[:, ::-1]),
    lambda h: h.transpose(0, 2, 1).reshape(2, 3, 4),
    lambda h: h.transpose(1, 0, 2).transpose(1, 0, 2),
    lambda h: jnp.concatenate([h[:, :1], jnp.sin(h[:, 1:])], 1),
    lambda h: h + lax.stop_gradient(h.sum()),
    lambda h: jnp.cumsum(h, 2),
    lambda h: jnp.pad(h[..., :-1], ((0, 0), (0, 0), (1, 0))),
    lambda h: h @ KERNEL[:, 0] @ KERNEL[:, 0].T,
    lambda h: jnp.einsum("bhd,hde->bhe", h, KERNEL.transpose(1, 0, 2)).sum(-1, keepdims=True) + h,
    lambda h: lax.scan(lambda c, v: (v, c), h[0], h)[1],
    lambda h: lax.fori_loop(0, 2, lambda i, c: jnp.roll(c, 1, 1), h),
    lambda h: lax.cond(h[0, 0, 0] > 0, jnp.sin, lambda h: h[::-1], h),
    lambda h: h[:, INDEX],
    lambda h: h.at[:, 0].multiply(2.0),
    lambda h: h * jax.nn.sigmoid(h[..., :1]),
]


CHAINS = range(16)


def chain(seed):
    """Three random steps, each added to its input now and then."""
    rng = np.random.default_rng(seed)
    steps = [CHAIN[i] for i in rng.integers(len(CHAIN), size=3)]
    mixes = rng.random(3) < 0.3

    def f(h):
        for step, mix in zip(steps, mixes, strict=True):
            h = step(h) + h if mix else step(h)
        return h

    return f


@pytest.mark.parametrize("seed", CHAINS)
def test_random_chains_are_covered(seed):
    assert_covered(seed, chain(seed))


def test_a_rule_that_says_too_little_is_caught(monkeypatch):
    wrong = {name: lambda e, s, o: [(0, 1, 2)] * len(s) for name in ("rev", "triangular_solve")}
    monkeypatch.setattr(axis_moves, "_RULES", axis_moves._RULES | wrong)
    for name in ("flip", "triangular solve of rows"):
        with pytest.raises(AssertionError):
            assert_covered(name, OPS[name][0])


def test_a_custom_backward_that_says_too_little_is_caught(monkeypatch):
    diagonal = [[(0, 1, 2)]]
    monkeypatch.setitem(RULES, "custom_lin", lambda e, o, d: d.move(e, o, diagonal))
    with pytest.raises(AssertionError):
        assert_covered("own backward that turns", own_turn)


# Differentiable primitives that keep no axis, or that are entered, or that no step may hold.
MIXING = frozenset(
    """accum_grad_in_ref addupdate bitcast_convert_type box_get box_set call_hi_primitive check
    composite cond custom_lin custom_linear_solve custom_vmap_call dce_sink debug_callback
    debug_print empty_ref eval_jaxpr ffi_call free_ref freeze from_edtype get inspect_sharding
    io_callback jit linear_call log_extend log_read new_box new_log new_ref pbroadcast_dynamic
    pure_callback ragged_dot_general random_bits random_fold_in random_gamma random_seed
    random_split random_unwrap random_wrap remat2 remat_opt run_state scan shard_map stage swap
    to_edtype unreduced_reduce_scatter while""".split()
)
# They give or take integers and booleans, which have no tangents.
DISCRETE = frozenset(
    """and argmax argmin eq eq_to ge gt is_finite le le_to lt lt_to mulhi ne not or shift_left
    shift_right_arithmetic shift_right_logical xor""".split()
)


def test_every_differentiable_primitive_of_jax_has_a_rule_or_a_reason():
    own = {
        value.name
        for name, module in list(sys.modules.items())
        if name.startswith(("jax._src.lax.", "jax._src.ad_", "jax._src.custom_"))
        for value in vars(module).values()
        if isinstance(value, core.Primitive)
    }
    names = {p.name for table in (ad.primitive_jvps, ad.primitive_transposes) for p in table} & own
    ruled = (
        axis_moves.ELEMENTWISE
        | axis_moves.PAIRWISE
        | axis_moves.CUMULATIVE
        | set(axis_moves._RULES)
    )
    families = ("scatter", "reduce_")
    missing = names - ruled - MIXING - DISCRETE - jaxprs.COLLECTIVES
    assert not {name for name in missing if not name.startswith(families)}
    assert "stack" in names & ruled, "the registries are empty, so this test proves nothing"
