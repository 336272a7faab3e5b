# SPDX-License-Identifier: Apache-2.0
"""``conv``: the friendly form. It checks, names and canonicalises; ``_fused`` does the work."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.typing import ArrayLike

from jaxwin import _compat, _explain, _layouts, _pack, _registry
from jaxwin._fused import check_activation, fused_conv
from jaxwin._pack import PackedWeights
from jaxwin._primitive import conv_p

Padding = Literal["SAME", "VALID", "SAME_LOWER"] | int | Sequence[int | tuple[int, int]]

_PRECISIONS = (None, "default", "high", "highest", "fastest")
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
    precision: str | None = None,
    max_workspace: int | None = None,
) -> jax.Array:
    """Convolve, and apply ``activation(conv + bias + residual)`` in the same pass.

    The number of spatial dimensions, one to three, follows from the rank of ``x``. Every input
    can be differentiated, in forward and reverse mode and to any order, and batched by ``vmap``.

    Args:
      x: input of shape (N, spatial..., C), or as `layout` says.
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
      layout: of ``x``, ``residual`` and the result. ``"NHWC"`` (or ``"channels_last"``),
        ``"NCHW"`` (or ``"channels_first"``), ``"CHWN"``, or ``"CHWN8"`` or ``"CHWN16"``: images in
        blocks, (ceil(N / 8), C, spatial..., 8), as `jaxwin.to_layout` makes them. Those names hold
        at any rank; ``"NWC"``, ``"NDHWC"``, ``"CWN8"`` and so on name the same at their own.
      algorithm: ``"auto"``, the name of an algorithm, ``"xla"``, or ``"any"`` (as ``"auto"``, but
        also algorithms of other numerical families, which round otherwise, where they are faster,
        and XLA where it was measured to be), for this convolution; those of its gradients, and of a
        ``vmap`` over weights, are planned on their own, in the canonical family.
      precision: ``None``, or lax's ``"default"``, ``"high"`` or ``"highest"``, which make no
        difference on the CPU; ``"fastest"`` makes ``algorithm="any"`` of ``"auto"``, and is no
        different from ``None`` where an algorithm is named.
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
    arrangement = _layouts.parse("conv", layout, x.ndim)
    rank = arrangement.spatial_rank(x.ndim)
    if not 1 <= rank <= 3:
        raise ValueError(
            f"conv: x must have 3, 4 or 5 dimensions (batch, channels and 1 to 3 spatial), got "
            f"shape {x.shape}; add a batch dimension to a single example with x[None]"
            if not arrangement.block
            else f"conv: x in layout {layout!r} must have 4, 5 or 6 dimensions (blocks, channels, "
            f"1 to 3 spatial and images), got shape {x.shape}; convert it with jaxwin.to_layout"
        )
    _layouts.check_blocks("conv", layout, arrangement, x.shape)
    if w.ndim != rank + 2:
        raise ValueError(
            f"conv: w must have as many dimensions as x, (window..., C / groups, K), got w.shape="
            f"{w.shape} for x.shape={x.shape}"
            if not arrangement.block
            else f"conv: w must have {rank + 2} dimensions, (window..., C / groups, K), got "
            f"w.shape={w.shape} for x.shape={x.shape} in layout {layout!r}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"conv: x must be of a floating-point dtype, got {x.dtype.name}; cast it with "
            "x.astype(jnp.float32), or use jaxwin.conv_general_dilated"
        )
    _check_dtype("w", w, x)

    strides = _per_dimension("stride", stride, rank)
    dilations = _per_dimension("dilation", dilation, rank)
    groups = _integer("groups", groups)
    channels = arrangement.features(x.shape)
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

    if isinstance(w, PackedWeights) and w.groups != groups:
        raise ValueError(
            f"conv: w was packed with groups={w.groups}, got groups={groups}; give "
            "jaxwin.pack the groups of the convolution"
        )

    spatial = arrangement.spatial(x.shape)
    window = [(k - 1) * d + 1 if k else 0 for k, d in zip(w.shape, dilations, strict=False)]
    pads = _pads(padding, spatial, window, strides)

    check_activation("conv", activation)
    max_workspace = _plan_wishes("conv", algorithm, max_workspace)
    if precision not in _PRECISIONS:
        raise ValueError(
            f"conv: unknown precision {precision!r}; choose one of {_names(_PRECISIONS[1:])}, or "
            "None"
        )
    if precision == "fastest":
        algorithm, precision = "any" if algorithm == "auto" else algorithm, None

    if arrangement.block and rank == 3:  # blocks would be a fourth spatial dimension
        n = arrangement.images(x.shape)
        images, blocks = _layouts.Layout("images"), arrangement
        if residual is not None:
            residual = _array("residual", residual)
            if residual.ndim != x.ndim or residual.shape[-1] != blocks.block:
                raise ValueError(
                    f"conv: residual must have the shape of the output, in layout {layout!r}, got "
                    f"{residual.shape}"
                )
            residual = _layouts.out_of(residual, blocks, blocks.images(residual.shape), images)
        result = conv(
            _layouts.out_of(x, blocks, n, images),
            w,
            stride=strides,
            padding=pads,
            dilation=dilations,
            groups=groups,
            bias=bias,
            residual=residual,
            activation=activation,
            layout="CHWN",
            algorithm=algorithm,
            precision=precision,
            max_workspace=max_workspace,
        )
        return _layouts.into(result, images, blocks)

    # Blocks are a spatial dimension in front, of three in all if there is but one other, so that
    # the native core tells them from rows of pixels.
    front = max(1, 3 - rank) if arrangement.block else 0
    ones = (1,) * front
    added = tuple(range(2, 1 + front))  # dimensions of size 1 in blocked arrays
    ndim = rank + 2 + front
    data = arrangement.specification(ndim)
    kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
    params: dict[str, Any] = {
        "window_strides": ones + strides,
        "padding": ((0, 0),) * front + pads,
        "lhs_dilation": ones + (1,) * rank,
        "rhs_dilation": ones + dilations,
        "dimension_numbers": lax.ConvDimensionNumbers(data, kernel, data),
        "feature_group_count": groups,
        "batch_group_count": 1,
        "precision": _compat.canonicalize_precision(precision),
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
        shapes = (
            struct(s, v.dtype) for v, s in ((x, _with(x.shape, added)), (w, ones + tuple(w.shape)))
        )
        out = jax.eval_shape(lambda x, w: fused_conv(x, w, **params), *shapes)
        expected = tuple(size for d, size in enumerate(out.shape) if d not in added)
        if residual.shape != expected:
            raise ValueError(
                f"conv: residual must have the shape of the output, {expected}, got "
                f"{residual.shape}"
            )
        residual = lax.expand_dims(residual, added)
    if isinstance(w, PackedWeights):
        weights = w.array if packing is not None else lax.expand_dims(w.array, range(front))
    else:
        weights = lax.expand_dims(w, range(front))
    if packing is not None:
        packing = packing._replace(shape=ones + packing.shape)
    result = fused_conv(
        lax.expand_dims(x, added),
        weights,
        bias,
        residual,
        activation=activation,
        algorithm=algorithm,
        max_workspace=max_workspace,
        packed=packing,
        **params,
    )
    return lax.squeeze(result, added)


def named(
    function: str,
    of_lax: Callable[[Any, Any], Any],
    lhs: Any,
    rhs: Any,
    algorithm: str,
    max_workspace: int | None,
) -> jax.Array:
    """`of_lax(lhs, rhs)`, one of lax's convolutions, by that algorithm and within that workspace.

    function: the public function whose arguments are checked.
    """
    max_workspace = _plan_wishes(function, algorithm, max_workspace)
    closed = jax.make_jaxpr(of_lax)(lhs, rhs)
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(closed.jaxpr.invars, (jnp.asarray(lhs), jnp.asarray(rhs)), strict=True))
    for equation in closed.jaxpr.eqns:  # beside the convolution: what flips the kernel
        values = [v.val if isinstance(v, core.Literal) else known[v] for v in equation.invars]
        if equation.primitive in (_compat.lax_conv_p, conv_p):
            x, w = values
            wishes: Any = {"algorithm": algorithm, "max_workspace": max_workspace}
            results = [fused_conv(x, w, **wishes, **equation.params)]
        else:
            results = _compat.bind_equation(equation, values)
        known |= dict(zip(equation.outvars, results, strict=True))
    result: jax.Array = known[closed.jaxpr.outvars[0]]
    return result


def _plan_wishes(function: str, algorithm: str, max_workspace: Any) -> int | None:
    """Raises where there is no such algorithm or limit; the limit."""
    # A program may be lowered for another platform than it is traced on.
    if not any(algorithm in algorithms(platform) for platform in ("cpu", "cuda")):
        here = algorithms(_explain.default_platform())
        raise ValueError(
            f"{function}: unknown algorithm {algorithm!r}; choose one of {_names(here)}"
        )
    if max_workspace is None:
        return None
    limit = _integer("max_workspace", max_workspace, function)
    if limit < 0:
        raise ValueError(
            f"{function}: max_workspace must be a number of bytes, 0 or more, or None, got "
            f"max_workspace={limit}"
        )
    return limit


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


def _with(shape: Sequence[int], added: Sequence[int]) -> tuple[int, ...]:
    """The shape with dimensions of size 1 at these positions."""
    result = list(shape)
    for d in added:
        result.insert(d, 1)
    return tuple(result)


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


def _integer(name: str, value: Any, function: str = "conv") -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{function}: {name} must be an int, got {name}={value!r} of type "
            f"{type(value).__name__}"
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
