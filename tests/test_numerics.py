# SPDX-License-Identifier: Apache-2.0
"""The numerical contract, seen from Python: the same bits whatever happens around a convolution."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import reference
from jax import lax

import jaxwin
from jaxwin import _ffi, _registry

NHWC = ("NHWC", "HWIO", "NHWC")
ISAS = [row["name"] for row in _registry.registry()["isas"] if row["runnable"]]


def _conv(x, w, **kwargs):
    kwargs = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC} | kwargs
    return jaxwin.conv_general_dilated(x, w, **kwargs)


def _operands(seed: int, x_shape: tuple[int, ...], w_shape: tuple[int, ...]):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(x_shape, np.float32), rng.standard_normal(w_shape, np.float32)


def test_batch_size_and_position_change_no_bit() -> None:
    x, w = _operands(0, (7, 13, 14, 9), (3, 3, 9, 21))
    whole = np.asarray(jax.jit(_conv)(x, w))
    for i in range(7):
        np.testing.assert_array_equal(jax.jit(_conv)(x[i : i + 1], w)[0], whole[i])
    mapped = jax.vmap(lambda image: _conv(image[None], w)[0])(x)
    np.testing.assert_array_equal(mapped, whole)


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_input_gradient_is_batch_invariant(groups: int) -> None:
    x, w = _operands(1, (4, 12, 12, 9), (3, 3, 9 // groups, 18))

    def gradient(x):
        f = lambda x: jnp.sum(  # noqa: E731
            _conv(x, w, window_strides=(2, 2), feature_group_count=groups) ** 2
        )
        return jax.jit(jax.grad(f))(x)

    whole = gradient(x)
    for i in range(4):
        np.testing.assert_array_equal(gradient(x[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_isa_and_threads_change_no_bit(
    isa: str, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = _operands(2, (2, 40, 41, 24), (3, 5, 24, 40))
    cotangent = np.random.default_rng(3).standard_normal((2, 40, 41, 40), np.float32)

    def everything(x, w):
        y, pull = jax.vjp(_conv, x, w)
        return y, *pull(cotangent)

    reference_results = jax.jit(everything)(x, w)
    monkeypatch.setenv("JAXWIN_MAX_ISA", isa)
    monkeypatch.setenv("NPROC", threads)
    capped = jax.jit(lambda *operands: everything(*operands))(x, w)
    for a, b in zip(reference_results, capped, strict=True):
        np.testing.assert_array_equal(a, b)


def test_layout_changes_no_bit() -> None:
    x, w = _operands(4, (2, 9, 10, 6), (3, 2, 6, 11))
    expected = jax.jit(_conv)(x, w)
    for lhs, rhs, out in (
        ("NCHW", "OIHW", "NCHW"),
        ("CHWN", "IHWO", "CHWN"),
        ("HWNC", "OHWI", "NHWC"),
    ):

        def permuted(array, source, target):
            return jnp.transpose(array, [source.index(letter) for letter in target])

        result = jax.jit(
            lambda x, w, lhs=lhs, rhs=rhs, out=out: _conv(x, w, dimension_numbers=(lhs, rhs, out))
        )(permuted(x, "NHWC", lhs), permuted(w, "HWIO", rhs))
        np.testing.assert_array_equal(permuted(result, out, "NHWC"), expected)


@pytest.mark.parametrize("algorithm", ["im2win", "direct", "im2col", "auto"])
def test_chain_through_xla(algorithm: str) -> None:
    problem = problems.make(2, 7, 19, (10, 11), (3, 3), stride=(2, 1))
    x, w = problems.operands(problem, np.random.default_rng(5))
    y = jax.jit(lambda x, w: jaxwin.conv(x, w, stride=(2, 1), padding="VALID", algorithm=algorithm))
    np.testing.assert_array_equal(y(x, w), reference.chain(problem, x, w))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "w"])
@pytest.mark.parametrize("groups", [1, 4])
def test_nonfinite_values_spread_as_in_lax(value: float, where: str, groups: int) -> None:
    x, w = _operands(6, (2, 8, 9, 4), (3, 3, 4 // groups, 8))
    (x if where == "x" else w)[0, 1, 0, -1] = value
    cotangent = np.ones((2, 8, 9, 8), np.float32)
    if groups == 1:  # XLA's grouped weight gradient multiplies across groups by zero
        cotangent[0, 0, 0, 3] = value if where == "w" else 1

    def everything(conv):
        def f(x, w):
            kwargs = {
                "window_strides": (1, 1),
                "padding": "SAME",
                "dimension_numbers": NHWC,
                "feature_group_count": groups,
            }
            y, pull = jax.vjp(lambda x, w: conv(x, w, **kwargs), x, w)
            return y, *pull(cotangent)

        return jax.jit(f)(x, w)

    ours, theirs = everything(jaxwin.conv_general_dilated), everything(lax.conv_general_dilated)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        np.testing.assert_array_equal(np.isposinf(a), np.isposinf(b))
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))


@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [
        ("bfloat16", None),
        ("float16", None),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("int8", "float32"),
    ],
)
def test_narrow_dtypes_are_widened_exactly_and_rounded_once(dtype, preferred) -> None:
    x, w = (
        np.asarray(jnp.asarray(a * 8).astype(dtype))
        for a in _operands(9, (2, 9, 8, 5), (3, 3, 5, 18))
    )
    options = {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": NHWC}

    def f(x, w):
        return jaxwin.conv_general_dilated(x, w, preferred_element_type=preferred, **options)

    (row,) = jaxwin.explain(f, x, w)
    assert row.algorithm != "xla"
    result = jax.jit(f)(x, w)
    assert result.dtype == jnp.dtype(preferred or dtype)
    wide = dataclasses.replace(
        row.problem, lhs_dtype="float32", rhs_dtype="float32", out_dtype="float32"
    )
    chain = reference.chain(wide, x.astype(np.float32), w.astype(np.float32))
    np.testing.assert_array_equal(result, jnp.asarray(chain).astype(result.dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((5, 0), (0, 6)), ((1, 1), (16, 0))])
def test_padding_multiplies_nonfinite_filters_in_every_algorithm(value, padding) -> None:
    """Rows and tiles on padding are skipped; filters that are not finite are felt there too."""
    problem = problems.make(2, 5, 18, (7, 6), (3, 3), padding=padding)
    rng = np.random.default_rng(8)
    for tap in np.ndindex(3, 3):
        x, w = problems.operands(problem, rng)
        w[(*tap, 2, 4)] = value
        theirs = np.asarray(lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=NHWC))
        for name, candidate in _ffi.candidates(problem.native()).items():
            if "rejected" in candidate or candidate["family"] in ("winograd", "sfc"):
                continue  # there it spreads over the tile
            base = candidate["params"]
            variants = [base]
            if name in ("im2win", "im2col"):  # the ways to pack, and the whole tensor at once
                names = _registry.parameter_names(name)
                changes = [{"pack": pack} for pack in range(3)] + [{"full": 1}]
                usual = dict(zip(names, base, strict=True))
                variants += [[*(usual | change).values()] for change in changes]
            for params in variants:
                label = f"{name} {params}"
                y = problems.run(problem, x, w, name, threads=2, params=tuple(params))
                np.testing.assert_array_equal(np.isnan(y), np.isnan(theirs), err_msg=label)
                np.testing.assert_array_equal(np.isposinf(y), np.isposinf(theirs), err_msg=label)
                relu = problems.run(problem, x, w, name, params=tuple(params), activation="relu")
                np.testing.assert_array_equal(relu, np.maximum(y, 0), err_msg=label)


def test_denormals_are_flushed_on_every_thread() -> None:
    x, w = _operands(7, (1, 64, 64, 16), (3, 3, 16, 32))
    x *= np.float32(1e-38)
    w *= np.float32(0.1)
    one = problems.make(1, 16, 32, (64, 64), (3, 3), padding=((1, 1), (1, 1)))
    results = [problems.run(one, x, w, "im2win", threads=t) for t in (1, 2, 4)]
    tiny = np.finfo(np.float32).tiny
    assert not ((np.abs(results[0]) < tiny) & (results[0] != 0)).any()
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_array_equal(jax.jit(_conv)(x, w), results[0])
