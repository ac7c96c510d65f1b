"""Says which GPU JAX sees here, or exits with what is missing: `python tools/gpu_ready.py`.

With `--packages` it checks only the packages: enough for a rehearsal on a CPU.
"""

import importlib.util
import pathlib
import sys

missing = [
    name
    for name in ("jax", "optax", "jaxtyping", "chex", "pytest")
    if importlib.util.find_spec(name) is None
]
if missing:
    sys.exit("not installed: " + ", ".join(missing))

import jax  # noqa: E402

device = jax.devices()[0]
if "--packages" not in sys.argv:
    if jax.default_backend() != "gpu":
        sys.exit(f"JAX {jax.__version__} sees no GPU, only {device.device_kind}")
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    from pallas_kernels import unfit

    if why := unfit("gpu"):
        sys.exit(why)
print(f"JAX {jax.__version__}, {device.device_kind}")
