"""The structure that is proved covers the Jacobian that is measured, and is no larger than it must.

The oracle is `jax.jacfwd` at three random points, compared entry by entry with the
entries a structure allows, which are written out here by brute force.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpara.recurrence.solve import jacobian_products
from jaxpara.recurrence.structure.proof import Block, Dense, Diagonal, jacobian_structure

B, D, H, W = 2, 4, 2, 3
RNG = np.random.default_rng(0)
SQUARE = jnp.asarray(RNG.normal(size=(D, D)), jnp.float32)
PER_HEAD = jnp.asarray(RNG.normal(size=(H, W, W)), jnp.float32)
MASK = jnp.eye(D) + jnp.eye(D, k=1)


class Case(NamedTuple):
    """A step on a list of leaves, their shapes, and what must be found."""

    step: object
    shapes: tuple
    kind: type
    groups: tuple | None = None  # ((leaves), (shared axes of each leaf)), ...


def elementwise_gru(h, x):
    z = jax.nn.sigmoid(h * 0.7 + x)
    return z * h + (1 - z) * jnp.tanh(x + h * 0.3)


def lstm(leaves, x):
    c, h = leaves
    f = jax.nn.sigmoid(h + x)
    c = f * c + (1 - f) * jnp.tanh(h - x)
    return [c, jax.nn.sigmoid(c + x) * jnp.tanh(c)]


def slstm(leaves, x):
    c, n, m, h = leaves
    i, f = h * 0.5 + x, h * 0.2 - x
    top = jnp.maximum(f + m, i)
    i, f = jnp.exp(i - top), jnp.exp(f + m - top)
    c, n = f * c + i * jnp.tanh(h), f * n + i
    return [c, n, top, c / (1 + jnp.abs(n))]


def packed_lstm(leaves, x):
    return [jnp.concatenate(lstm(jnp.split(leaves[0], 2, -1), x[:, :D]), -1)]


def dense_gru(leaves, x):
    (h,) = leaves
    z = jax.nn.sigmoid(h @ SQUARE + x)
    return [z * h + (1 - z) * jnp.tanh(x + (z * h) @ SQUARE.T)]


def heads(leaves, x):
    return [jnp.tanh(jnp.einsum("bhi,hij->bhj", leaves[0], PER_HEAD) + x)]


def packed_heads(leaves, x):
    h = leaves[0].reshape(B, H, W)
    return [jnp.tanh(jnp.einsum("bhi,hij->bhj", h, PER_HEAD).reshape(B, H * W) + x)]


def packed_and_plain_heads(leaves, x):
    """One leaf packed, one not, and a norm over the heads of a third axis order."""
    h, c = leaves
    c = 0.5 * c + jnp.einsum("bhi,hij->bhj", h.reshape(B, H, W), PER_HEAD)
    return [jnp.sin(h + x) * c.reshape(B, H * W), c]


def grouped_norm(leaves, x):
    h = leaves[0].reshape(B, H, W)
    return [((h - h.mean(2, keepdims=True)) / (1 + h.var(2, keepdims=True))).reshape(B, -1) + x]


def layernorm(leaves, x):
    h = leaves[0] + x
    return [(h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1)]


def merged_then_split(leaves, x):
    flat = (leaves[0] * x).reshape(B, H * W)
    return [jnp.tanh(flat).reshape(B, H, W)]


def matrix_memory(leaves, x):
    c, n = leaves
    return [c * jnp.tanh(n)[:, None, :] + x, jnp.tanh(n) + c.sum(1)]


def transposed_leaf(leaves, x):
    a, b = leaves
    return [jnp.tanh(a + b.T), jnp.sin(b) + (a * x).T]


@jax.custom_jvp
def nosy(h):
    return jnp.tanh(h)


@nosy.defjvp
def _(primals, tangents):
    return nosy(*primals), jnp.roll(tangents[0], 1) * primals[0]


@jax.custom_vjp
def own_backward(h):
    return jnp.tanh(h)


own_backward.defvjp(lambda h: (jnp.tanh(h), h), lambda h, g: (g * (1 - jnp.tanh(h) ** 2),))


@jax.custom_batching.custom_vmap
def own_batching(h):
    return jnp.sin(h)


own_batching.def_vmap(lambda size, batched, h: (jnp.sin(h), batched[0]))


def one(f):
    """A step on a single leaf."""
    return lambda leaves, x: [f(leaves[0], x)]


def solved(h, x):
    def solve(_, b):
        return b / (2 + x * x)

    return lax.custom_linear_solve(lambda v: (2 + x * x) * v, jnp.sin(h), solve, solve)


BD, BHW = (B, D), (B, H, W)
EVERY = ((0,), ((),))  # one leaf, nothing shared
ROWS = ((0,), ((0,),))  # one leaf, its first axis shared

CASES = {
    # The twenty cells on which probing was measured against proof.
    "diagonal gru": Case(one(elementwise_gru), (BD,), Diagonal),
    "lstm of two leaves": Case(lstm, (BD, BD), Block, (((0, 1), ((0, 1), (0, 1))),)),
    "lstm packed": Case(packed_lstm, ((B, 2 * D),), Dense, (ROWS,)),
    "heads by einsum": Case(heads, (BHW,), Block, (((0,), ((0, 1),)),)),
    "dense gru": Case(dense_gru, (BD,), Dense, (ROWS,)),
    "slstm of four leaves": Case(slstm, (BD,) * 4, Block, (((0, 1, 2, 3), ((0, 1),) * 4),)),
    "fori_loop": Case(
        one(lambda h, x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c * x), h)), (BD,), Diagonal
    ),
    "softmax": Case(one(lambda h, x: jax.nn.softmax(h + x)), (BD,), Dense, (ROWS,)),
    "layernorm": Case(layernorm, (BD,), Dense, (ROWS,)),
    "roll": Case(one(lambda h, x: jnp.tanh(h + jnp.roll(h, 1, -1))), (BD,), Dense, (ROWS,)),
    "masked matmul": Case(one(lambda h, x: jnp.tanh(h @ (SQUARE * MASK))), (BD,), Dense, (ROWS,)),
    "relu mostly off": Case(one(lambda h, x: jax.nn.relu(h - 2)), (BD,), Diagonal),
    "rare roll": Case(
        one(lambda h, x: jnp.where(x > 10, jnp.roll(h, 1, -1), h)), (BD,), Dense, (ROWS,)
    ),
    "rare dense branch": Case(
        one(lambda h, x: lax.cond(x.sum() > 99, lambda h: h @ SQUARE, jnp.sin, h)),
        (BD,),
        Dense,
        (ROWS,),
    ),
    "where flip": Case(
        one(lambda h, x: jnp.where(h > 0, h, jnp.flip(h, -1))), (BD,), Dense, (ROWS,)
    ),
    "stop_gradient of sum": Case(
        one(lambda h, x: jnp.sin(h) + lax.stop_gradient(h.sum())), (BD,), Diagonal
    ),
    "zero times sum": Case(one(lambda h, x: jnp.sin(h) + 0 * h.sum()), (BD,), Dense, (EVERY,)),
    "sort": Case(one(lambda h, x: jnp.sort(h, -1)), (BD,), Dense, (ROWS,)),
    "int cast": Case(
        one(lambda h, x: h * (h.sum() > 0).astype(jnp.int32).astype(jnp.float32)), (BD,), Diagonal
    ),
    "round": Case(one(lambda h, x: h + jnp.round(h.sum()) + jnp.sign(h[0])), (BD,), Diagonal),
    # Broadcasting, reshapes, indexing.
    "size one broadcast": Case(
        one(lambda h, x: lax.mul(h, x[:1]) + lax.add(x[:, :1], h)), (BD,), Diagonal
    ),
    "row mean": Case(
        one(lambda h, x: h - h.mean(0, keepdims=True)), (BD,), Dense, (((0,), ((1,),)),)
    ),
    "merged then split": Case(merged_then_split, (BHW,), Diagonal),
    "transposed there and back": Case(one(lambda h, x: jnp.tanh(h.T * x.T).T), (BD,), Diagonal),
    "transposed for good": Case(one(lambda h, x: h + h.T), ((D, D),), Dense, (EVERY,)),
    "halves apart": Case(
        one(lambda h, x: jnp.concatenate([jnp.sin(h[:, :1]), jnp.cos(h[:, 1:])], -1)),
        (BD,),
        Diagonal,
    ),
    "padded back": Case(one(lambda h, x: jnp.pad(h[:, 1:], ((0, 0), (1, 0))) + x), (BD,), Diagonal),
    "at set": Case(one(lambda h, x: h.at[:, 0].set(x[:, 0])), (BD,), Diagonal),
    "at add": Case(one(lambda h, x: h.at[:, 0].add(h[:, 1])), (BD,), Dense, (ROWS,)),
    "gathered columns": Case(
        one(lambda h, x: jnp.sin(h[:, jnp.array([1, 0, 3, 2])])), (BD,), Dense, (ROWS,)
    ),
    "dynamic_slice": Case(
        one(lambda h, x: h * lax.dynamic_slice_in_dim(h, (x[0, 0] > 0).astype(jnp.int32), 1, 1)),
        (BD,),
        Dense,
        (ROWS,),
    ),
    "cumsum": Case(one(lambda h, x: jnp.cumsum(h, 1) * x), (BD,), Dense, (ROWS,)),
    "row maximum": Case(one(lambda h, x: h - h.max(1, keepdims=True)), (BD,), Dense, (ROWS,)),
    # Several leaves.
    "leaves apart": Case(lambda s, x: [jnp.tanh(s[0] * x), jnp.sin(s[1])], (BD, (3,)), Diagonal),
    "one leaf feeds another": Case(
        lambda s, x: [jnp.tanh(s[0]), s[1] * s[0]], (BD, BD), Block, (((0, 1), ((0, 1), (0, 1))),)
    ),
    "leaves exchanged": Case(
        lambda s, x: [s[1] * x, jnp.sin(s[0])], (BD, BD), Block, (((0, 1), ((0, 1), (0, 1))),)
    ),
    "matrix memory": Case(matrix_memory, ((B, 3, D), (B, D)), Dense, (((0, 1), ((0, 2), (0, 1))),)),
    "transposed leaf": Case(transposed_leaf, (BD, (D, B)), Block, (((0, 1), ((0, 1), (1, 0))),)),
    "scalars": Case(lambda s, x: [s[0] * s[1], s[1] + x[0, 0]], ((), ()), Block),
    "reset of the carry": Case(lambda s, x: [x, jnp.sin(s[1])], (BD, BD), Diagonal),
    # Control flow and custom rules.
    "while mixes late": Case(
        one(
            lambda h, x: lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, c[2], jnp.roll(c[2], 1, 0)), (0, h, h)
            )[1]
        ),
        (BD,),
        Dense,
        (((0,), ((1,),)),),
    ),
    "scan over the batch": Case(
        one(lambda h, x: lax.scan(lambda c, v: (c + v[0], jnp.sin(v)), 0.0, h)[1]), (BD,), Diagonal
    ),
    "map of a dense step": Case(
        one(lambda h, x: lax.map(lambda v: jnp.tanh(SQUARE @ v), h)), (BD,), Dense, (ROWS,)
    ),
    "scan mixes rows": Case(
        one(lambda h, x: lax.scan(lambda c, v: (c + v, c), x[0], h)[1]),
        (BD,),
        Dense,
        (((0,), ((1,),)),),
    ),
    "checkpoint and jit": Case(
        one(lambda h, x: jax.checkpoint(jax.jit(elementwise_gru))(h, x)), (BD,), Diagonal
    ),
    "custom_jvp by its rule": Case(one(lambda h, x: nosy(h)), (BD,), Dense, (EVERY,)),
    "custom_vjp": Case(one(lambda h, x: own_backward(h)), (BD,), Diagonal),
    "packed heads": Case(packed_heads, ((B, H * W),), Block, (((0,), ((0, 1),), ((B, H, W),)),)),
    "packed and plain heads": Case(
        packed_and_plain_heads,
        ((B, H * W), BHW),
        Block,
        (((0, 1), ((0, 1), (0, 1)), (BHW, BHW)),),
    ),
    "grouped norm": Case(grouped_norm, ((B, H * W),), Dense, (((0,), ((0, 1),), (BHW,)),)),
    "stack of rows": Case(one(lambda h, x: jnp.stack([h[0] * x[0], h[1]])), (BD,), Diagonal),
    "stack of columns": Case(
        one(lambda h, x: jnp.stack([h[:, i] ** 2 for i in range(D)], 1)), (BD,), Diagonal
    ),
    "mean over an axis of size one": Case(
        one(lambda h, x: h - h.mean(1, keepdims=True) + h[:, None].mean(1)), ((B, 1, D),), Diagonal
    ),
    "solve of its own matrix": Case(
        one(lambda h, x: jnp.linalg.solve(jnp.eye(D) + x[:, :, None] ** 2, h[..., None])[..., 0]),
        (BD,),
        Dense,
        (ROWS,),
    ),
    "custom_vmap": Case(one(lambda h, x: own_batching(h) * x), (BD,), Diagonal),
    "linear solve": Case(one(solved), (BD,), Diagonal),
    "vmapped dense": Case(
        one(lambda h, x: jax.vmap(lambda v: jnp.tanh(SQUARE @ v))(h)), (BD,), Dense, (ROWS,)
    ),
    "fft": Case(one(lambda h, x: jnp.fft.ifft(jnp.fft.fft(h)).real), (BD,), Dense, (ROWS,)),
    "channelwise convolution": Case(
        one(
            lambda h, x: lax.conv_general_dilated(
                h[:, None],
                jnp.ones((2, 1, 3)),
                (1,),
                "SAME",
                feature_group_count=2,
                dimension_numbers=("CNH", "OIH", "CNH"),
            )[:, 0]
        ),
        (BD,),
        Dense,
        (ROWS,),
    ),
}


def structure(case):
    carry = [jax.ShapeDtypeStruct(s, jnp.float32) for s in case.shapes]
    x = jax.ShapeDtypeStruct(case.shapes[0] or BD, jnp.float32)
    return jacobian_structure(lambda c, x: (case.step(c, x), None), carry, x)


def points_of(case, count=3):
    """Random leaves and inputs, [point, ...]."""

    def draw(shape):
        return RNG.normal(size=(count, *shape)).astype(np.float32)

    return [draw(s) for s in case.shapes], draw(case.shapes[0] or BD)


@functools.cache
def measured():
    """For each case the Jacobians [out leaf][in leaf] at three points."""

    def at(name, leaves, x):
        mode = jax.jacrev if name == "custom_vjp" else jax.jacfwd
        return mode(lambda s: CASES[name].step(s, x))(leaves)

    @jax.jit  # one compilation for all; random numbers made inside would be most of it
    def run(points):
        return {name: jax.vmap(functools.partial(at, name))(*points[name]) for name in CASES}

    return jax.device_get(run({name: points_of(case) for name, case in CASES.items()}))


def allowed(groups, shapes):
    """Brute force: [out leaf][in leaf] -> boolean array over (out index, in index)."""
    table = [[np.zeros((*a, *b), bool) for b in shapes] for a in shapes]

    def indices(shape, view):
        return [np.unravel_index(k, view) for k in range(int(np.prod(shape)))]

    for group in groups:
        seen = group.views or [shapes[leaf] for leaf in group.leaves]
        members = list(zip(group.leaves, group.shared, seen, strict=True))
        for i, out_axes, out_view in members:
            for j, in_axes, in_view in members:
                pairs = [
                    [all(p[a] == q[b] for a, b in zip(out_axes, in_axes, strict=True))
                     for q in indices(shapes[j], in_view)]
                    for p in indices(shapes[i], out_view)
                ]  # fmt: skip
                table[i][j][...] = np.array(pairs, bool).reshape(table[i][j].shape)
    return table


@pytest.mark.parametrize("name", CASES)
def test_structure_is_the_expected_one(name):
    case = CASES[name]
    found = structure(case)
    assert isinstance(found, case.kind)
    hash(found)
    if case.groups is not None:
        groups = tuple((*g[:2], g.views) if g.views else g[:2] for g in found.resolve(case.shapes))
        assert groups == case.groups


@pytest.mark.parametrize("name", CASES)
def test_structure_covers_the_jacobian(name):
    case = CASES[name]
    found = structure(case)
    permitted = allowed(found.resolve(case.shapes), case.shapes)
    jac = measured()[name]
    for i in range(len(case.shapes)):
        for j in range(len(case.shapes)):
            outside = np.where(permitted[i][j], 0, jac[i][j])
            assert not outside.any(), f"leaf {i} by leaf {j} has entries outside {found}"


@pytest.mark.parametrize(
    "name",
    ["diagonal gru", "slstm of four leaves", "heads by einsum", "row mean", "matrix memory",
     "transposed leaf", "leaves apart", "transposed for good", "packed heads",
     "packed and plain heads"],
)  # fmt: skip
def test_blocks_hold_the_whole_jacobian(name):
    case = CASES[name]
    groups = structure(case).resolve(case.shapes)
    jac = jax.tree.map(lambda d: d[0], measured()[name])
    probe = [RNG.normal(size=s).astype(np.float32) for s in case.shapes]

    def apply(vector):
        return [
            sum(np.tensordot(d, p, p.ndim) for d, p in zip(row, vector, strict=True)) for row in jac
        ]

    unit = map(np.asarray, jacobian_products.basis(groups, probe))
    pushed = [np.stack(leaf) for leaf in zip(*map(apply, zip(*unit, strict=True)), strict=True)]
    matrices = jacobian_products.gather_columns(groups, pushed)
    rows = [
        np.einsum("ijn,jn->in", matrix, p)
        for matrix, p in zip(matrices, jacobian_products.to_lanes(groups, probe), strict=True)
    ]
    for a, b in zip(jacobian_products.from_lanes(groups, rows, probe), apply(probe), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
