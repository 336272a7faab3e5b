# SPDX-License-Identifier: Apache-2.0
"""Every AVX-512 micro-kernel on an emulated CPU, in guarded buffers, at odd sizes.

Its bits must be those of the baseline kernels (and AVX2's, where this CPU has it), which run
natively, one vector and one row at a time. The emulator reports any access outside the buffers.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass, field
from typing import Any

import native
import numpy as np
import problems
import pytest
from emulator import Emulator, bochs, guarded

from jaxwin import _registry

try:
    bochs()
except ImportError as error:
    native.missing(f"bochscpu-python: {error}")

REGISTRY = _registry.registry()
ISAS = {row["name"]: row for row in REGISTRY["isas"]}
# The words of ffi/dtypes.h, and all its element types, by their numbers.
DTYPES = {"float32": 0, "float64": 1}
PAIRS = "int32"
WORDS = DTYPES | {PAIRS: 2}
ELEMENTS = [
    *("float32", "float64", "bfloat16", "float16", "int8", "uint8"),
    *("int16", "uint16", "int32", "uint32"),
]
TILES = [(mr, nv) for most, nv in ISAS["avx512"]["tiles"] for mr in range(1, most + 1)]
REFERENCES = [name for name in ("baseline", "avx2") if ISAS[name]["runnable"]]
# Types of arrays whose elements kernels with channels as lanes read, and of results they store.
LANES = ISAS["avx512"]["lanes"]
STORED = {
    "float32": ["float32", "bfloat16", "float16", "int32"],
    "float64": ["float64"],
    "bfloat16": ["float32", "bfloat16"],
    "float16": ["float32", "float16"],
    "int8": ["float32", "int32"],
    "uint8": ["float32", "int32"],
}
# Store of ffi/kernels/kernels.h; bfloat16 by the CPU is beyond the emulator, see test_dtypes.py.
STORES = {"float32": 1, "float64": 1, "bfloat16": 2, "float16": 4, "int32": 5}
_CANARY = 1.2345e30


def _width(isa: str, dtype: str) -> int:
    return ISAS[isa]["width"] * 4 // np.dtype(dtype).itemsize


_POINTERS = ("a", "b", "c", "runs")
_NUMBERS = (
    "n_runs",
    "a_row",
    "a_step",
    "b_step",
    "c_row",
    "cols",
    "load",
    "add",
    "stream",
    "blocks",
    "b_block",
)


class GemmArgs(ctypes.Structure):
    """GemmArgs of ffi/kernels/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("table", ctypes.c_void_p),
        ("table_row", ctypes.c_int64),
        ("zeros", ctypes.c_void_p),
        ("ahead", ctypes.c_void_p),
        ("ahead_step", ctypes.c_int64),
        ("result", ctypes.c_int64),
    ]


class SweepArgs(ctypes.Structure):
    """SweepArgs of ffi/kernels/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "y", "runs")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "n_runs",
                "n",
                "cols",
                "x_row",
                "x_col",
                "q_begin",
                "q_end",
                "w_col",
                "w_block",
                "y_row",
                "y_col",
                "row_step",
                "rows",
                "border",
                "in_cols",
                "channels",
                "span",
            )
        ),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first", "features")),
        ("zeros", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("result", "follow")),
    ]


class WindowArgs(ctypes.Structure):
    """WindowArgs of ffi/kernels/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "y")),
        *(
            (name, ctypes.c_int64)
            for name in ("cols", "x_row", "x_col", "y_row", "y_col", "rows", "edges", "result")
        ),
    ]


class TransformArgs(ctypes.Structure):
    """TransformArgs of ffi/kernels/transforms.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("src", "dst")),
        *((name, ctypes.c_int64) for name in ("src_row", "src_col", "dst_row", "dst_col", "cols")),
    ]


class EpilogueArgs(ctypes.Structure):
    """EpilogueArgs of ffi/kernels/kernels.h."""

    _fields_ = [
        ("c", ctypes.c_void_p),
        ("c_row", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("bias_row", ctypes.c_int64),
        ("bias_col", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("residual_row", ctypes.c_int64),
        ("activation", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("y_row", ctypes.c_int64),
    ]


class ScaleArgs(ctypes.Structure):
    """ScaleArgs of ffi/kernels/channels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "line", "residual", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "activation")),
    ]


class MomentsArgs(ctypes.Structure):
    """MomentsArgs of ffi/kernels/channels.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "g", "moments")),
        *((name, ctypes.c_int64) for name in ("rows", "cols")),
    ]


@dataclass
class Kernels:
    """The plain symbols, and the emulated CPU that runs those of AVX-512."""

    symbols: ctypes.CDLL
    emulator: Emulator
    reached: set[str] = field(default_factory=set)

    def native(self, isa: str, name: str, dtype: str, *arguments: np.ndarray | int) -> None:
        """Calls a kernel on this CPU."""
        function = getattr(self.symbols, f"jaxwin_test_{name}_{isa}")
        function.restype = None
        function(
            ctypes.c_int64(WORDS[dtype]),
            *(
                ctypes.c_void_p(a.ctypes.data)
                if isinstance(a, np.ndarray)
                else ctypes.c_int64(int(a))
                for a in arguments
            ),
        )

    def emulated(
        self,
        name: str,
        dtype: str,
        *arguments: np.ndarray | int,
        buffers: tuple[np.ndarray, ...] = (),
    ) -> None:
        """Calls an AVX-512 kernel on the emulated CPU."""
        self.reached.add(name)
        function = getattr(self.symbols, f"jaxwin_test_{name}_avx512")
        self.emulator.call(function, WORDS[dtype], *arguments, buffers=buffers)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory):
    path = native.plain_library(tmp_path_factory.mktemp("kernels"))
    library = ctypes.CDLL(str(path))
    with Emulator(path) as emulator:
        yield Kernels(library, emulator)


def _words(structure: ctypes.Structure) -> np.ndarray:
    """The bytes of a structure, as an array that can be passed and mapped."""
    return np.frombuffer(bytes(structure), np.uint8).copy()


def _gemm_args(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, runs: np.ndarray, **numbers: int
) -> np.ndarray:
    values = dict.fromkeys((*_NUMBERS, "table_row"), 0) | {"n_runs": len(runs)} | numbers
    pointers = {"a": a, "b": b, "c": c, "runs": runs}
    return _words(GemmArgs(**{k: v.ctypes.data for k, v in pointers.items()}, **values))


def _matrix(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    return guarded(problems.values(rng, shape, dtype))


def _word(dtype: str) -> str:
    return dtype if dtype in DTYPES else "float32"


def _untouched(dtype: str, size: int) -> np.ndarray:
    return np.full(size * np.dtype(dtype).itemsize, 0xA5, np.uint8).view(dtype)


def _store(kernels: Kernels, isa: str, words: np.ndarray, result: str, to: np.ndarray) -> None:
    """Words as the elements of a result of this type."""
    if result == words.dtype.name:
        to[: len(words)] = words
        return
    kind, n = 2, len(words)
    numbers = (0, words, 0, 1, 1, n)
    kernels.native(isa, "convert", words.dtype.name, kind, ELEMENTS.index(result), to, *numbers)


def _same(result: np.ndarray, expected: np.ndarray, what: str) -> None:
    np.testing.assert_array_equal(result.view(np.uint8), expected.view(np.uint8), what)


# The forms, as jaxwin_test_gemm_* counts them.
PACKED, STRIDED, INDIRECT, AHEAD, NARROW, NARROW_AHEAD, NEAR = range(7)
FORMS = [(dtype, form) for dtype in WORDS for form in (PACKED, STRIDED)]
FORMS.remove((PAIRS, STRIDED))  # integers are packed always
FORMS.append(("float32", AHEAD))
GEMMS = [(*tile, *form) for tile in TILES for form in FORMS]
NARROWS = [(mr, nv) for mr, nv in TILES if mr >= 8 and nv == 1]
GEMMS += [(*tile, "float32", form) for tile in NARROWS for form in (NARROW, NARROW_AHEAD, NEAR)]


@pytest.mark.parametrize(("mr", "nv", "dtype", "form"), GEMMS)
def test_gemm(kernels: Kernels, mr: int, nv: int, dtype: str, form: int) -> None:
    full = _width("avx512", dtype)
    strided = form == STRIDED
    rng = np.random.default_rng([mr, nv, form])
    # Runs of odd lengths, out of order; rows of A overlap, as windows do.
    lengths = [5, 1, 7]
    steps = sum(lengths)
    a_row, a_step = 3, 2 if strided else 1
    for cols in {(nv - 1) * full + 1, nv * full - 3, nv * full}:
        b_step = cols + 2 if strided else nv * full
        runs = guarded(
            np.array(
                [(6, 6 * b_step, 5), (0, 5 * b_step, 1), (1, 0, 5), (12, 11 * b_step, 2)], np.int64
            )
        )
        a = _matrix(rng, dtype, (mr - 1) * a_row + 12 + a_step + 1)
        b = _matrix(rng, dtype, (steps - 1) * b_step + (cols if strided else nv * full))
        c_row = cols + 5
        start = problems.values(rng, ((mr - 1) * c_row + cols,), dtype)
        for load, add in ((0, 0), (1, 0), (0, 1)):
            numbers = {
                "a_row": a_row,
                "a_step": a_step,
                "b_step": b_step,
                "c_row": c_row,
                "load": load,
                "add": add,
            }
            c = guarded(start)
            # What is prefetched may lie anywhere.
            ahead = {"ahead": b.ctypes.data, "ahead_step": 1 << 20}
            arguments = _gemm_args(a, b, c, runs, cols=cols, **numbers, **ahead)
            kernels.emulated("gemm", dtype, mr, nv, form, arguments, buffers=(a, b, c, runs))
            for isa in REFERENCES:
                width = _width(isa, dtype)
                expected = start.copy()
                for row in range(mr):
                    for j in range(0, cols, width):
                        piece = _gemm_args(
                            a[row * a_row :],
                            b[j:],
                            expected[row * c_row + j :],
                            runs,
                            cols=min(width, cols - j),
                            **numbers,
                        )
                        # the strided form, which reads no column beyond
                        kernels.native(
                            isa, "gemm", dtype, 1, 1, PACKED if dtype == PAIRS else STRIDED, piece
                        )
                _same(c, expected, f"{isa} cols {cols} load {load} add {add}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mr", "nv"), [(mr, nv) for mr, nv in TILES if mr <= 8])
def test_gemm_by_a_table(kernels: Kernels, dtype: str, mr: int, nv: int) -> None:
    full = _width("avx512", dtype)
    rng = np.random.default_rng([mr, nv])
    lengths = [5, 1, 7]
    b_step = nv * full
    begins = np.cumsum([0, *lengths])
    runs = guarded(np.array([(t, begins[t] * b_step, n) for t, n in enumerate(lengths)], np.int64))
    a = _matrix(rng, dtype, 20)
    zeros = guarded(np.zeros(max(lengths), dtype))
    offsets = rng.integers(0, len(a) - max(lengths), (mr, len(lengths)), np.int64, endpoint=True)
    table = guarded(np.where(rng.random(offsets.shape) < 0.3, -1, offsets).ravel())
    b = _matrix(rng, dtype, sum(lengths) * b_step)
    for cols in {(nv - 1) * full + 1, nv * full - 3, nv * full}:
        c_row = cols + 5
        start = np.full((mr - 1) * c_row + cols, _CANARY, dtype)
        c = guarded(start)
        numbers = {"b_step": b_step, "c_row": c_row, "a_step": 1}
        arguments = _words(
            GemmArgs(
                a=a.ctypes.data,
                b=b.ctypes.data,
                c=c.ctypes.data,
                runs=runs.ctypes.data,
                n_runs=len(runs),
                cols=cols,
                table=table.ctypes.data,
                table_row=len(lengths),
                zeros=zeros.ctypes.data,
                **numbers,
            )
        )
        kernels.emulated(
            "gemm", dtype, mr, nv, INDIRECT, arguments, buffers=(a, b, c, runs, table, zeros)
        )
        for isa in REFERENCES:
            width = _width(isa, dtype)
            expected = start.copy()
            for row in range(mr):
                found = table[row * len(lengths) : (row + 1) * len(lengths)]
                pieces = [
                    zeros[:n] if at < 0 else a[at : at + n]
                    for at, n in zip(found, lengths, strict=True)
                ]
                in_order = np.concatenate(pieces)
                order = np.array([(0, 0, len(in_order))], np.int64)
                for j in range(0, cols, width):
                    piece = _gemm_args(
                        in_order,
                        b[j:],
                        expected[row * c_row + j :],
                        order,
                        cols=min(width, cols - j),
                        **numbers,
                    )
                    kernels.native(isa, "gemm", dtype, 1, 1, STRIDED, piece)
            _same(c, expected, f"{isa} cols {cols}")


@pytest.mark.parametrize(("dtype", "pixels"), [(d, p) for d, n in LANES for p in range(1, n + 1)])
def test_lanes(kernels: Kernels, dtype: str, pixels: int) -> None:
    word = _word(dtype)
    full = _width("avx512", word)
    rng = np.random.default_rng(pixels)
    for case, cols in enumerate((1, full - 3, full, 2 * full + 5)):
        result = STORED[dtype][(pixels + case) % len(STORED[dtype])]
        runs = guarded(np.array([(7, 2 * full, 1), (0, 0, 1), (3, full, 1)], np.int64))
        a_row, c_row = cols + 1, cols + 2
        blocks, b_block = -(-cols // full), 3 * full + 2
        a = _matrix(rng, dtype, (pixels - 1) * a_row + 7 + cols)
        b = _matrix(rng, word, blocks * b_block - 2)
        start = _untouched(result, (pixels - 1) * c_row + cols)
        c = guarded(start)
        numbers = {"a_row": a_row, "c_row": c_row, "blocks": blocks, "b_block": b_block}
        numbers["result"] = STORES[result]
        arguments = _gemm_args(a, b, c, runs, cols=cols, **numbers)
        form = (ELEMENTS.index(dtype), pixels)
        kernels.emulated("lanes", word, *form, arguments, buffers=(a, b, c, runs))
        wide = a.astype(word)
        feature = np.arange(cols)
        filters = [b[feature // full * b_block + run[1] + feature % full] for run in runs]
        for isa in REFERENCES:
            expected = start.copy()
            for p in range(pixels):
                rows = [wide[p * a_row + run[0] :][:cols] for run in runs]
                words = np.zeros(cols, word)
                _chain(kernels, isa, rows, filters, words)
                _store(kernels, isa, words, result, expected[p * c_row :])
            _same(c, expected, f"{isa} cols {cols} {result}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mr", "nv"), TILES)
def test_gemm_past_the_caches(kernels: Kernels, dtype: str, mr: int, nv: int) -> None:
    full = _width("avx512", dtype)
    rng = np.random.default_rng([mr, nv])
    cols = c_row = nv * full
    runs = guarded(np.array([(0, 0, 3)], np.int64))
    a, b = _matrix(rng, dtype, (mr - 1) * 2 + 3), _matrix(rng, dtype, 3 * cols)
    results = []
    for stream in (0, 1):
        c = guarded(np.full(mr * c_row, _CANARY, dtype))
        numbers = {"a_row": 2, "a_step": 1, "b_step": cols, "c_row": c_row, "stream": stream}
        arguments = _gemm_args(a, b, c, runs, cols=cols, **numbers)
        kernels.emulated("gemm", dtype, mr, nv, PACKED, arguments, buffers=(a, b, c, runs))
        results.append(c)
    _same(results[1], results[0], "stream")


def _chain(
    kernels: Kernels,
    isa: str,
    inputs: list[np.ndarray],
    filters: list[np.ndarray],
    to: np.ndarray,
) -> None:
    """The chain of products of all lanes, by the tiles of one pixel, one vector at a time."""
    dtype, cols = inputs[0].dtype, len(inputs[0])
    width, beyond = _width(isa, dtype.name), np.zeros(_width("avx512", dtype.name), dtype)
    a, b = (guarded(np.concatenate([*rows, beyond])) for rows in (inputs, filters))
    seen = np.array([(t * cols, t * cols, 1) for t in range(len(inputs))], np.int64)
    for j in range(0, cols, width):
        piece = _gemm_args(a[j:], b[j:], to[j:], seen, cols=min(width, cols - j), blocks=1)
        kernels.native(isa, "lanes", dtype.name, DTYPES[dtype.name], 1, piece)


_OWN, _PERMUTED, _BROADCAST = range(3)  # SweepForm in ffi/kernels/kernels.h


@pytest.mark.parametrize(("dtype", "form", "window", "stride", "most"), ISAS["avx512"]["sweeps"])
def test_sweep(
    kernels: Kernels, dtype: str, form: int, window: int, stride: int, most: int
) -> None:
    """Against the tiles of pixels, one pixel and one vector at a time, on expanded input."""
    word = _word(dtype)
    full = _width("avx512", word)
    words_only = dtype in DTYPES and form != _BROADCAST and window > 2
    every = [word] if words_only else STORED[dtype]
    rng = np.random.default_rng([form, window, stride])
    channels, features = {_OWN: (1, 1), _PERMUTED: (2, 4), _BROADCAST: (3, full)}[form]
    span = full // features * channels
    n, wide = 5, window + 3
    lane = np.arange(full)
    table = guarded(
        np.array([lane // features * channels + i for i in range(channels)], np.int32).view(
            np.int64
        )
    )
    for rows in range(1, most + 1):
        for cols, border in ((full - 4, rows % 2), (2 * full, 1 - rows % 2)):
            in_cols = -(-cols // features) * channels
            first = full if form == _BROADCAST else 0  # a group comes before these
            # A column that is skipped at both ends, except where it is all that an output reads.
            skipped = int(window > 1)
            q_begin, q_end = skipped, (n - 1) * stride + window - skipped
            x_col, taps = in_cols + 2, 2
            x_row = (q_end + 3) * x_col
            # The second run's first row and the first run's last row are not there, with a border.
            runs = guarded(np.array([(x_row + 1, channels * full, 0), (0, 0, -1)], np.int64))
            follow = rows // 2 % 2 if form == _OWN else 0
            if follow:
                runs[:] = (0, 0, -1), (x_row, channels * full, 0)
            if not border:
                runs[:, 2] += 1
            row_step, in_rows = 1, rows + 1 - 2 * border
            result = every[(rows + border) % len(every)]
            x = _matrix(rng, dtype, (rows + 1) * x_row + in_cols)
            w_col = taps * channels * full + 1
            w_block = window * w_col + wide
            blocks = -(-cols // full)
            w = _matrix(rng, word, blocks * w_block)
            y_col, y_row = cols + 1, n * (cols + 1) + 3
            start = _untouched(result, (rows - 1) * y_row + (n - 1) * y_col + cols)
            y = guarded(start)
            zeros = guarded(np.zeros(channels, word))
            before = first // features * channels * x.itemsize
            arguments = _words(
                SweepArgs(
                    x.ctypes.data - before,
                    *(v.ctypes.data for v in (w, y, runs)),
                    *(len(runs), n, cols, x_row, x_col, q_begin, q_end),
                    *(w_col, w_block, y_row, y_col, row_step, in_rows, border),
                    *(in_cols, channels, span, table.ctypes.data),
                    *(first, features, zeros.ctypes.data, STORES[result], follow),
                )
            )
            buffers = (x, w, y, runs, table, zeros)
            kernel = (ELEMENTS.index(dtype), form, window, stride, rows)
            kernels.emulated("sweep", word, *kernel, arguments, buffers=buffers)
            wide_x = x.astype(word)
            feature = np.arange(cols)
            channel = feature // features * channels  # that a feature begins with
            for isa in REFERENCES:
                expected = start.copy()
                for r, o in itertools.product(range(rows), range(n)):
                    inputs, filters = [], []
                    for kx, run in itertools.product(range(window), runs):
                        if not q_begin <= (q := o * stride + kx) < q_end:
                            continue
                        real = 0 <= run[2] + r * row_step < in_rows
                        at = r * x_row + q * x_col + run[0] if real else 0
                        for i in range(channels):
                            inputs.append(wide_x[at + channel + i] * np.dtype(word).type(real))
                            block = feature // full * w_block + kx * w_col + run[1] + i * full
                            filters.append(w[block + feature % full])
                    words = np.zeros(cols, word)
                    _chain(kernels, isa, inputs, filters, words)
                    _store(kernels, isa, words, result, expected[r * y_row + o * y_col :])
                _same(y, expected, f"{isa} rows {rows} cols {cols} border {border} {result}")


@pytest.mark.parametrize(("dtype", "stride", "rows", "every"), ISAS["avx512"]["windows"])
def test_window(kernels: Kernels, dtype: str, stride: int, rows: int, every: list[int]) -> None:
    """Against the tiles of pixels, one pixel and one vector at a time, on widened input."""
    word = _word(dtype)
    full = _width("avx512", word)
    results = [word] if dtype in DTYPES else STORED[dtype]
    rng = np.random.default_rng([ELEMENTS.index(dtype), stride, rows])
    left, right = 1, 2
    high = (rows - 1) * stride + 3
    cases = (
        (2 * full, 2**high - 1, 0),
        (full + 3, 2**high - 1, left + right),
        (full - 1, 2**high - 2, left),
        (full, 2 ** (high - 1) - 1, right),
        (3, 0, 0),
        (3 * full + 3, 2**high - 1, left + right),
        (2 * full, 2 ** (high - 1) - 1, right),
    )
    for pixels in every:
        for case, (cols, there, edges) in enumerate(cases):
            result = results[(pixels + case) % len(results)]
            # Guards end at the last column and the last row that are read, or begin at the first.
            wide = (pixels - 1) * stride + 3
            x_col, y_col = cols, cols + 1
            x_row = wide * x_col
            first_row = 1 if there and not there & 1 else 0
            front = first_row * x_row + (x_col if edges & left else 0)
            last_row = max(there.bit_length(), 1)
            end = last_row * x_row - (x_col if edges & right else 0)
            values = problems.values(rng, (high * x_row,), dtype)
            x = guarded(values[front:end] if there else values[:1])
            w = _matrix(rng, word, -(-cols // full) * 9 * full)
            changed = guarded(w)
            kernels.emulated("window_filters", word, ELEMENTS.index(dtype), stride, changed, cols)
            y_row = pixels * y_col + 5
            start = _untouched(result, (rows - 1) * y_row + (pixels - 1) * y_col + cols)
            y = guarded(start)
            arguments = _words(
                WindowArgs(
                    x.ctypes.data - front * x.itemsize,
                    *(changed.ctypes.data, y.ctypes.data, cols),
                    *(x_row, x_col, y_row, y_col, there, edges, STORES[result]),
                )
            )
            form = (ELEMENTS.index(dtype), stride, rows, pixels)
            kernels.emulated("window", word, *form, arguments, buffers=(x, changed, y))
            wide_values = values.astype(word)
            for isa in REFERENCES:
                expected = start.copy()
                for r, p in itertools.product(range(rows), range(pixels)):
                    inputs, filters = [np.zeros(cols, word)], [np.zeros(cols, word)]
                    for kx, ky in itertools.product(range(3), range(3)):
                        row, column = r * stride + ky, p * stride + kx
                        skip = (edges & left and column == 0) or (
                            edges & right and column == wide - 1
                        )
                        if skip or not there >> row & 1:
                            continue
                        at = row * x_row + column * x_col
                        inputs.append(wide_values[at : at + cols])
                        feature = np.arange(cols)
                        filters.append(
                            w[(feature // full * 9 + kx * 3 + ky) * full + feature % full]
                        )
                    words = np.zeros(cols, word)
                    _chain(kernels, isa, inputs, filters, words)
                    _store(kernels, isa, words, result, expected[r * y_row + p * y_col :])
                what = f"{isa} pixels {pixels} cols {cols} rows {there} edges {edges} {result}"
                _same(y, expected, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", range(1, ISAS["avx512"]["max_pixels"] + 1))
def test_lanes_grad(kernels: Kernels, dtype: str, count: int) -> None:
    full = _width("avx512", dtype)
    rng = np.random.default_rng(count)
    for cols in (1, full - 3, full):
        a_step, b_step, c_row = cols + 3, cols + 1, cols + 2
        runs = guarded(np.array([(4, 3 * b_step, 2), (0, 0, 3)], np.int64))
        offsets = guarded(rng.permutation(count).astype(np.int64))
        a = _matrix(rng, dtype, count - 1 + a_step + max(4, a_step) + full)
        b = _matrix(rng, dtype, 4 * b_step + cols)
        start = rng.standard_normal((count - 1) * c_row + cols).astype(dtype)
        for load in (0, 1):
            c = guarded(start)
            numbers = {"a_step": a_step, "b_step": b_step, "load": load}
            arguments = _gemm_args(a, b, c, runs, c_row=c_row, cols=cols, **numbers)
            kernels.emulated(
                "lanes_grad", dtype, count, arguments, offsets, buffers=(a, b, c, runs, offsets)
            )
            for isa in REFERENCES:
                width = _width(isa, dtype)
                expected = start.copy()
                for q in range(count):
                    for j in range(0, cols, width):
                        piece = _gemm_args(
                            a[j:],
                            b[j:],
                            expected[q * c_row + j :],
                            runs,
                            cols=min(width, cols - j),
                            **numbers,
                        )
                        kernels.native(
                            isa, "lanes_grad", dtype, 1, piece, offsets[q : q + 1].copy()
                        )
                _same(c, expected, f"{isa} cols {cols} load {load}")


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 3])
def test_groups_grad(kernels: Kernels, columns: int, groups: int) -> None:
    """Against the tiles of one pixel, where the channels are expanded to lanes."""
    full = _width("avx512", "float32")
    rng = np.random.default_rng(groups)
    lane = np.arange(full) % groups
    for channels in (c for c in (1, 2, 4, 8) if c * groups <= full):
        read = channels * groups  # floats of a pixel
        a_step, b_step, c_row = read + 3, full + 1, channels * full + 2
        a_row = 2 * a_step + 1
        # Guards end at the last element that is read of either operand.
        seen = [(4, 3 * b_step, 2), (0, 0, 3)]
        runs = guarded(np.array(seen, np.int64))
        last = max(4 + a_step, 2 * a_step)
        a = _matrix(rng, "float32", last + (columns - 1) * a_row + read)
        b = _matrix(rng, "float32", 4 * b_step + full)
        start = problems.values(rng, ((columns - 1) * c_row + channels * full,), "float32")
        c = guarded(start)
        numbers = {"a_row": a_row, "c_row": c_row, "a_step": a_step, "b_step": b_step}
        arguments = _gemm_args(a, b, c, runs, **numbers)
        form = (columns, channels, groups)
        kernels.emulated("groups_grad", "float32", *form, arguments, buffers=(a, b, c, runs))
        steps = [(x + s * a_step, w + s * b_step) for x, w, length in seen for s in range(length)]
        for isa in REFERENCES:
            expected = start.copy()
            for u, i in itertools.product(range(columns), range(channels)):
                to = expected[u * c_row + i * full :][:full]
                inputs = [a[u * a_row + x + i * groups + lane] for x, _ in steps]
                filters = [b[w : w + full] for _, w in steps]
                one = np.ones(full, np.float32)
                _chain(kernels, isa, [to.copy(), *inputs], [one, *filters], to)
            _same(c, expected, f"{isa} channels {channels}")


_SPECIAL = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-30, -1e-30, 88.5, -103.5], np.float32)


@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(d, a) for d in DTYPES for a in REGISTRY["dtypes"][d]["activations"]],
)
@pytest.mark.parametrize("bias", ["none", "by column", "by row"])
def test_epilogue(kernels: Kernels, dtype: str, activation: str, bias: str) -> None:
    full = _width("avx512", dtype)
    number = REGISTRY["activations"].index(activation)
    rng = np.random.default_rng(number)
    rows = 3
    for cols in (1, full + 1, 2 * full, 3 * full - 1):
        c_row, residual_row = cols + 4, cols + 1
        start = (8 * rng.standard_normal((rows - 1) * c_row + cols)).astype(dtype)
        start[: len(_SPECIAL)] = _SPECIAL[: len(start)]
        residual = _matrix(rng, dtype, (rows - 1) * residual_row + cols)
        values = _matrix(rng, dtype, cols if bias == "by column" else rows)

        def arguments(c: np.ndarray) -> np.ndarray:
            return _words(
                EpilogueArgs(
                    c=c.ctypes.data,
                    c_row=c_row,  # noqa: B023
                    rows=rows,
                    cols=cols,  # noqa: B023
                    bias=None if bias == "none" else values.ctypes.data,  # noqa: B023
                    bias_row=1 if bias == "by row" else 0,
                    bias_col=1 if bias == "by column" else 0,
                    residual=None if bias == "none" else residual.ctypes.data,  # noqa: B023
                    residual_row=residual_row,  # noqa: B023
                    activation=number,
                )
            )

        c = guarded(start)
        kernels.emulated("epilogue", dtype, arguments(c), buffers=(c, values, residual))
        for isa in REFERENCES:
            expected = start.copy()
            kernels.native(isa, "epilogue", dtype, arguments(expected))
            np.testing.assert_array_equal(np.isnan(c), np.isnan(expected))
            finite = ~np.isnan(expected)  # the sign and payload of a NaN are nobody's
            _same(c[finite], expected[finite], f"{isa} cols {cols}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", ["pixels", "planes", "neither", 2, 3, 4])
@pytest.mark.parametrize("count", [1, 3, 8, 15, 16, 17, 37])
def test_copy(kernels: Kernels, dtype: str, source: str, count: int) -> None:
    rng = np.random.default_rng(count)
    for n in (1, 7, 8, 19) if isinstance(source, str) else range(1, source + 1):
        src_ld, src_step = {
            "pixels": (count + 2, 1),
            "planes": (1, n + 3),
            "neither": (2, 2 * n + 1),
        }.get(source, (1, source))  # a few channels of pixels that have as many or more
        dst_ld = count + 1
        src = _matrix(rng, dtype, (n - 1) * src_ld + (count - 1) * src_step + 1)
        expected = np.full((n - 1) * dst_ld + count, _CANARY, dtype)
        dst = guarded(expected)
        for j in range(n):
            for k in range(count):
                expected[j * dst_ld + k] = src[j * src_ld + k * src_step]
        kernels.emulated("copy", dtype, dst, dst_ld, src, src_ld, src_step, n, count)
        _same(dst, expected, f"n {n}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("n_rows", [1, 3, 5])
def test_interleave(kernels: Kernels, dtype: str, n_rows: int, count: int) -> None:
    rng = np.random.default_rng([n_rows, count])
    for n in (1, 2, 9):
        for src_ld, dst_ld in ((count, n_rows * count), (count + 3, n_rows * count + 2)):
            rows = [_matrix(rng, dtype, (n - 1) * src_ld + count) for _ in range(n_rows)]
            table = np.array([row.ctypes.data for row in rows], np.uint64)
            table[n_rows // 2 :: 3] = 0  # rows on padding
            size = (n - 1) * dst_ld + n_rows * count
            dst = guarded(np.full(size, _CANARY, dtype))
            kernels.emulated(
                "interleave",
                dtype,
                dst,
                dst_ld,
                table,
                n_rows,
                src_ld,
                n,
                count,
                buffers=tuple(rows),
            )
            for i in range(n):
                for r in range(n_rows):
                    at = i * dst_ld + r * count
                    values = rows[r][i * src_ld : i * src_ld + count] if table[r] else 0.0
                    np.testing.assert_array_equal(dst[at : at + count], values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", range(1, 18))
def test_interleave_rows_of_single_elements(kernels: Kernels, dtype: str, n_rows: int) -> None:
    rng = np.random.default_rng(n_rows)
    for n, padding in ((1, False), (7, True), (16, False), (35, True)):
        rows = [_matrix(rng, dtype, n) for _ in range(n_rows)]
        table = np.array([row.ctypes.data for row in rows], np.uint64)
        if padding:
            table[n_rows // 2] = 0
        dst = guarded(np.full(n * n_rows, _CANARY, dtype))
        kernels.emulated(
            "interleave", dtype, dst, n_rows, table, n_rows, 1, n, 1, buffers=tuple(rows)
        )
        expected = np.stack([row if at else 0 * row for row, at in zip(rows, table, strict=True)])
        np.testing.assert_array_equal(dst, expected.T.ravel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplicity", [1, 3])
@pytest.mark.parametrize("span", [0, 1, 5, "vector"])
def test_expand(kernels: Kernels, dtype: str, span: Any, multiplicity: int) -> None:
    full = _width("avx512", dtype)
    span = full if span == "vector" else span
    rng = np.random.default_rng([span, multiplicity])
    for n, lanes in ((1, 1), (4, full - 3), (5, full)):
        source = span or 40
        table = guarded(rng.integers(0, source, (multiplicity, full)))
        src_ld, dst_ld = source + 1, multiplicity * full + 1
        src = _matrix(rng, dtype, (n - 1) * src_ld + source)
        dst = guarded(np.full((n - 1) * dst_ld + multiplicity * full, _CANARY, dtype))
        kernels.emulated(
            "expand", dtype, dst, dst_ld, src, src_ld, n, table, multiplicity, lanes, span
        )
        for i in range(n):
            for m in range(multiplicity):
                at = i * dst_ld + m * full
                expected = src[i * src_ld + table[m, :lanes]]
                np.testing.assert_array_equal(dst[at : at + lanes], expected)


_CONVERTED = [
    *(("float32", kind, d) for kind in (0, 1, 2) for d in ("bfloat16", "float16")),
    *((PAIRS, kind, d) for kind in (0, 1) for d in ("int8", "uint8", "int16")),
    *((PAIRS, 2, d) for d in ("int8", "uint8", "int16", "uint16", "int32", "uint32")),
]


@pytest.mark.parametrize(("word", "kind", "element"), _CONVERTED)
def test_convert(kernels: Kernels, word: str, kind: int, element: str) -> None:
    """Read (0), pack (1) and write (2): the same bits as the baseline's."""
    rng = np.random.default_rng([kind, ELEMENTS.index(element)])
    source, target = (word, element) if kind == 2 else (element, word)
    channels = 2 if word == PAIRS and kind < 2 else 1
    for n, count in ((1, 1), (3, 7), (16, 5), (19, 33)):
        for src_ld, src_step in ((count + 2, 1), (1, n + 3), (2, 2 * n + 1)):
            values = problems.values(rng, ((n - 1) * src_ld + (count - 1) * src_step + 1,), source)
            if source in DTYPES or source in ("bfloat16", "float16"):
                special = np.array([*_SPECIAL, 65519.0, 65520.0, 6e-8, 2.9e-8, 1e-40], np.float32)
                with np.errstate(over="ignore"):  # 65520 is infinity in float16
                    values[: len(special)] = special[: len(values)].astype(source)
            rows, columns = (n, -(-count // channels)) if kind != 1 else (-(-n // channels), count)
            dst_ld = columns + 1
            src = guarded(values)
            dst = guarded(np.full((rows - 1) * dst_ld + columns, 77, np.float32).astype(target))
            expected = dst.copy()
            arguments = (kind, ELEMENTS.index(element))
            sizes = (src_ld, src_step, n, count)
            kernels.emulated("convert", word, *arguments, dst, dst_ld, src, *sizes)
            kernels.native("baseline", "convert", word, *arguments, expected, dst_ld, src, *sizes)
            _same(dst, expected, f"n {n} count {count} {src_ld} {src_step}")


@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_write_past_the_caches(kernels: Kernels, element: str) -> None:
    """Stream (3): what write gives, by whole vectors of the array."""
    rng = np.random.default_rng(0)
    full = 2 * _width("avx512", "float32")
    for n, count in ((1, full), (3, 2 * full)):
        src_ld, dst_ld = count + 3, count + full
        src = _matrix(rng, "float32", (n - 1) * src_ld + count)
        dst = guarded(np.zeros((n - 1) * dst_ld + count, element))
        expected = dst.copy()
        number, sizes = ELEMENTS.index(element), (src_ld, 1, n, count)
        kernels.emulated("convert", "float32", 3, number, dst, dst_ld, src, *sizes)
        kernels.native("baseline", "convert", "float32", 2, number, expected, dst_ld, src, *sizes)
        _same(dst, expected, f"n {n} count {count}")


@pytest.mark.parametrize("element", ["bfloat16", "float16"])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_narrow_epilogue(kernels: Kernels, element: str, across: bool, activation: str) -> None:
    rng = np.random.default_rng(0)
    rows = 3
    activated = REGISTRY["activations"].index(activation)
    for cols in (1, 15, 33):
        c_row = cols + 2
        start = _matrix(rng, "float32", (rows - 1) * c_row + cols)
        bias = _matrix(rng, element, rows if across else cols)
        residual_row = cols + 1
        residual = _matrix(rng, element, (rows - 1) * residual_row + cols)

        def arguments(c: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
            return _words(
                EpilogueArgs(
                    *(c.ctypes.data, c_row, rows, cols),  # noqa: B023
                    *(bias.ctypes.data, int(across), int(not across)),  # noqa: B023
                    *(residual.ctypes.data, residual_row, activated),  # noqa: B023
                    *((None, 0) if y is None else (y.ctypes.data, cols + 1)),  # noqa: B023
                )
            )

        c, expected = guarded(start), start.copy()
        number = ELEMENTS.index(element)
        kernels.emulated(
            "narrow_epilogue", "float32", number, arguments(c), buffers=(c, bias, residual)
        )
        kernels.native("baseline", "narrow_epilogue", "float32", number, arguments(expected))
        _same(c, expected, f"cols {cols}")
        # The same, made elements at last.
        poison = _matrix(rng, element, rows * (cols + 1))
        c, y = guarded(start), guarded(poison)
        kernels.emulated(
            "narrow_epilogue", "float32", number, arguments(c, y), buffers=(c, bias, residual, y)
        )
        results = poison.reshape(rows, cols + 1)
        sums = np.append(expected, np.zeros(2, np.float32)).reshape(rows, c_row)
        results[:, :cols] = sums[:, :cols].astype(poison.dtype)
        _same(y, results.ravel(), f"cols {cols} as elements")


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate(kernels: Kernels, dtype: str) -> None:
    for n in (1, 7, 16, 37):
        rng = np.random.default_rng(n)
        src, dst = _matrix(rng, dtype, n), _matrix(rng, dtype, n)
        expected = dst + src
        kernels.emulated("accumulate", dtype, dst, src, n)
        _same(dst, expected, f"n {n}")


# Inputs and outputs of a tile's side, and its products, of the schemes of transforms.h.
SCHEMES = {"float32": [(0, 4, 2, 16), (1, 6, 4, 36), (2, 8, 6, 88)], PAIRS: [(2, 8, 6, 88)]}


@pytest.mark.parametrize("cols", [1, 13, 16, 37])
@pytest.mark.parametrize(("kind", "what"), list(enumerate(("input", "filter", "output"))))
@pytest.mark.parametrize("dtype", SCHEMES)
def test_transform(kernels: Kernels, dtype: str, kind: int, what: str, cols: int) -> None:
    for scheme, size, out, products in SCHEMES[dtype]:
        rng = np.random.default_rng([kind, cols, scheme])
        ld = cols + 3
        side = {"input": size, "filter": 3, "output": out}[what]
        tile = side * side * ld - 3
        lengths = (products * ld - 3, tile) if what == "output" else (tile, products * ld - 3)
        strides = {"src_row": side * ld, "src_col": ld, "dst_row": ld, "dst_col": 0}
        if what == "output":
            strides = {"src_row": ld, "src_col": 0, "dst_row": side * ld, "dst_col": ld}
        src = _matrix(rng, dtype, lengths[0])
        if dtype == PAIRS and what == "output":
            src //= 1000  # sums that wrap around are no multiples of 36
        start = problems.values(rng, (lengths[1],), dtype)

        def arguments(source: np.ndarray, to: np.ndarray) -> np.ndarray:
            pointers = {"src": source.ctypes.data, "dst": to.ctypes.data}
            return _words(TransformArgs(**pointers, cols=cols, **strides))  # noqa: B023

        result = guarded(start)
        kernels.emulated(
            "transform", dtype, kind, scheme, arguments(src, result), buffers=(src, result)
        )
        for isa in REFERENCES:
            expected = start.copy()
            kernels.native(isa, "transform", dtype, kind, scheme, arguments(src, expected))
            _same(result, expected, f"{isa} {what} scheme {scheme}")


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(d, a) for d in DTYPES for a in REGISTRY["dtypes"][d]["activations"]],
)
def test_scale(kernels: Kernels, dtype: str, activation: str, with_residual: bool) -> None:
    full = _width("avx512", dtype)
    number = REGISTRY["activations"].index(activation)
    for rows, cols in ((1, 1), (3, full), (2, 2 * full - 1), (5, full + 3)):
        rng = np.random.default_rng([rows, cols])
        x, residual = _matrix(rng, dtype, rows * cols), _matrix(rng, dtype, rows * cols)
        line = _matrix(rng, dtype, 2 * cols)
        start = np.full(rows * cols, np.nan, dtype)

        def arguments(y: np.ndarray) -> np.ndarray:
            pointers = {"x": x, "line": line, "y": y}  # noqa: B023
            if with_residual:
                pointers["residual"] = residual  # noqa: B023
            addresses = {name: array.ctypes.data for name, array in pointers.items()}
            return _words(ScaleArgs(**addresses, rows=rows, cols=cols, activation=number))  # noqa: B023

        y = guarded(start)
        kernels.emulated("scale", dtype, arguments(y), buffers=(x, residual, line, y))
        if activation == "none":
            expected = x.reshape(rows, cols) * line[cols:] + line[:cols]
            _same(y, (expected.ravel() + residual) if with_residual else expected.ravel(), "numpy")
        for isa in REFERENCES:
            expected = start.copy()
            kernels.native(isa, "scale", dtype, arguments(expected))
            _same(y, expected, f"{isa} {rows}x{cols}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(kernels: Kernels, dtype: str) -> None:
    full = _width("avx512", dtype)
    for rows, cols in ((1, 1), (8, full), (17, 2 * full - 1), (10, full + 3)):
        rng = np.random.default_rng([rows, cols])
        x, g = _matrix(rng, dtype, rows * cols), _matrix(rng, dtype, rows * cols)
        start = _matrix(rng, dtype, 2 * cols)

        def arguments(sums: np.ndarray) -> np.ndarray:
            pointers = {"x": x, "g": g, "moments": sums}  # noqa: B023
            addresses = {name: array.ctypes.data for name, array in pointers.items()}
            return _words(MomentsArgs(**addresses, rows=rows, cols=cols))  # noqa: B023

        sums = guarded(start)
        kernels.emulated("moments", dtype, arguments(sums), buffers=(x, g, sums))
        expected = start.reshape(2, cols).copy()
        for a, b in zip(x.reshape(rows, cols), g.reshape(rows, cols), strict=True):
            expected += np.stack([b, a * b])
        _same(sums, expected.ravel(), f"numpy {rows}x{cols}")
        for isa in REFERENCES:
            other = start.copy()
            kernels.native(isa, "moments", dtype, arguments(other))
            _same(sums, other, f"{isa} {rows}x{cols}")


def test_every_plain_symbol_was_emulated(kernels: Kernels, request: pytest.FixtureRequest) -> None:
    """A kernel that is new in ffi/kernels/kernels.cc needs a test here."""
    if request.config.option.keyword or len(request.session.items) < len(TILES):
        pytest.skip("not all tests of this file were selected")
    exported = native.plain_symbols(kernels.symbols._name, "avx512")
    assert kernels.reached == exported
