#!/bin/sh
# The kernels on this machine's GPU: correctness, then speed. Installs nothing.
#
#   tools/gpu.sh [arguments of benchmarks.kernels]
#
# Needs a Python with jax[cuda12] (0.11 or newer for the fused kernels), optax, jaxtyping, chex and
# pytest: $PYTHON, or the first of .venv, python3, python in which JAX sees a GPU.
set -eu

cd "$(dirname "$0")/.."
export JAX_PLATFORMS=  # all of them: the float64 oracle runs on the CPU beside the GPU

export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"

why=""
for python in "${PYTHON:-}" .venv/bin/python python3 python; do
  [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 || continue
  if said="$("$python" tools/gpu_ready.py 2>&1)"; then
    echo "make gpu: $python: $said"
    # Only the files that hold such tests are read: others need packages that may be absent.
    files="$(grep -l 'pytest.mark.gpu' tests/test_*.py)"
    # shellcheck disable=SC2086
    "$python" -m pytest -q -m gpu $files || [ $? -eq 5 ] || {
      echo "make gpu: what is wrong is not timed; fix it, or run benchmarks.kernels by itself" >&2
      exit 1
    }
    exec "$python" -m benchmarks.kernels "$@"
  fi
  why="$why
  $python: $(printf '%s' "$said" | tail -1)"
done
echo "make gpu: no Python here can run it:$why" >&2
echo "  pip install 'jax[cuda12]' optax jaxtyping chex pytest, and name it: PYTHON=... make gpu" >&2
exit 1
