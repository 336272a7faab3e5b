#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# sanitize.sh [TEST...]: the native core under AddressSanitizer and UndefinedBehaviorSanitizer, in
# its own build folder; runs the conformance tests, or those that are named.
# Needs .venv with the extra "dev" (make lint sets it up).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
build=$PWD/build/sanitize
cxx=${CXX:-c++}
[ $# -gt 0 ] || set -- tests/test_conformance.py tests/test_faults.py

.venv/bin/cmake -S ffi -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
    -DCMAKE_CXX_COMPILER="$cxx" -DPython_EXECUTABLE="$python" \
    -DJAXWIN_SANITIZE=address,undefined >/dev/null
.venv/bin/ninja -C "$build" --quiet _ffi

# The package as links, with this build's extension. -S leaves the editable install out, whose
# import hook would take the other one.
rm -rf "$build/site"
mkdir -p "$build/site/jaxwin"
ln -s "$PWD"/jaxwin/* "$build/site/jaxwin/"
ln -sfn "$PWD/tuner" "$build/site/jaxwin/tuner"
rm -f "$build"/site/jaxwin/_ffi*.so
ln -s "$build"/_ffi*.so "$build/site/jaxwin/"
PYTHONPATH=$build/site:$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH

# Python is not instrumented, so the runtime must be there before it. It leaks on purpose.
runtime=$("$cxx" -print-file-name=libasan.so)
[ -e "$runtime" ] || runtime=$("$cxx" -print-file-name=libclang_rt.asan-x86_64.so)
export LD_PRELOAD=$runtime
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
"$python" -S - <<'PY'
import pathlib
from jaxwin import _ffi
assert "/build/sanitize/" in _ffi.__file__, _ffi.__file__
assert "asan" in pathlib.Path("/proc/self/maps").read_text()
PY
"$python" -S -m pytest -q -p no:cacheprovider "$@"
