"""`matmul` against `jnp.matmul`, whatever axes lead and however they are sharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpara.matmul import matmul


def drawn(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def with_gradients(product, x, matrix, weights):
    return product(x, matrix), jax.grad(
        lambda x, m: jnp.sum(weights * product(x, m)), argnums=(0, 1)
    )(x, matrix)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4), (0, 3), (2, 0)])
def test_matmul_equals_that_of_jax_with_gradients(lead):
    given = drawn(*lead, 6), drawn(6, 7), drawn(*lead, 7)
    found, expected = (with_gradients(f, *given) for f in (matmul, jnp.matmul))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        # 2e-6: the gradient of the matrix sums over the leading axes in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("spec", [P("a"), P(None, "a"), P("a", "b"), P(None, None, "a")])
def test_matmul_takes_every_sharding_of_an_explicit_mesh(spec):
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x, matrix, weights = drawn(4, 8, 6), drawn(6, 7), drawn(4, 8, 7)
    expected = with_gradients(jnp.matmul, x, matrix, weights)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        found = with_gradients(matmul, placed, jnp.asarray(matrix), weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
