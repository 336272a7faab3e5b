# SPDX-License-Identifier: Apache-2.0
"""Presets and the grammar of shapes."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import lax

from jaxwin.tuner import problems

ALL = [conv for name in problems.PRESETS for conv in problems.preset(name)]


def _macs(conv: problems.Conv) -> int:
    transposed = max(conv.lhs_dilation) > 1
    pixels = math.prod(conv.size if transposed else conv.out_size)
    per_pixel = math.prod(conv.window) * conv.features * conv.channels // conv.groups
    return conv.count * conv.batch * pixels * per_pixel


@pytest.mark.parametrize(
    ("name", "layers", "macs"),
    [
        ("paper", 12, 4_407_267_808),
        # The published numbers of the networks, without their fully connected layers.
        ("resnet50", 53, 4_089_184_256 - 2048 * 1000),
        ("mobilenetv2", 52, 300_774_272 - 1280 * 1000),
        ("convnext", 22 + 36, 4_455_531_264 - 768 * 1000),
    ],
)
def test_preset_has_the_known_size(name: str, layers: int, macs: int) -> None:
    convs = problems.preset(name)
    assert sum(conv.count for conv in convs) == layers
    assert sum(map(_macs, convs)) == macs
    assert sum(conv.count * conv.flops for conv in convs) == 2 * macs


def test_paper_layers() -> None:
    sizes = {"cv1": 55, "cv3": 111, "cv4": 109, "cv7": 222, "cv12": 5}
    by_name = {conv.name: conv for conv in problems.preset("paper", batch=8)}
    assert list(by_name) == [f"cv{i}" for i in range(1, 13)]
    for name, size in sizes.items():
        assert by_name[name].out_size == (size, size)
        assert by_name[name].batch == 8
    same = {conv.name: conv for conv in problems.preset("paper", padding="same")}
    assert same["cv5"].out_size == same["cv5"].size


def test_names_in_a_preset_differ() -> None:
    for name in problems.PRESETS:
        names = [conv.name for conv in problems.preset(name)]
        assert len(set(names)) == len(names), name


@pytest.mark.parametrize("name", problems.PRESETS)
def test_what_jaxwin_prints_can_be_read_again(name: str) -> None:
    for conv in problems.preset(name, batch=3):
        again = problems.parse(str(conv), name=conv.name)
        assert again.problem() == conv.problem()


@pytest.mark.parametrize("direction", ["dx", "dw"])
def test_what_jaxwin_prints_for_a_gradient_can_be_read_again(direction: str) -> None:
    for text in ("n4 9x8 c6 k12 w3x2 s2 p1 g3", "n2 9 c6 k4 w3 rd2 psame", "n2 7x7 c4 k6 w3"):
        problem = problems.parse(text).problem(direction)
        again = problems.parse(str(problem))
        assert str(again) == str(problem)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000 c4 k8 w5", "n1 1000 c4 k8 w5"),
        ("n2,8x9,c4,k8,w3,s2,p1", "n2 8x9 c4 k8 w3x3 s2x2 p1:1x1:1"),
        ("8X9 C4 K8 W3x1 P1x0", "n1 8x9 c4 k8 w3x1 p1:1x0:0"),
        ("8x8 c4 k8 w3 s2 psame", "n1 8x8 c4 k8 w3x3 s2x2 p0:1x0:1"),
        ("8x8 c4 k8 w3 p0:2x-1:1", "n1 8x8 c4 k8 w3x3 p0:2x-1:1"),
        ("8x8 c4 k8 w4 s2 p1 transposed", "n1 8x8 c4 k8 w4x4 p2:2x2:2 ld2x2"),
        ("4x6x8 c4 k8 w3 rd2 g4 bfloat16", "n1 4x6x8 c4 k8 w3x3x3 rd2x2x2 g4 bfloat16"),
        ("n6 8 c4 k6 w3 bg2", "n6 8 c4 k6 w3 bg2"),
    ],
)
def test_grammar(text: str, expected: str) -> None:
    conv = problems.parse(text) if "rd2" not in text else problems.parse(text, padding="same")
    if "rd2" in text:
        expected = expected.replace(" rd2", " p2:2x2:2x2:2 rd2")
    assert str(conv) == conv.name == expected


def test_what_a_shape_leaves_open_is_given_by_the_caller() -> None:
    conv = problems.parse("8x8 c4 k8 w3 *5", batch=7, padding="same", dtype="float16")
    assert (conv.batch, conv.out_size, conv.dtype, conv.count) == (7, (8, 8), "float16", 5)
    fixed = problems.parse("n1 8x8 c4 k8 w3 p0 float32", batch=7, padding="same", dtype="float16")
    assert (fixed.batch, fixed.out_size, fixed.dtype) == (1, (6, 6), "float32")


@pytest.mark.parametrize("dtype", problems.DTYPES)
def test_dtypes(dtype: str) -> None:
    conv = problems.parse("n2 8x8 c4 k8 w3", dtype=dtype)
    assert conv == problems.parse(f"n2 8x8 c4 k8 w3 {dtype}")
    problem = conv.problem()
    out = "int32" if "int" in dtype else dtype
    assert (problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype) == (dtype, dtype, out)
    assert problems.parse(str(conv)).problem() == problem
    assert problems.from_problem(problem) == conv
    if "int" in dtype:
        for direction in ("dx", "dw"):
            with pytest.raises(ValueError, match=f"no gradients .{direction}"):
                conv.problem(direction)


def test_dtypes_that_are_none() -> None:
    with pytest.raises(ValueError, match="'int4' is not one of float32"):
        problems.parse("n2 8x8 c4 k8 w3", dtype="int4")
    problem = dataclasses.replace(problems.parse("n2 8x8 c4 k8 w3").problem(), lhs_dtype="int64")
    with pytest.raises(ValueError, match="int64 and float32"):
        problems.from_problem(problem)


@pytest.mark.parametrize("window", [2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_transposed_is_lax_conv_transpose(window: int, stride: int, padding: str) -> None:
    conv = problems.parse(f"n2 5x6 c3 k4 w{window} s{stride} transposed", padding=padding)
    fn, _ = problems.computation(conv, "fwd", "nhwc", lax.conv_general_dilated)
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, np.float32) for shape in (conv.x_shape, conv.w_shape))
    theirs = lax.conv_transpose(x, w, (stride, stride), padding.upper())
    assert conv.y_shape == theirs.shape
    np.testing.assert_array_equal(fn(x, w), theirs)


@pytest.mark.parametrize("layout", problems.LAYOUTS[1:])
@pytest.mark.parametrize("direction", problems.DIRECTIONS)
@pytest.mark.parametrize(
    "text", ["n2 7x8 c4 k6 w3x2 s2x1 p1 g2", "n3 9 c4 k2 w3 s2 transposed", "n2 4x5x6 c2 k3 w2"]
)
def test_layouts_compute_the_same(text: str, direction: str, layout: str) -> None:
    conv = problems.parse(text)
    rng = np.random.default_rng(0)
    data = {name: rng.standard_normal(conv.shape(name), np.float32) for name in "xwy"}
    results = []
    for name in ("nhwc", layout):
        fn, operands = problems.computation(conv, direction, name, lax.conv_general_dilated)
        arrays = [problems.to_layout(data[operand], operand, name) for operand in operands]
        for operand, array in zip(operands, arrays, strict=True):
            assert array.shape == problems.abstract(conv, operand, name).shape
        kind = problems.result_operand(direction)
        results.append(problems.from_layout(np.asarray(jax.jit(fn)(*arrays)), kind, name))
        assert results[-1].shape == conv.shape(kind)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "blame"),
    [
        ("56x56 c64 k64", "window"),
        ("c64 k64 w3", "size"),
        ("56x56 k64 w3", "channels"),
        ("56x56 c64 w3", "features"),
        ("56x56 c64 k64 w3 z9", "'z9'"),
        ("56x56 c64 k64 w3 w5", "'w5'"),
        ("56x56 c64 k64 w3x3x3", "window"),
        ("56x56 c64 k64 w3 p1x1x1", "padding"),
        ("2x2x2x2 c64 k64 w3", "dimensions"),
        ("56x56 c64 k64 w57", "larger"),
        ("56x56 c64 k63 w3 g2", "groups"),
        ("56x56 c0 k64 w3", "at least 1"),
        ("56x56 c64 k64 w3 s0", "at least 1"),
        ("56x56 c64 k64 w3 s2 ld2 transposed", "transposed"),
        ("n3 56x56 c64 k64 w3 bg2", "batch"),
        ("n4 56x56 c64 k64 w3 g2 bg2", "exclude"),
        ("", "''"),
    ],
)
def test_a_wrong_shape_is_said_in_one_line(text: str, blame: str) -> None:
    with pytest.raises(ValueError) as caught:
        problems.parse(text)
    assert blame in str(caught.value)
    assert "\n" not in str(caught.value)
    assert repr(text) in str(caught.value)


def test_shapes_start_no_backend() -> None:
    """Whoever reads shapes can still say how many threads XLA gets."""
    code = (
        "from jaxwin.tuner import machine, problems\n"
        "problems.parse('n2 6x7 c4 k8 w3').problem('fwd')\n"
        "assert machine.pool_threads() == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
