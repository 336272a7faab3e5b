#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# setup_env.sh EXTRA: create .venv in the checkout and install jaxwin with that extra, editable.
# Checks first what the build needs; what is missing is said in one line. Called by the Makefile.
# PYTHON and CXX choose an interpreter and a compiler.
set -eu
cd "$(dirname "$0")/.."
extra=${1:?usage: setup_env.sh EXTRA}
say() { printf 'setup: %s\n' "$*"; }
stop() {
    printf 'setup: %s\n' "$*" >&2
    exit 2
}

case $(uname -m) in
x86_64 | amd64 | AMD64) ;;
*) stop "the CPU must be x86-64, this one is $(uname -m)" ;;
esac

# "usable", or what is wrong with it.
python_state() {
    "$1" - 2>/dev/null <<'PY' || printf 'does not run'
import os, sys, sysconfig
if not (3, 11) <= sys.version_info < (3, 15):
    print("is Python %d.%d" % sys.version_info[:2], end="")
    raise SystemExit
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("has no Python.h (Debian: apt install python3-dev)", end="")
    raise SystemExit
try:
    import ensurepip, venv
except ImportError:
    print("has no venv module (Debian: apt install python3-venv)", end="")
    raise SystemExit
print("usable", end="")
PY
}

python=
problems=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if ! command -v "$candidate" >/dev/null 2>&1; then
        [ -z "${PYTHON:-}" ] || problems="; PYTHON=$candidate is not there"
        continue
    fi
    state=$(python_state "$candidate")
    if [ "$state" = usable ]; then
        python=$candidate
        break
    fi
    problems="$problems; $candidate ${state:-is not Python}"
done
[ -n "$python" ] || stop "Python 3.11 to 3.14 is needed and none was found${problems}"

compiles() { # CXX may be a command with flags, so it is split into words
    $1 -std=c++17 -fsyntax-only -x c++ - >/dev/null 2>&1 <<'CC'
#include <optional>
#if defined(__clang__) ? __clang_major__ < 10 : __GNUC__ < 9
#error too old
#endif
CC
}

if [ -n "${CXX:-}" ]; then
    compiles "$CXX" || stop "CXX=$CXX is not a C++17 compiler (g++ 9 or clang++ 10, or newer)"
else
    for candidate in c++ g++ clang++; do
        if compiles "$candidate"; then
            CXX=$candidate
            break
        fi
    done
    [ -n "${CXX:-}" ] ||
        stop "a C++17 compiler is needed: g++ 9 or clang++ 10, or newer (Debian: apt install g++)"
fi
export CXX

version='import sys; print("%d.%d" % sys.version_info[:2])'
if [ -n "${PYTHON:-}" ] && [ -x .venv/bin/python ] &&
    [ "$(.venv/bin/python -c "$version")" != "$("$python" -c "$version")" ]; then
    stop ".venv was made with another Python than PYTHON=$PYTHON: make clean first"
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv || stop "could not create .venv"
fi
say "installing jaxwin[$extra] into .venv (the first time it compiles the native kernels: minutes)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extra]" ||
    stop "pip could not install jaxwin[$extra]; its messages are above"
