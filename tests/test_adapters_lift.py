"""Every method through every kind of use at once: `lift(f)(state) == f(effective(state))`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lift_contexts import layers, normal
from recurrence_cases import QUICK

import jaxpara as jp

X, TOKENS, IMAGE = normal(1, 3, 8), np.array([[1, 2, 5], [7, 0, 11]]), normal(7, 1, 5, 5, 4)
PARAMS = {
    "stack": normal(2, 4, 8, 8),
    "table": normal(3, 12, 8),
    "kernel": normal(4, 3, 3, 4, 8),
    "w": normal(0, 8, 8),
}


def uses_everything(p, x):
    """A weight multiplied from both sides, sliced, scanned, looked up, convolved, raw."""
    h, sums = lax.scan(layers, x @ p["w"], p["stack"])
    return {
        "scan": (h, sums),
        "transposed": jnp.tanh(h @ p["w"].T),
        "columns": h @ p["w"][:, 2:5],
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


def uses_some(p, x):
    """A scan, a lookup and a convolution."""
    h, _ = lax.scan(layers, x, p["stack"])
    kinds = ("NHWC", "HWIO", "NHWC")
    conv = lax.conv_general_dilated(IMAGE, p["kernel"], (1, 1), "SAME", dimension_numbers=kinds)
    return h @ p["table"].T, p["table"][TOKENS], conv


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
}
# By path what each use meets, in the order of the program; what is not here is densified.
EVERYTHING = {
    "dora": {"w": "rrrrd", "stack": "rdd", "table": "rr"},
    "paca": {"w": "rrrrd", "stack": "rdr", "table": "rr"},
    "mos": {"w": "rrdrd", "stack": "rdr", "table": "rr"},
}
SOME = {
    "ia3": {"stack": "r", "table": "rr", "kernel": "d"},
    "ia3 of rows": {"stack": "r", "table": "rr", "kernel": "d"},
    "lora of a convolution": {"kernel": "r"},
    "dora of a convolution": {"kernel": "r"},
    "sparse_nm": {"stack": "d", "table": "dd", "kernel": "d"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_lifted_is_the_function_of_the_effective_weights(name):
    function = uses_everything if name in EVERYTHING else uses_some
    with jax.enable_x64(True):
        t = METHODS[name]
        state = jax.jit(t.attach, compiler_options=QUICK)(jax.random.key(0), PARAMS)
        train, frozen = jp.split(state, t.trainable(state))
        leaves, structure = jax.tree.flatten(train)
        # Every trained number moved, so that no part is zero.
        leaves = [
            np.asarray(leaf) + 0.3 * normal(i + 20, *leaf.shape) for i, leaf in enumerate(leaves)
        ]
        train = jax.tree.unflatten(structure, leaves)

        def loss(train, x, run):
            out = run(jp.combine(train, frozen), x)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

        def both(train, x):
            def of(run):
                return jax.value_and_grad(lambda *a: loss(*a, run), (0, 1), has_aux=True)(train, x)

            return of(jp.lift(function)), of(lambda state, x: function(t.effective(state), x))

        ours, theirs = jax.jit(both, compiler_options=QUICK)(train, X)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert found.dtype == wanted.dtype
            largest = max(np.max(np.abs(wanted), initial=0), 1e-3)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-11 * largest)
        if len(t.members) == 1:  # in a chain each member notes its uses
            found = {}
            for use in t.report(state, function, X).uses:
                found[use.path] = found.get(use.path, "") + use.how[0]
            wanted = (EVERYTHING | SOME)[name]
            assert {path: uses for path, uses in found.items() if path in wanted} == wanted
