# SPDX-License-Identifier: Apache-2.0
"""Hostile input: hand-edited programs, odd buffers, extreme sizes. A clear error or the right
answer, never a crash.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxlib import xla_client

import jaxwin

NHWC = ("NHWC", "HWIO", "NHWC")


def _program() -> tuple[str, list[jax.Array], np.ndarray]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 8, 9, 4), np.float32))
    w = jnp.asarray(rng.standard_normal((3, 3, 4, 8), np.float32))
    f = jax.jit(lambda x, w: jaxwin.conv(x, w, padding=1))
    return f.lower(x, w).as_text(), [x, w], np.asarray(f(x, w))


def _execute(text: str, operands: list[jax.Array]) -> np.ndarray:
    device = jax.devices()[0]
    executable = device.client.compile_and_load(
        text, xla_client.DeviceList((device,)), xla_client.CompileOptions()
    )
    results = executable.execute_sharded(operands).disassemble_into_single_device_arrays()
    return np.asarray(results[0][0])


EDITS = [
    (r"algorithm = \"\w+\"", 'algorithm = "nonsense"', "algorithm: unknown"),
    (r"algorithm = \"\w+\"", 'algorithm = "segregated"', "no lhs_dilation"),
    (r"params = dense<[^>]*> : tensor<\d+xi64>", "params = dense<1> : tensor<3xi64>", "params"),
    (r"params = dense<\[\d+, ", "params = dense<[1000000, ", "mr: no such tile"),
    (r"params = dense<\[\d+, ", "params = dense<[-1, ", "mr: no such tile"),
    (r"params = dense<\[(\d+), \d+, ", r"params = dense<[\1, 9, ", "nv: no such tile"),
    (r"threads = \d+", "threads = 0", "threads"),
    (r"threads = \d+", "threads = 1000000000", "threads"),
    (r"activation = 0", "activation = 99", "activation"),
    (r"activation = 0", "activation = -1", "activation"),
    (r"has_bias = 0", "has_bias = 1", "operands"),
    (r"feature_group_count = 1", "feature_group_count = 2", "feature"),
    (r"feature_group_count = 1", "feature_group_count = 0", "feature_group_count"),
    (r"batch_group_count = 1", "batch_group_count = 3", "groups"),
    (r"window_strides = dense<1>", "window_strides = dense<0>", "window_strides"),
    (r"window_strides = dense<1>", "window_strides = dense<2>", "out"),
    (r"padding = dense<1>", "padding = dense<7>", "out"),
    (r"padding = dense<1>", "padding = dense<9223372036854775807>", "padding"),
    (r"rhs_dilation = dense<1>", "rhs_dilation = dense<4611686018427387904>", "dilation"),
    (r"lhs_dilation = dense<1>", "lhs_dilation = dense<-1>", "dilation"),
    (
        r"lhs_spec = dense<\[0, 3, 1, 2\]>",
        "lhs_spec = dense<[0, 0, 1, 2]>",
        "dimension_numbers",
    ),
    (
        r"lhs_spec = dense<\[0, 3, 1, 2\]>",
        "lhs_spec = dense<[0, 9, 1, 2]>",
        "dimension_numbers",
    ),
    (r"rhs_spec = dense<\[3, 2, 0, 1\]>", "rhs_spec = dense<[0, 1, 2, 3]>", "rhs"),
    (r"threads = \d+ : i64, ", "", "threads is missing"),
    (r"threads = \d+ : i64", "threads = 1.0 : f32", "threads is missing or of a wrong type"),
]


@pytest.mark.parametrize(("pattern", "replacement", "message"), EDITS)
def test_edited_attribute_is_refused(pattern: str, replacement: str, message: str) -> None:
    text, operands, _ = _program()
    edited, count = re.subn(pattern, replacement, text)
    assert count == 1
    with pytest.raises(Exception, match=message) as caught:
        _execute(edited, operands)
    assert "INVALID_ARGUMENT" in str(caught.value)
    assert "jaxwin: " in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"tensor<\d+xui8>", "tensor<4xui8>"),  # a workspace that is too small
        (r"isa = \"\w+\"", 'isa = "a_future_one"'),  # a program from another machine
        (r"threads = \d+", "threads = 64"),
    ],
)
def test_harmless_edit_gives_the_same_bits(pattern: str, replacement: str) -> None:
    text, operands, expected = _program()
    edited, count = re.subn(pattern, replacement, text)
    assert count >= 1
    np.testing.assert_array_equal(_execute(edited, operands), expected)


@pytest.mark.parametrize(
    ("x_shape", "w_shape"),
    [
        ((0, 8, 8, 4), (3, 3, 4, 8)),
        ((2, 0, 8, 4), (3, 3, 4, 8)),
        ((2, 8, 8, 0), (3, 3, 0, 8)),
        ((2, 8, 8, 4), (3, 3, 4, 0)),
        ((2, 2, 2, 4), (5, 5, 4, 8)),
    ],
)
def test_empty_dimensions_are_lax_s(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> None:
    x, w = jnp.ones(x_shape), jnp.ones(w_shape)

    def result(conv):
        return jax.jit(lambda x, w: conv(x, w, (1, 1), "VALID", dimension_numbers=NHWC))(x, w)

    np.testing.assert_array_equal(
        result(jaxwin.conv_general_dilated), result(lax.conv_general_dilated)
    )


def test_window_much_larger_than_the_input() -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((1, 5, 6, 3), np.float32))
    w = jnp.asarray(rng.standard_normal((64, 61, 3, 5), np.float32))

    def result(conv):
        return jax.jit(
            lambda x, w: conv(x, w, (1, 1), [(63, 63), (60, 60)], dimension_numbers=NHWC)
        )(x, w)

    np.testing.assert_allclose(
        result(jaxwin.conv_general_dilated), result(lax.conv_general_dilated), atol=1e-4
    )


@pytest.mark.parametrize("dilation", [1, 1000, 2**30])
def test_enormous_dilation_and_padding(dilation: int) -> None:
    x = jnp.ones((1, 4, 4, 2))
    w = jnp.ones((2, 1, 2, 3))
    pad = [(dilation, 0), (0, 0)]
    y = jax.jit(
        lambda x, w: jaxwin.conv_general_dilated(
            x, w, (1, 1), pad, rhs_dilation=(dilation, 1), dimension_numbers=NHWC
        )
    )(x, w)
    expected = np.full((1, 4, 4, 3), 2.0)
    if dilation == 1:
        expected[:, 1:] = 4.0
    np.testing.assert_array_equal(y, expected)


def test_non_contiguous_and_donated_buffers() -> None:
    rng = np.random.default_rng(2)
    base = rng.standard_normal((9, 2, 20, 8), np.float32)
    x = base.transpose(1, 0, 2, 3)[:, ::-1, ::2]  # negative and skipping strides
    w = rng.standard_normal((3, 3, 8, 8), np.float32)
    expected = jax.jit(jaxwin.conv)(np.ascontiguousarray(x), w)
    np.testing.assert_array_equal(jax.jit(jaxwin.conv)(x, w), expected)
    donating = jax.jit(lambda x, w: x + jaxwin.conv(x, w), donate_argnums=0)
    donated = jnp.asarray(np.ascontiguousarray(x))
    np.testing.assert_array_equal(donating(donated, w), np.ascontiguousarray(x) + expected)


def test_unknown_instruction_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_MAX_ISA", "mmx")
    with pytest.raises(ValueError, match="JAXWIN_MAX_ISA: 'mmx' is not one of baseline"):
        jax.jit(jaxwin.conv)(jnp.ones((1, 4, 4, 1)), jnp.ones((1, 1, 1, 1)))


def test_disable_goes_to_lax(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = jnp.ones((1, 4, 4, 1)), jnp.ones((1, 1, 1, 1))
    monkeypatch.setenv("JAXWIN_DISABLE", "1")
    explanation = jaxwin.explain(jaxwin.conv, x, w)
    assert explanation.fallbacks == 1
    assert "JAXWIN_DISABLE" in str(explanation)
    assert "jaxwin_conv" not in jax.jit(jaxwin.conv).lower(x, w).as_text()


@pytest.mark.parametrize("dtype", ["int32", "uint16", "complex64"])
def test_other_dtypes_are_lax_s_and_said(dtype: str) -> None:
    x, w = jnp.ones((1, 6, 6, 2), dtype), jnp.ones((3, 3, 2, 4), dtype)

    def f(x, w):
        return jaxwin.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)

    explanation = jaxwin.explain(f, x, w)
    assert explanation.fallbacks == 1
    assert dtype in str(explanation)
    expected = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)
    np.testing.assert_array_equal(jax.jit(f)(x, w), expected)


def test_rank_five_is_lax_s_and_said() -> None:
    x, w = jnp.ones((1, 2, 4, 4, 4, 4)), jnp.ones((3, 2, 2, 2, 2, 2))

    def f(x, w):
        return jaxwin.conv_general_dilated(x, w, (1,) * 4, "VALID")

    assert "4 spatial dimensions" in str(jaxwin.explain(f, x, w))
    np.testing.assert_array_equal(
        jax.jit(f)(x, w), lax.conv_general_dilated(x, w, (1,) * 4, "VALID")
    )
