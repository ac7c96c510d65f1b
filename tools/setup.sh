#!/bin/sh
# Make or refresh a virtual environment that holds jaxpara with its extras, and say which it is.
#
#   tools/setup.sh [VENV [EXTRAS]]        default: .venv dev,experiments
#
# Installs nothing when the environment works and pyproject.toml has not changed. The stamp is
# written last, so an interrupted run is simply repeated.
set -eu

cd "$(dirname "$0")/.."
venv="${1:-.venv}"
extras="${2:-dev,experiments}"
stamp="$venv/.jaxpara-stamp"
want="$(cksum < pyproject.toml) $extras"

version() { "$1" -c 'import sys; print(sys.version)' 2>/dev/null; }

# An environment is kept if pip runs in it and it is of the interpreter asked for, if one was.
keep=no
if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then keep=yes; fi
if [ "$keep" = yes ] && [ -n "${PYTHON:-}" ]; then
  python="$(sh tools/python.sh)" || exit 1
  [ "$(version "$venv/bin/python")" = "$(version "$python")" ] || keep=no
fi

if [ "$keep" = yes ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] \
  && "$venv/bin/python" -c 'import sys, jax, jaxpara
print("jaxpara: using %s (Python %s, JAX %s)" % (
    sys.executable, sys.version.split()[0], jax.__version__))' 2>/dev/null; then
  exit 0
fi

if [ "$keep" = no ]; then
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
