# SPDX-License-Identifier: Apache-2.0
"""Runs functions of a loaded shared library on an emulated CPU that has AVX-512.

The emulator is Bochs (PyPI: bochscpu-python), inside this process. A page of the emulated memory
is a page of ours, at the same address: a function is called by its real address with real pointers,
and its stores land in the caller's arrays. Only the pages of the libraries and of the named buffers
exist. So AVX-512 code runs on any CPU, and every access outside its buffers is reported:

    with Emulator("kernels.so") as emulator:
        c = guarded(np.zeros(100, np.float32))
        emulator.call(library.kernel, a, c, 100, buffers=[tables_that_arguments_point_to])

For leaf code: no system calls, no thread-local storage, integer and pointer arguments only. VNNI
and BF16 instructions are not in the CPU model and end in an invalid-opcode report.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import subprocess
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
_STACK_PAGES = 64
# Guest-physical addresses: the page tables lie from _TABLES on, the pages from _PAGES on.
_TABLES, _PAGES = 1 << 20, 1 << 28
_ARGUMENT_REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
# CR0.MP; CR4.OSFXSR, OSXMMEXCPT, OSXSAVE; XCR0: x87, SSE, AVX and the three parts of AVX-512.
_CR0, _CR4, _XCR0 = 1 << 1, 1 << 9 | 1 << 10 | 1 << 18, 0xE7
# MXCSR and the x87 control word as a Linux process has them: nearest-even, exceptions masked.
_MXCSR, _FPCW = 0x1F80, 0x37F
_EXCEPTIONS = {0: "division by zero", 6: "invalid opcode", 13: "general protection", 14: "page"}

# The wheel of bochscpu asks for a C library of 2.38 or newer because of these symbols alone.
_OLD_GLIBC_SHIM = """
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
unsigned long long __isoc23_strtoull(const char *s, char **e, int b) { return strtoull(s, e, b); }
unsigned long __isoc23_strtoul(const char *s, char **e, int b) { return strtoul(s, e, b); }
long long __isoc23_strtoll(const char *s, char **e, int b) { return strtoll(s, e, b); }
long __isoc23_strtol(const char *s, char **e, int b) { return strtol(s, e, b); }
int __isoc23_sscanf(const char *s, const char *f, ...) {
  va_list a; va_start(a, f); int r = vsscanf(s, f, a); va_end(a); return r;
}
int __isoc23_fscanf(FILE *s, const char *f, ...) {
  va_list a; va_start(a, f); int r = vfscanf(s, f, a); va_end(a); return r;
}
"""


class EmulationError(RuntimeError):
    """The emulated function touched memory that is not its own, or executed a bad instruction."""


@functools.cache
def bochs() -> Any:
    """The module bochscpu.

    Raises:
        ImportError: it is not installed, or does not load here.
    """
    try:
        import bochscpu
    except ImportError as error:
        if "__isoc23" not in str(error):
            raise
        with tempfile.TemporaryDirectory() as folder:
            source, library = os.path.join(folder, "shim.c"), os.path.join(folder, "shim.so")
            with open(source, "w") as file:
                file.write(_OLD_GLIBC_SHIM)
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        import bochscpu
    import bochscpu.cpu
    import bochscpu.memory

    return bochscpu


def guarded(array: np.ndarray, *, front: bool = False) -> np.ndarray:
    """A copy of an array whose end (or beginning: `front`) is that of its page.

    The page behind (before) it belongs to nobody, so the emulator reports an access to it.
    """
    array = np.ascontiguousarray(array)
    size = -(-max(array.nbytes, 1) // PAGE) * PAGE
    pages = np.frombuffer(mmap.mmap(-1, size + 2 * PAGE), np.uint8)
    start = PAGE if front else PAGE + size - array.nbytes
    copy = pages[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Emulator:
    """An emulated CPU that sees the code and data of some loaded libraries.

    libraries: paths of shared objects, loaded already. The C library is always visible, since
    compilers put memset and memcpy in place of loops.
    """

    def __init__(self, *libraries: str | os.PathLike[str]) -> None:
        self._session = bochs().Session()
        self._session.missing_page_handler = self._missing_page
        self._stack = np.frombuffer(mmap.mmap(-1, _STACK_PAGES * PAGE), np.uint8)
        # Where a function returns to: one page that holds `hlt`.
        self._halt = np.frombuffer(bytearray(b"\xf4" * PAGE * 2), np.uint8)
        self._halt_address = -(-self._halt.ctypes.data // PAGE) * PAGE
        self._pages: dict[int, int] = {}  # number of the page -> guest-physical address
        self._next = _PAGES
        self._problems: list[str] = []
        for path in (*libraries, _c_library()):
            for start, size in _mappings(path):
                self._map(start, size)
        self._map(self._stack.ctypes.data, self._stack.nbytes)
        self._map(self._halt_address, 1)

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        for physical in self._pages.values():
            bochs().memory.page_remove(physical)
        self._pages.clear()

    def call(
        self, function: Any, *arguments: np.ndarray | int, buffers: Iterable[np.ndarray] = ()
    ) -> int:
        """Calls a ctypes function of one of the libraries; returns what it leaves in rax.

        arguments: integers, and arrays, whose addresses are passed. buffers: further arrays that
        the function reaches through pointers.

        Raises:
            EmulationError: the function left its buffers or did something that this CPU cannot do.
        """
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        arrays += list(buffers)
        mine = [page for a in arrays for page in self._map(a.ctypes.data, max(a.nbytes, 1))]
        words = [a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in arguments]
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        try:
            return self._run(address, words)
        finally:
            for page in mine:
                bochs().memory.page_remove(self._pages.pop(page))

    def _map(self, start: int, size: int) -> list[int]:
        """Makes the pages of [start, start + size) visible; returns those that were not."""
        new = []
        for page in range(start // PAGE, (start + size - 1) // PAGE + 1):
            if page not in self._pages:
                bochs().memory.page_insert(self._next, page * PAGE)
                self._pages[page] = self._next
                self._next += PAGE
                new.append(page)
        return new

    def _run(self, address: int, words: list[int]) -> int:
        memory = bochs().memory
        table = memory.PageMapLevel4Table()
        for page, physical in self._pages.items():
            table.insert(page * PAGE, physical, 1)  # 1: writable
        tables = table.commit(_TABLES)
        for host, physical in tables:
            memory.page_insert(physical, host)
        self._problems.clear()
        self._session.cpu.state = self._state(address, words)
        try:
            self._session.run([self._hook(address)])
        finally:
            for _, physical in tables:
                memory.page_remove(physical)
        if self._problems:
            raise EmulationError("; ".join(self._problems))
        return int(self._session.cpu.state.rax)

    def _state(self, address: int, words: list[int]) -> Any:
        """The registers at the function's first instruction (System V calling convention)."""
        on_stack = words[len(_ARGUMENT_REGISTERS) :]
        top = self._stack.ctypes.data + self._stack.nbytes - PAGE  # page-aligned, so 16-aligned
        rsp = top - 16 * ((len(on_stack) + 1) // 2) - 8
        for offset, word in enumerate([self._halt_address, *on_stack]):
            ctypes.c_uint64.from_address(rsp + 8 * offset).value = word & (2**64 - 1)

        state = bochs().State()
        bochs().cpu.set_long_mode(state)
        state.cr0, state.cr4, state.xcr0 = int(state.cr0) | _CR0, int(state.cr4) | _CR4, _XCR0
        state.mxcsr, state.mxcsr_mask, state.fpcw = _MXCSR, 0xFFFF, _FPCW
        state.cr3, state.rip, state.rsp, state.rflags = _TABLES, address, rsp, 1 << 1
        for register, word in zip(_ARGUMENT_REGISTERS, words, strict=False):
            setattr(state, register, word & (2**64 - 1))
        state.cs = _segment(0x10, 0x229B)  # 64-bit code
        for name in ("ds", "ss", "es", "fs", "gs"):
            setattr(state, name, _segment(0x18, 0xC93))
        return state

    def _hook(self, address: int) -> Any:
        def exception(session: Any, _cpu: int, vector: Any, error: Any) -> None:
            now = session.cpu.state
            name = _EXCEPTIONS.get(int(vector), "number " + str(int(vector)))
            where = f" at address {now.cr2:#x}" if int(vector) == 14 else ""
            self._problems.append(
                f"{name} fault{where}, error code {int(error):#x}, instruction {now.rip:#x} "
                f"(function + {now.rip - address:#x})"
            )
            session.stop()

        hook = bochs().Hook()
        hook.exception = exception
        hook.hlt = lambda session, _cpu: session.stop()
        return hook

    def _missing_page(self, physical: int) -> None:
        self._problems.append(f"no page at guest-physical address {physical:#x}")
        raise EmulationError(self._problems[-1])


def _segment(selector: int, attributes: int) -> Any:
    segment = bochs().Segment()
    segment.present, segment.selector, segment.attr = True, selector, attributes
    segment.base, segment.limit = 0, 0xFFFFFFFF
    return segment


def _c_library() -> str:
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if os.path.basename(path).startswith(("libc.so.", "libc-")):
                return path
    raise RuntimeError("no C library is loaded")


def _mappings(library: str | os.PathLike[str]) -> list[tuple[int, int]]:
    """Address and size of the readable mappings of a loaded library, its .bss among them."""
    name = os.path.realpath(library)
    found, behind = [], False
    with open("/proc/self/maps") as maps:
        for line in maps:
            row = line.split(maxsplit=5)
            low, high = (int(part, 16) for part in row[0].split("-"))
            mine = len(row) > 5 and os.path.realpath(row[5].strip()) == name
            # an anonymous mapping right behind the library's is its .bss
            if (mine or (behind and len(row) < 6)) and row[1].startswith("r"):
                found.append((low, high - low))
            behind = mine
    if not found:
        raise ValueError(f"{library} is not loaded")
    return found
