# SPDX-License-Identifier: Apache-2.0
"""Convolutions on a GPU by a plan of one's own choice, and the layers that are measured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

import jaxwin
from jaxwin import _cuda, _dispatch, _explain, _ffi
from jaxwin._plan import Decision, Plan
from jaxwin._problem import Problem

CHANNELS_LAST = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}


def plan_of(
    problem: Problem, algorithm: str, params: tuple[int, ...] = (), dtype: str = "float32"
) -> Plan | str:
    """The plan with these parameters (the defaults for none), or why there is none."""
    wide = dtype != "float32" and problem.out_dtype == "float32"
    answer = _ffi.cuda_make_plan(
        problem.native(), algorithm, dtype=dtype, wide_result=wide, params=list(params)
    )
    if "plan" not in answer:
        return str(answer["error"])
    plan = answer["plan"]
    return Plan(
        plan["algorithm"], _cuda.ISA, 1, tuple(plan["params"]), int(plan["workspace_bytes"])
    )


@contextlib.contextmanager
def forced(plan: Plan) -> Iterator[None]:
    """Convolutions that are lowered inside take this plan."""
    decision = Decision("requested", plan)
    with mock.patch.object(_dispatch, "decide", lambda *_, **__: decision):
        yield


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer: sizes without batch and channels; direction "fwd", "dx" or "dw"."""

    name: str
    n: int
    size: tuple[int, ...]
    c: int
    k: int
    window: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    transposed: int = 1  # lhs_dilation
    direction: str = "fwd"

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the input and the filter, channels last."""
        return (self.n, *self.size, self.c), (*self.window, self.c // self.groups, self.k)

    def convolution(self, ours: bool, precision: Any) -> Callable[[Any, Any], Any]:
        """conv(x, w), by jaxwin or by lax."""
        rank = len(self.size)
        function = jaxwin.conv_general_dilated if ours else jax.lax.conv_general_dilated

        def convolve(x: Any, w: Any) -> Any:
            return function(
                x,
                w,
                (self.stride,) * rank,
                [(self.padding, self.padding)] * rank,
                lhs_dilation=(self.transposed,) * rank,
                rhs_dilation=(self.dilation,) * rank,
                dimension_numbers=CHANNELS_LAST[rank],
                feature_group_count=self.groups,
                precision=precision,
            )

        return convolve

    def function(self, ours: bool, precision: Any = "highest") -> Callable[[Any, Any], Any]:
        """What is measured: f(x, w), f(dy, w) or f(dy, x) by direction."""
        convolve = self.convolution(ours, precision)
        x, w = (jax.ShapeDtypeStruct(s, "float32") for s in self.shapes)
        if self.direction == "fwd":
            return convolve
        if self.direction == "dx":

            def input_gradient(dy: Any, w: Any) -> Any:
                like = jax.ShapeDtypeStruct(x.shape, dy.dtype)
                return jax.linear_transpose(lambda x: convolve(x, w), like)(dy)[0]

            return input_gradient

        def weight_gradient(dy: Any, x: Any) -> Any:
            like = jax.ShapeDtypeStruct(w.shape, dy.dtype)
            return jax.linear_transpose(lambda w: convolve(x, w), like)(dy)[0]

        return weight_gradient

    def operand_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the two operands of `function`."""
        x, w = self.shapes
        if self.direction == "fwd":
            return x, w
        forward = self.convolution(False, None)
        arrays = (jax.ShapeDtypeStruct(s, "float32") for s in (x, w))
        y: tuple[int, ...] = jax.eval_shape(forward, *arrays).shape
        return (y, w) if self.direction == "dx" else (y, x)

    def problem(self, dtype: str = "float32") -> Problem:
        """What the native core is asked to compute."""
        arrays = [jax.ShapeDtypeStruct(s, dtype) for s in self.operand_shapes()]
        (problem,) = _explain.problems(self.function(True), *arrays)
        return problem


def _paper() -> list[Case]:
    """The twelve layers of the im2win papers."""
    layers = [
        (227, 3, 96, 11, 4),
        (231, 3, 96, 11, 4),
        (227, 3, 64, 7, 2),
        (224, 64, 64, 7, 2),
        (24, 96, 256, 5, 1),
        (12, 256, 512, 3, 1),
        (224, 3, 64, 3, 1),
        (112, 64, 128, 3, 1),
        (56, 64, 64, 3, 1),
        (28, 128, 128, 3, 1),
        (14, 256, 256, 3, 1),
        (7, 512, 512, 3, 1),
    ]
    return [
        Case(f"cv{i}", 64, (s, s), c, k, (w, w), stride)
        for i, (s, c, k, w, stride) in enumerate(layers, 1)
    ]


def _with(cases: list[Case], direction: str) -> list[Case]:
    return [dataclasses.replace(case, direction=direction) for case in cases]


PAPER = _paper()
SETS: dict[str, list[Case]] = {
    "paper": PAPER,
    "depthwise": [
        Case("dw3 56", 64, (56, 56), 144, 144, (3, 3), 1, 1, groups=144),
        Case("dw3 s2", 64, (112, 112), 96, 96, (3, 3), 2, 1, groups=96),
        Case("dw5 28", 64, (28, 28), 240, 240, (5, 5), 1, 2, groups=240),
        Case("dw7 14", 64, (14, 14), 384, 384, (7, 7), 1, 3, groups=384),
        Case("dw3 dilated", 64, (28, 28), 256, 256, (3, 3), 1, 2, 2, groups=256),
        Case("dw line", 32, (4096,), 512, 512, (4,), 1, 2, groups=512),
    ],
    "grouped": [
        Case("g32 c4", 64, (56, 56), 128, 128, (3, 3), 1, 1, groups=32),
        Case("g32 c8", 64, (28, 28), 256, 256, (3, 3), 1, 1, groups=32),
        Case("g32 c32", 64, (14, 14), 1024, 1024, (3, 3), 1, 1, groups=32),
        Case("g16 dilated", 64, (28, 28), 256, 256, (3, 3), 1, 2, 2, groups=16),
    ],
    "transposed": [
        Case("up 8", 64, (8, 8), 512, 256, (4, 4), 1, 2, transposed=2),
        Case("up 32", 64, (32, 32), 128, 64, (4, 4), 1, 2, transposed=2),
        Case("up 3d", 4, (16, 16, 16), 64, 32, (4, 4, 4), 1, 2, transposed=2),
    ],
    "first": [
        Case("rgb 7x7", 64, (224, 224), 3, 64, (7, 7), 2, 3),
        Case("rgb 3x3", 64, (224, 224), 3, 32, (3, 3), 2, 1),
        Case("patch 16", 64, (224, 224), 3, 768, (16, 16), 16),
    ],
    "dilated": [Case("d2", 64, (28, 28), 256, 256, (3, 3), 1, 2, 2)],
    "line": [
        Case("wave 51", 16, (60400,), 16, 16, (51,), 1, 200, 8),
        Case("line 9", 32, (8192,), 128, 128, (9,), 1, 4),
    ],
    "volume": [
        Case("3d 16", 8, (32, 32, 32), 32, 32, (3, 3, 3), 1, 1),
        Case("3d 5", 4, (32, 32, 32), 32, 32, (5, 5, 5), 1, 2),
    ],
    "batch 1": [
        Case("b1 56", 1, (56, 56), 64, 64, (3, 3), 1, 1),
        Case("b1 14", 1, (14, 14), 256, 256, (3, 3), 1, 1),
        Case("b1 1x1", 1, (28, 28), 512, 128, (1, 1)),
        Case("b1 dw", 1, (56, 56), 144, 144, (3, 3), 1, 1, groups=144),
    ],
}
SETS |= {
    "paper dw": _with([PAPER[i] for i in (0, 6, 7, 8, 9, 10, 11)], "dw"),
    "paper dx": _with([PAPER[i] for i in (3, 7, 8, 9, 10, 11)], "dx"),
    "depthwise dw": _with(SETS["depthwise"][:3], "dw"),
    "depthwise dx": _with(SETS["depthwise"][:3], "dx"),
    "grouped dw": _with(SETS["grouped"][:2], "dw"),
}
