# SPDX-License-Identifier: Apache-2.0
"""``flax.linen.Conv`` and ``flax.linen.ConvTranspose`` on jaxwin's convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jaxwin  # it says what replaces lax's convolution
from jaxwin._substitute import substituting
from jaxwin.flax import missing

try:
    from flax import linen as nn
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flax":
        raise
    raise ImportError(missing(__name__), name="flax") from None

__all__ = ["Conv", "ConvTranspose", "fold_batch_norm"]

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


def fold_batch_norm(
    conv: Mapping[str, Any],
    norm: Mapping[str, Any],
    statistics: Mapping[str, Any],
    epsilon: float = 1e-5,
    *,
    transpose_kernel: bool = False,
) -> dict[str, Any]:
    """Parameters of the convolution that does the batch normalisation after it as well.

    Args:
      conv: parameters of a ``Conv`` or ``ConvTranspose``: ``kernel``, and ``bias`` if it has one.
      norm: parameters of the ``BatchNorm`` after it: ``scale`` and ``bias``, as far as it has them.
      statistics: its collection ``batch_stats``: ``mean`` and ``var``.
      epsilon: its field; Flax's default is that of `jaxwin.fold_batch_norm`.
      transpose_kernel: the field of a ``ConvTranspose``.

    Returns:
      ``kernel`` and ``bias``, for the same convolution with ``use_bias=True`` and no ``BatchNorm``.
    """
    kernel, bias = jaxwin.fold_batch_norm(
        conv["kernel"],
        conv.get("bias"),
        norm.get("scale"),
        norm.get("bias"),
        statistics["mean"],
        statistics["var"],
        epsilon,
        feature_axis=-2 if transpose_kernel else -1,
    )
    return {"kernel": kernel, "bias": bias}
