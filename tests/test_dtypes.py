# SPDX-License-Identifier: Apache-2.0
"""Every dtype that kernels read, through JAX: results and gradients against lax, bits, messages."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from jax import lax

import jaxwin
from jaxwin import _ffi, _registry

NHWC = ("NHWC", "HWIO", "NHWC")
DTYPES = _registry.registry()["dtypes"]
INTEGERS = [(d, r) for d, row in DTYPES.items() if "int" in d for r in row["results"]]
# Strides, groups, dilation: what the kernels of one dtype treat differently.
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "strided": {"window_strides": (2, 1)},
    "grouped": {"feature_group_count": 3},
    "depthwise": {"feature_group_count": 9},
    "dilated": {"rhs_dilation": (2, 1)},
    "transposed": {"lhs_dilation": (2, 2), "padding": ((2, 2), (1, 2))},
}


def _conv(function, case: str, **more):
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}
    options |= CASES[case] | more
    return lambda x, w: function(x, w, **options)


def _operands(dtype: str, case: str = "dense", seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    groups = CASES[case].get("feature_group_count", 1)
    shapes = (2, 10, 11, 9), (3, 3, 9 // groups, 18)
    return tuple(jnp.asarray(problems.values(rng, shape, dtype)) for shape in shapes)


def _native(function, *args) -> None:
    """Every convolution of the function has a kernel for the dtype of its operands."""
    for row in jaxwin.explain(function, *args):
        assert row.algorithm != "xla", row.reason
        assert not row.problem.widened


@pytest.mark.parametrize("case", CASES)
def test_float64_and_its_gradients(case: str) -> None:
    with jax.enable_x64(True):
        x, w = _operands("float64", case)

        def both(function):
            convolve = _conv(function, case)
            loss = lambda x, w: (convolve(x, w) ** 2).sum()  # noqa: E731
            return lambda x, w: (convolve(x, w), *jax.grad(loss, (0, 1))(x, w))

        _native(both(jaxwin.conv_general_dilated), x, w)
        got = jax.jit(both(jaxwin.conv_general_dilated))(x, w)
        for a, b in zip(got, jax.jit(both(lax.conv_general_dilated))(x, w), strict=True):
            assert a.dtype == np.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * float(jnp.abs(b).max()))


def test_float64_under_vmap_install_and_conv() -> None:
    with jax.enable_x64(True):
        x, w = _operands("float64")
        mapped = jax.vmap(_conv(jaxwin.conv_general_dilated, "dense"), in_axes=(None, 0))
        expected = jax.vmap(_conv(lax.conv_general_dilated, "dense"), in_axes=(None, 0))
        both = jnp.stack([w, 2 * w])
        np.testing.assert_allclose(mapped(x, both), expected(x, both), rtol=1e-11, atol=1e-11)
        with jaxwin.installed():
            text = jax.jit(_conv(lax.conv_general_dilated, "dense")).lower(x, w).as_text()
        assert "jaxwin_conv" in text and "f32" not in text
        fused = jax.jit(lambda x, w: jaxwin.conv(x, w, activation="leaky_relu"))
        z = jax.jit(_conv(jaxwin.conv_general_dilated, "dense"))(x, w)
        np.testing.assert_array_equal(fused(x, w), np.where(z > 0, z, 0.01 * z))


def test_float64_with_an_activation_that_xla_computes() -> None:
    with jax.enable_x64(True):
        x, w = _operands("float64")
        tanh = lambda x, w: jaxwin.conv(x, w, activation="tanh")  # noqa: E731
        _native(tanh, x, w)
        text = jax.jit(tanh).lower(x, w).as_text()
        assert "jaxwin_conv" in text and "tanh" in text
        z = jax.jit(jaxwin.conv)(x, w)
        np.testing.assert_allclose(jax.jit(tanh)(x, w), np.tanh(z), rtol=1e-14)


def test_float64_does_not_depend_on_the_instruction_set(monkeypatch) -> None:
    with jax.enable_x64(True):
        x, w = _operands("float64")
        results = []
        for row in _registry.registry()["isas"]:
            if row["runnable"]:
                monkeypatch.setenv("JAXWIN_MAX_ISA", row["name"])
                run = jax.jit(lambda x, w: _conv(jaxwin.conv_general_dilated, "dense")(x, w))
                results.append(np.asarray(run(x, w)))
        for result in results:
            np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("case", ["dense", "grouped", "depthwise", "transposed"])
@pytest.mark.parametrize(("dtype", "result"), INTEGERS)
def test_integers_equal_lax(dtype: str, result: str, case: str) -> None:
    x, w = _operands(dtype, case)
    preferred = None if result == dtype else result
    try:
        expected = jax.jit(_conv(lax.conv_general_dilated, case, preferred_element_type=preferred))(
            x, w
        )
    except TypeError as error:  # lax takes no such result
        with pytest.raises(TypeError, match=str(error)[:30]):
            _conv(jaxwin.conv_general_dilated, case, preferred_element_type=preferred)(x, w)
        return
    ours = _conv(jaxwin.conv_general_dilated, case, preferred_element_type=preferred)
    _native(ours, x, w)
    got = jax.jit(ours)(x, w)
    assert got.dtype == result
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 1024), ("uint8", 258)])
def test_integers_are_floats_where_these_are_exact(dtype: str, most: int) -> None:
    """The largest products of all, as many of them as 2^24 allows, and one more."""
    extreme = np.iinfo(dtype).min if dtype == "int8" else np.iinfo(dtype).max
    for channels in (most, most + 1):
        problem = problems.make(1, channels, 2, (9,), (1,), dtype=dtype, out_dtype="int32")
        assert problem is not None
        x, w = (np.full(shape, extreme, dtype) for shape in (problem.lhs_shape, problem.rhs_shape))
        rejected = _ffi.candidates(problem.native())["planar"].get("rejected")
        beyond = "planar: sums are beyond the integers that floats hold"
        assert rejected == (None if channels == most else beyond)
        for algorithm in ("auto", "planar")[: 1 + (channels == most)]:
            y = problems.run(problem, x, w, algorithm)
            np.testing.assert_array_equal(y, np.full(y.shape, channels * int(extreme) ** 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize(
    ("window", "stride", "expand"), [(5, 1, 1), (7, 2, 1), (3, 1, 1), (3, 2, 2)]
)
def test_depthwise_in_strips_and_groups_of_features(
    dtype: str, window: int, stride: int, expand: int
) -> None:
    """Tiles of more features than a group, blocks of rows that end within a tile: the same bits."""
    rng = np.random.default_rng(window)
    result = "int32" if dtype == "int8" else dtype
    sizes = {"stride": (stride, stride), "padding": ((2, 1), (1, 2)), "groups": 70}
    made = functools.partial(problems.make, 2, 70, 70 * expand, (19, 61), (window, window), **sizes)
    narrow, wide = made(dtype=dtype, out_dtype=result), made()
    assert narrow is not None and wide is not None
    x, w = (problems.values(rng, shape, dtype) for shape in (narrow.lhs_shape, narrow.rhs_shape))
    expected = problems.run(wide, x.astype("float32"), w.astype("float32"), "depthwise")
    for isa in (row["name"] for row in _registry.registry()["isas"] if row["runnable"]):
        usual = _ffi.make_plan(narrow.native(), algorithm="depthwise", isa=isa)["plan"]["params"]
        for rows, threads in ((usual[0], 1), (7, 2), (0, 1)):
            params = (rows, *usual[1:])
            got = problems.run(narrow, x, w, "depthwise", isa=isa, threads=threads, params=params)
            np.testing.assert_array_equal(got, expected.astype(result))


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        ("int8", "int32"),
        ("int8", "int16"),
        ("int8", "int8"),
        ("uint8", "int32"),
        ("uint8", "uint8"),
    ],
)
@pytest.mark.parametrize("features", [16, 40, 83])
@pytest.mark.parametrize("padding", [0, 1])
def test_whole_windows_of_bytes_are_exact(
    dtype: str, result: str, features: int, padding: int
) -> None:
    """Extreme values too, of which products of pairs would not fit 16 bits."""
    rng = np.random.default_rng(features)
    sizes = {"padding": ((padding, padding),) * 2, "groups": features}
    made = functools.partial(problems.make, 2, features, features, (8, 11), (3, 3), **sizes)
    narrow, wide = made(dtype=dtype, out_dtype=result), made(dtype="float64")
    assert narrow is not None and wide is not None
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    shapes = narrow.lhs_shape, narrow.rhs_shape
    for values in ([low, high], np.arange(low, high + 1)):
        x, w = (rng.choice(values, shape).astype(dtype) for shape in shapes)
        expected = problems.run(wide, *(v.astype("float64") for v in (x, w)), "depthwise")
        for isa in (row["name"] for row in _registry.registry()["isas"] if row["runnable"]):
            got = problems.run(narrow, x, w, "depthwise", isa=isa, threads=2)
            np.testing.assert_array_equal(got, expected.astype("int64").astype(result))


def test_integer_sums_wrap_around() -> None:
    """The least int16, squared, twice: 2^31."""
    x = jnp.full((1, 4, 4, 6), -(2**15), jnp.int16)
    w = jnp.full((3, 3, 6, 5), -(2**15), jnp.int16)
    ours = _conv(jaxwin.conv_general_dilated, "dense", preferred_element_type=jnp.int32)
    expected = _conv(lax.conv_general_dilated, "dense", preferred_element_type=jnp.int32)(x, w)
    np.testing.assert_array_equal(jax.jit(ours)(x, w), expected)


def _scaled(dtype: str, case: str, exponents: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Operands of all magnitudes, denormals too."""
    x, w = _operands("float32", case)
    rng = np.random.default_rng(1)
    scale = np.exp2(rng.integers(*exponents, x.shape).astype(np.float64))
    return jnp.asarray(np.asarray(x, np.float64) * scale).astype(dtype), (w / 16).astype(dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        ("bfloat16", (-134, 4)),
        ("bfloat16", (-134, -124)),
        ("float16", (-24, 3)),
        ("float16", (9, 16)),
    ],
)
def test_narrow_floats_have_the_bits_of_float32_between_conversions(
    dtype: str, exponents: tuple[int, int], case: str
) -> None:
    x, w = _scaled(dtype, case, exponents)
    x = x.at[0, 0, 0, 0].set(jnp.nan).at[1, 9, 10, 1].set(-jnp.inf)
    ours = _conv(jaxwin.conv_general_dilated, case)

    def between(x, w):
        return ours(x.astype(jnp.float32), w.astype(jnp.float32)).astype(dtype)

    _native(ours, x, w)
    got, expected = np.asarray(jax.jit(ours)(x, w)), np.asarray(jax.jit(between)(x, w))
    real = ~np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), ~real)
    # Zeros compare equal whatever their signs, which flushed sums leave open.
    np.testing.assert_array_equal(got[real].astype(np.float32), expected[real].astype(np.float32))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats_with_an_epilogue(dtype: str, layout: str) -> None:
    x, w = _operands(dtype)
    rng = np.random.default_rng(2)
    bias, residual = (
        jnp.asarray(problems.values(rng, shape, dtype)) for shape in ((18,), (2, 10, 11, 18))
    )
    if layout == "NCHW":
        x, residual = (jnp.moveaxis(v, -1, 1) for v in (x, residual))

    def conv(*operands):
        x, w, bias, residual = operands
        return jaxwin.conv(x, w, bias=bias, residual=residual, activation="silu", layout=layout)

    _native(conv, x, w, bias, residual)
    got = jax.jit(conv)(x, w, bias, residual)
    wide = jax.jit(conv)(*(v.astype(jnp.float32) for v in (x, w, bias, residual)))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, wide.astype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("features", [32, 72, 96, 160])
def test_results_that_pass_the_caches_by_have_the_same_bits(dtype: str, features: int) -> None:
    """Whole cache lines of a panel's features, and panels that end within one."""
    rng = np.random.default_rng(features)
    made = functools.partial(problems.make, 1, 5, features, (9, 37), (3, 3))
    narrow, wide = made(dtype=dtype, out_dtype=dtype), made()
    assert narrow is not None and wide is not None
    x, w = (problems.values(rng, shape, dtype) for shape in (narrow.lhs_shape, narrow.rhs_shape))
    bias = problems.values(rng, (features,), dtype)
    wide_bias = bias.astype("float32")
    expected = problems.run(wide, *(v.astype("float32") for v in (x, w)), "rows", bias=wide_bias)
    at = _registry.parameter_names("rows").index("stream")
    for isa in (row["name"] for row in _registry.registry()["isas"] if row["runnable"]):
        usual = _ffi.make_plan(narrow.native(), algorithm="rows", isa=isa)["plan"]["params"]
        for stream in (0, 1):
            params = (*usual[:at], stream, *usual[at + 1 :])
            got = problems.run(narrow, x, w, "rows", isa=isa, params=params, bias=bias)
            np.testing.assert_array_equal(got, expected.astype(dtype))


def test_bfloat16_to_float32_is_not_rounded() -> None:
    x, w = _operands("bfloat16")
    ours = _conv(jaxwin.conv_general_dilated, "dense", preferred_element_type=jnp.float32)
    _native(ours, x, w)
    wide = _conv(jaxwin.conv_general_dilated, "dense")(*(v.astype(jnp.float32) for v in (x, w)))
    np.testing.assert_array_equal(jax.jit(ours)(x, w), wide)


def test_narrow_operands_are_not_copied_to_float32() -> None:
    x, w = jnp.zeros((1, 112, 112, 64), jnp.bfloat16), jnp.zeros((3, 3, 64, 64), jnp.bfloat16)
    ours = _conv(jaxwin.conv_general_dilated, "dense")
    wide = lambda x, w: ours(x.astype(jnp.float32), w.astype(jnp.float32)).astype(x.dtype)  # noqa: E731
    own, between = (
        jax.jit(f).lower(x, w).compile().memory_analysis().temp_size_in_bytes for f in (ours, wide)
    )
    assert own < 4 * x.size < between


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weight_gradients_of_narrow_floats_run_on_float32(dtype: str) -> None:
    x, w = _operands(dtype)
    gradient = jax.grad(lambda w: _conv(jaxwin.conv_general_dilated, "dense")(x, w).sum())
    rows = [r for r in jaxwin.explain(gradient, w) if r.problem.direction == "dw"]
    assert rows and all(row.problem.widened and row.algorithm != "xla" for row in rows)
    wide = jax.grad(
        lambda w: _conv(lax.conv_general_dilated, "dense")(x.astype(jnp.float32), w).sum()
    )(w.astype(jnp.float32))
    got = jax.jit(gradient)(w)
    assert got.dtype == dtype
    scale = float(jnp.abs(wide).max())
    tolerance = float(jnp.finfo(dtype).eps) * scale
    np.testing.assert_allclose(got.astype(jnp.float32), wide, atol=tolerance)


def test_what_has_no_kernel_is_said() -> None:
    for dtype, result, text in (
        ("int32", "int32", "no kernels for int32"),
        ("uint16", "uint16", "no kernels for uint16"),
        ("complex64", "complex64", "no kernels for complex64"),
        ("float32", "float64", "no kernels for float32, float64"),
    ):
        problem = problems.make(1, 2, 3, (6, 6), (3, 3), dtype=dtype, out_dtype=result)
        (row,) = jaxwin.explain(problem)
        assert (row.algorithm, row.reason) == ("xla", text)
    x, w = _operands("bfloat16")
    with pytest.raises(ValueError, match="direct: no bfloat16 kernels"):
        jaxwin.conv(x, w, algorithm="direct", padding="VALID")


def test_arrays_of_another_size_are_refused() -> None:
    problem = problems.make(1, 2, 3, (6, 6), (3, 3), dtype="float64")
    plan = _ffi.make_plan(problem.native())["plan"]
    x, w = problems.operands(problem, np.random.default_rng(0))
    y, workspace = np.empty(problem.out_shape), np.empty(plan["workspace_bytes"], np.uint8)

    def run(*arrays):
        return _ffi.run(problem.native(), plan["algorithm"], "", 1, plan["params"], *arrays)

    assert run(x, w, y, workspace) == ""
    assert "wrong size" in run(x.astype(np.float32), w, y, workspace)
    assert "wrong size" in run(x, w, y.astype(np.float32), workspace)
