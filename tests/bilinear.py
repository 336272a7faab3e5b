# SPDX-License-Identifier: Apache-2.0
"""Bilinear algorithms for 3x3 windows, from their definitions: what the kernels must amount to.

Results y of a tile are A ((G w) * (B x)), with one row of G and B, and one column of A, for each
product. G and B follow from the definition; that an A exists is what makes an algorithm of them,
and least squares finds it.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bilinear:
    """A: (results, products), G: (products, 9), B: (products, inputs); tiles are square."""

    A: np.ndarray
    G: np.ndarray
    B: np.ndarray

    @property
    def products(self) -> int:
        return len(self.G)

    @property
    def growth(self) -> float:
        """How large the absolute values of everything that is added up can be.

        Relative to max |x| times the sum of |w|.
        """
        absolute = np.abs(self.A) @ (np.abs(self.B).sum(1) * np.abs(self.G).max(1))
        return float(absolute.max())


def correlation(out: int) -> np.ndarray:
    """The tensor of the convolution of a tile: [result, weight, input]."""
    size = out + 2
    tensor = np.zeros((out, out, 3, 3, size, size))
    for i, j, u, v in np.ndindex(out, out, 3, 3):
        tensor[i, j, u, v, i + u, j + v] = 1
    return tensor.reshape(out * out, 9, size * size)


def solved(G: np.ndarray, B: np.ndarray, out: int) -> Bilinear:
    """The algorithm with these factors; fails where there is none."""
    terms = np.einsum("pw,px->wxp", G, B).reshape(-1, len(G))
    wanted = correlation(out).reshape(out * out, -1).T
    A, *_ = np.linalg.lstsq(terms, wanted, rcond=None)
    assert np.abs(terms @ A - wanted).max() < 1e-11, "these products do not give the convolution"
    return Bilinear(A.T, G, B)


@functools.cache
def winograd(out: int) -> Bilinear:
    """F(out x out, 3x3) by Toom and Cook's interpolation at 0, 1, -1, (2, -2) and infinity."""
    points = {2: [0, 1, -1], 4: [0, 1, -1, 2, -2]}[out]
    size = out + 2
    # Of one dimension, transposed: a product of polynomials of degrees out - 1 and 2, interpolated.
    values = np.array([[float(p) ** i for i in range(size)] for p in points])
    values = np.vstack([values, np.eye(size)[-1]])
    weights = np.vstack([values[:-1, :3], np.eye(3)[-1]])
    # The same normalisation as the kernels': B is of integers.
    scale = np.array([np.prod([p - q for q in points if q != p]) for p in points] + [1.0])
    B = np.linalg.inv(values).T * scale[:, None]
    G = weights / scale[:, None]
    return solved(np.kron(G, G), np.kron(B, B), out)


@functools.cache
def sfc() -> Bilinear:
    """SFC-6(6x6, 3x3): frequencies of a cyclic correlation of length six, and corrections.

    A complex factor a + b s, s = exp(i pi / 3), takes the three products of a, b and a + b.
    """
    s = np.exp(1j * np.pi / 3)
    cyclic = np.zeros((6, 8), complex)  # x[6], x[1], ..., x[5]: the last six are periodic
    for k, n in np.ndindex(6, 6):
        cyclic[k, n if n else 6] = s ** (k * n)
    window = np.array([[s ** (-k * v) for v in range(3)] for k in range(6)])
    missing = np.zeros((2, 8), complex)
    missing[0, [0, 6]] = 1, -1
    missing[1, [7, 1]] = 1, -1
    inputs = np.vstack([cyclic, missing])  # the terms of one dimension
    weights = np.vstack([window, np.eye(3)[[0, 2]]])

    factors: list[tuple[np.ndarray, np.ndarray]] = []

    def parts(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        b = row.imag / s.imag
        return row.real - b * s.real, b

    conjugate = [0, 5, 4, 3, 2, 1, 6, 7]
    done = set()
    for i, j in np.ndindex(8, 8):
        if (conjugate[i], conjugate[j]) in done:
            continue
        done.add((i, j))
        x, w = np.kron(inputs[i], inputs[j]), np.kron(weights[i], weights[j])
        (xa, xb), (wa, wb) = parts(x), parts(w)
        if np.abs(xb).max() < 1e-12:
            factors.append((wa, xa))
        else:
            factors += [(wa, xa), (wb, xb), (wa + wb, xa + xb)]
    G, B = (np.array(rows) for rows in zip(*factors, strict=True))
    return solved(G, B, 6)
