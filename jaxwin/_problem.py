# SPDX-License-Identifier: Apache-2.0
"""The canonical description of one convolution."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxwin import _ffi


@dataclasses.dataclass(frozen=True)
class Problem:
    """One convolution, as the operands and parameters of `lax.conv_general_dilated` say it.

    Shapes are those of the operands as stored; `*_spec` say which stored dimension is the batch
    (for rhs: the output feature), the feature, and each spatial dimension. `padding` holds one
    (low, high) pair per spatial dimension. `bias`, `residual` and `activation` describe a fused
    epilogue. `rhs_reversal` says along which spatial dimensions the window is read backwards, as
    input gradients do; empty for none.
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    lhs_spec: tuple[int, ...]
    rhs_spec: tuple[int, ...]
    out_spec: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_group_count: int = 1
    batch_group_count: int = 1
    lhs_dtype: str = "float32"
    rhs_dtype: str = "float32"
    out_dtype: str = "float32"
    bias: bool = False
    residual: bool = False
    activation: str | None = None
    rhs_reversal: tuple[bool, ...] = ()

    @property
    def spatial_rank(self) -> int:
        """The number of spatial dimensions."""
        return len(self.lhs_shape) - 2

    def native(self) -> dict[str, Any]:
        """The fields that the native core reads."""
        return {
            "lhs_shape": self.lhs_shape,
            "rhs_shape": self.rhs_shape,
            "out_shape": self.out_shape,
            "lhs_spec": self.lhs_spec,
            "rhs_spec": self.rhs_spec,
            "out_spec": self.out_spec,
            "window_strides": self.window_strides,
            "padding": [value for pair in self.padding for value in pair],
            "lhs_dilation": self.lhs_dilation,
            "rhs_dilation": self.rhs_dilation,
            "rhs_reversal": [int(v) for v in self.rhs_reversal] or [0] * self.spatial_rank,
            "feature_group_count": self.feature_group_count,
            "batch_group_count": self.batch_group_count,
        }

    @functools.cached_property
    def _described(self) -> dict[str, Any]:
        result: dict[str, Any] = _ffi.describe(self.native())
        return result

    @property
    def flops(self) -> float:
        """Floating-point operations (two per multiplication), without inserted zeros."""
        return float(self._described.get("flops", 0.0))

    @property
    def chunk_rows(self) -> int:
        """0: the reduction is one chain; else the window rows per chunk (numerical contract)."""
        return int(self._described.get("chunk_rows", 0))

    def __str__(self) -> str:
        def dims(shape: Sequence[int]) -> str:
            return "x".join(map(str, shape))

        spatial = [self.lhs_shape[d] for d in self.lhs_spec[2:]]
        window = [self.rhs_shape[d] for d in self.rhs_spec[2:]]
        parts = [
            f"n{self.lhs_shape[self.lhs_spec[0]]}",
            f"{dims(spatial)}",
            f"c{self.lhs_shape[self.lhs_spec[1]]}",
            f"k{self.rhs_shape[self.rhs_spec[0]]}",
            f"w{dims(window)}",
        ]
        if any(s != 1 for s in self.window_strides):
            parts.append(f"s{dims(self.window_strides)}")
        if any(pair != (0, 0) for pair in self.padding):
            parts.append("p" + "x".join(f"{low}:{high}" for low, high in self.padding))
        if any(d != 1 for d in self.lhs_dilation):
            parts.append(f"ld{dims(self.lhs_dilation)}")
        if any(d != 1 for d in self.rhs_dilation):
            parts.append(f"rd{dims(self.rhs_dilation)}")
        if any(self.rhs_reversal):
            parts.append("reversed")
        if self.feature_group_count > 1:
            parts.append(f"g{self.feature_group_count}")
        if self.batch_group_count > 1:
            parts.append(f"bg{self.batch_group_count}")
        parts += [word for word, on in (("bias", self.bias), ("residual", self.residual)) if on]
        if self.activation is not None:
            parts.append(self.activation)
        if self.lhs_dtype != "float32":
            parts.append(self.lhs_dtype)
        return " ".join(parts)


def from_parameters(
    lhs: Any,
    rhs: Any,
    out: Any,
    params: dict[str, Any],
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
    reversed_dimensions: Sequence[int] = (),
) -> Problem:
    """The problem of a convolution with these abstract operands and lax's parameters.

    lhs, rhs, out: anything with `shape` and `dtype`, sizes static. reversed_dimensions: those
    dimensions of rhs that are read backwards; spatial ones only.
    """
    numbers = params["dimension_numbers"]

    def ints(values: Sequence[Any]) -> tuple[int, ...]:
        return tuple(int(v) for v in values)

    return Problem(
        lhs_shape=ints(lhs.shape),
        rhs_shape=ints(rhs.shape),
        out_shape=ints(out.shape),
        lhs_spec=ints(numbers.lhs_spec),
        rhs_spec=ints(numbers.rhs_spec),
        out_spec=ints(numbers.out_spec),
        window_strides=ints(params["window_strides"]),
        padding=tuple((int(low), int(high)) for low, high in params["padding"]),
        lhs_dilation=ints(params["lhs_dilation"]),
        rhs_dilation=ints(params["rhs_dilation"]),
        feature_group_count=int(params["feature_group_count"]),
        batch_group_count=int(params["batch_group_count"]),
        lhs_dtype=np.dtype(lhs.dtype).name,
        rhs_dtype=np.dtype(rhs.dtype).name,
        out_dtype=np.dtype(out.dtype).name,
        bias=bias,
        residual=residual,
        activation=activation,
        rhs_reversal=(
            tuple(d in reversed_dimensions for d in numbers.rhs_spec[2:])
            if reversed_dimensions
            else ()
        ),
    )
