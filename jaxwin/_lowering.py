# SPDX-License-Identifier: Apache-2.0
"""CPU lowering of a convolution: problem -> plan -> custom call, or lax where no kernel exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import lax
from jax.interpreters import mlir


def lower_conv(
    ctx: mlir.LoweringRuleContext,
    lhs: Any,
    rhs: Any,
    *epilogue: Any,
    activation: str | None = None,
    has_bias: bool = False,
    has_residual: bool = False,
    **conv_params: Any,
) -> Sequence[Any]:
    """Stub: lowers an unfused convolution through lax."""
    assert not epilogue and activation is None

    def through_lax(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated_p.bind(x, w, **conv_params)

    return mlir.lower_fun(through_lax, multiple_results=False)(ctx, lhs, rhs)
