# SPDX-License-Identifier: Apache-2.0
"""Plans on a GPU without XLA: through the driver, in memory that is NaN and guarded.

What a kernel does wrong shows here first, and compute-sanitizer has nothing else to look at.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from jaxwin import _cuda, _ffi
from jaxwin._problem import Problem

LIBRARY = "libcuda.so.1"
_GUARD = 4096  # bytes on both sides


class DriverError(RuntimeError):
    """The driver's own words; after most of them this process is done with the GPU."""


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL(LIBRARY)
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(library, library.cuInit(0))
    _check(library, library.cuDeviceGet(ctypes.byref(device), 0))
    _check(library, library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    _check(library, library.cuCtxSetCurrent(context))
    return library


def _check(library: Any, code: int) -> None:
    if code != 0:
        text = ctypes.c_char_p()
        library.cuGetErrorName(code, ctypes.byref(text))
        raise DriverError((text.value or b"an unknown error").decode())


def _call(name: str, *arguments: Any) -> None:
    library = _driver()
    _check(library, getattr(library, name)(*arguments))


class _Memory:
    """Bytes on the GPU between guards; all of them begin as 0xFF."""

    def __init__(self, count: int, values: np.ndarray | None = None) -> None:
        self._whole = np.full(count + 2 * _GUARD, 0xFF, np.uint8)
        if values is not None:
            self._whole[_GUARD : _GUARD + count] = values.ravel().view(np.uint8)
        self._pointer = ctypes.c_uint64()
        size = ctypes.c_size_t(self._whole.size)
        _call("cuMemAlloc_v2", ctypes.byref(self._pointer), size)
        _call("cuMemcpyHtoD_v2", self._pointer, ctypes.c_void_p(self._whole.ctypes.data), size)
        self.address = self._pointer.value + _GUARD

    def read(self) -> tuple[np.ndarray, bool]:
        """What is inside, and whether the guards are as they were."""
        size = ctypes.c_size_t(self._whole.size)
        _call("cuMemcpyDtoH_v2", ctypes.c_void_p(self._whole.ctypes.data), self._pointer, size)
        ends = self._whole[:_GUARD], self._whole[-_GUARD:]
        return self._whole[_GUARD:-_GUARD].copy(), all(bool((e == 0xFF).all()) for e in ends)

    def free(self) -> None:
        _call("cuMemFree_v2", self._pointer)


@functools.cache
def runtime() -> Any:
    """The native core's runtime, with the cache of kernels that programs use."""
    _driver()
    return _ffi.CudaRuntime([LIBRARY], _cuda.nvrtc_libraries(), _cuda.cache_folder())


def run(
    problem: Problem,
    lhs: np.ndarray,
    rhs: np.ndarray,
    algorithm: str,
    *,
    params: tuple[int, ...] = (),
    dtype: str = "float32",
) -> np.ndarray:
    """The result of a plan's launches; as `cuda_shim.run` gives it.

    Raises:
        DriverError: the GPU reports a fault.
        RuntimeError: the plan cannot be launched.
        AssertionError: a kernel wrote outside of its memory.
    """
    answer = _ffi.cuda_make_plan(problem.native(), algorithm, dtype, params=list(params))
    assert "plan" in answer, answer
    plan = answer["plan"]
    size = int(np.prod(problem.out_shape)) * lhs.itemsize
    memory = {
        "x": _Memory(lhs.nbytes, lhs),
        "w": _Memory(rhs.nbytes, rhs),
        "y": _Memory(size),
        "workspace": _Memory(max(plan["workspace_bytes"], 1)),
    }
    failure, text = runtime().run(
        problem.native(),
        plan["algorithm"],
        dtype,
        params=plan["params"],
        buffers={name: m.address for name, m in memory.items()},
    )
    if failure:
        raise RuntimeError(f"{failure}: {text}")
    _call("cuCtxSynchronize")
    result, _ = memory["y"].read()
    broken = [name for name, m in memory.items() if not m.read()[1]]
    for m in memory.values():
        m.free()
    assert not broken, f"a write outside of {', '.join(broken)}"
    return result.view(lhs.dtype).reshape(problem.out_shape)


# --- times of single kernels -----------------------------------------------------------------

_FILLER_BYTES = 1 << 30  # written before a kernel, so that no cache holds anything of its operands
_DRAWN = (1 << 20) + 7  # values that are drawn; larger operands repeat them


class _Plain:
    """Memory on the GPU with these values, or with zeros."""

    def __init__(self, size: int, values: np.ndarray | None = None) -> None:
        self._pointer = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(self._pointer), ctypes.c_size_t(size))
        self.address = self._pointer.value
        self._size = ctypes.c_size_t(size)
        if values is None:
            self.fill(0)
        else:
            data = ctypes.c_void_p(values.ctypes.data)
            _call("cuMemcpyHtoD_v2", self._pointer, data, self._size)

    def fill(self, byte: int) -> None:
        """Queues writing all of it."""
        _call("cuMemsetD8Async", self._pointer, ctypes.c_ubyte(byte), self._size, None)

    def free(self) -> None:
        _call("cuMemFree_v2", self._pointer)


def _normal(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    values = np.resize(rng.standard_normal(_DRAWN, np.float32), int(np.prod(shape)))
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def launch_times(
    problem: Problem,
    algorithm: str,
    params: tuple[int, ...] = (),
    *,
    dtype: str = "float32",
    rounds: int = 5,
) -> list[tuple[str, list[float]]]:
    """The kernels of a plan in their order, with microseconds between events around each alone.

    In front of each a large piece of memory is written: that empties the caches, and lasts longer
    than queueing the events and the kernel behind it.
    """
    _driver()
    plan = _ffi.cuda_make_plan(problem.native(), algorithm, dtype, params=list(params))["plan"]
    width = 4 if dtype == "float32" else 2
    rng = np.random.default_rng()
    drawn = {
        name: _normal(shape, dtype, rng)
        for name, shape in (("x", problem.lhs_shape), ("w", problem.rhs_shape))
    }
    sizes = {name: values.nbytes for name, values in drawn.items()}
    sizes |= {"y": int(np.prod(problem.out_shape)) * width, "workspace": plan["workspace_bytes"]}
    memory = {name: _Plain(max(size, 16), drawn.get(name)) for name, size in sizes.items()}
    filler = _Plain(_FILLER_BYTES)
    buffers = {name: m.address for name, m in memory.items()}
    launches = _ffi.cuda_launches(
        problem.native(), plan["algorithm"], dtype, False, plan["params"], buffers
    )
    begin, end, stream = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    for event in (begin, end):
        _call("cuEventCreate", ctypes.byref(event), 0)
    times: list[list[float]] = [[] for _ in launches]
    for turn in range(rounds + 1):  # the first one loads the kernels
        for only in range(len(launches)):
            filler.fill(turn)
            _call("cuEventRecord", begin, stream)
            failure, text = runtime().run(
                problem.native(),
                plan["algorithm"],
                dtype,
                params=plan["params"],
                buffers=buffers,
                only=only,
            )
            if failure:
                raise RuntimeError(f"{failure}: {text}")
            _call("cuEventRecord", end, stream)
            _call("cuEventSynchronize", end)
            taken = ctypes.c_float()
            _call("cuEventElapsedTime", ctypes.byref(taken), begin, end)
            if turn > 0:
                times[only].append(1e3 * taken.value)
    for event in (begin, end):
        _call("cuEventDestroy_v2", event)
    for m in (filler, *memory.values()):
        m.free()
    return [(launch["kernel"], us) for launch, us in zip(launches, times, strict=True)]
