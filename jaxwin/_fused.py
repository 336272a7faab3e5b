# SPDX-License-Identifier: Apache-2.0
"""The fused convolution: ``act(conv(x, w) + bias + residual)`` as one primitive.

Its meaning is ``decompose``; every rule below is derived from that meaning.

- Derivatives come as unfused convolutions, so reverse mode, higher orders and batching of the
  tangents are the convolution primitive's own. Where the activation's derivative follows from its
  output (relu, relu6, leaky_relu, tanh, sigmoid) the fused call stays in the differentiated
  program and only a mask or factor is kept; otherwise (gelu, silu) the call computes the
  pre-activation, bias and residual still fused, and the activation follows it.
- The rule is a JVP rule of the primitive and not ``jax.custom_jvp``: it then sees which tangents
  are symbolically zero, so a first layer does not convolve the zero tangent of its input.
- Packed weights are an operand of the primitive; where anything but the fused call itself needs
  weights, they are unpacked, which is linear.
- Batching x (and residual) folds the new axis into N and stays fused; a batched weight or bias
  goes through the unfused convolution's batching rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxwin import _compat, _lowering
from jaxwin._pack import Packing, unpack_array
from jaxwin._primitive import conv_p
from jaxwin._problem import Problem

Array = jax.Array
Elementwise = Callable[[Array], Array]

LEAKY_RELU_SLOPE = 0.01


class Activation(NamedTuple):
    """An activation; ``from_output(y, dz)`` is its tangent, where y alone determines it."""

    function: Elementwise
    from_output: Callable[[Array, Array], Array] | None


def _zero_unless(keep: Array, dz: Array) -> Array:
    return lax.select(keep, dz, lax.full_like(dz, 0))


def _leaky_relu_tangent(y: Array, dz: Array) -> Array:
    # A small negative z may underflow to y == -0.0: the sign still tells the side.
    positive = (y > 0) | ((y == 0) & ~jnp.signbit(y))
    return lax.select(positive, dz, jnp.asarray(LEAKY_RELU_SLOPE, dz.dtype) * dz)


def _tanh_tangent(y: Array, dz: Array) -> Array:
    return dz * (1 - y * y)


def _sigmoid_tangent(y: Array, dz: Array) -> Array:
    return dz * (y * (1 - y))


# Values and derivative conventions (relu'(0) = 0, relu6'(6) = 0, leaky_relu'(0) = 1) are jax.nn's.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(jax.nn.relu, lambda y, dz: _zero_unless(y > 0, dz)),
    "relu6": Activation(jax.nn.relu6, lambda y, dz: _zero_unless((y > 0) & (y < 6), dz)),
    "leaky_relu": Activation(lambda z: jax.nn.leaky_relu(z, LEAKY_RELU_SLOPE), _leaky_relu_tangent),
    "tanh": Activation(jnp.tanh, _tanh_tangent),
    "sigmoid": Activation(jax.nn.sigmoid, _sigmoid_tangent),
    "silu": Activation(jax.nn.silu, None),
    "gelu": Activation(lambda z: jax.nn.gelu(z, approximate=True), None),
}


def check_activation(function: str, activation: str | None) -> None:
    """Raises ValueError, in the name of `function`, unless it is None or one of ACTIVATIONS."""
    if activation is not None and activation not in tuple(ACTIVATIONS):
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(
            f"{function}: unknown activation {activation!r}; choose one of {known} or None"
        )


fused_conv_p: Any = Primitive("jaxwin_fused_conv")


def fused_conv(
    x: Array,
    w: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    activation: str | None = None,
    algorithm: str = "auto",
    max_workspace: int | None = None,
    packed: Packing | None = None,
    **conv_params: Any,
) -> Array:
    """Bind the primitive; ``conv_params`` are exactly those of ``lax.conv_general_dilated_p``.

    packed: how ``w`` is packed, if it is.
    """
    x, w, *epilogue = vary_alike(x, w, *(v for v in (bias, residual) if v is not None))
    usual = algorithm == "auto" and max_workspace is None and packed is None
    if not epilogue and activation is None and usual:
        plain: Array = conv_p.bind(x, w, **conv_params)
        return plain
    out: Array = fused_conv_p.bind(
        x,
        w,
        *epilogue,
        activation=activation,
        has_bias=bias is not None,
        has_residual=residual is not None,
        algorithm=algorithm,
        max_workspace=max_workspace,
        packed=packed,
        **conv_params,
    )
    return out


def of_problem(
    problem: Problem,
    x: Array,
    w: Array,
    *epilogue: Array,
    algorithm: str = "auto",
    precision: Any = None,
) -> Array:
    """The convolution that a problem describes; x, w and the epilogue lie as it says."""
    bias, residual = _split_epilogue(epilogue, problem.bias, problem.residual)
    spatial = zip(problem.rhs_spec[2:], problem.rhs_reversal, strict=False)
    reversed_dimensions = [d for d, backwards in spatial if backwards]
    return fused_conv(
        x,
        lax.rev(w, reversed_dimensions) if reversed_dimensions else w,
        bias,
        residual,
        activation=problem.activation,
        algorithm=algorithm,
        window_strides=problem.window_strides,
        padding=problem.padding,
        lhs_dilation=problem.lhs_dilation,
        rhs_dilation=problem.rhs_dilation,
        dimension_numbers=lax.ConvDimensionNumbers(
            problem.lhs_spec, problem.rhs_spec, problem.out_spec
        ),
        feature_group_count=problem.feature_group_count,
        batch_group_count=problem.batch_group_count,
        precision=_compat.canonicalize_precision(precision),
        preferred_element_type=jnp.dtype(problem.out_dtype),
        out_sharding=None,
    )


def decompose(
    x: Array,
    w: Array,
    *epilogue: Array,
    activation: str | None,
    has_bias: bool,
    has_residual: bool,
    algorithm: str = "auto",
    max_workspace: int | None = None,
    packed: Packing | None = None,
    **conv_params: Any,
) -> Array:
    """The meaning of the primitive: unfused convolution, then bias, residual, activation.

    16-bit floats are carried in float32 and rounded once at the end, as in the fused kernels. With
    packed weights it is the fused convolution with the unpacked ones.
    """
    bias, residual = _split_epilogue(epilogue, has_bias, has_residual)
    if packed is not None:
        return fused_conv(
            x,
            unpack_array(w, packed),
            bias,
            residual,
            activation=activation,
            algorithm=algorithm,
            max_workspace=max_workspace,
            **conv_params,
        )
    wide, dtype = _wide_dtype(x, conv_params)
    if wide != dtype:
        conv_params = conv_params | {"preferred_element_type": wide}
    if has_bias or has_residual or activation is not None:
        z = fused_conv(x, w, algorithm=algorithm, max_workspace=max_workspace, **conv_params)
    else:
        z = conv_p.bind(x, w, **conv_params)
    feature = conv_params["dimension_numbers"].out_spec[1]
    if bias is not None:
        bias = _along(bias, feature, z.ndim)
    return _epilogue(z, bias, residual, activation, dtype)


def _split_epilogue(epilogue: Sequence[Any], has_bias: bool, has_residual: bool) -> tuple[Any, Any]:
    """(bias or None, residual or None)"""
    assert len(epilogue) == has_bias + has_residual
    return (epilogue[0] if has_bias else None), (epilogue[-1] if has_residual else None)


def _wide_dtype(x: Array, conv_params: dict[str, Any]) -> tuple[Any, Any]:
    """(type in which the epilogue is computed, type of the result)."""
    dtype = jnp.dtype(conv_params["preferred_element_type"] or x.dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return (jnp.dtype(jnp.float32) if narrow else dtype), dtype


def _along(v: Array, axis: int, ndim: int) -> Array:
    """The vector v as an array of rank ndim that varies along one axis."""
    return lax.expand_dims(v, [d for d in range(ndim) if d != axis])


def _epilogue(
    z: Array, bias: Array | None, residual: Array | None, activation: str | None, dtype: Any
) -> Array:
    for v in (bias, residual):
        if v is not None:
            z = z + v.astype(z.dtype)
    if activation is not None:
        z = ACTIVATIONS[activation].function(z)
    return z.astype(dtype)


def _abstract_eval(
    x: Any,
    w: Any,
    *epilogue: Any,
    activation: str | None,
    has_bias: bool,
    has_residual: bool,
    algorithm: str,
    max_workspace: int | None,
    packed: Packing | None,
    **conv_params: Any,
) -> Any:
    if packed is not None:
        if w.shape != packed.packed_shape:
            raise ValueError(
                f"fused convolution: packed weights have shape {w.shape}, expected "
                f"{packed.packed_shape}"
            )
        w = jax.typeof(jax.eval_shape(functools.partial(unpack_array, packing=packed), w))
    out, _ = conv_p.abstract_eval(x, w, **conv_params)
    bias, residual = _split_epilogue(epilogue, has_bias, has_residual)
    features = out.shape[conv_params["dimension_numbers"].out_spec[1]]
    if bias is not None and bias.shape != (features,):
        raise ValueError(f"fused convolution: bias has shape {bias.shape}, expected ({features},)")
    if residual is not None and residual.shape != out.shape:
        raise ValueError(
            f"fused convolution: residual has shape {residual.shape}, expected {out.shape}"
        )
    return out


def _jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    activation: str | None,
    has_bias: bool,
    has_residual: bool,
    algorithm: str,
    max_workspace: int | None,
    packed: Packing | None,
    **conv_params: Any,
) -> tuple[Any, Any]:
    x, w, *epilogue = primals
    dx, dw, *depilogue = tangents
    bias, residual = _split_epilogue(epilogue, has_bias, has_residual)
    db, dresidual = _split_epilogue(depilogue, has_bias, has_residual)
    act = ACTIVATIONS[activation] if activation is not None else None
    tangent_from_output = act.from_output if act is not None else None

    # The fused output, or the pre-activation where the activation's derivative needs that.
    fused_activation = activation if tangent_from_output is not None else None
    y = fused_conv(
        x,
        w,
        bias,
        residual,
        activation=fused_activation,
        algorithm=algorithm,
        max_workspace=max_workspace,
        packed=packed,
        **conv_params,
    )

    def weights(w: Array) -> Array:
        return w if packed is None else unpack_array(w, packed)

    terms = []
    if not isinstance(dx, ad.Zero):
        terms.append(conv_p.bind(dx, weights(w), **conv_params))
    if not isinstance(dw, ad.Zero):
        terms.append(conv_p.bind(x, weights(dw), **conv_params))
    if db is not None and not isinstance(db, ad.Zero):
        feature = conv_params["dimension_numbers"].out_spec[1]
        terms.append(lax.broadcast_in_dim(db, y.shape, (feature,)))
    if dresidual is not None and not isinstance(dresidual, ad.Zero):
        terms.append(dresidual)
    dz = terms[0]
    for term in terms[1:]:
        dz = dz + term

    if act is None:
        return y, dz
    if tangent_from_output is not None:
        return y, tangent_from_output(y, dz)
    wide, dtype = _wide_dtype(x, conv_params)
    z = y.astype(wide)
    # Differentiated in place, so that one factor is kept and not every intermediate of the formula.
    y, slope = jax.jvp(act.function, (z,), (lax.full_like(z, 1),))
    return y.astype(dtype), dz * slope.astype(dtype)


def _batch(
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    activation: str | None,
    has_bias: bool,
    has_residual: bool,
    algorithm: str,
    max_workspace: int | None,
    packed: Packing | None,
    **conv_params: Any,
) -> tuple[Any, Any]:
    x, w, *epilogue = args
    x_dim, w_dim, *epilogue_dims = dims
    bias, residual = _split_epilogue(epilogue, has_bias, has_residual)
    bias_dim, residual_dim = _split_epilogue(epilogue_dims, has_bias, has_residual)
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    lhs_spec, _, out_spec = conv_params["dimension_numbers"]

    fold = (
        x_dim is not None
        and w_dim is None
        and bias_dim is None
        and (residual is None or residual_dim is not None)
        and conv_params["batch_group_count"] == 1
        and conv_params["out_sharding"] is None
        and size != 0
    )
    if fold:
        out = fused_conv(
            _fold_axis(x, x_dim, lhs_spec[0]),
            w,
            bias,
            None if residual is None else _fold_axis(residual, residual_dim, out_spec[0]),
            activation=activation,
            algorithm=algorithm,
            max_workspace=max_workspace,
            packed=packed,
            **conv_params,
        )
        n = out_spec[0]
        shape = (*out.shape[:n], size, out.shape[n] // size, *out.shape[n + 1 :])
        return lax.reshape(out, shape), n

    # The decomposition, with the new axis where the convolution's batching rule leaves it.
    if packed is not None:
        unpacked = functools.partial(unpack_array, packing=packed)
        w = unpacked(w) if w_dim is None else jax.vmap(unpacked, in_axes=w_dim)(w)
        w_dim = None if w_dim is None else 0
    wide, dtype = _wide_dtype(x, conv_params)
    if wide != dtype:
        conv_params = conv_params | {"preferred_element_type": wide}

    def convolve(x: Array, w: Array) -> Any:
        return conv_p.bind(x, w, **conv_params)

    if x_dim is None and w_dim is None:
        axis = 0
        z = lax.expand_dims(convolve(x, w), [axis])
    else:
        axis = out_spec[0] if w_dim is None else out_spec[1]
        z = jax.vmap(convolve, in_axes=(x_dim, w_dim), out_axes=axis)(x, w)
    if bias is not None:
        feature = out_spec[1] + (axis <= out_spec[1])
        if bias_dim is None:
            bias = _along(bias, feature, z.ndim)
        else:
            # (size, K) or its transpose, in the order of the two axes of z
            bias = jnp.moveaxis(bias, bias_dim, 0 if axis < feature else 1)
            bias = lax.expand_dims(bias, [d for d in range(z.ndim) if d not in (axis, feature)])
    if residual is not None:
        if residual_dim is None:
            residual = lax.expand_dims(residual, [axis])
        else:
            residual = jnp.moveaxis(residual, residual_dim, axis)
    return _epilogue(z, bias, residual, activation, dtype), axis


def _fold_axis(v: Array, source: int, into: int) -> Array:
    """Merge axis ``source`` into axis ``into`` (counted without it), as its slower part."""
    v = jnp.moveaxis(v, source, into)
    return lax.reshape(
        v, (*v.shape[:into], v.shape[into] * v.shape[into + 1], *v.shape[into + 2 :])
    )


def vary_alike(*args: Array) -> list[Array]:
    """Inside shard_map: operands that vary over the same mesh axes, as lax makes them."""
    types = [getattr(jax.typeof(a), "manual_axis_type", None) for a in args]
    varying: list[frozenset[Any]] = [getattr(t, "varying", frozenset()) for t in types]
    union = frozenset[Any]().union(*varying)
    return [
        a if vma == union else jax.lax.pcast(a, tuple(union - vma), to="varying")
        for a, vma in zip(args, varying, strict=True)
    ]


_lower_decomposed: Any = mlir.lower_fun(decompose, multiple_results=False)


def _lower(platform: str, ctx: Any, x: Any, w: Any, *epilogue: Any, **params: Any) -> Sequence[Any]:
    """One native call where this device sees whole, static shapes; else the decomposition.

    The decomposition's convolution knows how a program is divided over devices.
    """
    if _compat.placement(ctx) == "local" and _compat.is_static(ctx, params["padding"]):
        try:
            return _lowering.lower_conv(ctx, x, w, *epilogue, platform=platform, **params)
        except _lowering.NoEpilogueError:
            pass  # XLA computes that
        except NotImplementedError:
            # There is an epilogue and no kernel, for example because of the dtype; or XLA was
            # measured to be faster, which then computes all of it.
            # Only filters in another machine's panels are unpacked for the kernels here.
            if params["packed"] is None:
                params = params | {"algorithm": "xla"}
    decomposed: Sequence[Any] = _lower_decomposed(ctx, x, w, *epilogue, **params)
    return decomposed


fused_conv_p.def_impl(functools.partial(_compat.apply_primitive, fused_conv_p))
fused_conv_p.def_abstract_eval(_abstract_eval)
ad.primitive_jvps[fused_conv_p] = _jvp
batching.primitive_batchers[fused_conv_p] = _batch
_compat.require_devices(fused_conv_p)
_LOWERINGS = {platform: functools.partial(_lower, platform) for platform in ("cpu", "cuda")}
_compat.register_lowering(fused_conv_p, _LOWERINGS, _lower_decomposed)
