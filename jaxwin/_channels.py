# SPDX-License-Identifier: Apache-2.0
"""Sums and scaling by channel, each one pass over memory: for batch normalisation.

XLA makes a pass of its own for every sum over rows, and scales an array anew for everybody who
reads it. Arrays here are (rows, C), of one type; sums and factors are float32 at least.

- `moments(x, g)` is ``[sum of g, sum of x * g]``, over rows.
- `line(x, c)` is ``c[0] + c[1] * x``. It is the other's transpose in `g`, and a primitive for that
  alone: XLA computes it, in the loops around it.
- `scaled(x, c, residual, activation)` is ``activation(line(x, c) + residual)``, to be stored.

Under vmap all of them are plain operations of JAX. They lower to these on other platforms than CPU,
for 16-bit types (XLA widens in its loops) and in programs that XLA divides over devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxwin import _compat, _registry
from jaxwin._fused import ACTIVATIONS, vary_alike
from jaxwin._lowering import MOMENTS_TARGET, SCALE_TARGET
from jaxwin._settings import settings

Array = jax.Array


def moments(x: Array, g: Array) -> Array:
    """(2, C): the sums over rows of g, and of x * g."""
    out: Array = _moments_p.bind(*vary_alike(x, g))
    return out


def line(x: Array, c: Array) -> Array:
    """(rows, C): c[0] + c[1] * x, for c of shape (2, C), whose type it has."""
    out: Array = _line_p.bind(*vary_alike(x, c))
    return out


def scaled(x: Array, c: Array, residual: Array | None, activation: str | None) -> Array:
    """(rows, C), of the type of x: activation(c[0] + c[1] * x + residual). Not differentiable."""
    operands = (x, c) if residual is None else (x, c, residual)
    out: Array = _scaled_p.bind(*vary_alike(*operands), activation=activation)
    return out


def _wide(v: Array) -> Array:
    return v.astype(jnp.promote_types(v.dtype, jnp.float32))


def _plain_moments(x: Array, g: Array) -> Array:
    x, g = _wide(x), _wide(g)
    return jnp.stack([jnp.sum(g, 0), jnp.sum(x * g, 0)])


def _plain_line(x: Array, c: Array) -> Array:
    return _wide(x) * c[1] + c[0]


def _plain_scaled(x: Array, c: Array, *residual: Array, activation: str | None) -> Array:
    y = _plain_line(x, c)
    for r in residual:
        y = y + r
    if activation is not None:
        y = ACTIVATIONS[activation].function(y)
    return y.astype(x.dtype)


def _primitive(name: str, plain: Callable[..., Array]) -> Any:
    """A primitive whose type is that of `plain`, and which is `plain` under vmap."""
    primitive: Any = Primitive(name)

    def batch(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Array, int]:
        return jax.vmap(functools.partial(plain, **params), in_axes=tuple(dims))(*args), 0

    def type_of(*avals: Any, **params: Any) -> Any:
        return jax.typeof(jax.eval_shape(functools.partial(plain, **params), *avals))

    primitive.def_impl(functools.partial(_compat.apply_primitive, primitive))
    primitive.def_abstract_eval(type_of)
    batching.primitive_batchers[primitive] = batch
    return primitive


def _lower_natively(primitive: Any, plain: Callable[..., Array], target: str) -> None:
    """Has the primitive lower to a custom call where that can be."""
    through_jax = mlir.lower_fun(plain, multiple_results=False)

    def lower(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Sequence[Any]:
        if not _has_kernels(ctx, **params):
            lowered: Sequence[Any] = through_jax(ctx, *args, **params)
            return lowered
        attributes = {"isa": _registry.isa(), "threads": np.int64(_registry.threads())}
        if "activation" in params:
            number = _registry.activation_number(params["activation"])
            attributes["activation"] = np.int64(number)
        return jax.ffi.ffi_lowering(target)(ctx, *args, **attributes)

    _compat.register_lowering(primitive, {"cpu": lower}, through_jax)
    _compat.require_devices(primitive)


def _has_kernels(ctx: Any, activation: str | None = None) -> bool:
    x = ctx.avals_in[0]
    if settings().disable or _compat.placement(ctx) != "local" or not _compat.is_static(ctx):
        return False
    if x.shape[1] == 1:  # lanes are channels; to XLA it is a row of numbers
        return False
    row = _registry.registry()["dtypes"].get(x.dtype.name, {})
    known = (activation or "none") in row.get("scale_activations", ())
    return known and all(a.dtype == x.dtype for a in ctx.avals_in)


_moments_p = _primitive("jaxwin_moments", _plain_moments)
_line_p = _primitive("jaxwin_line", _plain_line)
_scaled_p = _primitive("jaxwin_scaled", _plain_scaled)

_lower_natively(_moments_p, _plain_moments, MOMENTS_TARGET)
_lower_natively(_scaled_p, _plain_scaled, SCALE_TARGET)
mlir.register_lowering(_line_p, mlir.lower_fun(_plain_line, multiple_results=False))


# Both are linear in their second operand, and each is the other's transpose in it.


def _of_products(x: Array, g: Array) -> Array:
    """The part of `moments` that is linear in x."""
    products = jnp.sum(_wide(x) * _wide(g), 0)
    return jnp.stack([jnp.zeros_like(products), products])


def _transpose_moments(ct: Any, x: Any, g: Any) -> Sequence[Any]:
    return [None, ad.Zero(g.aval) if isinstance(ct, ad.Zero) else line(x, ct).astype(g.aval.dtype)]


def _transpose_line(ct: Any, x: Any, c: Any) -> Sequence[Any]:
    return [None, ad.Zero(c.aval) if isinstance(ct, ad.Zero) else moments(x, ct)]


_defjvp: Any = ad.defjvp
_defjvp(
    _moments_p,
    lambda dx, x, g: _of_products(dx, g),
    lambda dg, x, g: moments(x, dg),
)
_defjvp(
    _line_p,
    lambda dx, x, c: _wide(dx) * c[1],
    lambda dc, x, c: line(x, dc),
)
ad.primitive_transposes[_moments_p] = _transpose_moments
ad.primitive_transposes[_line_p] = _transpose_line
