# SPDX-License-Identifier: Apache-2.0
"""A problem as a program has it: what XLA, or dispatch, computes beside a plan."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxwin import _fused
from jaxwin._problem import Problem


def convolve(
    problem: Problem,
    x: jax.Array,
    w: jax.Array,
    *epilogue: jax.Array,
    algorithm: str,
    precision: Any = None,
    out_dtype: str = "",
) -> jax.Array:
    """The result of a problem by jaxwin's `algorithm`, such as "xla".

    epilogue: bias and residual, as far as the problem has them. precision: of lax. out_dtype:
    another than the problem's.
    """
    reversed_dimensions = [
        d
        for d, backwards in zip(problem.rhs_spec[2:], problem.rhs_reversal, strict=False)
        if backwards
    ]
    result: jax.Array = _fused.fused_conv(
        x,
        jax.lax.rev(w, reversed_dimensions) if reversed_dimensions else w,
        epilogue[0] if problem.bias else None,
        epilogue[-1] if problem.residual else None,
        activation=problem.activation,
        algorithm=algorithm,
        window_strides=problem.window_strides,
        padding=problem.padding,
        lhs_dilation=problem.lhs_dilation,
        rhs_dilation=problem.rhs_dilation,
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            problem.lhs_spec, problem.rhs_spec, problem.out_spec
        ),
        feature_group_count=problem.feature_group_count,
        batch_group_count=problem.batch_group_count,
        precision=precision,
        preferred_element_type=np.dtype(out_dtype or problem.out_dtype),
        out_sharding=None,
    )
    return result
