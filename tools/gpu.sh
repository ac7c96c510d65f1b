#!/bin/sh
# The kernels on this machine's GPU: correctness, then speed. Installs nothing.
#
#   tools/gpu.sh [arguments of benchmarks.kernels]     for MINUTES (9); again: continues
#   tools/gpu.sh --rehearse                            the same on any CPU, tiny, in a minute or two
#
# Needs a Python with jax[cuda12] (0.11 or newer), optax, jaxtyping, chex and pytest: $PYTHON, or
# the first of .venv, python3, python in which JAX sees a GPU, Hopper or newer. Three files go to
# $RESULTS (benchmarks/results): what the tests said, the rows of the benchmark, and its tables.
set -eu

cd "$(dirname "$0")/.."
minutes="${MINUTES:-9}"
results="${RESULTS:-benchmarks/results}"
began="$(date +%s)"
ready=""
if [ "${1:-}" = --rehearse ]; then
  export JAX_PLATFORMS=cpu
  ready=--packages
else
  export JAX_PLATFORMS=  # all of them: the float64 oracle runs on the CPU beside the GPU
fi
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"

left() { # seconds
  awk "BEGIN { print 60 * $minutes - ($(date +%s) - $began) }"
}

rehearse() { # all that needs no GPU: the tests are found, the benchmark runs, a map is fitted
  folder="$(mktemp -d)"
  "$python" -m pytest -q -m gpu --collect-only >"$folder/tests.txt" || {
    cat "$folder/tests.txt"
    return 1
  }
  tail -1 "$folder/tests.txt"
  "$python" -m benchmarks.kernels --grid smoke --ops gru linear --dtypes float32 --minutes 5 \
    --results "$folder"
  "$python" -m benchmarks.fit_choice "$folder"/*.csv --platform cpu --output "$folder/choice.json"
  echo "make gpu: rehearsed on a CPU; no figure here is a measurement, $folder may go"
}

measure() { # tests until they all passed, then rows until the time is over
  status=0
  "$python" tools/gpu_tests.py --seconds "$(left)" --results "$results" || status=$?
  if [ $status -eq 3 ]; then
    echo "make gpu: $minutes minutes are over; the same command continues with the tests"
    return 0
  elif [ $status -ne 0 ]; then
    echo "make gpu: what is wrong is not timed; fix it, or run benchmarks.kernels by itself" >&2
    return 1
  fi
  "$python" -m benchmarks.kernels --results "$results" \
    --minutes "$(awk "BEGIN { print $(left) / 60 }")" "$@"
}

why=""
for python in "${PYTHON:-}" .venv/bin/python python3 python; do
  [ -n "$python" ] && command -v "$python" >/dev/null 2>&1 || continue
  if said="$("$python" tools/gpu_ready.py $ready 2>&1)"; then
    echo "make gpu: $python: $said"
    if [ -n "$ready" ]; then rehearse; else measure "$@"; fi
    exit
  fi
  why="$why
  $python: $(printf '%s' "$said" | tail -1)"
done
cat >&2 <<END
make gpu: no Python here can run it:$why
It needs an NVIDIA GPU, Hopper or newer, its driver, and a Python with
  pip install 'jax[cuda12]' optax jaxtyping chex pytest
named by PYTHON=... make gpu. Without a GPU: make gpu ARGS=--rehearse
END
exit 1
