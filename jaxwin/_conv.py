# SPDX-License-Identifier: Apache-2.0
"""``conv``: the friendly form. It checks, names and canonicalises; ``_fused`` does the work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxwin import _compat, _explain, _pack, _registry
from jaxwin._fused import ACTIVATIONS, fused_conv
from jaxwin._pack import PackedWeights

Padding = Literal["SAME", "VALID", "SAME_LOWER"] | int | Sequence[int | tuple[int, int]]

# Layout names: those of rank 2 spatial dimensions stand for their family at any rank.
_CHANNELS_LAST = ("NHWC", "channels_last", "NWC", "NDHWC")
_CHANNELS_FIRST = ("NCHW", "channels_first", "NCW", "NCDHW")
_RANK_OF_LAYOUT = {"NWC": 1, "NCW": 1, "NDHWC": 3, "NCDHW": 3}
_PADDING_NAMES = ("SAME", "VALID", "SAME_LOWER")


def algorithms(platform: str) -> tuple[str, ...]:
    """What `conv` takes as `algorithm` on a platform, "cpu" or "cuda"."""
    names = [row["name"] for row in _registry.rows(platform)]
    return "auto", *names, _registry.XLA, "any"


def conv(
    x: ArrayLike,
    w: ArrayLike | PackedWeights,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    layout: str = "NHWC",
    algorithm: str = "auto",
    max_workspace: int | None = None,
) -> jax.Array:
    """Convolve, and apply ``activation(conv + bias + residual)`` in the same pass.

    The number of spatial dimensions, one to three, follows from the rank of ``x``. Every input
    can be differentiated, in forward and reverse mode and to any order, and batched by ``vmap``.

    Args:
      x: input of shape (N, spatial..., C); (N, C, spatial...) with a channels-first layout.
      w: weights of shape (window..., C / groups, K), whatever the layout of ``x``; or what
        `jaxwin.pack` has made of them.
      stride: step of the window: an int, or one per spatial dimension.
      padding: ``"SAME"``, ``"VALID"``, ``"SAME_LOWER"``, an int for every side, or a sequence with
        one int or one ``(low, high)`` pair per spatial dimension.
      dilation: distance between the elements of the window: an int, or one per spatial dimension.
      groups: number of groups that the C input and K output channels are split into.
      bias: shape (K,), or None.
      residual: shape of the output, or None.
      activation: ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01), ``"gelu"`` (tanh
        approximation), ``"silu"``, ``"tanh"``, ``"sigmoid"``, or None; each as in ``jax.nn``.
      layout: ``"NHWC"`` (or ``"channels_last"``) or ``"NCHW"`` (or ``"channels_first"``), at any
        rank; ``"NWC"``, ``"NDHWC"``, ``"NCW"``, ``"NCDHW"`` name the same at their own rank. Holds
        for ``x``, ``residual`` and the result.
      algorithm: ``"auto"``, the name of an algorithm, ``"xla"``, or ``"any"`` (as ``"auto"``, but
        XLA where it was measured to be faster), for this convolution; those of its gradients, and
        of a ``vmap`` over weights, are planned on their own.
      max_workspace: upper limit in bytes for the workspace of this convolution, or None.

    Returns:
      The result, in the layout and dtype of ``x``.

    Raises:
      TypeError, ValueError: naming the argument at fault and its value.
    """
    x = _array("x", x)
    packing = w.packing if isinstance(w, PackedWeights) else None
    if isinstance(w, PackedWeights):
        _pack.check(w)
    else:
        w = _array("w", w)
    rank = x.ndim - 2
    if not 1 <= rank <= 3:
        raise ValueError(
            f"conv: x must have 3, 4 or 5 dimensions (batch, channels and 1 to 3 spatial), got "
            f"shape {x.shape}; add a batch dimension to a single example with x[None]"
        )
    if w.ndim != x.ndim:
        raise ValueError(
            f"conv: w must have as many dimensions as x, (window..., C / groups, K), got w.shape="
            f"{w.shape} for x.shape={x.shape}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"conv: x must be of a floating-point dtype, got {x.dtype.name}; cast it with "
            "x.astype(jnp.float32), or use jaxwin.conv_general_dilated"
        )
    _check_dtype("w", w, x)

    channels_last = _is_channels_last(layout, rank)
    strides = _per_dimension("stride", stride, rank)
    dilations = _per_dimension("dilation", dilation, rank)
    groups = _integer("groups", groups)
    channels = x.shape[-1 if channels_last else 1]
    features = w.shape[-1]
    if groups < 1:
        raise ValueError(f"conv: groups must be at least 1, got groups={groups}")
    if channels % groups:
        raise ValueError(
            f"conv: groups must divide the channels of x, got groups={groups} and {channels} "
            f"channels (x.shape={x.shape}, layout={layout!r})"
        )
    if features % groups:
        raise ValueError(
            f"conv: groups must divide the output channels of w, got groups={groups} and "
            f"{features} channels (w.shape={w.shape})"
        )
    if w.shape[-2] != channels // groups:
        raise ValueError(
            f"conv: w must have C / groups = {channels // groups} input channels, got {w.shape[-2]}"
            f" (w.shape={w.shape} read as (window..., C / groups, K), x.shape={x.shape}, "
            f"layout={layout!r}, groups={groups})"
        )

    if packing is not None and packing.groups != groups:
        raise ValueError(
            f"conv: w was packed with groups={packing.groups}, got groups={groups}; give "
            "jaxwin.pack the groups of the convolution"
        )

    spatial = x.shape[1:-1] if channels_last else x.shape[2:]
    window = [(k - 1) * d + 1 if k else 0 for k, d in zip(w.shape, dilations, strict=False)]
    pads = _pads(padding, spatial, window, strides)

    if activation is not None and activation not in tuple(ACTIVATIONS):
        raise ValueError(
            f"conv: unknown activation {activation!r}; choose one of {_names(ACTIVATIONS)} or None"
        )
    # A program may be lowered for another platform than it is traced on.
    if not any(algorithm in algorithms(platform) for platform in ("cpu", "cuda")):
        here = algorithms(_explain.default_platform())
        raise ValueError(f"conv: unknown algorithm {algorithm!r}; choose one of {_names(here)}")
    if max_workspace is not None:
        max_workspace = _integer("max_workspace", max_workspace)
        if max_workspace < 0:
            raise ValueError(
                f"conv: max_workspace must be a number of bytes, 0 or more, or None, got "
                f"max_workspace={max_workspace}"
            )

    ndim = x.ndim
    data = (0, ndim - 1, *range(1, ndim - 1)) if channels_last else tuple(range(ndim))
    kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
    params: dict[str, Any] = {
        "window_strides": strides,
        "padding": pads,
        "lhs_dilation": (1,) * rank,
        "rhs_dilation": dilations,
        "dimension_numbers": lax.ConvDimensionNumbers(data, kernel, data),
        "feature_group_count": groups,
        "batch_group_count": 1,
        "precision": _compat.canonicalize_precision(None),
        "preferred_element_type": None,
        "out_sharding": None,
    }

    if bias is not None:
        bias = _array("bias", bias)
        _check_dtype("bias", bias, x)
        if bias.shape != (features,):
            raise ValueError(
                f"conv: bias must have shape ({features},), one value per output channel, got "
                f"{bias.shape}"
            )
    if residual is not None:
        residual = _array("residual", residual)
        _check_dtype("residual", residual, x)
        struct: Any = jax.ShapeDtypeStruct
        shapes = (struct(v.shape, v.dtype) for v in (x, w))
        out = jax.eval_shape(lambda x, w: fused_conv(x, w, **params), *shapes)
        if residual.shape != out.shape:
            raise ValueError(
                f"conv: residual must have the shape of the output, {out.shape}, got "
                f"{residual.shape}"
            )
    return fused_conv(
        x,
        w.array if isinstance(w, PackedWeights) else w,
        bias,
        residual,
        activation=activation,
        algorithm=algorithm,
        max_workspace=max_workspace,
        packed=packing,
        **params,
    )


def pack(
    w: ArrayLike,
    x: Any = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    layout: str = "NHWC",
) -> PackedWeights:
    """Pack weights once, for inference, in the order in which the kernels read them.

    `conv` takes the result in place of `w` and gives the same bits. It then need not pack the
    weights at every call, which costs most where there are many weights and few pixels. The
    result is a pytree: pass it to jitted functions as an argument, like any weights.

    Args:
      w: weights of shape (window..., C / groups, K).
      x: the input, or a `jax.ShapeDtypeStruct`, that the weights will mostly meet: they are packed
        for the plan of that convolution. None: for an output of 14 by 14 pixels (or 14, or 14 by
        14 by 14). Any other input works too.
      stride, padding, dilation, groups, layout: as for `conv`. Only `groups` must be the same
        there; the others, like `x`, say what to pack for.

    Returns:
      The packed weights. Where the kernels for such a convolution read no panels (depthwise ones,
      for example), they hold `w` as it is.

    Raises:
      TypeError, ValueError: as `conv`.

    Where a plan for the packed form does not exist (on another platform, with another instruction
    set, divided over several devices, for some shapes), the weights are unpacked in the program,
    which is right but slow; `explain` shows a convolution without "packed" then. Derivatives with
    respect to `x` and to the packed weights work, through unpacked weights.
    """
    w = _array("w", w)
    if not 3 <= w.ndim <= 5:
        raise ValueError(
            "pack: w must have 3 to 5 dimensions (window..., C / groups, K), got shape "
            f"{tuple(w.shape)}"
        )
    if x is None:
        window, channels = w.shape[:-2], w.shape[-2] * groups
        struct: Any = jax.ShapeDtypeStruct
        x = struct((1, *(13 + k for k in window), channels), w.dtype)
        stride, padding, dilation, layout = 1, "VALID", 1, "NHWC"

    def call(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv(
            x, w, stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout
        )

    (problem,) = _explain.problems(call, x, w)
    return _pack.pack_for(w, groups, problem)


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in names)


def _array(name: str, value: Any) -> jax.Array:
    if isinstance(value, list | tuple | str) or value is None:
        raise TypeError(
            f"conv: {name} must be an array, got {type(value).__name__}; convert it with "
            "jnp.asarray"
        )
    return jnp.asarray(value)


def _check_dtype(name: str, value: jax.Array | PackedWeights, x: jax.Array) -> None:
    if value.dtype != x.dtype:
        raise TypeError(
            f"conv: {name} must have the dtype of x, got {value.dtype.name} and x of "
            f"{x.dtype.name}; cast one of them with .astype"
        )


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"conv: {name} must be an int, got {name}={value!r} of type {type(value).__name__}"
        ) from None


def _per_dimension(name: str, value: Any, rank: int) -> tuple[int, ...]:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != rank:
            raise ValueError(
                f"conv: {name} must be an int or a sequence of {rank}, one per spatial dimension, "
                f"got {name}={value!r}"
            )
        values = tuple(_integer(name, v) for v in value)
    else:
        values = (_integer(name, value),) * rank
    if min(values) < 1:
        raise ValueError(f"conv: {name} must be at least 1, got {name}={value!r}")
    return values


def _is_channels_last(layout: str, rank: int) -> bool:
    if layout not in _CHANNELS_LAST + _CHANNELS_FIRST:
        raise ValueError(
            f"conv: unknown layout {layout!r}; choose one of "
            f"{_names(_CHANNELS_LAST + _CHANNELS_FIRST)}"
        )
    last = layout in _CHANNELS_LAST
    if _RANK_OF_LAYOUT.get(layout, rank) != rank:
        raise ValueError(
            f"conv: layout {layout!r} has {_RANK_OF_LAYOUT[layout]} spatial dimensions but x has "
            f"{rank}; {'NHWC' if last else 'NCHW'!r} holds at any rank"
        )
    return last


def _pads(
    padding: Any, spatial: Sequence[int], window: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    rank = len(spatial)
    padding = padding.tolist() if isinstance(padding, np.ndarray) else padding
    if isinstance(padding, str):
        if padding.upper() not in _PADDING_NAMES:
            raise ValueError(
                f"conv: unknown padding {padding!r}; choose one of {_names(_PADDING_NAMES)}, an "
                "int, or a sequence of ints or (low, high) pairs"
            )
        pads = lax.padtype_to_pads(spatial, window[:rank], strides, padding)
        return tuple((lo, hi) for lo, hi in pads)
    if not isinstance(padding, Sequence):
        return ((_integer("padding", padding),) * 2,) * rank
    if len(padding) != rank:
        raise ValueError(
            f"conv: padding must have one int or one (low, high) pair for each of the {rank} "
            f"spatial dimensions, got padding={padding!r}"
        )
    result = []
    for p in padding:
        pair = p if isinstance(p, Sequence) else (p, p)
        if isinstance(p, str) or len(pair) != 2:
            raise ValueError(
                f"conv: each element of padding must be an int or a (low, high) pair, got {p!r} in "
                f"padding={padding!r}"
            )
        result.append((_integer("padding", pair[0]), _integer("padding", pair[1])))
    return tuple(result)
