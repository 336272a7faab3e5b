# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation: of training, and folded into weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwin
from jaxwin import _channels, _registry

ISAS = [row["name"] for row in _registry.registry()["isas"] if row["runnable"]]


def _draw(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def _normalise(y, scale, bias, mean, var, eps):
    """In float64."""
    y, scale, bias, mean, var = (np.asarray(v, np.float64) for v in (y, scale, bias, mean, var))
    return (y - mean) / np.sqrt(var + eps) * scale + bias


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_folded_convolution_is_the_convolution_and_the_normalisation(
    groups: int, with_bias: bool
) -> None:
    x, w, b, scale, bias, mean = _draw(
        0, (2, 9, 10, 8), (3, 3, 8 // groups, 16), (16,), (16,), (16,), (16,)
    )
    var = np.random.default_rng(1).uniform(0.1, 3, 16).astype(np.float32)
    b = b if with_bias else None
    w2, b2 = jaxwin.fold_batch_norm(w, b, scale, bias, mean, var, 1e-3)
    assert (w2.shape, w2.dtype, b2.shape, b2.dtype) == (w.shape, w.dtype, (16,), w.dtype)
    plain = jaxwin.conv(x, w, groups=groups, bias=b)
    got = jaxwin.conv(x, w2, groups=groups, bias=b2)
    expected = _normalise(plain, scale, bias, mean, var, 1e-3)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    # and no further from it than what XLA makes of the two operations
    xla = (plain - mean) * (scale / jnp.sqrt(var + 1e-3)) + bias
    assert np.abs(got - expected).max() < 4 * np.abs(xla - expected).max() + 1e-6


def test_each_weight_is_rounded_as_documented() -> None:
    w, scale, mean = _draw(2, (3, 3, 4, 8), (8,), (8,))
    var = np.random.default_rng(3).uniform(0.1, 3, 8).astype(np.float32)
    w2, b2 = jaxwin.fold_batch_norm(w, None, scale, None, mean, var)
    factor = scale / np.sqrt(var + np.float32(1e-5))
    np.testing.assert_allclose(w2, w * factor, rtol=3e-7)
    np.testing.assert_allclose(b2, -mean * factor, rtol=3e-7)


def test_features_first_and_what_is_left_out() -> None:
    w, b, mean = _draw(4, (6, 5, 3, 3), (6,), (6,))
    var = np.ones(6, np.float32)
    first, offset = jaxwin.fold_batch_norm(w, b, None, None, mean, var, 0.0, feature_axis=0)
    np.testing.assert_array_equal(first, w)
    np.testing.assert_array_equal(offset, b - mean)
    last, _ = jaxwin.fold_batch_norm(np.moveaxis(w, 0, -1), b, None, None, mean, var, 0.0)
    np.testing.assert_array_equal(np.moveaxis(last, -1, 0), first)


def test_sixteen_bits_are_folded_in_float32() -> None:
    w, scale, mean = (jnp.asarray(v, jnp.bfloat16) for v in _draw(5, (1, 1, 4, 8), (8,), (8,)))
    var = jnp.full((8,), 0.3, jnp.bfloat16)
    w2, b2 = jaxwin.fold_batch_norm(w, None, scale, None, mean, var)
    assert w2.dtype == b2.dtype == jnp.bfloat16
    wide = [v.astype(jnp.float32) for v in (w, scale, mean, var)]
    exact, offset = jaxwin.fold_batch_norm(wide[0], None, wide[1], None, wide[2], wide[3])
    np.testing.assert_array_equal(w2, exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(b2, offset.astype(jnp.bfloat16))


def test_inside_jit_and_differentiated() -> None:
    w, scale, mean = _draw(6, (3, 3, 4, 8), (8,), (8,))
    var = np.ones(8, np.float32)

    def fold(scale):
        return jaxwin.fold_batch_norm(w, None, scale, None, mean, var)

    np.testing.assert_allclose(jax.jit(fold)(scale)[0], fold(scale)[0], rtol=1e-6)
    slope = jax.grad(lambda s: fold(s)[0].sum())(scale)
    np.testing.assert_allclose(slope, w.sum((0, 1, 2)) / np.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "blame"),
    [
        ({"mean": np.zeros(3)}, "mean must have shape (8,)"),
        ({"var": np.zeros((8, 1))}, "var must have shape (8,)"),
        ({"b": np.zeros(1)}, "b must have shape (8,)"),
        ({"feature_axis": 4}, "feature_axis=4"),
    ],
)
def test_errors(arguments: dict, blame: str) -> None:
    good = dict(
        w=np.zeros((3, 3, 4, 8)), b=None, scale=None, bias=None, mean=np.zeros(8), var=np.ones(8)
    )
    with pytest.raises(ValueError, match="fold_batch_norm") as caught:
        jaxwin.fold_batch_norm(**(good | arguments))
    assert blame in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("transposed", [None, False, True])
def test_flax_layers(transposed: bool | None) -> None:
    """linen and nnx, convolutions and (with and without `transpose_kernel`) transposed ones."""
    pytest.importorskip("flax")
    from flax import linen, nnx

    import jaxwin.flax

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 6, 7, 4), np.float32))
    scale, bias, mean = (jnp.asarray(v) for v in _draw(1, (6,), (6,), (6,)))
    var = jnp.asarray(rng.uniform(0.2, 2, 6), jnp.float32)
    name = "Conv" if transposed is None else "ConvTranspose"
    extra = {} if transposed is None else {"transpose_kernel": transposed}

    layer = getattr(jaxwin.flax.linen, name)(6, (3, 2), strides=(2, 1), **extra)
    norm = linen.BatchNorm(use_running_average=True, epsilon=1e-3)
    params = layer.init(jax.random.key(0), x)["params"]
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    expected = norm.apply(variables, layer.apply({"params": params}, x))
    folded = jaxwin.flax.linen.fold_batch_norm(
        params, variables["params"], variables["batch_stats"], 1e-3, **extra
    )
    got = layer.apply({"params": folded}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

    for use_bias in (True, False):
        layer = getattr(jaxwin.flax.nnx, name)(
            4, 6, (3, 2), strides=(2, 1), use_bias=use_bias, rngs=nnx.Rngs(0), **extra
        )
        norm = nnx.BatchNorm(6, use_running_average=True, epsilon=1e-3, rngs=nnx.Rngs(0))
        norm.scale[...], norm.bias[...] = scale, bias
        norm.mean[...], norm.var[...] = mean, var
        before = jax.tree.map(np.asarray, nnx.state(layer))
        folded = jaxwin.flax.nnx.fold_batch_norm(layer, norm)
        assert type(folded) is type(layer)
        np.testing.assert_allclose(folded(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, before, nnx.state(layer))


def _plain(x, scale, bias, residual=None, activation=None, eps=1e-5):
    """As one would write it, for whatever precision x has."""
    pixels = tuple(range(x.ndim - 1))
    mean, var = jnp.mean(x, pixels), jnp.var(x, pixels)
    y = (x - mean) / jnp.sqrt(var + eps) * scale + bias
    if residual is not None:
        y = y + residual
    functions = {"gelu": lambda z: jax.nn.gelu(z, approximate=True), None: lambda z: z}
    return functions.get(activation, getattr(jax.nn, activation or "relu"))(y), mean, var


ACTIVATIONS = [None, "relu", "relu6", "leaky_relu", "tanh", "sigmoid", "silu", "gelu"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (40, 5), (2, 3, 4, 5, 2)])
def test_the_normalisation_of_training_and_its_derivatives(
    shape: tuple[int, ...], with_residual: bool, activation: str | None
) -> None:
    """Values and reverse mode, of all three results, against float64 written plainly."""
    channels = shape[-1]
    x, residual, dy = _draw(4, shape, shape, shape)
    scale, bias, dmean, dvar = _draw(5, *[(channels,)] * 4)
    x = 2 * x + 3
    args = (x, scale, bias, residual) if with_residual else (x, scale, bias)

    def ours(x, scale, bias, residual=None):
        return jaxwin.batch_norm(x, scale, bias, residual=residual, activation=activation, eps=1e-3)

    def plain(x, scale, bias, residual=None):
        return _plain(x, scale, bias, residual, activation, 1e-3)

    got, pull = jax.vjp(ours, *args)
    slopes = pull((dy, dmean, dvar))
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) for a in args]
        expected, pull64 = jax.vjp(plain, *wide)
        expected_slopes = pull64(tuple(jnp.asarray(a, jnp.float64) for a in (dy, dmean, dvar)))
    assert [a.dtype for a in (*got, *slopes)] == [np.float32] * (3 + len(args))
    for name, a, b in zip(("y", "mean", "var"), got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)
    for name, a, b in zip(
        ("x", "scale", "bias", "residual"), slopes, expected_slopes, strict=False
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("activation", [None, "relu", "tanh", "gelu"])
def test_the_normalisation_of_training_is_differentiated_in_every_mode(
    activation: str | None,
) -> None:
    x, tangent = _draw(6, (6, 3, 4), (6, 3, 4))
    scale, bias, weights = _draw(7, (4,), (4,), (4,))

    def ours(x):
        y, mean, var = jaxwin.batch_norm(x, scale, bias, activation=activation)
        return jnp.sum(y * y * weights) + jnp.sum(mean * var)

    def plain(x):
        y, mean, var = _plain(x, scale, bias, None, activation)
        return jnp.sum(y * y * weights) + jnp.sum(mean * var)

    for order in (
        lambda f: jax.jvp(f, (x,), (tangent,))[1],
        lambda f: jax.grad(f)(x),
        lambda f: jax.jvp(jax.grad(f), (x,), (tangent,))[1],
        lambda f: jax.grad(lambda x: jnp.sum(jax.grad(f)(x) * tangent))(x),
        lambda f: jax.jit(jax.vmap(jax.grad(f)))(jnp.stack([x, tangent])),
    ):
        np.testing.assert_allclose(order(ours), order(plain), rtol=1e-3, atol=1e-3)


def test_the_normalisation_of_training_without_scale_bias_and_in_16_bits() -> None:
    (x,) = _draw(8, (4, 6, 6, 8))
    y, mean, var = jaxwin.batch_norm(x, None, None)
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, x.var((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(np.asarray(var) + 1e-5), atol=1e-5)
    narrow = jnp.asarray(x, jnp.bfloat16)
    y16, mean16, var16 = jaxwin.batch_norm(narrow, None, None, residual=narrow, activation="relu")
    assert (y16.dtype, mean16.dtype, var16.dtype) == (jnp.bfloat16, np.float32, np.float32)
    expected = _plain(narrow.astype(np.float32), 1.0, 0.0, narrow.astype(np.float32), "relu")[0]
    np.testing.assert_allclose(y16.astype(np.float32), expected, rtol=2**-8, atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(jaxwin.batch_norm(x, None, None)[0] ** 2))(narrow)
    assert slope.dtype == jnp.bfloat16
    # A wider residual is not rounded before it is added.
    wide = narrow.astype(np.float32) / 3
    y16, _, _ = jaxwin.batch_norm(narrow, None, None, residual=wide)
    exact = _plain(narrow.astype(np.float32), 1.0, 0.0, wide)[0]
    assert y16.dtype == jnp.bfloat16
    assert np.mean(y16 == exact.astype(jnp.bfloat16)) > 0.99


def test_a_constant_channel_has_no_negative_variance() -> None:
    x = jnp.full((64, 9, 9, 3), 1000.1)
    y, _, var = jaxwin.batch_norm(x, None, None)
    assert (np.asarray(var) >= 0).all() and np.isfinite(y).all()
    slope = jax.grad(lambda x: jnp.sum(jaxwin.batch_norm(x, None, None)[0] ** 2))(x)
    assert np.isfinite(slope).all()


# Rows and channels; the last three have sums of several chunks: by rows, by bytes, and of a row.
SIZES = [(1, 2), (7, 3), (9, 16), (33, 17), (300, 64), (9000, 3), (9000, 40), (3, 150000)]


def _moments_in_order(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """What `batch_norm` says: row by row within 512 KiB or 4096 rows, and then those sums."""
    step = min(4096, max(1, (1 << 19) // (x.shape[1] * x.itemsize)))
    total = None
    for first in range(0, len(x), step):
        own = slice(first, first + step)
        sums = np.zeros((2, x.shape[1]), x.dtype)
        for a, b in zip(x[own], g[own], strict=True):
            sums += np.stack([b, a * b])
        total = sums if total is None else total + sums
    return total


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
def test_passes_by_channel_have_the_same_bits_everywhere(
    size: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(size)
    with jax.enable_x64(dtype == "float64"):
        x, g = (rng.standard_normal(size).astype(dtype) for _ in range(2))
        c = rng.standard_normal((2, size[1])).astype(dtype)
        moments = _moments_in_order(x, g)
        scaled = np.maximum((x * c[1] + c[0]) + g, 0)
        for isa in ISAS:
            for threads in ("1", "3"):
                monkeypatch.setenv("JAXWIN_MAX_ISA", isa)
                monkeypatch.setenv("NPROC", threads)

                def passes(x, g, c):
                    return _channels.moments(x, g), _channels.scaled(x, c, g, "relu")

                program = jax.jit(passes).lower(x, g, c)
                text = program.as_text()
                assert f'isa = "{isa}"' in text and f"threads = {threads}" in text
                got = program.compile()(x, g, c)
                np.testing.assert_array_equal(got[0], moments)
                np.testing.assert_array_equal(got[1], scaled)
    np.testing.assert_allclose(moments[0], g.astype(np.float64).sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (np.ones((40, 1), np.float32), "one channel"),
        (np.ones((40, 8), jnp.bfloat16), "16 bits"),
        (np.ones((3, 40, 8), np.float32), "vmap"),
        (np.ones((40, 8), np.float32), "JAXWIN_DISABLE"),
    ],
)
def test_where_xla_makes_the_passes(
    x: np.ndarray, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "JAXWIN_DISABLE":
        monkeypatch.setenv(why, "1")

    def ours(x):
        return jaxwin.batch_norm(x, None, None, residual=x, activation="relu")[0]

    ours = jax.vmap(ours) if why == "vmap" else ours
    program = jax.jit(ours).lower(x)
    assert "custom_call" not in program.as_text()
    np.testing.assert_array_equal(program.compile()(x), x)  # 0 + 1


def test_programs_for_other_platforms_have_no_call() -> None:
    ours = jax.jit(jax.grad(lambda x: jnp.sum(jaxwin.batch_norm(x, None, None)[0] ** 2)))
    traced = ours.trace(np.ones((40, 8), np.float32))
    assert "jaxwin_moments" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "custom_call" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_normalisation_is_exported() -> None:
    """For CPU with our kernels, and with a symbolic batch through JAX's operations."""
    x = _draw(9, (4, 5, 8))[0]

    @jax.jit
    def ours(x):
        return jaxwin.batch_norm(x, None, None, activation="relu")[0]

    checks = jaxwin.export_safety_checks()
    program = jax.export.export(ours, disabled_checks=checks)(x)
    assert "jaxwin_scale" in program.mlir_module()
    np.testing.assert_array_equal(jax.export.deserialize(program.serialize()).call(x), ours(x))
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 5, 8"), np.float32)
    program = jax.export.export(ours)(symbolic)
    assert "jaxwin_scale" not in program.mlir_module()
    np.testing.assert_allclose(program.call(x), ours(x), atol=1e-5)


def _calls(target: str, *shapes: tuple[int, ...], dtype: Any = np.float32, **attributes: Any):
    """A custom call as nobody but an edited program makes it; the last shape is the result's."""
    *operands, out = shapes
    arrays = [np.zeros(shape, dtype) for shape in operands]
    attributes = dict(isa="avx2", threads=np.int64(1)) | attributes
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(out, dtype))
    return jax.block_until_ready(call(*arrays, **attributes))


RELU = np.int64(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _calls("jaxwin_moments", (4, 3), (4, 2), (2, 3)), "g: must have the shape"),
        (lambda: _calls("jaxwin_moments", (4, 3), (4, 3), (3, 2)), "result: must have two rows"),
        (lambda: _calls("jaxwin_moments", (4, 3, 1), (4, 3, 1), (2, 3)), "x: must have two"),
        (
            lambda: _calls("jaxwin_moments", (4, 3), (4, 3), (2, 3), dtype=np.int32),
            "x: no kernels for its element type",
        ),
        (
            lambda: _calls("jaxwin_scale", (4, 3), (3,), (4, 3), activation=RELU),
            "line: must have two rows",
        ),
        (
            lambda: _calls("jaxwin_scale", (4, 3), (2, 3), (4, 4), activation=RELU),
            "result: must have the shape",
        ),
        (
            lambda: _calls("jaxwin_scale", (4, 3), (2, 3), (1, 3), (4, 3), activation=RELU),
            "residual: must have the shape",
        ),
        (
            lambda: _calls("jaxwin_scale", (4, 3), (2, 3), (4, 3), activation=np.int64(64)),
            "activation: unknown",
        ),
    ],
)
def test_an_edited_call_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        call()
    assert "INVALID_ARGUMENT" in str(caught.value) and "jaxwin: " in str(caught.value)


def test_calls_for_other_machines_and_without_rows() -> None:
    """An unknown instruction set is the best one here; no rows sum up to zero."""
    assert (_calls("jaxwin_moments", (0, 3), (0, 3), (2, 3), isa="a_future_one") == 0).all()
    assert (_calls("jaxwin_moments", (4, 3), (4, 3), (2, 3), isa="a_future_one") == 0).all()
    assert _calls("jaxwin_scale", (0, 3), (2, 3), (0, 3), activation=RELU).shape == (0, 3)
    assert _calls("jaxwin_moments", (4, 0), (4, 0), (2, 0)).shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=np.ones((2, 3), np.int32)), "x must be floating point"),
        (dict(x=np.float32(1)), "x must be floating point"),
        (dict(x=np.ones((0, 3), np.float32)), "at least one value per channel"),
        (dict(scale=np.ones(2, np.float32)), r"scale must have shape \(3,\)"),
        (dict(bias=np.ones((1, 3), np.float32)), r"bias must have shape \(3,\)"),
        (dict(residual=np.ones((2, 1), np.float32)), "residual must have the shape of x"),
        (dict(activation="swish"), "unknown activation 'swish'; choose one of 'relu', "),
    ],
)
def test_what_cannot_be_normalised_is_said(arguments: dict, message: str) -> None:
    usual = dict(x=np.ones((2, 3), np.float32), scale=None, bias=None)
    with pytest.raises(ValueError, match=f"batch_norm: .*{message}"):
        jaxwin.batch_norm(**{**usual, **arguments})
