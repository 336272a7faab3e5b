# SPDX-License-Identifier: Apache-2.0
"""Bad calls: what lax rejects, ours rejects in the same way; and what ``conv`` says itself."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxwin._conv import algorithms, conv
from jaxwin._fused import ACTIVATIONS
from jaxwin._primitive import conv_general_dilated, conv_transpose


def zeros(*shape: int, dtype: Any = jnp.float32) -> Any:
    return np.zeros(shape, dtype)


NHWC = ("NHWC", "HWIO", "NHWC")
GOOD: dict[str, Any] = {
    "lhs": zeros(4, 6, 8, 8),
    "rhs": zeros(12, 6, 3, 3),
    "window_strides": (1, 1),
    "padding": "SAME",
}

# Calls that lax rejects, as changes to the good call.
BAD_GENERAL: dict[str, dict[str, Any]] = {
    "ranks differ": {"rhs": zeros(12, 6, 3)},
    "rank 1": {"lhs": zeros(4), "rhs": zeros(4)},
    "scalar": {"lhs": zeros(), "rhs": zeros()},
    "no array": {"lhs": [[1.0]]},
    "stride 0": {"window_strides": (0, 1)},
    "stride negative": {"window_strides": (-1, 1)},
    "stride missing": {"window_strides": (1,)},
    "stride is an int": {"window_strides": 1},
    "stride of float": {"window_strides": (1.5, 1)},
    "too many strides": {"window_strides": (1, 1, 1)},
    "lhs dilation 0": {"lhs_dilation": (0, 1), "padding": [(1, 1), (1, 1)]},
    "lhs dilation negative": {"lhs_dilation": (-1, 1), "padding": [(1, 1), (1, 1)]},
    "lhs dilation missing": {"lhs_dilation": (2,), "padding": [(1, 1), (1, 1)]},
    "lhs dilation with string padding": {"lhs_dilation": (2, 2)},
    "rhs dilation 0": {"rhs_dilation": (0, 1), "padding": [(1, 1), (1, 1)]},
    "rhs dilation negative": {"rhs_dilation": (-1, 1), "padding": [(1, 1), (1, 1)]},
    "rhs dilation missing": {"rhs_dilation": (2,), "padding": [(1, 1), (1, 1)]},
    "unknown padding": {"padding": "CIRCULAR"},
    "int as padding string": {"padding": "1"},
    "int padding": {"padding": 1},
    "flat padding": {"padding": (1, 1)},
    "float padding": {"padding": [(1.5, 1), (1, 1)]},
    "padding missing": {"padding": [(1, 1)]},
    "padding of three": {"padding": [(1, 1, 1), (1, 1, 1)]},
    "channels differ": {"rhs": zeros(12, 5, 3, 3)},
    "groups do not divide input": {"feature_group_count": 4, "rhs": zeros(12, 1, 3, 3)},
    "groups do not divide output": {"feature_group_count": 3, "rhs": zeros(10, 2, 3, 3)},
    "groups not in weights": {"feature_group_count": 3},
    "groups 0": {"feature_group_count": 0},
    "groups negative": {"feature_group_count": -1},
    "batch groups 0": {"batch_group_count": 0},
    "batch groups do not divide batch": {"batch_group_count": 3},
    "batch groups do not divide output": {"batch_group_count": 4, "rhs": zeros(10, 6, 3, 3)},
    "both group counts": {
        "feature_group_count": 2, "batch_group_count": 2, "rhs": zeros(12, 3, 3, 3)
    },
    "dimension numbers of other rank": {"dimension_numbers": ("NHC", "HIO", "NHC")},
    "dimension numbers without N": {"dimension_numbers": ("XHWC", "HWIO", "NHWC")},
    "dimension numbers repeated": {"dimension_numbers": ("NHHC", "HHIO", "NHHC")},
    "dimension numbers disagree": {"dimension_numbers": ("NHWC", "HXIO", "NHWC")},
    "two dimension numbers": {"dimension_numbers": ("NHWC", "HWIO")},
    "dimension numbers of wrong type": {"dimension_numbers": 3},
    "channels by dimension numbers": {"dimension_numbers": NHWC},
    "dtypes differ": {"rhs": zeros(12, 6, 3, 3, dtype=jnp.bfloat16)},
    "int and float": {"lhs": zeros(4, 6, 8, 8, dtype=jnp.int32)},
    "complex and float": {"lhs": zeros(4, 6, 8, 8, dtype=jnp.complex64)},
    "unknown precision": {"precision": "exact"},
    "three precisions": {"precision": ("high", "high", "high")},
    "preferred type narrower": {"preferred_element_type": jnp.bfloat16},
    "preferred type of another kind": {"preferred_element_type": jnp.int32},
    "no such argument": {"groups": 2},
    "window_strides not given": {"window_strides": ...},
}  # fmt: skip

GOOD_TRANSPOSE: dict[str, Any] = {
    "lhs": zeros(4, 8, 8, 6),
    "rhs": zeros(3, 3, 6, 12),
    "strides": (2, 2),
    "padding": "SAME",
}
BAD_TRANSPOSE: dict[str, dict[str, Any]] = {
    "ranks differ": {"rhs": zeros(3, 6, 12)},
    "rank 6": {"lhs": zeros(1, 2, 2, 2, 2, 1), "rhs": zeros(1, 1, 1, 1, 1, 1)},
    "stride 0": {"strides": (0, 1)},
    "stride is an int": {"strides": 2},
    "unknown padding": {"padding": "CIRCULAR"},
    "int padding": {"padding": 1},
    "channels differ": {"rhs": zeros(3, 3, 5, 12)},
    "channels differ, transposed": {"transpose_kernel": True},
    "dimension numbers of other rank": {"dimension_numbers": ("NHC", "HIO", "NHC")},
    "dtypes differ": {"rhs": zeros(3, 3, 6, 12, dtype=jnp.float16)},
    "dilation 0": {"rhs_dilation": (0, 0)},
}


def outcome(function: Any, good: dict[str, Any], change: dict[str, Any]) -> Any:
    """(type, text) of what a call raises; the shape of its result if it raises nothing."""
    arguments = {k: v for k, v in {**good, **change}.items() if v is not ...}
    try:
        with np.errstate(all="ignore"):
            return jax.block_until_ready(function(**arguments)).shape
    except Exception as error:
        # Names of functions and source locations are not part of the message.
        text = re.sub(r"(?s)at loc\(.*", "", str(error))
        return type(error), text.replace("jaxwin_", "")


@pytest.mark.parametrize("change", BAD_GENERAL.values(), ids=BAD_GENERAL.keys())
def test_general_rejects_as_lax(change: dict[str, Any]) -> None:
    expected = outcome(lax.conv_general_dilated, GOOD, change)
    assert outcome(conv_general_dilated, GOOD, change) == expected
    under_jit = outcome(
        lambda **kw: jax.jit(
            lambda lhs, rhs: conv_general_dilated(
                lhs, rhs, **{k: v for k, v in kw.items() if k not in ("lhs", "rhs")}
            )
        )(kw["lhs"], kw["rhs"]),
        GOOD,
        change,
    )
    if isinstance(expected[0], type):
        assert isinstance(under_jit[0], type)


def test_most_of_these_calls_are_errors() -> None:
    """Guards the list: a call that lax accepts after all tests nothing here."""
    accepted = [
        name
        for name, change in BAD_GENERAL.items()
        if not isinstance(outcome(lax.conv_general_dilated, GOOD, change)[0], type)
    ]
    assert accepted == []


@pytest.mark.parametrize("change", BAD_TRANSPOSE.values(), ids=BAD_TRANSPOSE.keys())
def test_transpose_rejects_as_lax(change: dict[str, Any]) -> None:
    expected = outcome(lax.conv_transpose, GOOD_TRANSPOSE, change)
    assert isinstance(expected[0], type)
    assert outcome(conv_transpose, GOOD_TRANSPOSE, change) == expected


# --- conv ------------------------------------------------------------------------------------

X, W = zeros(4, 8, 8, 6), zeros(3, 3, 6, 12)
bf16 = jnp.bfloat16

# Changes to conv(X, W), the exception, and a pattern that its text must match.
BAD_CONV: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": zeros(8, 6)}, ValueError, r"x must have 3, 4 or 5 dimensions.*\(8, 6\).*x\[None\]"),
    ({"x": zeros(1, 2, 2, 2, 2, 6)}, ValueError, r"x must have 3, 4 or 5.*\(1, 2, 2, 2, 2, 6\)"),
    ({"w": zeros(3, 6, 12)}, ValueError, r"w must have as many dimensions.*\(3, 6, 12\)"),
    ({"x": [[1.0]]}, TypeError, "x must be an array, got list"),
    ({"w": None}, TypeError, "w must be an array, got NoneType"),
    ({"x": zeros(4, 8, 8, 6, dtype=np.int32)}, TypeError, "x must.*floating.*int32.*astype"),
    ({"x": zeros(4, 8, 8, 6, dtype=np.complex64)}, TypeError, "floating.*complex64"),
    ({"w": zeros(3, 3, 6, 12, dtype=bf16)}, TypeError, "w must.*dtype of x.*bfloat16.*float32"),
    ({"w": zeros(3, 3, 5, 12)}, ValueError, r"w must have C / groups = 6.*got 5"),
    ({"layout": "NCHW"}, ValueError, r"w must have C / groups = 8.*got 6.*layout='NCHW'"),
    ({"layout": "HWNC"}, ValueError, "unknown layout 'HWNC'.*'NHWC', 'channels_last'"),
    ({"layout": "NWC"}, ValueError, "'NWC' has 1 spatial dimensions but x has 2.*'NHWC'"),
    ({"stride": 0}, ValueError, "stride must be at least 1, got stride=0"),
    ({"stride": (1, -1)}, ValueError, r"stride must be at least 1, got stride=\(1, -1\)"),
    ({"stride": (1, 1, 1)}, ValueError, r"stride must be.*sequence of 2.*\(1, 1, 1\)"),
    ({"stride": 1.5}, TypeError, "stride must be an int, got stride=1.5 of type float"),
    ({"stride": "2"}, TypeError, "stride must be an int, got stride='2'"),
    ({"stride": True}, TypeError, "stride must be an int, got stride=True of type bool"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1, got dilation=0"),
    ({"dilation": (2,)}, ValueError, r"dilation must be.*sequence of 2.*\(2,\)"),
    ({"groups": 0}, ValueError, "groups must be at least 1, got groups=0"),
    ({"groups": 4}, ValueError, "groups must divide the channels of x, got groups=4 and 6"),
    ({"groups": 3, "w": zeros(3, 3, 2, 10)}, ValueError, "groups must divide the output.*3 and 10"),
    ({"groups": 2.0}, TypeError, "groups must be an int, got groups=2.0 of type float"),
    ({"padding": "CIRCULAR"}, ValueError, "unknown padding 'CIRCULAR'.*'SAME', 'VALID'"),
    ({"padding": "1"}, ValueError, "unknown padding '1'"),
    ({"padding": 1.0}, TypeError, "padding must be an int, got padding=1.0"),
    ({"padding": (1, 2, 3)}, ValueError, r"padding must.*each of the 2.*\(1, 2, 3\)"),
    ({"padding": [(1, 2)]}, ValueError, r"padding must.*each of the 2.*\[\(1, 2\)\]"),
    ({"padding": [(1, 2, 3), 1]}, ValueError, r"each element of padding.*\(1, 2, 3\)"),
    ({"padding": ["SAME", 1]}, ValueError, "each element of padding.*'SAME'"),
    ({"padding": [(1, 0.5), 1]}, TypeError, "padding must be an int, got padding=0.5"),
    ({"bias": zeros(6)}, ValueError, r"bias must have shape \(12,\).*\(6,\)"),
    ({"bias": zeros(1, 1, 1, 12)}, ValueError, r"bias must have shape \(12,\).*\(1, 1, 1, 12\)"),
    ({"bias": zeros(12, dtype=bf16)}, TypeError, "bias must have the dtype of x, got bfloat16"),
    ({"bias": [0.0] * 12}, TypeError, "bias must be an array, got list"),
    ({"residual": X}, ValueError, r"residual must.*\(4, 8, 8, 12\), got \(4, 8, 8, 6\)"),
    ({"residual": zeros(4, 8, 8, 12, dtype=bf16)}, TypeError, "residual must have the dtype of x"),
    ({"activation": "swish"}, ValueError, "unknown activation 'swish'.*'relu', 'relu6'.*or None"),
    ({"activation": jax.nn.relu}, ValueError, "unknown activation .*relu.*'gelu'"),
    ({"activation": ["relu"]}, ValueError, r"unknown activation \['relu'\]"),
    ({"algorithm": "fft"}, ValueError, "unknown algorithm 'fft'.*'auto'.*'im2win'"),
    ({"algorithm": None}, ValueError, "unknown algorithm None"),
    ({"max_workspace": -1}, ValueError, "max_workspace must be.*got max_workspace=-1"),
    ({"max_workspace": 1e6}, TypeError, "max_workspace must be an int.*1000000.0 of type float"),
]


@pytest.mark.parametrize(("change", "exception", "pattern"), BAD_CONV, ids=lambda v: str(v)[:40])
def test_conv_says_what_is_wrong(
    change: dict[str, Any], exception: type[Exception], pattern: str
) -> None:
    arguments = {"x": X, "w": W, **change}
    with pytest.raises(exception, match=pattern) as caught:
        conv(arguments.pop("x"), arguments.pop("w"), **arguments)
    text = str(caught.value)
    assert type(caught.value) is exception
    assert text.startswith("conv: ") and "\n" not in text
    assert caught.value.__cause__ is None


def test_conv_lists_every_valid_name() -> None:
    for change, names in (
        ({"activation": "?"}, ACTIVATIONS),
        ({"algorithm": "?"}, algorithms("cpu")),
    ):
        with pytest.raises(ValueError) as caught:
            conv(X, W, **change)
        assert all(repr(name) in str(caught.value) for name in names)
    elsewhere = set(algorithms("cuda")) - set(algorithms("cpu"))
    assert elsewhere and not any(repr(name) in str(caught.value) for name in elsewhere)


def test_errors_come_before_any_computation() -> None:
    """The same text under a trace."""
    with pytest.raises(ValueError, match="stride must be at least 1"):
        jax.jit(lambda x, w: conv(x, w, stride=0))(X, W)
    with pytest.raises(ValueError, match="bias must have shape"):
        jax.eval_shape(lambda x, w: conv(x, w, bias=x[0, 0, 0]), X, W)
    with pytest.raises(ValueError, match=re.escape("got (8, 8, 12)")):
        jax.vmap(lambda x, r: conv(x[None], W, residual=r))(X, zeros(4, 8, 8, 12))
