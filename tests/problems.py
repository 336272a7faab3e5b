# SPDX-License-Identifier: Apache-2.0
"""Problems drawn at random, and runs of plans in poisoned, guarded buffers."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

import numpy as np

from jaxwin import _ffi, _registry
from jaxwin._problem import Problem

LAYOUTS = {
    1: [("NWC", "WIO"), ("NCW", "OIW"), ("CWN", "IWO"), ("NCW", "WIO")],
    2: [("NHWC", "HWIO"), ("NCHW", "OIHW"), ("CHWN", "IHWO"), ("NHWC", "OHWI"), ("HWNC", "HWOI")],
    # The last: CHWN8, whose blocks are a depth.
    3: [("NDHWC", "DHWIO"), ("NCDHW", "OIDHW"), ("CDHWN", "IDHWO"), ("DCHWN", "DHWIO")],
}


def _spec(text: str, first: str, second: str) -> tuple[int, ...]:
    spatial = [i for i, letter in enumerate(text) if letter not in (first, second)]
    return (text.index(first), text.index(second), *spatial)


def make(
    n: int,
    c: int,
    k: int,
    size: tuple[int, ...],
    window: tuple[int, ...],
    *,
    stride: tuple[int, ...] | None = None,
    padding: tuple[tuple[int, int], ...] | None = None,
    lhs_dilation: tuple[int, ...] | None = None,
    rhs_dilation: tuple[int, ...] | None = None,
    groups: int = 1,
    batch_groups: int = 1,
    reversal: tuple[bool, ...] = (),
    layout: tuple[str, str] | None = None,
    out_layout: str | None = None,
    dtype: str = "float32",
    out_dtype: str = "",
) -> Problem | None:
    """The problem, or None where its result would be empty. c: of lhs; k: of rhs."""
    rank = len(size)
    ones = (1,) * rank
    stride, lhs_dilation, rhs_dilation = stride or ones, lhs_dilation or ones, rhs_dilation or ones
    padding = padding or ((0, 0),) * rank
    lhs, rhs = layout or LAYOUTS[rank][0]
    out = out_layout or lhs
    spatial = []
    for d in range(rank):
        extent = (size[d] - 1) * lhs_dilation[d] + 1 + sum(padding[d])
        span = (window[d] - 1) * rhs_dilation[d] + 1
        if extent < span:
            return None
        spatial.append((extent - span) // stride[d] + 1)
    lhs_spec, rhs_spec, out_spec = (
        _spec(lhs, "N", "C"),
        _spec(rhs, "O", "I"),
        _spec(out, "N", "C"),
    )

    def store(spec: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
        shape = [0] * len(spec)
        for dimension, value in zip(spec, sizes, strict=True):
            shape[dimension] = value
        return tuple(shape)

    return Problem(
        lhs_shape=store(lhs_spec, (n, c, *size)),
        rhs_shape=store(rhs_spec, (k, c // groups, *window)),
        out_shape=store(out_spec, (n // batch_groups, k, *spatial)),
        lhs_spec=lhs_spec,
        rhs_spec=rhs_spec,
        out_spec=out_spec,
        window_strides=stride,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_group_count=groups,
        batch_group_count=batch_groups,
        rhs_reversal=reversal,
        lhs_dtype=dtype,
        rhs_dtype=dtype,
        out_dtype=out_dtype or dtype,
    )


def draw(
    rng: np.random.Generator,
    kind: str | None = None,
    dtype: str = "float32",
    out_dtype: str = "",
) -> Problem:
    """A small random problem. kind: "any", or one that a certain algorithm is made for."""
    while True:
        pick = kind or "any"
        tiled = pick in ("winograd", "sfc")
        rank = 2 if tiled else int(rng.choice([1, 2, 2, 2, 3]))

        def ints(low: int, high: int, rank: int = rank) -> tuple[int, ...]:
            return tuple(int(v) for v in rng.integers(low, high + 1, rank))

        limit = {1: 40, 2: 14, 3: 6}[rank]
        size = ints(1, limit)
        window = ints(1, {1: 9, 2: 5, 3: 3}[rank])
        stride = ints(1, 3) if rng.random() < 0.5 else (1,) * rank
        rdil = ints(1, 3) if rng.random() < 0.3 else (1,) * rank
        ldil = ints(1, 3) if rng.random() < 0.3 or pick == "segregated" else (1,) * rank
        padding = tuple((int(a), int(b)) for a, b in zip(ints(-1, 4), ints(-1, 4), strict=True))
        if pick == "direct" or rng.random() < 0.2:
            padding = ((0, 0),) * rank
        n, c, k = int(rng.integers(1, 4)), int(rng.integers(1, 20)), int(rng.integers(1, 40))
        lhs, rhs = LAYOUTS[rank][int(rng.integers(len(LAYOUTS[rank])))]
        if lhs.endswith("N"):  # images are lanes
            n = int(rng.integers(1, 20))
        groups = batch_groups = 1
        if pick in ("depthwise", "grouped") or rng.random() < 0.3:
            groups = int(rng.choice([2, 3, 5, 8, 17]))
            per_group = 1 if pick == "depthwise" else int(rng.integers(1, 6))
            multiple = int(rng.integers(1, 5))
            if rng.random() < 0.3:
                batch_groups, groups = groups, 1
                n, k, c = batch_groups * int(rng.integers(1, 3)), batch_groups * multiple, per_group
            else:
                c, k = groups * per_group, groups * multiple
        if pick == "weight_grad" or rng.random() < 0.25:
            # what a weight gradient looks like: a window of almost the input's size
            window = tuple(max(1, s - int(d)) for s, d in zip(size, ints(0, 2), strict=True))
            stride, rdil = (1,) * rank, stride
            padding = tuple((int(a), int(b)) for a, b in zip(ints(-1, 2), ints(-1, 2), strict=True))
            if rank == 3 and rng.random() < 0.5:  # a depth that is only summed over
                window, padding = (size[0], *window[1:]), ((0, 0), *padding[1:])
                ldil, rdil = (1, *ldil[1:]), (1, *rdil[1:])
        if tiled:
            window, stride, rdil, ldil, batch_groups = (3, 3), (1, 1), (1, 1), (1, 1), 1
        out = LAYOUTS[rank][int(rng.integers(len(LAYOUTS[rank])))][0]
        problem = make(
            n,
            c,
            k,
            size,
            window,
            stride=stride,
            padding=padding,
            lhs_dilation=ldil,
            rhs_dilation=rdil,
            groups=groups,
            batch_groups=batch_groups,
            reversal=tuple(bool(v) for v in ints(0, 1)) if rng.random() < 0.2 else (),
            layout=(lhs, rhs),
            out_layout=out if rng.random() < 0.3 else lhs,
            dtype=dtype,
            out_dtype=out_dtype,
        )
        if problem is not None and 0 < problem.flops < 4e6:
            return problem


def operands(problem: Problem, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random operands of a problem."""
    return (
        values(rng, problem.lhs_shape, problem.lhs_dtype),
        values(rng, problem.rhs_shape, problem.rhs_dtype),
    )


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Random values: normal, or all integers that the dtype holds."""
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return rng.standard_normal(shape).astype(dtype)


_GUARD = 256
_CANARY = 0xA5


def _bits(array: np.ndarray) -> np.dtype:
    """What stands for an array's dtype where nobody knows bfloat16."""
    return np.dtype(f"uint{8 * array.itemsize}")


def comparable(array: np.ndarray) -> np.ndarray:
    """Equal values in which NumPy finds NaN: in bfloat16 it takes them for different from all."""
    return array.astype(np.float32) if array.dtype == "bfloat16" else array


# So many bytes of memory, and a question whether what lies around them is still as it was.
_Guarded = tuple[np.ndarray, Callable[[], bool]]


def _between_canaries(count: int) -> _Guarded:
    whole = np.full(count + 2 * _GUARD, _CANARY, np.uint8)
    ends = whole[:_GUARD], whole[_GUARD + count :]
    return whole[_GUARD : _GUARD + count], lambda: all((end == _CANARY).all() for end in ends)


def _on_the_heap(count: int) -> _Guarded:
    """For AddressSanitizer, whose own guards are at both ends."""
    return np.empty(count, np.uint8), lambda: True


def _before_a_closed_page(count: int) -> _Guarded:
    """A step behind the end is a fault. AddressSanitizer does not see those of masked vectors."""
    size = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    closed = ctypes.c_void_p(whole.ctypes.data + size)
    assert ctypes.CDLL(None).mprotect(closed, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    slack = size - count
    whole[:slack] = _CANARY
    return whole[slack:size], lambda: bool((whole[:slack] == _CANARY).all())


_MEMORIES = (
    [_on_the_heap, _before_a_closed_page]
    if os.environ.get("JAXWIN_SANITIZED")  # .ci/sanitize.sh
    else [_between_canaries]
)


def run(
    problem: Problem,
    lhs: np.ndarray,
    rhs: np.ndarray,
    algorithm: str,
    *,
    isa: str = "",
    threads: int = 1,
    params: tuple[int, ...] = (),
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    activation: str = "none",
) -> np.ndarray:
    """Runs a plan outside XLA, all arrays guarded; result and workspace begin as NaN (all ones)."""
    answer = _ffi.make_plan(
        problem.native(), algorithm=algorithm, isa=isa, threads=threads, params=list(params)
    )
    assert "plan" in answer, answer
    plan = answer["plan"]

    def run_in(memory: Callable[[int], _Guarded]) -> np.ndarray:
        guards = []

        def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            memory_, intact = memory(int(np.prod(shape)) * np.dtype(dtype).itemsize)
            memory_[:] = 0xFF
            guards.append(intact)
            return memory_.view(dtype).reshape(shape)

        def guarded(values: np.ndarray) -> np.ndarray:
            array = poisoned(values.shape, values.dtype)
            array[...] = values
            return array

        y = poisoned(problem.out_shape, problem.out_dtype)
        wrong = _ffi.run(
            problem.native(),
            plan["algorithm"],
            plan["isa"],
            threads,
            plan["params"],
            *(guarded(operand).view(_bits(operand)) for operand in (lhs, rhs)),
            y.view(_bits(y)),
            poisoned((plan["workspace_bytes"],), "uint8"),
            *(v if v is None else guarded(v).view(_bits(v)) for v in (bias, residual)),
            _registry.registry()["activations"].index(activation),
        )
        assert not wrong, wrong
        assert all(intact() for intact in guards), "overrun"
        return y

    first, *others = [run_in(memory) for memory in _MEMORIES]
    for other in others:
        np.testing.assert_array_equal(comparable(other), comparable(first))
    return first
