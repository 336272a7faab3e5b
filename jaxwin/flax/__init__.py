# SPDX-License-Identifier: Apache-2.0
"""Flax's convolution layers on jaxwin: ``jaxwin.flax.linen`` and ``jaxwin.flax.nnx``.

Each has ``Conv`` and ``ConvTranspose``: Flax's own classes, subclassed, with Flax's own code
inside; its convolutions are made ours while it runs. Fields, defaults, initial parameters,
checkpoints, padding modes and errors are therefore Flax's, of whatever version is installed.

Importing this package needs no Flax; its modules are imported at their first use.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["linen", "nnx"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def missing(layers: str) -> str:
    """What to tell who imports ``layers`` without Flax."""
    return f"{layers} needs Flax, which is not installed; run: pip install 'jaxwin[flax]'"
