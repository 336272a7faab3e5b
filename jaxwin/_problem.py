# SPDX-License-Identifier: Apache-2.0
"""The canonical description of one convolution."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxwin import _ffi

# Dtypes whose values are all float32 values, and those that a float32 result is rounded to.
_NARROW = ("bfloat16", "float16", "int8", "uint8", "int16", "uint16")
_ROUNDED = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One convolution, as the operands and parameters of `lax.conv_general_dilated` say it.

    Shapes are those of the operands as stored; `*_spec` say which stored dimension is the batch
    (for rhs: the output feature), the feature, and each spatial dimension. `padding` holds one
    (low, high) pair per spatial dimension. `bias`, `residual` and `activation` describe a fused
    epilogue. `rhs_reversal` says along which spatial dimensions the window is read backwards, as
    input gradients do; empty for none. `rhs_panel` is the panel of filters that `jaxwin.pack` has
    packed, 0 for others; `rhs_shape` and `rhs_spec` are those before.
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
    rhs_panel: int = 0

    def __hash__(self) -> int:
        # Dispatch looks a problem up several times, and a hash takes longer than the rest of a
        # look-up. Shapes tell most problems apart.
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = hash(_SHAPES(self))
        return known

    def __getstate__(self) -> dict[str, Any]:
        # Of strings another process has other hashes.
        return {k: v for k, v in self.__dict__.items() if k not in ("_hash", "_asked")}

    @property
    def spatial_rank(self) -> int:
        """The number of spatial dimensions."""
        return len(self.lhs_shape) - 2

    def native(self) -> Mapping[str, Any]:
        """The fields that the native core reads, among others; not to be changed."""
        if self.widened:
            return self.__dict__ | {"lhs_dtype": "float32", "out_dtype": "float32"}
        return self.__dict__

    def asked(self) -> _ffi.Asked:
        """The same as the native core has read it, for dispatch, which asks several questions."""
        known: _ffi.Asked | None = self.__dict__.get("_asked")
        if known is None:
            known = self.__dict__["_asked"] = _ffi.Asked(self.__dict__, self.widened)
        return known

    @property
    def widened(self) -> bool:
        """Whether float32 kernels compute it between exact conversions and one rounding.

        XLA converts the operands (every value of these dtypes is a float32), and rounds the result.
        Only where no kernel reads the operands themselves.
        """
        if self.lhs_dtype == self.rhs_dtype == self.out_dtype == "float32":
            return False
        return self._widened

    @functools.cached_property
    def _widened(self) -> bool:
        inputs, out = {self.lhs_dtype, self.rhs_dtype}, self.out_dtype
        if not (inputs <= {"float32", *_NARROW} and out in _ROUNDED):
            return False
        rows = _ffi.candidates(self.__dict__).values()
        return all("rejected" in row or row["family"] != "canonical" for row in rows)

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

    @property
    def direction(self) -> str:
        """What the problem looks like: "fwd", "dx" (dilated input) or "dw" (weight gradient).

        The parameters of lax do not say it: a transposed convolution is a "dx", a convolution with
        a window larger than its output a "dw".
        """
        return _ffi.direction(self.__dict__)

    @property
    def key(self) -> str:
        """The problem as text (JSON), the same for equal problems.

        Fields with their default value are left out, so that a later version with more fields
        writes the same text.
        """
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_key(cls, text: str) -> Problem:
        """The problem that `key` describes; the text may come from anywhere.

        Raises:
            ValueError: it describes no problem of this version.
        """
        try:
            values = json.loads(text)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"problem: not JSON: {str(text)[:80]!r}") from None
        if not isinstance(values, dict):
            raise ValueError(f"problem: not an object: {text[:80]!r}")
        try:
            problem = cls(**{name: _tuples(value) for name, value in values.items()})
        except TypeError:
            names = {field.name for field in dataclasses.fields(cls)}
            unknown = ", ".join(sorted(values.keys() - names))[:80]
            wrong = f"unknown fields: {unknown}" if unknown else "fields are missing"
            raise ValueError(f"problem: {wrong}") from None
        if wrong := _malformed(problem):
            raise ValueError(f"problem: {wrong}")
        return problem

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
        if self.rhs_panel:
            parts.append(f"packed{self.rhs_panel}")
        parts += [word for word, on in (("bias", self.bias), ("residual", self.residual)) if on]
        if self.activation is not None:
            parts.append(self.activation)
        if self.lhs_dtype != "float32":
            parts.append(self.lhs_dtype)
        return " ".join(parts)


_SHAPES = operator.attrgetter("lhs_shape", "rhs_shape", "out_shape", "lhs_dtype")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if type(value) is list else value


def _are_ints(values: Any) -> bool:
    return (
        type(values) is tuple
        and {*map(type, values)} <= {int}
        and not (values and (min(values) < -_LIMIT or max(values) > _LIMIT))
    )


def _is_name(value: Any) -> bool:
    return type(value) is str and value.isidentifier()


_LIMIT = 2**62
# What a field may hold, by its annotation.
_FORMS: dict[Any, Callable[[Any], bool]] = {
    "tuple[int, ...]": _are_ints,
    "tuple[bool, ...]": lambda v: type(v) is tuple and {*map(type, v)} <= {bool},
    "tuple[tuple[int, int], ...]": lambda v: (
        type(v) is tuple and all(_are_ints(pair) and len(pair) == 2 for pair in v)
    ),
    "int": lambda v: _are_ints((v,)),
    "bool": lambda v: type(v) is bool,
    "str": _is_name,
    "str | None": lambda v: v is None or _is_name(v),
}


def _malformed(p: Problem) -> str:
    """Which field has not the form that its annotation and the rank give it; else empty."""
    rank = len(p.lhs_shape) if type(p.lhs_shape) is tuple else 0
    if not 2 <= rank <= 64:
        return "lhs_shape"
    for field in dataclasses.fields(p):
        name, value = field.name, getattr(p, field.name)
        if not _FORMS[field.type](value):
            return name
        of_arrays = name.endswith(("_shape", "_spec"))
        if type(value) is tuple and value != field.default:
            if len(value) != (rank if of_arrays else rank - 2):
                return name
        if name.endswith("_spec") and {*value} != {*range(rank)}:
            return name
        if name.endswith(("_shape", "_strides", "_dilation")) and value and min(value) < 1:
            return name
        if name.endswith("_count") and value < 1:
            return name
        if name.endswith("_panel") and value < 0:
            return name
    return ""


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
    packed: Any = None,
) -> Problem:
    """The problem of a convolution with these abstract operands and lax's parameters.

    lhs, rhs, out: anything with `shape` and `dtype`, sizes static. reversed_dimensions: those
    dimensions of rhs that are read backwards; spatial ones only. packed: None, or the `Packing`
    of rhs.
    """
    numbers = params["dimension_numbers"]

    def ints(values: Sequence[Any]) -> tuple[int, ...]:
        return tuple(int(v) for v in values)

    return Problem(
        lhs_shape=ints(lhs.shape),
        rhs_shape=ints(rhs.shape if packed is None else packed.shape),
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
        rhs_panel=0 if packed is None else packed.panel,
    )


def from_equation(equation: Any, reversed_dimensions: Sequence[int] = ()) -> Problem:
    """The problem of a jaxpr's equation: of a convolution of ours, or of lax's."""
    params = equation.params
    lhs, rhs = (v.aval for v in equation.invars[:2])
    return from_parameters(
        lhs,
        rhs,
        equation.outvars[0].aval,
        params,
        bias=params.get("has_bias", False),
        residual=params.get("has_residual", False),
        activation=params.get("activation"),
        reversed_dimensions=reversed_dimensions,
        packed=params.get("packed"),
    )
