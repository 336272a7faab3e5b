#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# sanitize.sh [PYTEST ARGUMENT...]: the native core under AddressSanitizer and
# UndefinedBehaviorSanitizer, in its own build folder; runs the tests below, or what the arguments
# name. Needs g++ (CXX chooses another one) and .venv with the extra "dev" (make lint sets it up).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
build=$PWD/build/sanitize
cxx=${CXX:-g++}
[ $# -gt 0 ] || set -- tests/test_conformance.py tests/test_faults.py \
    tests/test_memory.py tests/test_numerics.py tests/test_conv.py::test_values \
    tests/test_conv.py::test_activation_over_its_whole_range \
    tests/test_batch_norm.py::test_passes_by_channel_have_the_same_bits_everywhere \
    tests/test_batch_norm.py::test_an_edited_call_is_refused \
    tests/test_batch_norm.py::test_calls_for_other_machines_and_without_rows

# Python is not instrumented, so the runtime must be there before it; and libstdc++ with it, since
# the runtime looks up at once what a C++ exception needs.
runtime=$($cxx -print-file-name=libasan.so)
[ -e "$runtime" ] || {
    echo "sanitize: $cxx has no libasan.so; set CXX to a g++ that has it" >&2
    exit 2
}
runtime="$runtime $($cxx -print-file-name=libstdc++.so)"

CXX=$cxx .venv/bin/cmake -S ffi -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
    -DPython_EXECUTABLE="$python" -DJAXWIN_SANITIZE=address,undefined >/dev/null
.venv/bin/ninja -C "$build" --quiet _ffi

# The package as links, with this build's extension. -S leaves the editable install out, whose
# import hook would take the other one, and -P the checkout itself.
rm -rf "$build/site"
mkdir -p "$build/site/jaxwin"
ln -s "$PWD"/jaxwin/* "$build/site/jaxwin/"
ln -sfn "$PWD/tuner" "$build/site/jaxwin/tuner"
rm -f "$build"/site/jaxwin/_ffi*.so
ln -s "$build"/_ffi*.so "$build/site/jaxwin/"
PYTHONPATH=$build/site:$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# Python and XLA leak on purpose. A report ends in an abort; there, and at a fault, pytest prints the
# line of the test (with -v its name too). --capture=sys: the report goes to the terminal, not to a
# file that dies with the process.
export PYTHONPATH JAXWIN_SANITIZED=1
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:handle_segv=0
export UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1
sanitized() { LD_PRELOAD=$runtime "$python" -P -S "$@"; }
sanitized - <<'PY'
import pathlib
from jaxwin import _ffi
assert "/build/sanitize/" in _ffi.__file__, _ffi.__file__
for runtime in "libasan", "libubsan":
    assert runtime in pathlib.Path("/proc/self/maps").read_text(), runtime
print("sanitize: testing", _ffi.__file__)
PY
sanitized -m pytest -q -p no:cacheprovider --capture=sys "$@"
