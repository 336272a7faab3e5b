# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of the micro-kernels."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

import native
import pytest

from jaxwin import _registry

ISAS = {row["name"]: row for row in _registry.registry()["isas"]}
# What a compiler may call in place of a loop.
_LEAF_CALLS = {"memset", "memcpy", "memmove", "fma", "_GLOBAL_OFFSET_TABLE_"}


def test_the_build_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXWIN_BUILD", raising=False)
    monkeypatch.setattr(native, "_ROOT", tmp_path)
    folders = {name: tmp_path / "build" / name for name in ("older", "cp3", "lint", "sanitize")}
    for age, (name, folder) in enumerate(folders.items()):
        folder.mkdir(parents=True)
        flags = "-fsanitize=address" if name == "sanitize" else "-O2"
        (folder / "compile_commands.json").write_text(f'[{{"command": "c++ {flags} -o a.o a.cc"}}]')
        if name != "lint":
            (folder / "_ffi.abi3.so").touch()
            os.utime(folder / "_ffi.abi3.so", (age, age))
    assert native.build_folder() == folders["cp3"]
    for name in ("older", "cp3"):
        (folders[name] / "_ffi.abi3.so").unlink()
    monkeypatch.delenv("JAXWIN_REQUIRE_BUILD", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no finished CMake build"):
        native.build_folder()
    monkeypatch.setenv("JAXWIN_REQUIRE_BUILD", "1")
    with pytest.raises(pytest.fail.Exception, match="no finished CMake build"):
        native.build_folder()


def _tool(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _leaks(object_file: Path, target: str) -> list[str]:
    """The symbols that another object could take from this one, or that it takes from another.

    An inline function compiled for AVX-512 that the linker may pick for a caller on an older CPU
    is an illegal instruction there; so nothing leaves the target's namespace.
    """
    found = []
    for line in _tool("nm", "-C", object_file).splitlines():
        kind, name = line[16:].strip().split(maxsplit=1)
        ours = name.startswith(f"jaxwin::{target}::") and kind not in "WVuwv"
        if kind == "U":
            ours = name in _LEAF_CALLS
        if kind.islower() and kind not in "uwv":
            ours = True  # local
        if not ours:
            found.append(f"{kind} {name}")
    return found


@pytest.mark.parametrize("target", [*ISAS, "avx512vnni"])
def test_no_symbol_leaves_its_instruction_set(target: str) -> None:
    paths = native.kernel_objects()[target]
    assert f"jaxwin::{target}::kernels(jaxwin::Word)" in _tool("nm", "-C", *paths)
    for path in paths:
        assert _leaks(path, target) == []


def test_a_leaked_inline_function_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.cc").write_text(
        "inline int leaked(int x) { return x + 1; }\n"
        "namespace jaxwin::avx2 { int kept(int x) { return leaked(x); } }\n"
    )
    subprocess.run("c++ -std=c++17 -O0 -c a.cc".split(), cwd=tmp_path, check=True)
    assert _leaks(tmp_path / "a.o", "avx2") == ["W leaked(int)"]


@functools.cache
def _functions(*object_files: Path) -> dict[str, list[str]]:
    """The instructions of every function, `address: text`, by demangled name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in _tool("objdump", "-dC", "--no-show-raw-insn", *object_files).splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = found.setdefault(match[1], [])
        elif re.match(r"\s+[0-9a-f]+:\t", line):
            current.append(line.strip())
    return found


def _inner_loops(code: list[str]) -> list[list[str]]:
    """The innermost loops: from the target of a jump back to the jump, with none inside."""
    addresses = [int(line.split(":")[0], 16) for line in code]
    spans = []
    for at, line in enumerate(code):
        if match := re.search(r"\tj\w+\s+([0-9a-f]+) ", line):
            target = int(match[1], 16)
            if target <= addresses[at] and target in addresses:
                spans.append((addresses.index(target), at))
    inner = [
        span
        for span in spans
        if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)
    ]
    return [code[first : last + 1] for first, last in inner]


def _spills(loop: list[str], code: list[str]) -> list[str]:
    """The instructions of a loop that move a vector to or from the stack."""
    stack = ["%rsp"]
    if any(re.search(r"mov\s+%rsp,%rbp", line) for line in code):
        stack.append("%rbp")
    on_stack = re.compile(rf"\((?:{'|'.join(stack)})\b")
    return [line for line in loop if on_stack.search(line) and re.search(r"%[xyz]mm\d", line)]


def _reads_whole_vector(line: str) -> bool:
    return re.search(r"vmov\w+\s+\S*\(%r[sb]p\),%[xyz]mm\d+$", line) is not None


def _tiles(target: str, name: str) -> dict[tuple[str, ...], list[str]]:
    """The instances of a kernel template: its arguments, and its code."""
    pattern = re.compile(rf"\b(?:\w+::|\(anonymous namespace\)::)*{name}<([^>]*)>\(")
    found = {}
    for function, code in _functions(*native.kernel_objects()[target]).items():
        if (match := pattern.search(function)) and f"jaxwin::{target}::" in function:
            found[tuple(match[1].split(", "))] = code
    return found


# Forms of ffi/kernels/gemm.h, as they are demangled: kStrided, kNarrow and kNarrowAhead.
STRIDED, NARROW = ")2", (")4", ")5")


# avx512vnni: what avx512 has for integers, with dot products.
@pytest.mark.parametrize("target", [*(t for t in ISAS if t != "baseline"), "avx512vnni"])
def test_no_vector_spills_in_the_tiles(target: str) -> None:
    """The accumulators stay in registers: see JAXWIN_UNROLL in ffi/kernels/vec.h."""
    tiles = _tiles(target, "gemm_tile")
    product = re.compile("vfmadd|vpmaddwd|vpdpwssd")
    largest = {(str(mr), str(nv)) for mr, nv in ISAS[target.removesuffix("vnni")]["tiles"]}
    tiles = {(*key[:3], key[3].split("::")[-1]): code for key, code in tiles.items()}
    for element in ("Pair",) if target == "avx512vnni" else ("float", "double", "Pair"):
        present = {key[:2] for key in tiles if key[3] == element}
        if element == "Pair":  # products before they are added take one register more
            registers = 16 if target == "avx2" else 32
            fit = ((int(mr), int(nv)) for mr, nv in largest)
            largest = {(str(min(mr, (registers - nv - 2) // nv)), str(nv)) for mr, nv in fit}
        assert largest <= present, f"tiles of the registry that the object lacks for {element}"
    for (mr, nv, form, element), code in tiles.items():
        steps = int(mr) * int(nv)
        hot = [loop for loop in _inner_loops(code) if any(map(product.search, loop))]
        assert hot, f"no loop in gemm_tile<{mr}, {nv}, {form}, {element}>"
        for loop in hot:
            multiplications = sum(product.search(line) is not None for line in loop)
            assert multiplications % steps == 0, (mr, nv, form, multiplications)
            spills = _spills(loop, code)
            # AVX2's strided form also needs a register for the mask of the last column vector;
            # where all sixteen are taken, reading that mask again is the cheapest way out.
            if target == "avx2" and form.endswith(STRIDED) and steps + int(nv) + 2 > 16:
                spills = [line for line in spills if not _reads_whole_vector(line)] + spills[1:]
            # The narrow forms have more pointers than there are registers for them: some are kept
            # in vectors, and one vector on the stack, in four steps.
            most = 8 if form.endswith(NARROW) else 0
            assert len(spills) <= most, f"gemm_tile<{mr}, {nv}, {form}, {element}>"


@pytest.mark.parametrize("target", [t for t in ISAS if t != "baseline"])
@pytest.mark.parametrize("name", ["lanes_tile", "lanes_grad_tile", "groups_grad_tile"])
def test_no_vector_spills_in_the_lanes(target: str, name: str) -> None:
    tiles = _tiles(target, name)
    assert tiles, f"the object has no {name}"
    for instance, code in tiles.items():
        hot = [loop for loop in _inner_loops(code) if any("vfmadd" in line for line in loop)]
        spills = [len(_spills(loop, code)) for loop in hot]
        # AVX2 has no masks for elements of less than four bytes: parts of vectors pass the stack.
        elements = name != "groups_grad_tile" and instance[-1] not in ("float", "double")
        fewest = target == "avx2" and elements
        assert (min if fewest else max)(spills, default=0) == 0, f"{name}<{', '.join(instance)}>"


# Types of elements, as they are demangled.
_WORDS = [("float", "float"), ("double", "double")]
_ELEMENTS = {
    "float32": "float",
    "float64": "double",
    "bfloat16": "{}::BFloat16",
    "float16": "{}::Float16",
    "int8": "signed char",
    "uint8": "unsigned char",
}


@pytest.mark.parametrize("target", [t for t in ISAS if t != "baseline"])
def test_no_vector_spills_in_the_sweeps(target: str) -> None:
    tiles = _tiles(target, "sweep_block")
    for dtype, form, window, stride, rows in ISAS[target]["sweeps"]:
        tile = (str(window), str(stride), str(rows), f"(jaxwin::SweepForm){form}")
        word = "double" if dtype == "float64" else "float"
        element = _ELEMENTS[dtype].format(f"jaxwin::{target}::(anonymous namespace)")
        assert {(*tile, plain, word, element) for plain in ("true", "false")} <= set(tiles)
    for arguments, code in tiles.items():
        if target == "avx2" and arguments[4] == "false" and arguments[5:] not in _WORDS:
            continue  # no masks for elements: parts of vectors pass the stack
        hot = [loop for loop in _inner_loops(code) if any("vfmadd" in line for line in loop)]
        assert hot, f"no loop in sweep_block<{arguments}>"
        for loop in hot:
            assert _spills(loop, code) == [], f"sweep_block<{arguments}>"


@pytest.mark.parametrize("target", [t for t in ISAS if t != "baseline"])
def test_the_accumulators_of_the_windows_stay_in_registers(target: str) -> None:
    """Some of the inputs that neighbouring windows share are kept on the stack: that was faster
    than to load and widen each of them again for every window."""
    tiles = {key: code for key, code in _tiles(target, "window_tile").items() if "float" in key[4]}
    assert tiles, "the object has no window_tile"
    for (stride, rows, pixels, *_), code in tiles.items():
        if len(code) <= 2:
            continue  # a jump to another tile, whose code is the same
        products = 9 * int(rows) * int(pixels)
        loops = _inner_loops(code)
        hot = [loop for loop in loops if sum("vfmadd" in line for line in loop) == products]
        assert hot, f"no loop in window_tile<{stride}, {rows}, {pixels}>"
        # Of each product, an accumulator on the stack would be read and written.
        assert min(len(_spills(loop, code)) for loop in hot) < products


def test_no_vector_spills_in_the_windows_of_bytes() -> None:
    tiles = _tiles("avx512vnni", "dot_tile")
    assert {key[:2] for key in tiles} == {(r, p) for r in "12" for p in "1247"}
    for arguments, code in tiles.items():
        hot = [loop for loop in _inner_loops(code) if any("vpdpbusd" in line for line in loop)]
        assert hot, f"no loop in dot_tile<{arguments}>"
        for loop in hot:
            assert _spills(loop, code) == [], f"dot_tile<{arguments}>"


def test_a_spill_is_seen(tmp_path: Path) -> None:
    """Forty accumulators do not fit thirty-two registers."""
    (tmp_path / "a.cc").write_text(
        """
        #include <immintrin.h>
        void spills(const float* a, float* c, long n) {
          __m512 acc[40];
        #pragma GCC unroll 40
          for (int r = 0; r < 40; ++r) acc[r] = _mm512_setzero_ps();
          for (long i = 0; i < n; ++i) {
            __m512 b = _mm512_loadu_ps(a + 16 * i);
        #pragma GCC unroll 40
            for (int r = 0; r < 40; ++r)
              acc[r] = _mm512_fmadd_ps(b, _mm512_set1_ps(a[r * n + i]), acc[r]);
          }
        #pragma GCC unroll 40
          for (int r = 0; r < 40; ++r) _mm512_storeu_ps(c + 16 * r, acc[r]);
        }
        """
    )
    subprocess.run("c++ -O3 -mavx512f -c a.cc".split(), cwd=tmp_path, check=True)
    (code,) = (c for name, c in _functions(tmp_path / "a.o").items() if "spills" in name)
    loops = [loop for loop in _inner_loops(code) if any("vfmadd" in line for line in loop)]
    assert loops and any(_spills(loop, code) for loop in loops)
