"""Says which GPU JAX sees here, or exits with what is missing."""

import importlib.util
import sys

missing = [
    name
    for name in ("jax", "optax", "jaxtyping", "chex", "pytest")
    if importlib.util.find_spec(name) is None
]
if missing:
    sys.exit("not installed: " + ", ".join(missing))

import jax  # noqa: E402

if jax.default_backend() != "gpu":
    sys.exit(f"JAX {jax.__version__} sees no GPU, only {jax.devices()[0].device_kind}")
print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
