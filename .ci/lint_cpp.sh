#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# lint_cpp.sh: clang-format over ffi/, then clang-tidy over everything but the micro-kernels.
# Needs .venv with the extra "dev". Called by make lint.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
build=build/lint

mapfile -t files < <(find ffi -name '*.cc' -o -name '*.h' -o -name '*.cuh' | sort)
"$bin/clang-format" --version
"$bin/clang-format" --dry-run -Werror "${files[@]}"

# clang-tidy reads the compiler's flags from compile_commands.json; nothing is built.
"$bin/cmake" -S ffi -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
    -DPython_EXECUTABLE="$bin/python" >/dev/null
"$bin/clang-tidy" --version | grep version
find ffi -name '*.cc' -not -path 'ffi/kernels/*' | sort |
    timeout 600 xargs -P "$(nproc)" -n 1 "$bin/clang-tidy" -p "$build" --quiet 2> >(grep -v 'warnings generated' >&2)
echo "C++ lint: ${#files[@]} files are fine"
