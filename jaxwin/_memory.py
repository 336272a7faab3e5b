# SPDX-License-Identifier: Apache-2.0
"""What the C library does with the memory of programs that have ended."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_memory() -> bool:
    """Have this process keep the memory that it once needed.

    XLA takes a program's results and temporaries from the C library in every run, and glibc gives
    large blocks back to the system afterwards: the next run maps and clears every page anew. In
    the training step of a network that can be a sixth of the time. After this call freed memory
    stays with the process and is used again: the first runs still map new pages, until every block
    has found a place. So the process stays as large as it ever was, and becomes a few blocks
    larger; results do not change.

    It is for the whole process, and cannot be undone in it. Call it before the first computation:
    threads that have taken memory already may go on in areas of their own.

    Returns:
      Whether the C library can do it: it is glibc (Linux). Elsewhere nothing changes.

    The same from outside of the process: ``GLIBC_TUNABLES=glibc.malloc.arena_max=1:
    glibc.malloc.trim_threshold=8589934592:glibc.malloc.mmap_threshold=8589934592``.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    if not hasattr(library, "gnu_get_libc_version"):  # musl and others know no such options
        return False
    # No block from mmap, which goes back when it is freed; the heap's end stays; and one heap for
    # all threads, since those of other threads end at 64 MiB.
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    done = [mallopt(ctypes.c_int(option), ctypes.c_int(value)) for option, value in wanted.items()]
    return all(done)
