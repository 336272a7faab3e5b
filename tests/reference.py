# SPDX-License-Identifier: Apache-2.0
"""Slow and obvious references: the numerical contract spelled out, and float64."""

from __future__ import annotations

import itertools

import numpy as np

from jaxwin._problem import Problem


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 or float64 with one rounding, elementwise.

    Float32: the product is exact in float64; the sum is rounded to odd there, so that the
    conversion to float32 rounds right. Float64: the product is two floats, and of the sum of three
    the lower two are rounded to odd (Boldo and Melquiond, 2008, sections 3 and 5). That needs
    values of usual size: no infinities, nothing near the ends of the exponents.
    """
    if a.dtype == np.float32:
        odd = _add_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))
        return odd.astype(np.float32)
    high, low = _two_product(a, b)
    upper, lowest = _two_sum(c, low)
    upper, middle = _two_sum(high, upper)
    return upper + _add_to_odd(lowest, middle)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd."""
    total, error = _two_sum(a, b)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + step, bits).view(np.float64)


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a * b as the sum of two floats (Dekker, Veltkamp)."""

    def split(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scaled = 134217729.0 * v
        high = scaled - (scaled - v)
        return high, v - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _canonical(problem: Problem, lhs: np.ndarray, rhs: np.ndarray):
    """lhs as [n, g, c, z, y, x], rhs as [g, k, c, z, y, x]; and the triples of parameters."""
    p = problem
    missing = 3 - p.spatial_rank
    x = np.transpose(lhs, p.lhs_spec)
    w = np.transpose(rhs, p.rhs_spec)
    w = np.flip(w, [2 + d for d, backwards in enumerate(p.rhs_reversal) if backwards])
    groups = max(p.feature_group_count, p.batch_group_count)
    ones = (1,) * missing
    x = x.reshape(x.shape[:2] + ones + x.shape[2:])
    w = w.reshape(w.shape[:2] + ones + w.shape[2:])
    if p.batch_group_count > 1:
        x = x.reshape((groups, x.shape[0] // groups, *x.shape[1:]))
        x = np.moveaxis(x, 0, 1)
    else:
        x = x.reshape((x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    w = w.reshape((groups, w.shape[0] // groups, *w.shape[1:]))
    stride = ones + p.window_strides
    low = (0,) * missing + tuple(pair[0] for pair in p.padding)
    ldil = ones + p.lhs_dilation
    rdil = ones + p.rhs_dilation
    out = ones + tuple(p.out_shape[d] for d in p.out_spec[2:])
    return x, w, stride, low, ldil, rdil, out


def _to_output(problem: Problem, y: np.ndarray) -> np.ndarray:
    """[n, g, k, z, y, x] to the stored layout of the result."""
    p = problem
    spatial = y.shape[6 - p.spatial_rank :]
    y = y.reshape((y.shape[0], y.shape[1] * y.shape[2], *spatial))
    result = np.empty(p.out_shape, y.dtype)
    np.transpose(result, p.out_spec)[...] = y
    return result


def chain(problem: Problem, lhs: np.ndarray, rhs: np.ndarray, piece: int = 0) -> np.ndarray:
    """The result bit for bit: one fma chain per element in canonical order.

    Order: window x, window y, window z, input channel; or, where problem.chunk_rows is not 0,
    chunks of so many (channel, z, y) rows of the window, each row along x, the chunks' sums added
    in order. Positions on padding multiply by zero; inserted zeros are no operands. Integers: the
    exact sum, of which the result has the low bits. piece: no chain is longer than that, and the
    pieces' sums are added in order; outside of the contract.
    """
    if lhs.dtype.kind in "iu":
        return _exact(problem, lhs, rhs)
    if lhs.dtype.itemsize < 4:  # widened exactly, rounded once
        wide = chain(problem, lhs.astype(np.float32), rhs.astype(np.float32))
        return wide.astype(problem.out_dtype)
    x, w, stride, low, ldil, rdil, out = _canonical(problem, lhs, rhs)
    n, g, c = x.shape[:3]
    k = w.shape[1]
    window = w.shape[3:]
    size = x.shape[3:]

    def step(acc: np.ndarray, tap: tuple[int, int, int], channel: int) -> np.ndarray:
        # Which outputs see a real input through this tap.
        selectors, sources = [], []
        for d in range(3):
            q = np.arange(out[d]) * stride[d] - low[d] + tap[d] * rdil[d]
            real = (q >= 0) & (q % ldil[d] == 0) & (q // ldil[d] < size[d])
            selectors.append(np.flatnonzero(real))
            sources.append(q[real] // ldil[d])
        if any(len(s) == 0 for s in selectors):
            return acc
        at = np.ix_(range(n), range(g), range(k), *selectors)
        taken = x[:, :, channel][np.ix_(range(n), range(g), *sources)][:, :, None]
        weight = w[:, :, channel, tap[0], tap[1], tap[2]][None, :, :, None, None, None]
        shape = (n, g, k, *(len(s) for s in selectors))
        acc[at] = fma(np.broadcast_to(taken, shape), np.broadcast_to(weight, shape), acc[at])
        return acc

    zeros = np.zeros((n, g, k, *out), lhs.dtype)
    if problem.chunk_rows == 0:
        acc, total = zeros.copy(), None
        sizes = (window[2], window[1], window[0], c)
        for i, (v, u, z, channel) in enumerate(itertools.product(*map(range, sizes))):
            if piece and i and i % piece == 0:
                total = acc if total is None else total + acc
                acc = zeros.copy()
            acc = step(acc, (z, u, v), channel)
        return _to_output(problem, acc if total is None else total + acc)
    # A depth that is only summed over comes first: images in blocks have the order of images.
    first = out[0] == 1 and window[0] == size[0] > 1 and low[0] == 0 and ldil[0] == rdil[0] == 1
    if first and not (problem.spatial_rank == 3 and problem.rhs_reversal[:1] == (True,)):
        rows = [(i, z, u) for z in range(window[0]) for i in range(c) for u in range(window[1])]
    else:
        rows = list(itertools.product(range(c), range(window[0]), range(window[1])))
    total = None
    for begin in range(0, len(rows), problem.chunk_rows):
        acc = zeros.copy()
        for channel, z, u in rows[begin : begin + problem.chunk_rows]:
            for v in range(window[2]):
                acc = step(acc, (z, u, v), channel)
        total = acc if total is None else total + acc
    return _to_output(problem, total)


def float64(problem: Problem, lhs: np.ndarray, rhs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The convolution in float64, and the same of the absolute values (for error bounds)."""
    magnitudes = (np.abs(v.astype(np.float64)) for v in (lhs, rhs))
    return _sums(problem, lhs, rhs, np.float64), _sums(problem, *magnitudes, np.float64)


def scale(problem: Problem, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """max |x| times the sum of |w| of each result's feature: what error bounds are multiples of."""
    sums = np.abs(rhs.astype(np.float64)).sum(tuple(problem.rhs_spec[1:]))
    shape = [1] * len(problem.out_shape)
    shape[problem.out_spec[1]] = -1
    return np.abs(lhs.astype(np.float64)).max(initial=0.0) * sums.reshape(shape)


def _exact(problem: Problem, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    return _sums(problem, lhs, rhs, np.int64).astype(problem.out_dtype)


def _sums(problem: Problem, lhs: np.ndarray, rhs: np.ndarray, dtype: type) -> np.ndarray:
    """The convolution in a wide type, in numpy's order."""
    x, w, stride, low, ldil, rdil, out = _canonical(problem, lhs, rhs)
    n, g = x.shape[:2]
    k = w.shape[1]
    size = x.shape[3:]
    y = np.zeros((n, g, k, *out), dtype)
    for tap in itertools.product(*(range(s) for s in w.shape[3:])):
        selectors, sources = [], []
        for d in range(3):
            q = np.arange(out[d]) * stride[d] - low[d] + tap[d] * rdil[d]
            real = (q >= 0) & (q % ldil[d] == 0) & (q // ldil[d] < size[d])
            selectors.append(np.flatnonzero(real))
            sources.append(q[real] // ldil[d])
        if any(len(s) == 0 for s in selectors):
            continue
        taken = x.astype(dtype)[np.ix_(range(n), range(g), range(x.shape[2]), *sources)]
        y[np.ix_(range(n), range(g), range(k), *selectors)] += np.einsum(
            "ngczyx,gkc->ngkzyx", taken, w.astype(dtype)[(..., *tap)]
        )
    return _to_output(problem, y)


def rounded(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Float32 values as a kernel is given them, and what they are worth there, in float32.

    Sixteen bits are given as uint16; float32 as it is, where it is worth what tf32 keeps.
    """
    bits = values.view(np.uint32)
    if dtype == "float32":
        return values, (bits + np.uint32(0x1000) & np.uint32(0xFFFFE000)).view(np.float32)
    if dtype == "float16":
        half = values.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float32)
    short = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return short, widened(short, dtype)


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """What `rounded` gave, or a kernel's result of its type, in float32."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.view(np.float16).astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)
