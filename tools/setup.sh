#!/bin/sh
# Make or refresh a virtual environment that holds jaxpara with its extras.
#
#   tools/setup.sh [VENV [EXTRAS]]        default: .venv dev,experiments
#
# Does nothing when the environment works and pyproject.toml has not changed. The stamp is written
# last, so an interrupted run is simply repeated.
set -eu

cd "$(dirname "$0")/.."
venv="${1:-.venv}"
extras="${2:-dev,experiments}"
stamp="$venv/.jaxpara-stamp"
want="$(cksum < pyproject.toml) $extras ${PYTHON:-}"

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] \
  && "$venv/bin/python" -c 'import jax, jaxpara' >/dev/null 2>&1; then
  exit 0
fi

# An environment made by another interpreter than the one asked for, or broken, is made again.
reuse=no
if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then reuse=yes; fi
if [ "$reuse" = yes ] && [ -n "${PYTHON:-}" ]; then
  asked="$("$(sh tools/python.sh)" -c 'import sys; print(sys.version)')" || exit 1
  [ "$("$venv/bin/python" -c 'import sys; print(sys.version)')" = "$asked" ] || reuse=no
fi
if [ "$reuse" = no ]; then
  python="$(sh tools/python.sh)" || exit 1
  echo "jaxpara: using $python ($("$python" --version 2>&1)) for $venv"
  rm -f "$stamp"
  if ! "$python" -m venv --clear "$venv"; then
    echo "jaxpara: $python -m venv failed; on Debian or Ubuntu: sudo apt install python3-venv" >&2
    exit 1
  fi
else
  echo "jaxpara: using $venv/bin/python ($("$venv/bin/python" --version 2>&1))"
fi

echo "jaxpara: installing the packages of [$extras] into $venv (a few minutes the first time)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
printf '%s\n' "$want" > "$stamp"
