# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels' own source on the CPU, launch by launch as the native core plans them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxwin import _ffi
from jaxwin._problem import Problem

_ARGS = {
    "jaxwin_sum": "SumArgs",
    "jaxwin_pack": "PackArgs",
    "jaxwin_window": "WindowArgs",
}
_MAIN = """
#include "shim.h"
{source}
extern "C" const char* run(const void* args, int blocks, int threads, int shared_bytes) {{
  _mm_setcsr(_mm_getcsr() | 0x8040U);
  jaxwin::cuda::{args} a;
  std::memcpy(&a, args, sizeof(a));
  shim::problem[0] = 0;
  for (int b = 0; b < blocks && shim::problem[0] == 0; ++b) {{
    blockIdx.x = static_cast<unsigned>(b);
    shim::run_block(threads, shared_bytes, [&] {{ jaxwin::cuda::{kernel}(a); }});
  }}
  return shim::problem;
}}
"""


@functools.cache
def _compiler() -> tuple[str, ...]:
    """The command, without files. The shim's header is compiled once, which halves the time."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    fma = ["-mfma"] if "fma" in Path("/proc/cpuinfo").read_text().split() else []
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", *fma]
    header = _folder() / "shim.h"
    shutil.copy(Path(__file__).with_name("shim.h"), header)
    command = [compiler, *flags, "-x", "c++-header", str(header), "-o", f"{header}.gch"]
    subprocess.run(command, capture_output=True, check=False)  # without it all works, too
    return compiler, *flags, f"-I{_folder()}"


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="jaxwin_shim_"))


def cleanup() -> None:
    """Removes what was compiled."""
    if _folder.cache_info().currsize:
        shutil.rmtree(_folder(), ignore_errors=True)
        _folder.cache_clear()
        _compiler.cache_clear()
        _kernel.cache_clear()


@functools.cache
def _kernel(kernel: str, source: str, options: tuple[str, ...]) -> Any:
    text = _MAIN.format(
        source=_ffi.cuda_source(source), kernel=kernel, args=_ARGS.get(kernel, "ConvArgs")
    )
    name = hashlib.sha256(" ".join((kernel, *options)).encode()).hexdigest()[:16]
    file, library = _folder() / f"{name}.cc", _folder() / f"{name}.so"
    file.write_text(text)
    command = [*_compiler(), "-shared", *options, "-o", str(library), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]
    function = ctypes.CDLL(str(library)).run
    function.restype = ctypes.c_char_p
    return function


_GUARD = 64  # elements; x and w are followed by more of them than a vector has


def _guarded(values: np.ndarray | None, count: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """An aligned array between guards, which are NaN; and the whole of it."""
    whole = np.empty(count + 2 * _GUARD + 64, dtype)
    whole.view(np.uint8)[:] = 0xFF
    skip = (-whole.ctypes.data % 256) // whole.itemsize
    inner = whole[skip + _GUARD : skip + _GUARD + count]
    if values is not None:
        inner[:] = values.ravel()
    return inner, whole


def run(
    problem: Problem,
    lhs: np.ndarray,
    rhs: np.ndarray,
    algorithm: str,
    *,
    params: tuple[int, ...] = (),
    dtype: str = "float32",
    wide_result: bool = False,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    activation: int = 0,
) -> np.ndarray:
    """The result of a plan's launches; result and workspace begin as NaN.

    lhs, rhs, bias, residual: float32, or uint16 with the bits of the narrower dtype. wide_result:
    float32 comes of these.
    """
    answer = _ffi.cuda_make_plan(
        problem.native(), algorithm, dtype, wide_result, params=list(params)
    )
    assert "plan" in answer, answer
    plan = answer["plan"]
    element = lhs.dtype
    arrays = {
        "x": _guarded(lhs, lhs.size, element),
        "w": _guarded(rhs, rhs.size, element),
        "y": _guarded(
            None, int(np.prod(problem.out_shape)), np.float32 if wide_result else element
        ),
        "workspace": _guarded(None, -(-plan["workspace_bytes"] // 4), np.float32),
    }
    for name, values in (("bias", bias), ("residual", residual)):
        if values is not None:
            arrays[name] = _guarded(values, values.size, element)
    buffers: dict[str, int] = {name: inner.ctypes.data for name, (inner, _) in arrays.items()}
    if plan["workspace_bytes"] == 0:
        del buffers["workspace"]
    launches = _ffi.cuda_launches(
        problem.native(),
        plan["algorithm"],
        dtype,
        wide_result,
        plan["params"],
        {**buffers, "activation": activation},
    )
    for launch in launches:
        function = _kernel(launch["kernel"], launch["source"], tuple(launch["options"]))
        wrong = function(
            launch["args"], launch["blocks"], launch["threads"], launch["shared_bytes"]
        )
        assert not wrong, wrong
    for name, (inner, whole) in arrays.items():
        first = (inner.ctypes.data - whole.ctypes.data) // whole.itemsize
        around = np.concatenate([whole[:first], whole[first + inner.size :]])
        assert (around.view(np.uint8) == 0xFF).all(), f"{name}: overrun"
    return arrays["y"][0].reshape(problem.out_shape).copy()
