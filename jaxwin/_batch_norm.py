# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation: of training, and that of inference folded into a convolution."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxwin import _channels
from jaxwin._fused import ACTIVATIONS, check_activation


def _vector(
    function: str,
    each: str,
    size: int,
    dtype: Any,
    name: str,
    value: ArrayLike | None,
    default: float,
) -> jax.Array:
    """An argument that has one value for each of something, or the default for all."""
    array = jnp.full((size,), default, dtype) if value is None else jnp.asarray(value)
    if array.shape != (size,):
        raise ValueError(
            f"{function}: {name} must have shape ({size},), one value per {each}, got {array.shape}"
        )
    return array.astype(dtype)


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

    vector = functools.partial(_vector, "fold_batch_norm", "output feature of w", features, wide)
    factor = vector("scale", scale, 1.0) / jnp.sqrt(vector("var", var, 1.0) + eps)
    shift = vector("bias", bias, 0.0)
    offset = (vector("b", b, 0.0) - vector("mean", mean, 0.0)) * factor + shift
    along = [1] * w.ndim
    along[feature_axis] = features
    folded = w.astype(wide) * factor.reshape(along)
    return folded.astype(w.dtype), offset.astype(w.dtype)


def batch_norm(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    eps: float = 1e-5,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A batch normalisation with the batch's own statistics, as in training, channels last.

    ``activation((x - mean) / sqrt(var + eps) * scale + bias + residual)``, in few passes over
    memory: ``x * a + b`` with one `a` and `b` per channel, and derivatives written in the same way,
    which need `x` and the result and no third array. On CPU two sums over `x` are one pass, and the
    result is stored once, however many operations read it.

    Args:
      x: (..., C), floating point; as a convolution gives it.
      scale, bias: (C,), or None for ones and zeros.
      residual: of the shape of `x`; added before the activation.
      activation: one of those of `conv`, or None.
      eps: what is added to the variance.

    Returns:
      (y, mean, var): `y` has shape and dtype of `x`; `mean` and `var` of shape (C,) are the
      statistics of this batch, for running ones, in float32 for 16-bit `x`. `var` is divided by
      the number of values, not by one less.

    Raises:
      ValueError: `x` is not floating point or has no values, a shape does not fit, or the
        activation is unknown.

    Numerical contract: sums and statistics are computed in float32 at least. `var` is
    ``mean(x**2) - mean(x)**2``, no less than zero, as Flax's default: where the mean is far larger
    than the deviation, digits are lost. On CPU, float32 and float64 sums are taken row by row in
    pieces of 512 KiB and at most 4096 rows, whose sums are then added in their order, so that their
    bits depend neither on threads nor on the instruction set. Elsewhere (other platforms, 16-bit
    types, one channel, under vmap, programs over several devices) they are XLA's, and the bits may
    depend on the version of JAX. Derivatives of any order and mode work.

    Source: Ioffe and Szegedy, arXiv 1502.03167, section 3.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim == 0 or x.size == 0:
        raise ValueError(
            f"batch_norm: x must be floating point, (..., C), with at least one value per channel, "
            f"got {x.dtype} of shape {x.shape}"
        )
    channels = x.shape[-1]
    wide = jnp.promote_types(x.dtype, jnp.float32)

    vector = functools.partial(_vector, "batch_norm", "channel of x", channels, wide)
    if residual is not None:
        residual = jnp.asarray(residual)
        if residual.shape != x.shape:
            raise ValueError(
                f"batch_norm: residual must have the shape of x, {x.shape}, got {residual.shape}"
            )
    check_activation("batch_norm", activation)
    # Where the derivative does not follow from the result, the activation keeps its own.
    fused = activation if activation and ACTIVATIONS[activation].from_output else None
    y, mean, var = _normalise(
        x.reshape(-1, channels),
        vector("scale", scale, 1.0),
        vector("bias", bias, 0.0),
        None if residual is None else residual.reshape(-1, channels),
        fused,
        eps,
    )
    y = y.reshape(x.shape)
    if activation is not None and fused is None:
        y = ACTIVATIONS[activation].function(y)
    return y, mean, var


def _means(x: jax.Array, g: jax.Array) -> jax.Array:
    """Those of g and of x * g, over rows."""
    return _channels.moments(x, g) / x.shape[0]


# Of x as rows: where arrays change their shape between two loops, XLA computes them in both.
@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _normalise(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    activation: str | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, squares = _means(x, x)
    var = jnp.maximum(squares - lax.square(mean), 0)
    a = lax.rsqrt(var + eps) * scale
    c = jnp.stack([bias - mean * a, a])
    return _channels.scaled(x, c, residual, activation), mean, var


@_normalise.defjvp
def _normalise_jvp(
    activation: str | None, eps: float, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Any, Any]:
    x, scale, _, residual = primals
    dx, dscale, dbias, dresidual = tangents
    y, mean, var = _normalise(*primals, activation, eps)
    root = lax.rsqrt(var + eps)
    a = root * scale
    dmean, products = _means(x, dx)
    dvar = 2 * (products - mean * dmean)
    da = root * dscale - a * lax.square(root) / 2 * dvar
    # Sums of what one channel shares come first: there are two passes over pixels, not five.
    c = jnp.stack([dbias - mean * da - a * dmean, da])
    dy = dx * a + _channels.line(x, c)
    if residual is not None:
        dy = dy + dresidual
    dy = dy.astype(x.dtype)
    if activation is not None:
        from_output = ACTIVATIONS[activation].from_output
        assert from_output is not None  # batch_norm asks for no other
        dy = from_output(y, dy)
    return (y, mean, var), (dy, dmean, dvar)
