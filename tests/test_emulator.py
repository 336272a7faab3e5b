# SPDX-License-Identifier: Apache-2.0
"""The AVX-512 emulator computes, and sees an access outside a buffer."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulator import EmulationError, Emulator, bochs, guarded

try:
    bochs()
except ImportError as error:
    pytest.skip(f"bochscpu-python: {error}", allow_module_level=True)

_SOURCE = """
#include <immintrin.h>
/* c[i] += a[i] * b[i], i < n: whole vectors, then a masked tail. */
void axpy(const float *a, const float *b, float *c, long n) {
  for (long i = 0; i < n; i += 16) {
    __mmask16 m = n - i >= 16 ? 0xFFFF : (__mmask16)((1u << (n - i)) - 1);
    __m512 x = _mm512_maskz_loadu_ps(m, a + i), y = _mm512_maskz_loadu_ps(m, b + i);
    _mm512_mask_storeu_ps(c + i, m, _mm512_fmadd_ps(x, y, _mm512_maskz_loadu_ps(m, c + i)));
  }
}
/* The same, but it forgets the tail's mask. */
void careless(const float *a, const float *b, float *c, long n) {
  for (long i = 0; i < n; i += 16)
    _mm512_storeu_ps(c + i, _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i),
                                            _mm512_loadu_ps(c + i)));
}
long eight(long a, long b, long c, long d, long e, long f, long g, long h) {
  return a + 10 * (b + 10 * (c + 10 * (d + 10 * (e + 10 * (f + 10 * (g + 10 * h))))));
}
long through(const float *const *rows) { return (long)rows[1][2]; }
void clear(char *a, long n) { for (long i = 0; i < n; ++i) a[i] = 0; }
long counter;
long count(void) { return ++counter; }
long before(const long *a) { return a[-1]; }
void undefined(void) { __builtin_trap(); }
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "code.c").write_text(_SOURCE)
    command = "cc -O3 -mavx512f -shared -fPIC -Wl,-z,now -o code.so code.c"
    subprocess.run(command.split(), cwd=folder, check=True)
    return folder / "code.so"


@pytest.fixture(scope="module")
def library(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def emulator(path: Path, library: ctypes.CDLL):
    with Emulator(path) as result:
        yield result


def _vectors(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    return [guarded(rng.standard_normal(n, np.float32)) for _ in range(3)]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 5000])
def test_computes_as_the_formula_says(emulator, library, n: int) -> None:
    a, b, c = _vectors(n)
    # float64 holds the product exactly; the sum's second rounding is harmless for these values
    expected = (a.astype(np.float64) * b + c).astype(np.float32)
    emulator.call(library.axpy, a, b, c, n)
    np.testing.assert_array_equal(c, expected)


def test_reports_an_overrun(emulator, library) -> None:
    a, b, c = _vectors(19)
    with pytest.raises(EmulationError, match="page fault at address 0x") as error:
        emulator.call(library.careless, a, b, c, 19)
    assert any(f"{v.ctypes.data + v.nbytes:#x}" in str(error.value) for v in (a, b, c))
    a, b, c = _vectors(19)
    emulator.call(library.axpy, a, b, c, 19)  # and works again


def test_reports_an_underrun(emulator, library) -> None:
    array = guarded(np.arange(4), front=True)
    with pytest.raises(EmulationError, match=f"{array.ctypes.data - 8:#x}"):
        emulator.call(library.before, array)


def test_reports_a_buffer_it_was_not_given(emulator, library) -> None:
    row = guarded(np.arange(4, dtype=np.float32))
    rows = np.array([0, row.ctypes.data], np.uint64)
    with pytest.raises(EmulationError, match="page fault"):
        emulator.call(library.through, rows)
    assert emulator.call(library.through, rows, buffers=[row]) == 2


def test_reports_a_bad_instruction(emulator, library) -> None:
    with pytest.raises(EmulationError, match="invalid opcode"):
        emulator.call(library.undefined)


def test_passes_arguments_on_the_stack(emulator, library) -> None:
    assert emulator.call(library.eight, 1, 2, 3, 4, 5, 6, 7, 8) == 87654321


def test_sees_the_libraries_data_and_the_c_library(emulator, library) -> None:
    assert emulator.call(library.count) + 1 == emulator.call(library.count)
    array = guarded(np.full(10_000, 7, np.uint8))
    emulator.call(library.clear, array, array.size)  # compiled to memset
    assert not array.any()
