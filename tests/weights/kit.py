"""Ways in which a function uses a weight: the contexts of the table in test_lift."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.recurrence.kit import QUICK

RULE, DENSE = "rule", "densified"


def normal(seed, *shape):
    return 0.5 * np.random.default_rng(seed).standard_normal(shape)


W, X, STACK = normal(0, 8, 8), normal(1, 3, 8), normal(2, 4, 8, 8)
TOKENS = np.array([[1, 2, 5], [7, 0, 1]])


class Context(NamedTuple):
    """A function of `(w, x)`, its arguments, and how `w` is used: (primitive, how) in order."""

    function: Any
    uses: tuple[tuple[str, str], ...]
    w: Any = W
    x: Any = X
    differentiable: bool = True


DOT = (("dot_general", RULE),)


def layers(h, w):
    return jnp.tanh(h @ w), jnp.sum(h)


@jax.custom_vjp
def doubled_gradient(x, w):
    return x @ w


doubled_gradient.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (2 * g @ saved[1].T, 2 * saved[0].T @ g)
)


@jax.custom_vjp
def attend(q, w):
    scores = jax.nn.softmax(q @ w @ q.T)
    return scores @ q


attend.defvjp(
    lambda q, w: (attend(q, w), (q, w)),
    lambda saved, g: jax.vjp(lambda q, w: jax.nn.softmax(q @ w @ q.T) @ q, *saved)[1](g),
)


@jax.custom_jvp
def through_tanh(w):
    return jnp.tanh(w)


through_tanh.defjvps(lambda t, out, w: 3 * t)


def sharded(w, x):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    run = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    )
    return run(w, x)


def shrinking(carry, _):
    return (carry[0] @ carry[1], 0.5 * carry[1]), None


CONTEXTS = {
    "matmul": Context(lambda w, x: x @ w, DOT),
    "weight_on_the_left": Context(lambda w, x: w @ x.T, DOT),
    "transposed": Context(lambda w, x: x @ w.T, DOT),
    "tensordot": Context(lambda w, x: jnp.tensordot(x, w, 1), DOT),
    "lax_dot": Context(lambda w, x: lax.dot(x, w), DOT),
    "vector": Context(lambda w, x: x[0] @ w, DOT),
    "einsum": Context(lambda w, x: jnp.einsum("bi,io->ob", x, w), DOT),
    "einsum_of_a_stack": Context(lambda w, x: jnp.einsum("bi,lio->lbo", x, w), DOT, STACK),
    "einsum_over_outputs": Context(lambda w, x: jnp.einsum("bo,lio->lbi", x, w), DOT, STACK),
    "einsum_over_two_axes": Context(
        lambda w, x: jnp.einsum("lbi,lio->bo", x, w), DOT, STACK, normal(3, 4, 3, 8)
    ),
    "experts": Context(
        lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), DOT, STACK, normal(3, 4, 3, 8)
    ),
    "inner_jit": Context(lambda w, x: jax.jit(lambda w, x: x @ w)(w, x), DOT),
    "nested_jit": Context(lambda w, x: jax.jit(jax.jit(lambda w, x: w.T @ x.T))(w, x), DOT),
    "scan_over_layers": Context(lambda w, x: lax.scan(layers, x, w), DOT, STACK),
    "reversed_scan": Context(lambda w, x: lax.scan(layers, x, w, reverse=True), DOT, STACK),
    "scan_of_remat": Context(lambda w, x: lax.scan(jax.checkpoint(layers), x, w), DOT, STACK),
    "scan_of_a_transposed_stack": Context(
        lambda w, x: lax.scan(layers, x, jnp.swapaxes(w, 1, 2)), DOT, STACK
    ),
    "scan_over_moved_layers": Context(
        lambda w, x: lax.scan(layers, x, jnp.swapaxes(w, 0, 1)),
        (("scan", DENSE),),
        normal(9, 8, 2, 8),
    ),
    "scan_constant": Context(
        lambda w, x: lax.scan(lambda h, _: layers(h, w), x, None, length=3), DOT
    ),
    "scan_in_a_scan": Context(
        lambda w, x: lax.scan(lambda h, pair: (lax.scan(layers, h, pair)[0], None), x, w)[0],
        DOT,
        normal(5, 2, 2, 8, 8),
    ),
    "scan_carry": Context(
        lambda w, x: lax.scan(shrinking, (x, w), None, length=2)[0][0], (("scan", DENSE),)
    ),
    "constant_scan_carry": Context(
        lambda w, x: lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (x, w), length=2)[0][0],
        DOT,
    ),
    "remat": Context(lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x), DOT),
    "cond": Context(lambda w, x: lax.cond(x[0, 0] > -9, lambda: x @ w, lambda: x), DOT),
    "switch": Context(
        lambda w, x: lax.switch(
            1,
            [lambda: x, lambda: x @ w, lambda: x @ w.T],
        ),
        DOT * 2,
    ),
    "cond_returns_the_weight": Context(
        lambda w, x: x @ lax.cond(x[0, 0] > -9, lambda: w, lambda: w.T), (("cond", DENSE),)
    ),
    "while": Context(
        lambda w, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x)
        )[1],
        DOT,
        differentiable=False,
    ),
    "fori_loop_over_layers": Context(
        lambda w, x: lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ w[i]), x), DOT, STACK
    ),
    "python_loop_over_layers": Context(lambda w, x: x @ w[0] @ w[3], DOT * 2, STACK),
    "vmap_over_layers": Context(lambda w, x: jax.vmap(lambda w: x @ w)(w), DOT, STACK),
    "vmap_over_inputs": Context(lambda w, x: jax.vmap(lambda x: x @ w)(x), DOT),
    "vmap_of_a_scan": Context(
        lambda w, x: jax.vmap(lambda x: lax.scan(layers, x, w)[0])(x), DOT, STACK
    ),
    "tied": Context(lambda w, x: jnp.tanh(x @ w) @ w.T, DOT * 2),
    "embedding": Context(lambda w, i: w[i], (("gather", RULE),), x=TOKENS),
    "take": Context(lambda w, i: jnp.take(w, i, axis=0), (("gather", RULE),), x=TOKENS),
    "tied_embedding": Context(
        lambda w, i: jnp.tanh(w[i]) @ w.T, (("gather", RULE), *DOT), x=TOKENS
    ),
    "gather_of_columns": Context(lambda w, i: w[:, i], (("gather", DENSE),), x=TOKENS),
    "sliced_fused_qkv": Context(
        lambda w, x: (x @ w[:, :3]) @ (x @ w[:, 3:6]).T @ (x @ w[:, 6:]), DOT * 3
    ),
    "split_fused_qkv": Context(
        lambda w, x: [x @ part for part in jnp.split(w, 2, axis=1)], DOT * 2
    ),
    "strided_rows": Context(lambda w, x: x[:, ::2] @ w[::2], DOT),
    "weight_norm": Context(
        lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0)), (("mul", DENSE), ("div", DENSE))
    ),
    "elementwise": Context(lambda w, x: x @ jnp.exp(w), (("exp", DENSE),)),
    "conv": Context(
        lambda w, x: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        (("conv_general_dilated", DENSE),),
        normal(6, 3, 3, 3, 4),
        normal(7, 1, 5, 5, 3),
    ),
    "custom_vjp": Context(lambda w, x: doubled_gradient(x, w), (("custom_vjp_call", DENSE),)),
    "custom_vjp_attention": Context(lambda w, x: attend(x, w), (("custom_vjp_call", DENSE),)),
    "custom_jvp": Context(lambda w, x: x @ through_tanh(w), (("custom_jvp_call", DENSE),)),
    "two_weights": Context(lambda w, x: (w @ w) @ x.T, (("dot_general", DENSE),)),
    "shard_map": Context(sharded, (("shard_map", DENSE),), x=normal(8, 4, 8)),
    "returned": Context(lambda w, x: w, ()),
}


def attached(t, w):
    attach = lambda w: t.attach(jax.random.key(0), {"w": w})  # noqa: E731
    return jax.jit(attach, compiler_options=QUICK)(w)


def effective(t, w):
    whole = lambda w: t.effective(t.attach(jax.random.key(0), {"w": w}))["w"]  # noqa: E731
    return np.asarray(jax.jit(whole, compiler_options=QUICK)(w))
