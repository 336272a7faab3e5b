# SPDX-License-Identifier: Apache-2.0
"""The convolution primitive: lax's, with a lowering of its own on CPU.

`conv_p` carries exactly the parameters of `lax.conv_general_dilated_p`. Its type rule is lax's.
Its differentiation and batching rules *are* lax's, run with lax's primitive replaced by ours, so
a gradient of our convolution is made of our convolutions and no theory of convolution is written
twice. On platforms other than CPU it lowers to lax's primitive.

Programs that XLA divides over several devices (jit with NamedSharding) use a partitioning rule:
batch and output features are divided freely, a division of the input features is followed by a
sum over devices, spatial and window dimensions are gathered. Inside shard_map shapes are local
already and none of that is needed. lax computes instead where the partitioning rule cannot be
used: a mesh that is only partly manual, programs for several devices that are exported, and
symbolic sizes. Two things that lax's primitive allows and ours does not follow from JAX's rules
for such rules: lowering against an AbstractMesh without devices, and two different meshes in one
program over several devices.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jaxwin import _compat, _lowering
from jaxwin._substitute import call_substituted, register_replacement, substituting

conv_p: Any = Primitive("jaxwin_conv_general_dilated")


# --- public functions ------------------------------------------------------------------------


# Held from the start: somebody may put jaxwin's functions in the place of lax's.
_lax_conv_general_dilated = lax.conv_general_dilated
_lax_conv_transpose = lax.conv_transpose


def conv_general_dilated(
    lhs: jax.typing.ArrayLike,
    rhs: jax.typing.ArrayLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    algorithm: str = "auto",
    max_workspace: int | None = None,
) -> jax.Array:
    """General n-dimensional convolution: `jax.lax.conv_general_dilated` on jaxwin's kernels.

    Arguments (but the last two), result shape, result dtype and errors are those of
    `jax.lax.conv_general_dilated`, whose own code checks and completes the arguments. Any
    transformation of JAX that applies to it applies here.

    Args:
      lhs: input of rank n+2, dimensions in the order of `dimension_numbers[0]` ("NCHW" by
        default: batch, input features, spatial).
      rhs: kernel of rank n+2, `dimension_numbers[1]` ("OIHW"). Its input feature size is that
        of `lhs` divided by `feature_group_count`.
      window_strides: n integers.
      padding: "SAME", "SAME_LOWER", "VALID", or n pairs (low, high); negative values crop.
      lhs_dilation: n integers; zeros between input elements (transposed convolution). Allows
        explicit padding only.
      rhs_dilation: n integers; holes in the kernel (atrous convolution).
      dimension_numbers: None, three strings such as ("NHWC", "HWIO", "NHWC"), or
        `jax.lax.ConvDimensionNumbers`.
      feature_group_count: number of groups that input and output features divide into.
      batch_group_count: number of groups that batch and output features divide into; at most
        one of the two counts may exceed 1.
      precision: as in lax.
      preferred_element_type: dtype of accumulation and result; None for the inputs' dtype.
      out_sharding: sharding of the result in explicit sharding mode.
      algorithm, max_workspace: as for `jaxwin.conv`, which takes floating-point types alone.

    Returns:
      An array of rank n+2 in the order of `dimension_numbers[2]`.

    Raises:
      ValueError, TypeError: where and with the text that `jax.lax.conv_general_dilated` gives.

    On CPU a float32 result is one chain of fused multiply-adds per element over (kernel spatial
    positions, then input channel): its bits do not depend on threads, batch size, layout or
    tuning. Where no kernel exists lax computes the result; when the input features are divided
    over devices, the partial sums of the devices are added by XLA.
    """
    kwargs = {} if out_sharding is None else {"out_sharding": out_sharding}

    def of_lax(lhs: Any, rhs: Any) -> jax.Array:
        return _lax_conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            batch_group_count=batch_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            **kwargs,
        )

    return _convolve("conv_general_dilated", of_lax, lhs, rhs, algorithm, max_workspace)


def _convolve(
    function: str,
    of_lax: Callable[[Any, Any], jax.Array],
    lhs: Any,
    rhs: Any,
    algorithm: str,
    max_workspace: int | None,
) -> jax.Array:
    """What `of_lax` says, on jaxwin's kernels."""
    if algorithm == "auto" and max_workspace is None:
        with substituting():
            return of_lax(lhs, rhs)
    from jaxwin import _conv  # which needs this module

    return _conv.named(function, of_lax, lhs, rhs, algorithm, max_workspace)


def conv_transpose(
    lhs: jax.typing.ArrayLike,
    rhs: jax.typing.ArrayLike,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    transpose_kernel: bool = False,
    precision: Any = None,
    preferred_element_type: Any = None,
    use_consistent_padding: bool = False,
    *,
    algorithm: str = "auto",
    max_workspace: int | None = None,
) -> jax.Array:
    """Transposed convolution: `jax.lax.conv_transpose` on jaxwin's kernels.

    Arguments (but the last two), result and errors are those of `jax.lax.conv_transpose`.

    Args:
      lhs: input of rank n+2, channels last by default ("NHWC").
      rhs: kernel of rank n+2 ("HWIO"); not flipped unless `transpose_kernel`.
      strides: n integers, the factor by which each spatial dimension grows.
      padding: "SAME" or "VALID", meaning the padding of the corresponding forward convolution,
        or n pairs (low, high), meaning the padding of the dilated input, or that of the forward
        convolution with `use_consistent_padding`.
      rhs_dilation: n integers.
      dimension_numbers: as in `conv_general_dilated`, but channels last by default.
      transpose_kernel: flip the kernel's spatial axes and exchange its feature axes, so that the
        result is the gradient of the forward convolution with the same kernel.
      precision: as in lax.
      preferred_element_type: as in `conv_general_dilated`.
      use_consistent_padding: give pairs of integers the meaning that strings have.
      algorithm, max_workspace: as for `jaxwin.conv`; `"segregated"`, for example.

    Returns:
      An array of rank n+2, spatial sizes as `jax.lax.conv_transpose` gives them.

    Raises:
      ValueError, TypeError, AssertionError: as `jax.lax.conv_transpose`.
    """

    def of_lax(lhs: Any, rhs: Any) -> jax.Array:
        return _lax_conv_transpose(
            lhs,
            rhs,
            strides,
            padding,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            transpose_kernel=transpose_kernel,
            precision=precision,
            preferred_element_type=preferred_element_type,
            use_consistent_padding=use_consistent_padding,
        )

    return _convolve("conv_transpose", of_lax, lhs, rhs, algorithm, max_workspace)


def export_safety_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export` must be told so that it accepts programs with our kernels.

    `jax.export.export(jax.jit(f), disabled_checks=jaxwin.export_safety_checks())`. A program
    exported for CPU runs where jaxwin is imported. Programs for several devices and programs
    with symbolic sizes are exported through lax and run anywhere.
    """
    targets: Sequence[str] = getattr(_lowering, "FFI_TARGETS", ("jaxwin_conv",))
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]


# --- lowering --------------------------------------------------------------------------------


def _lower_to_lax_primitive(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Sequence[Any]:
    """Every platform: lax's primitive in our place."""
    bind = functools.partial(_compat.lax_conv_p.bind, **params)
    result: Sequence[Any] = mlir.lower_fun(bind, multiple_results=False)(ctx, lhs, rhs)
    return result


# True while this thread is inside lower_conv: what that lowers in turn is meant for lax.
_lowering_now = threading.local()


def lower_on_cpu(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Sequence[Any]:
    """CPU, for `conv_p` and, under `install()`, for lax's primitive: same operands, parameters."""
    placement = _compat.placement(ctx)
    nested = getattr(_lowering_now, "value", False)
    if nested or placement == "opaque" or not _compat.is_static(ctx, params["padding"]):
        return _compat.lower_through_lax(ctx, lhs, rhs, **params)
    if placement == "local":
        _lowering_now.value = True
        try:
            return _lowering.lower_conv(ctx, lhs, rhs, **params)
        finally:
            _lowering_now.value = False
    lhs_aval, rhs_aval = ctx.avals_in
    call = _partitioned(lhs_aval.shape, rhs_aval.shape, **{**params, "out_sharding": None})
    lower = mlir.lower_fun(call, multiple_results=False)
    (result,) = lower(_compat.without_sharding(ctx), lhs, rhs)
    return [_compat.constrain_result(ctx, result)]


def lower_on_cuda(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Sequence[Any]:
    """CUDA, as `lower_on_cpu`; lax computes what is divided over several devices."""
    nested = getattr(_lowering_now, "value", False)
    if nested or _compat.placement(ctx) != "local" or not _compat.is_static(ctx, params["padding"]):
        return _compat.lower_through_lax(ctx, lhs, rhs, platform="cuda", **params)
    _lowering_now.value = True
    try:
        return _lowering.lower_conv(ctx, lhs, rhs, platform="cuda", **params)
    finally:
        _lowering_now.value = False


LOWERINGS = {"cpu": lower_on_cpu, "cuda": lower_on_cuda}


# --- partitioning ----------------------------------------------------------------------------


def _sharding_rule(
    lhs_shape: Sequence[int], rhs_shape: Sequence[int], params: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The Shardy rule of one convolution, and its keyword arguments.

    Factors: n batch, c input feature, o output feature, g group; every spatial dimension has one
    of its own that needs replication. A grouped dimension is the pair (g, other), group major,
    so only g can be divided there and the others need replication.
    """
    numbers = params["dimension_numbers"]
    feature_groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    groups = max(feature_groups, batch_groups)
    sizes = {
        "g": groups,
        "n": lhs_shape[numbers.lhs_spec[0]] // batch_groups,
        "c": rhs_shape[numbers.rhs_spec[1]],
        "o": rhs_shape[numbers.rhs_spec[0]] // groups,
    }
    replicated: set[str] = set()

    def dimension(factor: str, grouped: bool) -> tuple[str, ...]:
        if not grouped:
            return (factor,)
        replicated.add(factor)
        return ("g",) if sizes[factor] == 1 else ("g", factor)

    lhs = {0: dimension("n", batch_groups > 1), 1: dimension("c", feature_groups > 1)}
    output_feature = dimension("o", groups > 1)
    rhs = {0: output_feature, 1: ("c",)}
    out = {0: ("n",), 1: output_feature}

    def arrange(spec: Sequence[int], dims: dict[int, tuple[str, ...]], letter: str) -> list[Any]:
        dimensions: list[Any] = [None] * len(spec)
        for i, position in enumerate(spec):
            dimensions[position] = dims.get(i, (f"{letter}{i}",))
            if i > 1:
                replicated.add(f"{letter}{i}")
        return dimensions

    tensors = (
        arrange(numbers.lhs_spec, lhs, "x"),
        arrange(numbers.rhs_spec, rhs, "k"),
        arrange(numbers.out_spec, out, "y"),
    )
    dimensions = [d for tensor in tensors for d in tensor]
    alone = {d[0] for d in dimensions if len(d) == 1}
    used = list(dict.fromkeys(factor for d in dimensions for factor in d))
    texts = [
        " ".join(d[0] if len(d) == 1 else f"({' '.join(d)})" for d in tensor) for tensor in tensors
    ]
    return f"{texts[0]}, {texts[1]} -> {texts[2]}", {
        "reduction_factors": () if "c" in replicated else ("c",),
        # Shardy wants them in the order of their first appearance.
        "need_replication_factors": tuple(factor for factor in used if factor in replicated),
        **{factor: sizes[factor] for factor in used if factor not in alone},
    }


def _axes(sharding: Any, dimension: int) -> tuple[Any, ...]:
    """Mesh axes that divide one dimension."""
    spec = getattr(sharding, "spec", ())
    entry = spec[dimension] if dimension < len(spec) else None
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


@functools.lru_cache(maxsize=4096)
def _partitioned(
    lhs_shape: tuple[int, ...], rhs_shape: tuple[int, ...], **params: Any
) -> Callable[..., Any]:
    """The convolution of global operands, with the rule by which XLA may divide it."""
    numbers = params["dimension_numbers"]
    feature_groups = params["feature_group_count"]
    batch_groups = params["batch_group_count"]
    groups = max(feature_groups, batch_groups)
    batch = lhs_shape[numbers.lhs_spec[0]]
    contracted = rhs_shape[numbers.rhs_spec[1]]
    features = rhs_shape[numbers.rhs_spec[0]]

    def whole(lhs: Any, rhs: Any) -> Any:
        return conv_p.bind(lhs, rhs, **params)

    convolution: Any = custom_partitioning(whole)  # type: ignore[no-untyped-call]

    def divide(mesh: Any, lhs: Any, rhs: Any, out: Any) -> tuple[Any, Any, Any]:
        """Mesh axes for (batch or batch group, output feature or group, contraction)."""
        used: set[Any] = set()

        def claim(size: int, *wishes: tuple[Any, ...]) -> tuple[Any, ...]:
            for axes in wishes:
                count = math.prod(mesh.shape[axis] for axis in axes)
                if axes and size % count == 0 and used.isdisjoint(axes):
                    used.update(axes)
                    return axes
            return ()

        lhs_batch, lhs_feature = (_axes(lhs, numbers.lhs_spec[i]) for i in (0, 1))
        rhs_output, rhs_input = (_axes(rhs, numbers.rhs_spec[i]) for i in (0, 1))
        out_batch, out_feature = (_axes(out, numbers.out_spec[i]) for i in (0, 1))
        if batch_groups > 1:
            group_axes = claim(groups, out_feature, lhs_batch, rhs_output)
            return (), group_axes, claim(contracted, lhs_feature, rhs_input)
        batch_axes = claim(batch, out_batch, lhs_batch)
        if feature_groups > 1:
            return batch_axes, claim(groups, out_feature, lhs_feature, rhs_output), ()
        output_axes = claim(features, out_feature, rhs_output)
        return batch_axes, output_axes, claim(contracted, lhs_feature, rhs_input)

    def shardings(mesh: Any, batch_axes: Any, output_axes: Any, sum_axes: Any) -> tuple[Any, ...]:
        def named(spec: Sequence[int], first: Any, second: Any) -> NamedSharding:
            entries: list[Any] = [None] * len(spec)
            entries[spec[0]], entries[spec[1]] = first or None, second or None
            spec_of: Any = PartitionSpec
            return NamedSharding(mesh, spec_of(*entries))

        lhs_batch = output_axes if batch_groups > 1 else batch_axes
        lhs_feature = output_axes if feature_groups > 1 else sum_axes
        return (
            named(numbers.lhs_spec, lhs_batch, lhs_feature),
            named(numbers.rhs_spec, output_axes, sum_axes),
            named(numbers.out_spec, batch_axes, output_axes),
        )

    def partition(mesh: Any, operands: Any, result: Any) -> tuple[Any, ...]:
        lhs, rhs = operands
        axes = divide(mesh, lhs.sharding, rhs.sharding, result.sharding)
        _, output_axes, sum_axes = axes
        lhs_sharding, rhs_sharding, out_sharding = shardings(mesh, *axes)
        local = dict(params)
        divisor = math.prod(mesh.shape[axis] for axis in output_axes)
        if feature_groups > 1:
            local["feature_group_count"] = feature_groups // divisor
        if batch_groups > 1:
            local["batch_group_count"] = batch_groups // divisor

        def one_device(lhs: Any, rhs: Any) -> Any:
            out = conv_p.bind(lhs, rhs, **local)
            psum: Any = lax.psum
            return psum(out, sum_axes) if sum_axes else out

        return mesh, one_device, out_sharding, (lhs_sharding, rhs_sharding)

    def infer_sharding(mesh: Any, operands: Any, result: Any) -> Any:
        lhs, rhs = operands
        return shardings(mesh, *divide(mesh, lhs.sharding, rhs.sharding, None))[2]

    rule, options = _sharding_rule(lhs_shape, rhs_shape, params)
    convolution.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer_sharding,
        sharding_rule=rule,
        **options,
    )
    divided: Callable[..., Any] = convolution
    return divided


# --- registration ----------------------------------------------------------------------------


def _derive(rule: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(call_substituted, rule)


def _register() -> None:
    register_replacement(_compat.lax_conv_p, conv_p)
    conv_p.def_impl(functools.partial(_compat.apply_primitive, conv_p))
    conv_p.def_effectful_abstract_eval(_compat.lax_conv_p.abstract_eval)
    _compat.derive_rules(_compat.lax_conv_p, conv_p, _derive)
    _compat.require_devices(conv_p)
    _compat.register_lowering(conv_p, LOWERINGS, _lower_to_lax_primitive)


_register()
