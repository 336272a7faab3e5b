# SPDX-License-Identifier: Apache-2.0
"""``flax.linen.Conv`` and ``flax.linen.ConvTranspose`` on jaxwin's convolutions."""

from __future__ import annotations

import inspect
from typing import Any

import jaxwin._primitive  # noqa: F401  (says what replaces lax's convolution)
from jaxwin._substitute import substituting
from jaxwin.flax import missing

try:
    from flax import linen as nn
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flax":
        raise
    raise ImportError(missing(__name__), name="flax") from None

__all__ = ["Conv", "ConvTranspose"]

# Flax wraps every method of a module to record its call. Ours is wrapped already, so what it calls
# are the bare functions: a call is then recorded once.
_flax_conv: Any = inspect.unwrap(nn.Conv.__call__)
_flax_conv_transpose: Any = inspect.unwrap(nn.ConvTranspose.__call__)


class Conv(nn.Conv):
    __doc__ = nn.Conv.__doc__

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        """As ``flax.linen.Conv.__call__``, on jaxwin's kernels."""
        with substituting():
            return _flax_conv(self, inputs)


class ConvTranspose(nn.ConvTranspose):
    __doc__ = nn.ConvTranspose.__doc__

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        """As ``flax.linen.ConvTranspose.__call__``, on jaxwin's kernels."""
        with substituting():
            return _flax_conv_transpose(self, inputs)
