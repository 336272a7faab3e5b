# SPDX-License-Identifier: Apache-2.0
"""``flax.nnx.Conv`` and ``flax.nnx.ConvTranspose`` on jaxwin's convolutions."""

from __future__ import annotations

from typing import Any

import jaxwin  # it says what replaces lax's convolution
from jaxwin._substitute import substituting
from jaxwin.flax import missing

try:
    from flax import nnx
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "flax":
        raise
    raise ImportError(missing(__name__), name="flax") from None

__all__ = ["Conv", "ConvTranspose", "fold_batch_norm"]


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


def fold_batch_norm(conv: nnx.Conv | nnx.ConvTranspose, norm: nnx.BatchNorm) -> Any:
    """A copy of a convolution that does the batch normalisation after it as well.

    Args:
      conv: ``nnx.Conv`` or ``nnx.ConvTranspose``, Flax's or ours; it stays as it is.
      norm: the ``nnx.BatchNorm`` after it, with its running statistics.

    Returns:
      A layer of the class of `conv`, with a bias. See `jaxwin.fold_batch_norm` for what changes
      numerically.
    """

    def value(parameter: Any) -> Any:
        return None if parameter is None else parameter[...]

    kernel, bias = jaxwin.fold_batch_norm(
        value(conv.kernel),
        value(conv.bias),
        value(norm.scale),
        value(norm.bias),
        value(norm.mean),
        value(norm.var),
        norm.epsilon,
        feature_axis=-2 if getattr(conv, "transpose_kernel", False) else -1,
    )
    folded: Any = nnx.clone(conv)
    folded.kernel = nnx.Param(kernel)
    folded.bias = nnx.Param(bias)
    folded.use_bias = True
    return folded
