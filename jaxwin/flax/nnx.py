# SPDX-License-Identifier: Apache-2.0
"""``flax.nnx.Conv`` and ``flax.nnx.ConvTranspose`` on jaxwin's convolutions."""

from __future__ import annotations

from typing import Any

import jaxwin._primitive  # noqa: F401  (says what replaces lax's convolution)
from jaxwin._substitute import substituting
from jaxwin.flax import missing

try:
    from flax import nnx
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flax":
        raise
    raise ImportError(missing(__name__), name="flax") from None

__all__ = ["Conv", "ConvTranspose"]


class Conv(nnx.Conv):
    __doc__ = nnx.Conv.__doc__

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``flax.nnx.Conv.__call__``, on jaxwin's kernels."""
        with substituting():
            return super().__call__(inputs, *args, **kwargs)


class ConvTranspose(nnx.ConvTranspose):
    __doc__ = nnx.ConvTranspose.__doc__

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``flax.nnx.ConvTranspose.__call__``, on jaxwin's kernels."""
        with substituting():
            return super().__call__(inputs, *args, **kwargs)
