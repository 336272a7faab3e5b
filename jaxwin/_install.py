# SPDX-License-Identifier: Apache-2.0
"""Replacing the lowering of lax's own convolution primitive, for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jaxwin import _compat
from jaxwin._primitive import LOWERINGS

_lock = threading.RLock()
_explicit = False  # install() was called, uninstall() not since
_contexts = 0  # installed() contexts open, over all threads
_active = False


def install() -> None:
    """From now on every convolution of the process is lowered to jaxwin's kernels on CPU and CUDA.

    Covers any library that ends in `jax.lax.conv_general_dilated_p`, with every transformation,
    without a change to its code. Programs compiled before keep running as compiled where someone
    holds them (`jit(f).lower(...).compile()`); jitted functions are compiled anew, since all of
    JAX's caches are cleared when the replacement begins or ends. Calling it twice is the same as
    calling it once.

    The numerical contract is that of `jaxwin.conv_general_dilated`; other platforms are not
    affected.
    """
    global _explicit
    with _lock:
        _explicit = True
        _switch()


def uninstall() -> None:
    """Undoes `install()`. Does nothing where nothing is installed.

    Inside `installed()`, of this or another thread, the replacement lasts until the last such
    context ends.
    """
    global _explicit
    with _lock:
        _explicit = False
        _switch()


@contextmanager
def installed() -> Iterator[None]:
    """`install()` for the time of a `with` block. May be nested, and used by several threads.

    The replacement holds for the whole process, not only for the thread that opened the block.
    """
    global _contexts
    with _lock:
        _contexts += 1
        _switch()
    try:
        yield
    finally:
        with _lock:
            _contexts -= 1
            _switch()


def is_installed() -> bool:
    """Whether lax's convolutions are lowered to jaxwin's kernels at present."""
    return _active


def _switch() -> None:
    """Brings the registered lowering in line with what is asked for. Called under the lock."""
    global _active
    wanted = _explicit or _contexts > 0
    if wanted == _active:
        return
    if wanted:
        _compat.replace_lax_lowering(LOWERINGS)
    else:
        _compat.restore_lax_lowering()
    _active = wanted
    _compat.forget_device_requirements()
    jax.clear_caches()  # type: ignore[no-untyped-call]
