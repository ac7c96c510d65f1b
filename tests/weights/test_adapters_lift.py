"""Every method through every kind of use at once: `lift(f)(state) == f(effective(state))`.

Methods whose product is not the one with the effective weight have it written by hand here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxpara as jp
from jaxpara.weights.quant.activations import fake_activations
from tests.recurrence.kit import QUICK
from tests.weights.kit import layers, normal

X, TOKENS, IMAGE = normal(1, 3, 8), np.array([[1, 2, 5], [7, 0, 11]]), normal(7, 1, 5, 5, 4)
PARAMS = {
    "stack": normal(2, 4, 8, 8),
    "table": normal(3, 12, 8),
    "kernel": normal(4, 3, 3, 4, 8),
    "w": normal(0, 8, 8),
    "branch": normal(5, 8, 8),
    "experts": normal(6, 2, 8, 8),
}


def uses_everything(p, x):
    """A weight multiplied from both sides, sliced, scanned, looked up, convolved, raw."""
    h, sums = lax.scan(jax.checkpoint(layers), x @ p["w"], p["stack"])
    return {
        "scan": (h, sums),
        "branch": lax.cond(h[0, 0] > -9, lambda: jnp.tanh(h @ p["w"].T), lambda: h),
        "columns": h @ p["w"][:, 2:5],
        "rows": h[:, 1:5] @ p["w"][1:5],
        "summed": jnp.einsum("bi,lio->bo", h, p["stack"]),
        "experts": jnp.einsum("bo,lio->lbi", h, p["stack"]),
        "both": jnp.einsum("bi,io->bio", h, p["w"]),
        "table": p["table"][TOKENS],
        "head": h @ p["table"].T,
        "conv": lax.conv_general_dilated(
            IMAGE, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        "raw": jnp.sin(p["w"]),
    }


def uses_some(p, x, product=jnp.matmul, sliced=jnp.matmul):
    """A scan of remat, a branch, experts, slices of a fused matrix, a lookup and a convolution."""
    layer = jax.checkpoint(lambda h, w: (jnp.tanh(product(h, w)), None))
    h, _ = lax.scan(layer, x, p["stack"])
    h = lax.cond(h[0, 0] > -9, lambda: jnp.tanh(product(h, p["branch"])), lambda: h)
    q, k = sliced(h, p["w"][:, :4]), sliced(h, p["w"][:, 4:])
    each = jax.vmap(product)(jnp.stack([h, -h]), p["experts"])
    kinds = ("NHWC", "HWIO", "NHWC")
    conv = lax.conv_general_dilated(IMAGE, p["kernel"], (1, 1), "SAME", dimension_numbers=kinds)
    return q @ k.T, h @ p["table"].T, p["table"][TOKENS], conv, each


METHODS = {
    "dora": jp.dora(rank=2),
    "dora of a convolution": jp.dora(rank=2, window=2, where="kernel"),
    "ia3": jp.ia3(),
    "ia3 of rows": jp.ia3(axis=-2),
    "paca": jp.paca(rank=3),
    "mos": jp.mos(rank=2, budget=2, shards=2),
    "lora of a convolution": jp.lora(rank=2, window=2, where="kernel"),
    "sparse_nm": jp.sparse_nm(n=1, m=2),
    "dora on integers": jp.chain(jp.fake_quant(), jp.dora(rank=2)),
    "mos inside a quantiser": jp.chain(jp.mos(rank=2, shards=2), jp.fake_quant()),
    "mos on mos": jp.chain(jp.mos(rank=2, shards=2), jp.mos(rank=2, private=2, where="stack")),
    "rtn": jp.rtn(bits=6, affine=True, group=2),
    "lora on nf4": jp.chain(jp.nf4(block=3, scale_block=7), jp.lora(rank=2)),
}
# By path what each use meets, in the order of the program; what is not here is densified.
EVERYTHING = {
    "dora": {"w": "rrrdrd", "stack": "rdd", "table": "rr"},
    "paca": {"w": "rrrdrd", "stack": "rdr", "table": "rr"},
    "mos": {"w": "rrddrd", "stack": "rdr", "table": "rr"},
}
ALL = {"stack": "r", "branch": "r", "w": "rr", "experts": "r", "table": "rr", "kernel": "d"}
SOME = {
    "ia3": ALL,
    "ia3 of rows": ALL,
    "lora of a convolution": {"kernel": "r"},
    "dora of a convolution": {"kernel": "r"},
    "sparse_nm": dict.fromkeys(("stack", "branch", "experts", "kernel"), "d"),
    "rtn": {**ALL, "table": "dd"},
}


def moved(train):
    """Every trained number moved, so that no part is zero."""
    leaves, structure = jax.tree.flatten(train)
    leaves = [np.asarray(leaf) + 0.3 * normal(i + 20, *leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, leaves)


def attached(t):
    state = jax.jit(t.attach, compiler_options=QUICK)(jax.random.key(0), PARAMS)
    train, frozen = jp.split(state, t.trainable(state))
    return moved(train), frozen


def compared(run, by_hand, train):
    """Both, with their gradients, in one program; equal to rounding."""

    def both(train, x):
        def of(function):
            def loss(train, x):
                out = function(train, x)
                return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

            return jax.value_and_grad(loss, (0, 1), has_aux=True)(train, x)

        return of(run), of(by_hand)

    ours, theirs = jax.jit(both, compiler_options=QUICK)(train, X)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert found.dtype == wanted.dtype
        largest = max(np.max(np.abs(wanted), initial=0), 1e-3)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11 * largest)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(theirs[1][1]))
    return theirs[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_lifted_is_the_function_of_the_effective_weights(name):
    function = uses_everything if name in EVERYTHING else uses_some
    with jax.enable_x64(True):
        t = METHODS[name]
        train, frozen = attached(t)
        out = compared(
            lambda train, x: jp.lift(function)(jp.combine(train, frozen), x),
            lambda train, x: function(t.effective(jp.combine(train, frozen)), x),
            train,
        )
        state = jp.combine(train, frozen)
        if len(t.members) == 1:  # in a chain each member notes its uses
            found = {}
            for use in t.report(state, function, X).uses:
                found[use.path] = found.get(use.path, "") + use.how[0]
            wanted = (EVERYTHING | SOME)[name]
            assert {path: uses for path, uses in found.items() if path in wanted} == wanted
        if name == "rtn":
            merged = jp.lift(function)(jp.weights.pack(t.merge(state)), X)
            for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(out), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@jax.custom_vjp
def sparse_product(x, pair):
    return x @ pair[0]


sparse_product.defvjp(
    lambda x, pair: (x @ pair[0], (x, pair)),
    lambda saved, g: (g @ saved[1][1].T, (saved[0].T @ g, jnp.zeros_like(saved[1][1]))),
)


@pytest.mark.slow
def test_bdwp_is_its_two_products_in_loops_branches_and_experts():
    with jax.enable_x64(True):
        t, other = jp.bdwp(n=1, m=2), jp.sparse_nm(n=1, m=2)
        train, frozen = attached(t)

        def by_hand(train, x):
            state = jp.combine(train, frozen)
            raw = jax.tree.map(lambda w: w.base, state, is_leaf=lambda w: isinstance(w, jp.Weight))
            turned = {name: jnp.swapaxes(w, -1, -2) for name, w in raw.items()}
            turned = other.effective(other.attach(jax.random.key(0), turned))
            forward, p = t.effective(state), {}
            for name in PARAMS:
                pair = forward[name], lax.stop_gradient(jnp.swapaxes(turned[name], -1, -2))
                p[name] = pair if name in ("stack", "branch", "experts") else forward[name]
            return uses_some(p, x, product=sparse_product)

        run = lambda train, x: jp.lift(uses_some)(jp.combine(train, frozen), x)  # noqa: E731
        compared(run, by_hand, train)
        uses = t.report(jp.combine(train, frozen), uses_some, X).uses
        ruled = {use.path for use in uses if use.how == "rule"}
        assert ruled == {"stack", "branch", "experts"}


@pytest.mark.slow
def test_activations_are_quantised_in_loops_branches_experts_and_slices():
    with jax.enable_x64(True):
        t = jp.fake_quant(bits=6, activations=6, group=4)
        train, frozen = attached(t)

        def product(x, w):
            return fake_activations(x, 6, 2) @ w

        def by_hand(train, x):
            p = t.effective(jp.combine(train, frozen))
            return uses_some(p, x, product=product, sliced=product)

        run = lambda train, x: jp.lift(uses_some)(jp.combine(train, frozen), x)  # noqa: E731
        compared(run, by_hand, train)
        uses = t.report(jp.combine(train, frozen), uses_some, X).uses
        ruled = {use.path for use in uses if use.how == "rule"}
        assert ruled == {"stack", "branch", "experts", "w"}
