# SPDX-License-Identifier: Apache-2.0
"""Lowering of a convolution: problem -> plan -> custom call, or lax where no kernel exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from jaxwin import _compat, _cuda, _dispatch, _ffi, _registry
from jaxwin._plan import Plan
from jaxwin._problem import Problem, from_parameters

# Registered at import, so that exported and deserialised programs find their targets.
_REGISTRATIONS: dict[str, Any] = _ffi.registrations()
FFI_TARGETS = tuple(_REGISTRATIONS)
TARGET, SCALE_TARGET, MOMENTS_TARGET = "jaxwin_conv", "jaxwin_scale", "jaxwin_moments"
_compat.register_ffi_target(TARGET, **_REGISTRATIONS[TARGET])
for _name in (SCALE_TARGET, MOMENTS_TARGET):
    jax.ffi.register_ffi_target(_name, _REGISTRATIONS[_name], platform="cpu")
_cuda.register(TARGET)


class NoEpilogueError(NotImplementedError):
    """There are kernels for a convolution, but not for its epilogue."""


def lower_conv(
    ctx: mlir.LoweringRuleContext,
    lhs: Any,
    rhs: Any,
    *epilogue: Any,
    activation: str | None = None,
    has_bias: bool = False,
    has_residual: bool = False,
    algorithm: str = "auto",
    max_workspace: int | None = None,
    packed: Any = None,
    platform: str = "cpu",
    **conv_params: Any,
) -> Sequence[Any]:
    """Lowers one convolution, with its epilogue if it has one, for a platform: "cpu" or "cuda".

    ctx: of the primitive; all sizes static. epilogue: the bias (one value per output feature)
    and the residual (the shape of the result), as far as there are any. conv_params: those of
    lax's primitive. packed: the `Packing` of rhs, or None.
    """
    if packed is not None and platform == "cuda":
        raise NotImplementedError("packed filters are for the CPU")
    out = ctx.avals_out[0]
    unreversed, reversed_dimensions = _without_reversal(
        rhs, conv_params["dimension_numbers"].rhs_spec[2:]
    )
    problem = from_parameters(
        ctx.avals_in[0],
        ctx.avals_in[1],
        out,
        conv_params,
        bias=has_bias,
        residual=has_residual,
        activation=activation,
        reversed_dimensions=reversed_dimensions,
        packed=packed,
    )
    decision = _dispatch.decide(
        problem,
        algorithm=algorithm,
        max_workspace=max_workspace,
        platform=platform,
        exact=_cuda.is_exact(conv_params["precision"]),
    )
    if decision.plan is not None:
        return _custom_call(ctx, problem, decision.plan, lhs, unreversed, *epilogue)
    if _dispatch.without_epilogue(problem) != problem:
        raise NoEpilogueError(decision.reason)
    if epilogue or activation is not None or packed is not None:
        raise NotImplementedError(decision.reason)
    return _compat.lower_through_lax(ctx, lhs, rhs, platform=platform, **conv_params)


def _without_reversal(rhs: Any, spatial: Sequence[int]) -> tuple[Any, tuple[int, ...]]:
    """What a reversed filter was before, and the reversed dimensions; else `rhs` and none.

    Input gradients are convolutions with a reversed filter: our kernels walk it backwards, and XLA
    drops the copy that nobody reads.
    """
    owner = rhs.owner if isinstance(rhs, ir.OpResult) else None
    if owner is None or owner.name != "stablehlo.reverse":
        return rhs, ()
    attribute: Any = owner.attributes["dimensions"]
    dimensions = tuple(int(d) for d in attribute)
    if not set(dimensions) <= set(spatial):
        return rhs, ()
    return owner.operands[0], dimensions


def attributes(problem: Problem, plan: Plan) -> dict[str, Any]:
    """The attributes of the custom call that computes a problem by a plan."""

    def ints(values: Sequence[int]) -> Any:
        return np.asarray(values, np.int64)

    result: dict[str, Any] = {
        name: ints(getattr(problem, name))
        for name in (
            "lhs_spec",
            "rhs_spec",
            "out_spec",
            "window_strides",
            "lhs_dilation",
            "rhs_dilation",
        )
    }
    result.update(
        padding=ints(sum(problem.padding, ())),
        rhs_reversal=ints(problem.rhs_reversal or (False,) * problem.spatial_rank),
        feature_group_count=np.int64(problem.feature_group_count),
        batch_group_count=np.int64(problem.batch_group_count),
        algorithm=plan.algorithm,
        isa=plan.isa,
        threads=np.int64(plan.threads),
        params=ints(plan.params),
        has_bias=np.int64(problem.bias),
        has_residual=np.int64(problem.residual),
        activation=np.int64(_registry.activation_number(problem.activation)),
        rhs_panel=np.int64(problem.rhs_panel),
    )
    if problem.rhs_panel:
        result["rhs_shape"] = ints(problem.rhs_shape)
    return result


def _custom_call(
    ctx: mlir.LoweringRuleContext, problem: Problem, plan: Plan, *operands: Any
) -> Sequence[Any]:
    results = list(ctx.avals_out)
    if plan.workspace_bytes > 0:
        results.append(jax.core.ShapedArray((plan.workspace_bytes,), np.dtype(np.uint8)))
    call = attributes(problem, plan)
    as_it_is = not problem.widened
    if plan.isa == _cuda.ISA:
        as_it_is = _cuda.operand_dtype(problem, plan.algorithm) == problem.lhs_dtype
    if as_it_is:
        return _call(ctx, list(ctx.avals_in), results, operands, call)
    narrow: Sequence[Any] = ctx.avals_in
    wide: list[Any] = [jax.core.ShapedArray(a.shape, np.dtype(np.float32)) for a in narrow]
    exact = [
        stablehlo.convert(ir.RankedTensorType.get(aval.shape, ir.F32Type.get()), value)
        for aval, value in zip(wide, operands, strict=True)
    ]
    results[0] = jax.core.ShapedArray(results[0].shape, np.dtype(np.float32))
    (value,) = _call(ctx, wide, results, exact, call)
    element: dict[str, Any] = {
        "float32": ir.F32Type,
        "bfloat16": ir.BF16Type,
        "float16": ir.F16Type,
    }
    rounded = ir.RankedTensorType.get(problem.out_shape, element[problem.out_dtype].get())
    return [stablehlo.convert(rounded, value)]


def _call(
    ctx: mlir.LoweringRuleContext,
    avals_in: Sequence[Any],
    avals_out: Sequence[Any],
    operands: Sequence[Any],
    call: dict[str, Any],
) -> Sequence[Any]:
    lowering = jax.ffi.ffi_lowering(TARGET)
    context: Any = ctx.replace(  # type: ignore[no-untyped-call]
        avals_in=avals_in, avals_out=avals_out
    )
    return list(lowering(context, *operands, **call))[:1]
