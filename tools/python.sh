#!/bin/sh
# Print the path of a Python that can make a virtual environment.
#
#   tools/python.sh              the python3 on PATH if it is new enough, else 3.14 ... 3.11
#   tools/python.sh 3.12 3.13    the first of these versions that is there
#   PYTHON=... tools/python.sh   this one (a name or a path), or an error
#
# A candidate is run, not only found: pyenv's shims exist for versions that are not selected.
set -u

root="${PYENV_ROOT:-$HOME/.pyenv}"
without_venv=""

say() { printf '%s\n' "$*" >&2; }

usable() { # new enough, and able to make an environment with pip in it
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || return 1
  "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 && return 0
  without_venv="${without_venv:-$1}"
  return 1
}

try() { # prints and ends on the first usable file of this name, on PATH and in pyenv
  case "$1" in
    */*) usable "$1" && { printf '%s\n' "$1"; exit 0; }; return ;;
  esac
  old_ifs="$IFS"; IFS=:
  for directory in ${PATH:-}; do
    IFS="$old_ifs"
    if [ -n "$directory" ] && [ -x "$directory/$1" ] && usable "$directory/$1"; then
      printf '%s\n' "$directory/$1"; exit 0
    fi
    IFS=:
  done
  IFS="$old_ifs"
  for file in "$root"/versions/*/bin/"$1"; do
    if [ -x "$file" ] && usable "$file"; then printf '%s\n' "$file"; exit 0; fi
  done
}

missing_venv() {
  version="$("$without_venv" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  say "jaxpara: $without_venv (Python $version) cannot make virtual environments: venv is missing."
  say "  Debian, Ubuntu:  sudo apt install python3-venv    (or python$version-venv)"
  say "  elsewhere:       install a Python with venv and ensurepip, or name one: PYTHON=/path/to/python"
}

if [ -n "${PYTHON:-}" ]; then
  try "$PYTHON"
  if [ -n "$without_venv" ]; then missing_venv; else
    say "jaxpara: PYTHON=$PYTHON is not there, does not run, or is older than 3.11."
  fi
  exit 1
fi

asked="$*"
# The user's own python3 first: it is the one that was chosen for this machine.
if [ -z "$asked" ]; then try python3; fi
for version in ${asked:-3.14 3.13 3.12 3.11}; do try "python$version"; done
if [ -z "$asked" ]; then try python; fi

if [ -n "$without_venv" ]; then missing_venv; exit 1; fi
if [ -n "$asked" ]; then say "jaxpara: none of these Pythons is here: $asked"; exit 1; fi
say "jaxpara: no Python 3.11 or newer was found on PATH or under $root/versions."
say "  Debian, Ubuntu:  sudo apt install python3 python3-venv python3-pip"
say "  macOS:           brew install python"
say "  or name one:     make PYTHON=/path/to/python3.12 ..."
exit 1
