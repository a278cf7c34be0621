#!/usr/bin/env bash
# Makes a virtual environment with the pins of one Python, and with this project in editable form.
#
#   requirements/install.sh PYTHON_VERSION VENV      such as: requirements/install.sh 3.12 .venv312
#
# Does nothing when VENV is already complete and the pins are those it was made from. An installation that was cut off
# is started anew. PYTHON=/path/to/python names the interpreter to use; otherwise one is looked for.
set -euo pipefail

if [ $# -ne 2 ]; then
  echo "usage: requirements/install.sh PYTHON_VERSION VENV, such as: requirements/install.sh 3.10 .venv" >&2
  exit 2
fi
version=$1
venv=$2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=requirements/py${version//./}.txt
stamp=$venv/.installed

fail() {
  echo "install: $*" >&2
  exit 1
}

[ -f "$requirements" ] || fail "there are no pins for Python $version; this project runs on 3.10 to 3.14"

# What the environment is made from. The directory counts too: an editable installation names it, and so a copied or
# moved checkout would import the code of the old one.
fingerprint() {
  echo "$PWD"
  "$venv/bin/python" -c 'import sys; print(sys.version)'
  cksum "$requirements" pyproject.toml setup.py impala_jax/kernels/kernels.cc
}

complete() {
  [ -f "$stamp" ] && [ "$(fingerprint 2>/dev/null)" = "$(cat "$stamp")" ]
}

if complete; then exit 0; fi
# One installation at a time. What this one starts inherits the lock, so a pip that outlives its shell is waited for too.
if command -v flock >/dev/null; then
  exec 9<"requirements/install.sh"
  flock --nonblock 9 || { echo "install: waiting for another installation in this checkout" && flock 9; }
  if complete; then exit 0; fi
fi

# True for an interpreter that really runs and has the wanted version: a pyenv shim may be on PATH and do neither.
suits() {
  [ "$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$version" ] || return 1
  # Debian splits venv from Python; uv does without it.
  [ -n "$uv" ] || "$1" -c 'import ensurepip, venv' 2>/dev/null
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    suits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python $version that can make virtual environments"
    echo "$PYTHON"
    return
  fi
  for candidate in "python$version" python3 python "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    if suits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  if [ -n "$uv" ]; then
    # Knows the interpreters that uv itself manages, and downloads one where that is allowed.
    "$uv" python find "$version" 2>/dev/null && return
    "$uv" python install "$version" >&2 && "$uv" python find "$version" && return
  fi
  local other=''
  [ "$version" != 3.10 ] || other='. Without Launchpad newer ones do too: make train PYTHON_VERSION=3.12'
  fail "no Python $version was found; install it (for example 'pyenv install $version', 'uv python install $version'," \
    "or your system's python$version and python$version-venv), or name one: PYTHON=/path/to/python$version$other"
}

uv=$(command -v uv || true)
python=$(find_python)

# Without a stamp the last installation did not end, and what it left may be half a package.
if [ -e "$venv" ] && { [ ! -f "$stamp" ] || [ "$(sed -n 1p "$stamp")" != "$PWD" ] ||
  [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]; }; then
  case $(basename "$venv") in
    .venv*) ;;
    *) [ -f "$venv/pyvenv.cfg" ] || fail "$venv exists and is no virtual environment; it was left alone" ;;
  esac
  echo "install: $venv is incomplete or stale, making it anew"
  rm -rf "$venv"
fi
rm -f "$stamp"

echo "install: $("$python" --version) at $("$python" -c 'import sys; print(sys.executable)') -> $venv"
if [ ! -e "$venv" ]; then
  if [ -n "$uv" ]; then "$uv" venv --quiet --seed --python "$python" "$venv"; else "$python" -m venv "$venv"; fi
fi
# The pins are complete, so nothing is resolved.
if [ -n "$uv" ]; then
  install=("$uv" pip install --quiet --compile-bytecode --python "$venv/bin/python")
else
  install=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)
fi
echo "install: $(wc -l <"$requirements") packages from $requirements, which takes a minute or a few"
"${install[@]}" --no-deps -r "$requirements"
kernels=impala_jax/kernels/_kernels.cpython-${version//./}-*.so
rm -f $kernels
"${install[@]}" --no-deps --no-build-isolation --editable .
compgen -G "$kernels" >/dev/null ||
  echo "install: the CPU kernels were not compiled, so convolutions take several times as long; install g++, then: make clean-venv install"
fingerprint >"$stamp.partial"
mv "$stamp.partial" "$stamp"
echo "install: $venv is complete"
