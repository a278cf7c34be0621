#!/usr/bin/env bash
# Makes a virtual environment with the pins of one Python, and with this project in editable form.
#
#   requirements/install.sh [--which] [PYTHON_VERSION [VENV]]      such as: requirements/install.sh 3.12 .venv312
#
# PYTHON_VERSION may be auto, the default. Then the Python of VENV stays, and a new VENV (by default .venv) gets 3.10 with
# Launchpad where there is one, else the newest that is there, else one of uv. --which only says which. Nothing is done
# when VENV is already complete and the pins are those it was made from. An installation that was cut off is started anew.
# PYTHON=/path/to/python names the interpreter to use.
set -euo pipefail

fail() {
  echo "install: $*" >&2
  exit 1
}

which=
if [ "${1:-}" = --which ]; then
  which=1
  shift
fi
asked=${1:-auto}
# Images and services set PYTHON_VERSION to a release such as 3.12.4.
[[ $asked =~ ^(3\.[0-9]+)\. ]] && asked=${BASH_REMATCH[1]}
venv=${2:-.venv}
if [ $# -gt 2 ]; then
  echo "usage: requirements/install.sh [--which] [PYTHON_VERSION [VENV]], such as: requirements/install.sh 3.12 .venv312" >&2
  exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
newest_first='3.14 3.13 3.12 3.11'
wanted=$newest_first
# Launchpad's and Reverb's wheels, which the pins of 3.10 contain, are for this platform only.
if [ "$(uname -sm)" = 'Linux x86_64' ]; then wanted="3.10 $newest_first"; fi
stamp=$venv/.installed
uv=$(command -v uv || true)
without_venv=

has_pins() {
  case " $wanted " in *" $version "*) ;; *) return 1 ;; esac
}

version=$asked
[ "$version" = auto ] || has_pins || fail "there are no pins for Python $version on $(uname -sm); there are for: $wanted"

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

# Such as 3.12; fails for a command that is not there or does not run, as a shim of pyenv may.
version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Sets python to the interpreter behind a command if it has this version and can make virtual environments.
takes() {
  [ "$(version_of "$1")" = "$2" ] || return 1
  # Debian splits venv from Python; uv does without it.
  if [ -z "$uv" ] && ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
    without_venv="; $1 cannot make virtual environments, so install your system's python$2-venv, or uv"
    return 1
  fi
  # Not the one of an active virtual environment, which may be the one that is deleted below.
  python=$("$1" -c 'import os, sys; print(sys.executable if sys.prefix == sys.base_prefix else os.path.realpath(sys.executable))')
}

# Sets python to an interpreter of this version.
find_python() {
  local candidate
  for candidate in "python$1" python3 python "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1".*/bin/python; do
    if takes "$candidate" "$1"; then return; fi
  done
  return 1
}

# Sets python to an interpreter that uv manages, or that it downloads where that is allowed.
from_uv() {
  local found
  [ -n "$uv" ] || return 1
  found=$("$uv" python find --system "$1" 2>/dev/null) ||
    { [ -n "$which" ] && echo "install: $venv gets a Python that uv downloads, because no other was found" && exit 0; } ||
    { "$uv" python install "$1" >&2 && found=$("$uv" python find --system "$1"); } || return 1
  takes "$found" "$(version_of "$found")"
}

# Sets version, python (unless VENV is kept), and why.
choose() {
  version=$asked python='' why=''
  # A stamp is the last thing that an installation writes, and names its folder and its Python.
  kept=
  if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$PWD" ]; then
    kept=$(version_of "$venv/bin/python") || kept=
  fi
  if [ "$version" = auto ] && [ -n "${PYTHON:-}" ]; then
    version=$(version_of "$PYTHON") || fail "PYTHON=$PYTHON is not a Python that runs"
    has_pins || fail "PYTHON=$PYTHON has version $version; there are pins for: $wanted"
  elif [ "$version" = auto ] && [ -n "$kept" ]; then
    version=$kept
    has_pins || version=auto
  fi

  if [ "$version" = "$kept" ]; then
    why='which is there already'
    [ "$asked" != auto ] || why="$why (PYTHON_VERSION=... changes it)"
  elif [ -n "${PYTHON:-}" ]; then
    takes "$PYTHON" "$version" || fail "PYTHON=$PYTHON is not a Python $version that can make virtual environments"
    why='which PYTHON names'
  elif [ "$version" != auto ]; then
    find_python "$version" || from_uv "$version" ||
      fail "no Python $version was found; install it (for example 'pyenv install $version', 'uv python install" \
        "$version', or your system's python$version and python$version-venv), name one by" \
        "PYTHON=/path/to/python$version, or leave out PYTHON_VERSION to take another$without_venv"
    why='as asked for'
  else
    for version in $wanted; do
      if find_python "$version"; then break; fi
    done
    if [ -z "$python" ]; then
      from_uv '>=3.11,<3.15' ||
        fail "no Python of $wanted was found; install one (for example your system's python3 and python3-venv), or uv," \
          "which downloads one, or name one by PYTHON=/path/to/python$without_venv"
      version=$(version_of "$python")
      why="the newest of uv's, because no other was found"
    elif [ "$version" = 3.10 ]; then
      why='which Launchpad and Reverb need'
    else
      why='the newest that was found; Launchpad and Reverb need 3.10 on Linux x86_64'
    fi
  fi
  requirements=requirements/py${version/./}.txt
}

choose
if [ -n "$python" ]; then
  echo "install: $venv gets $("$python" --version) ($python), $why"
else
  echo "install: $venv has $("$venv/bin/python" --version), $why"
fi
if [ -n "$which" ] || complete; then exit 0; fi

# One installation at a time. What this one starts inherits the lock, so a pip that outlives its shell is waited for too.
if command -v flock >/dev/null; then
  exec 9<"requirements/install.sh"
  flock --nonblock 9 || { echo "install: waiting for another installation in this checkout" && flock 9; }
  choose
  if complete; then exit 0; fi
fi

# Without a stamp the last installation did not end, and what it left may be half a package.
if [ -e "$venv" ] && [ "$version" != "$kept" ]; then
  case $(basename "$venv") in
    .venv*) ;;
    *) [ -f "$venv/pyvenv.cfg" ] || fail "$venv exists and is no virtual environment; it was left alone" ;;
  esac
  echo "install: $venv is incomplete or stale, making it anew"
  rm -rf "$venv"
fi
rm -f "$stamp"

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
kernels=impala_jax/kernels/_kernels*.cpython-${version/./}-*.so
rm -f $kernels
"${install[@]}" --no-deps --no-build-isolation --editable .
compgen -G "$kernels" >/dev/null ||
  echo "install: the CPU kernels were not compiled, so convolutions take several times as long; install g++, then: make clean-venv install"
fingerprint >"$stamp.partial"
mv "$stamp.partial" "$stamp"
echo "install: $venv is complete"
