# SPDX-License-Identifier: Apache-2.0
"""Everything jaxwin takes from JAX's private modules. No other file mentions them.

Each name is here because JAX has no public form of it; a new JAX release that moves one is
repaired in this file alone. Written for jax 0.10.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import effects as _effects
from jax._src import linear_util as _lu
from jax._src import mesh as _mesh
from jax._src import sharding_impls as _sharding_impls
from jax._src import util as _util
from jax._src.interpreters import ad as _ad
from jax._src.interpreters import batching as _batching
from jax._src.interpreters import mlir as _mlir
from jax._src.lax import lax as _lax
from jax.extend import backend as _backend
from jaxlib import xla_client as _xla_client

Jaxpr: Any = _core.Jaxpr
ClosedJaxpr: Any = _core.ClosedJaxpr
Trace: Any = _core.Trace
WrappedFun: Any = _lu.WrappedFun
set_current_trace: Any = _core.set_current_trace
weakref_lru_cache: Any = _util.weakref_lru_cache
apply_primitive: Any = _dispatch.apply_primitive
ConvDimensionNumbers = lax.ConvDimensionNumbers
lax_conv_p: Any = lax.conv_general_dilated_p
shaped_array: Any = _core.ShapedArray

# What lax makes of a convolution's `precision`, such as None under `jax.default_matmul_precision`.
canonicalize_precision: Any = _lax.canonicalize_precision

# The value of this context is part of every key of JAX's caches: code traced while convolutions
# are being replaced never meets code traced while they are not.
substitution_context: Any = jax.make_user_context(False)  # type: ignore[no-untyped-call]


def current_trace() -> Any:
    """The trace that primitives bound now would go to."""
    return _core.trace_ctx.trace


def wrap_callable(fun: Any, transformation: Callable[..., Any]) -> Any:
    """`fun` (a WrappedFun or a plain callable) called through `transformation(fun, *args)`."""
    if isinstance(fun, WrappedFun):
        return _lu.transformation2(transformation)(fun)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return transformation(fun, *args, **kwargs)

    return wrapped


# --- rules -----------------------------------------------------------------------------------

# Differentiation and batching rules by primitive. A rule takes values and parameters, and binds
# further primitives: derived by calling it with the convolution replaced.
_DERIVABLE_RULES: tuple[Any, ...] = (
    _ad.primitive_jvps,
    _ad.primitive_linearizations,
    _ad.primitive_transposes,
    _ad.fancy_transposes,
    _batching.fancy_primitive_batchers,
)


def derive_rules(source: Any, target: Any, derive: Callable[[Any], Any]) -> None:
    """Gives `target` every differentiation and batching rule that `source` has, via `derive`."""
    for registry in _DERIVABLE_RULES:
        if source in registry:
            registry[target] = derive(registry[source])


# --- lowering --------------------------------------------------------------------------------


def register_lowering(
    primitive: Any, rules: Mapping[str, Callable[..., Any]], other: Callable[..., Any]
) -> None:
    """Makes `rules` (by platform) and `other` the lowering of `primitive`, called where it stands.

    By default JAX lowers equal operations once, in a function of its own, where a rule cannot see
    what its operands come from. Where it does not, in programs for several platforms it can call
    one rule only (jax 0.10): so there is one, which chooses.
    """
    rule = _rule_by_platform(primitive, dict(rules), other)
    _mlir.register_lowering(primitive, rule, cacheable=False)


def _rule_by_platform(
    primitive: Any, rules: dict[str, Callable[..., Any]], default: Callable[..., Any]
) -> Callable[..., Any]:
    def rule(ctx: Any, *args: Any, **params: Any) -> Any:
        widened = ctx.replace(avals_out=list(ctx.avals_out))
        return _mlir.lower_per_platform(
            widened, str(primitive), rules, default, _effects.no_effects, *args, **params
        )

    return rule


# lax's own rules, taken before anybody can have replaced them through jaxwin.
_LAX_RULES: dict[str, Any] = {
    platform: rules[lax_conv_p]
    for platform, rules in _mlir._platform_specific_lowerings.items()
    if lax_conv_p in rules
}
_LAX_DEFAULT_RULE: Any = _mlir._lowerings[lax_conv_p]


def lower_through_lax(
    ctx: Any, lhs: Any, rhs: Any, platform: str = "cpu", **conv_params: Any
) -> Sequence[Any]:
    """Lowers one convolution for a platform by lax's original rule.

    It stays that rule while `jaxwin.install()` is in force, so a fallback cannot recurse.
    `ctx.avals_in` and `ctx.avals_out` must be those of the convolution.
    """
    entry = _LAX_RULES.get(platform, _LAX_DEFAULT_RULE)
    result: Sequence[Any] = entry.rule(ctx, lhs, rhs, **conv_params)
    return result


def replace_lax_lowering(replacements: dict[str, Callable[..., Any]]) -> None:
    """Makes `replacements` the lowerings of lax's convolution primitive on their platforms."""
    for platform in _LAX_RULES:
        del _mlir._platform_specific_lowerings[platform][lax_conv_p]
    rules = {platform: entry.rule for platform, entry in _LAX_RULES.items()} | replacements
    by_platform = _rule_by_platform(lax_conv_p, rules, _LAX_DEFAULT_RULE.rule)
    _mlir.register_lowering(lax_conv_p, by_platform, cacheable=False)
    require_devices(lax_conv_p)


def restore_lax_lowering() -> None:
    """Undoes `replace_lax_lowering`."""
    for platform, entry in _LAX_RULES.items():
        _mlir._platform_specific_lowerings[platform][lax_conv_p] = entry
    _mlir._lowerings[lax_conv_p] = _LAX_DEFAULT_RULE
    _mlir._uncacheable_primitives.discard(lax_conv_p)
    _dispatch.prim_requires_devices_during_lowering.discard(lax_conv_p)


def require_devices(primitive: Any) -> None:
    """Makes JAX tell the lowering of programs that contain `primitive` their devices and mesh."""
    _dispatch.prim_requires_devices_during_lowering.add(primitive)


def forget_device_requirements() -> None:
    """Drops what JAX remembers about which programs need devices at lowering."""
    _dispatch.jaxpr_has_prim_requiring_devices.cache_clear()


def is_static(ctx: Any, padding: Sequence[tuple[Any, Any]] = ()) -> bool:
    """Whether every size in the operands, the result and the padding is a plain integer."""
    shapes = [aval.shape for aval in (*ctx.avals_in, *ctx.avals_out)]
    return all(
        isinstance(size, (int, np.integer)) for sizes in (*shapes, *padding) for size in sizes
    )


def placement(ctx: Any) -> str:
    """How the program being lowered is laid out over devices.

    - "local": one device, or inside a fully manual region: shapes are those of one device.
    - "partitioned": XLA's partitioner will divide the program, and the mesh is known.
    - "opaque": it will be divided, but the mesh is unknown, only partly automatic, or the
      program is being exported, so that a partitioning callback could not outlive this process.
    """
    context = ctx.module_context.axis_context
    if isinstance(context, _sharding_impls.SPMDAxisContext):
        automatic = set(context.mesh.axis_names) - set(context.manual_axes)
        sizes = (context.mesh.shape[name] for name in automatic)
        return "local" if math.prod(sizes) == 1 else "opaque"
    if isinstance(context, _sharding_impls.ShardingContext):
        if context.num_devices == 1:
            return "local"
        if context.device_assignment is None or ctx.module_context.lowering_parameters.for_export:
            return "opaque"
        if context.abstract_mesh is None and _mesh.thread_resources.env.physical_mesh.empty:
            return "opaque"
        return "partitioned"
    return "local"


def without_sharding(ctx: Any) -> Any:
    """`ctx` with operand and result types reduced to shape and dtype."""
    return ctx.replace(
        avals_in=[shaped_array(a.shape, a.dtype) for a in ctx.avals_in],
        avals_out=[shaped_array(a.shape, a.dtype) for a in ctx.avals_out],
    )


def constrain_result(ctx: Any, value: Any) -> Any:
    """Attaches to `value` the sharding that the result's type carries (explicit sharding)."""
    lower: Any = _mlir.lower_with_sharding_in_types
    return lower(ctx, value, ctx.avals_out[0])


def may_use_cuda() -> bool:
    """Whether JAX has a plugin for CUDA, and may use it; starts no backend."""
    wanted = str(jax.config.jax_platforms or "")  # type: ignore[attr-defined]
    if wanted and not {"cuda", "gpu"} & set(wanted.split(",")):
        return False
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return any(importlib.util.find_spec(name) is not None for name in plugins)


def platform_version() -> str:
    """What the default backend says of itself, such as "cpu" or "cuda 13000"; starts it."""
    return str(_backend.get_backend().platform_version)


def inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters: bodies of loops, branches, calls."""
    return list(_core.jaxprs_in_params(params))


def bind_equation(equation: Any, values: Sequence[Any]) -> list[Any]:
    """The results of one equation of a jaxpr."""
    primitive = equation.primitive
    with equation.ctx.manager:
        result = primitive.bind(*values, **primitive.get_bind_params(equation.params))
    return list(result) if primitive.multiple_results else [result]


def register_ffi_target(name: str, handlers: dict[str, Any], state_type: dict[str, Any]) -> None:
    """Registers a CPU custom-call target whose call sites keep a state of `state_type`.

    What is registered before the CPU client exists waits for it, but jaxlib then registers waiting
    targets before waiting types, and refuses a target of an unknown type. So types are told now.
    """
    client: Any = _xla_client
    client.register_custom_type_handler("cpu", client._xla.register_custom_type)
    jax.ffi.register_ffi_type(f"{name}_state", state_type, platform="cpu")  # type: ignore[arg-type]
    jax.ffi.register_ffi_target(name, handlers, platform="cpu")
