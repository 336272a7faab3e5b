# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation of inference, folded into the convolution before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def fold_batch_norm(
    w: ArrayLike,
    b: ArrayLike | None,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    eps: float = 1e-5,
    *,
    feature_axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
    """Weights and bias of the convolution that does a batch normalisation as well.

    `conv(x, w2, bias=b2)` with the result `w2, b2` is
    `(conv(x, w) + b - mean) / sqrt(var + eps) * scale + bias`. Fold once, outside of the program
    that is called often. In training the statistics depend on the batch: nothing can be folded.

    Args:
      w: weights, output features along `feature_axis`: any convolution's, also grouped, depthwise
        and transposed ones.
      b: the convolution's own bias of shape (K,), or None.
      scale, bias: the normalisation's, of shape (K,), or None where it has none.
      mean, var: its running statistics, of shape (K,).
      eps: what it adds to `var`.
      feature_axis: -1 for HWIO, 0 for OIHW.

    Returns:
      (w2, b2): w2 has shape and dtype of `w`, b2 has shape (K,) and the dtype of `w`.

    Raises:
      ValueError: `w` has no such axis, or another argument's shape is not (K,).

    What changes numerically: `factor = scale / sqrt(var + eps)` is rounded three times, each
    product `w * factor` once more (relative error 2**-24 in float32), and the rounding
    of `(... - mean) * factor` after the sum is gone. So results differ in the last bits, by no
    more than a sum of products with relatively perturbed weights does. 16-bit weights are folded
    in float32 and rounded once. A `w` of infinity or a `var` of zero with `eps` 0 gives what the
    formula gives.
    """
    w = jnp.asarray(w)
    if not -w.ndim <= feature_axis < w.ndim:
        raise ValueError(
            f"fold_batch_norm: w of shape {w.shape} has no axis feature_axis={feature_axis}"
        )
    features = w.shape[feature_axis]
    wide = jnp.promote_types(w.dtype, jnp.float32)

    def vector(name: str, value: ArrayLike | None, default: float) -> jax.Array:
        if value is None:
            return jnp.full((features,), default, wide)
        array = jnp.asarray(value)
        if array.shape != (features,):
            raise ValueError(
                f"fold_batch_norm: {name} must have shape ({features},), one value per output "
                f"feature of w, got {array.shape}"
            )
        return array.astype(wide)

    factor = vector("scale", scale, 1.0) / jnp.sqrt(vector("var", var, 1.0) + eps)
    shift = vector("bias", bias, 0.0)
    offset = (vector("b", b, 0.0) - vector("mean", mean, 0.0)) * factor + shift
    along = [1] * w.ndim
    along[feature_axis] = features
    folded = w.astype(wide) * factor.reshape(along)
    return folded.astype(w.dtype), offset.astype(w.dtype)
