"""The limits of the rule by which solvers and kernels accept a solve."""

import jax.numpy as jnp
import pytest

from pallas_kernels import certificate

EPS = float(jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize(
    "dtype, tol, expected",
    [
        (jnp.float32, None, (8 * EPS, 80 * EPS)),
        (jnp.float32, 1e-6, (1e-6, 80 * EPS)),
        (jnp.float32, 1e-3, (1e-3, 1e-3)),
        (jnp.float32, 1e-8, (1e-8, 1e-8)),
        (jnp.float32, 0.0, (0.0, 0.0)),
        (jnp.bfloat16, None, (0.0, 0.0)),
        (jnp.float16, 1e-2, (0.0, 0.0)),
        ("float64", None, (8 * 2.0**-52, 80 * 2.0**-52)),
    ],
)
def test_limits_of_a_correction(dtype, tol, expected):
    assert certificate.limits(dtype, tol) == expected


def test_float32_unit_is_the_distance_from_one_to_its_neighbour():
    assert jnp.nextafter(jnp.float32(1), jnp.float32(2)) - 1 == EPS
