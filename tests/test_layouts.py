# SPDX-License-Identifier: Apache-2.0
"""Layouts: the same bits in every one, conversions, transformations, errors."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import reference

import jaxwin
from jaxwin import _dispatch, _layouts
from jaxwin._problem import Problem

LAYOUTS = ("NHWC", "NCHW", "CHWN", "CHWN8", "CHWN16")
BLOCKED = ("CHWN8", "CHWN16")
SPATIAL = {1: (9,), 2: (7, 6), 3: (4, 5, 3)}
WINDOW = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}


def values(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def batch_of(layout: str, n: int) -> int | None:
    return n if layout in BLOCKED else None


def in_layout(layout: str, x: jax.Array, *args: Any, residual: Any = None, **options: Any) -> Any:
    """jaxwin.conv of NHWC arrays, computed in another layout."""
    if residual is not None:
        options["residual"] = jaxwin.to_layout(residual, layout)
    y = jaxwin.conv(jaxwin.to_layout(x, layout), *args, layout=layout, **options)
    return jaxwin.from_layout(y, layout, batch=batch_of(layout, x.shape[0]))


@pytest.mark.parametrize(("rank", "n"), [(1, 1), (2, 19), (3, 8)])
def test_conversions(rank: int, n: int) -> None:
    x = values(0, n, *SPATIAL[rank], 5)
    numpy = {
        "NHWC": np.asarray(x),
        "NCHW": np.moveaxis(x, -1, 1),
        "CHWN": np.moveaxis(np.moveaxis(x, 0, -1), -2, 0),
    }
    for name in BLOCKED:
        block = int(name[4:])
        blocks = -(-n // block)
        full = np.zeros((blocks * block, *x.shape[1:]), np.float32)
        full[:n] = x
        full = full.reshape(blocks, block, *x.shape[1:])
        numpy[name] = np.moveaxis(np.moveaxis(full, 1, -1), -2, 1)
    for source in LAYOUTS if rank == 2 else ("NHWC",):
        old = jaxwin.to_layout(x, source)
        np.testing.assert_array_equal(old, numpy[source], source)
        back = jaxwin.from_layout(old, source, batch=batch_of(source, n))
        np.testing.assert_array_equal(back, x, source)
        for target in LAYOUTS if source in ("NHWC", "CHWN8") else ("NHWC",):
            batch = batch_of(source, n)
            new = jaxwin.to_layout(old, target, source=source, batch=batch)
            np.testing.assert_array_equal(new, numpy[target], f"{source} to {target}")


def test_names_of_ranks() -> None:
    x = values(0, 3, 9, 5)
    for name, family in (("NCW", "NCHW"), ("CWN", "CHWN"), ("CWN8", "CHWN8")):
        np.testing.assert_array_equal(jaxwin.to_layout(x, name), jaxwin.to_layout(x, family))
    w = values(1, 3, 5, 4)
    x8 = jaxwin.to_layout(x, "CWN8")
    np.testing.assert_array_equal(
        jaxwin.conv(x8, w, layout="CWN8"), jaxwin.conv(x8, w, layout="CHWN8")
    )


CASES: dict[str, dict[str, Any]] = {
    "plain": {"padding": "VALID"},
    "padded, strided": {"stride": 2, "padding": 2},
    "dilated": {"dilation": 2},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 6},
}


@pytest.mark.parametrize(
    ("rank", "case"), [*((2, case) for case in CASES), (1, "padded, strided"), (3, "grouped")]
)
def test_equal_bits(case: str, rank: int) -> None:
    """Result and both gradients, with a last block that is not full."""
    options = CASES[case]
    n, groups = 11, options.get("groups", 1)
    x = values(0, n, *SPATIAL[rank], 6)
    w = values(1, *WINDOW[rank], 6 // groups, 12)
    bias = values(2, 12)
    y = jaxwin.conv(x, w, **options)
    residual, cotangent = values(3, *y.shape), values(4, *y.shape)

    def run(layout: str) -> Any:
        def f(x: jax.Array, w: jax.Array) -> jax.Array:
            return in_layout(
                layout, x, w, bias=bias, residual=residual, activation="relu", **options
            )

        result, pullback = jax.vjp(f, x, w)
        return result, *pullback(cotangent)

    expected = jax.jit(run, static_argnums=0)("NHWC")
    for layout in ("NCHW", "CHWN", "CHWN8"):
        for name, a, b in zip(
            ("y", "dx", "dw"), jax.jit(run, static_argnums=0)(layout), expected, strict=True
        ):
            np.testing.assert_array_equal(a, b, f"{layout} {name}")


def test_a_chain_stays_in_its_layout() -> None:
    """The images that fill up a block become something else than zero, and nobody sees it."""
    n = 5
    x, w1, w2 = values(0, n, 6, 6, 3), values(1, 3, 3, 3, 8), values(2, 3, 3, 8, 4)
    bias = values(3, 8)

    def loss(weights: Any, layout: str) -> jax.Array:
        w1, w2 = weights
        h = jaxwin.to_layout(x, layout)
        h = jaxwin.conv(h, w1, bias=bias, activation="sigmoid", layout=layout)
        h = jaxwin.conv(h, w2, stride=2, layout=layout)
        return jnp.sum(jaxwin.from_layout(h, layout, batch=batch_of(layout, n)) ** 2)

    expected = jax.value_and_grad(loss)((w1, w2), "NHWC")
    for layout in ("NCHW", "CHWN", "CHWN16"):
        for a, b in zip(
            jax.tree.leaves(jax.value_and_grad(loss)((w1, w2), layout)),
            jax.tree.leaves(expected),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b, layout)
        programs = str(jax.make_jaxpr(lambda w, f=layout: loss(w, f))((w1, w2)))
        blocked = layout in BLOCKED
        assert programs.count(" transpose") == (2 if layout != "NHWC" else 0), programs
        assert programs.count(" pad[") == blocked


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layout", ["CHWN", "CHWN16"])
def test_narrow_dtypes(layout: str, dtype: Any) -> None:
    x, w = values(0, 9, 6, 5, 4, dtype=dtype), values(1, 3, 3, 4, 7, dtype=dtype)
    bias = values(2, 7, dtype=dtype)
    options = {"bias": bias, "activation": "relu"}
    np.testing.assert_array_equal(in_layout(layout, x, w, **options), jaxwin.conv(x, w, **options))


@pytest.mark.parametrize("layout", ["CHWN", "CHWN8"])
def test_transformations(layout: str) -> None:
    n = 3
    x, w = values(0, n, 5, 4, 3), values(1, 3, 3, 3, 4)
    tx, tw = values(2, *x.shape), values(3, *w.shape)

    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return in_layout(layout, x, w, activation="tanh")

    def g(x: jax.Array, w: jax.Array) -> jax.Array:
        return jaxwin.conv(x, w, activation="tanh")

    for a, b in zip(jax.jvp(f, (x, w), (tx, tw)), jax.jvp(g, (x, w), (tx, tw)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    xs, ws = values(4, 2, *x.shape), values(5, 2, *w.shape)
    for axes, args in (((0, None), (xs, w)), ((None, 0), (x, ws)), ((0, 0), (xs, ws))):
        np.testing.assert_allclose(
            jax.vmap(f, axes)(*args), jax.vmap(g, axes)(*args), rtol=1e-5, atol=1e-5
        )
    second = [
        jax.grad(lambda w, h=h: jnp.sum(jax.grad(lambda x: h(x, w).sum())(x) ** 2))(w)
        for h in (f, g)
    ]
    np.testing.assert_allclose(*second, rtol=1e-4, atol=1e-4)
    batched = jax.vmap(lambda x: jaxwin.to_layout(x, layout))(xs)
    for i in range(2):
        np.testing.assert_array_equal(batched[i], jaxwin.to_layout(xs[i], layout))
    step = jax.checkpoint(lambda c, w: (in_layout(layout, c, w), None))
    same = jax.lax.scan(step, x, values(6, 2, 3, 3, 3, 3))[0]
    np.testing.assert_array_equal(
        same, jax.lax.scan(lambda c, w: (jaxwin.conv(c, w), None), x, values(6, 2, 3, 3, 3, 3))[0]
    )


@pytest.mark.parametrize("layout", ["NCHW", "CHWN8"])
def test_packed_weights(layout: str) -> None:
    x, w = values(0, 5, 6, 7, 8), values(1, 3, 3, 8, 20)
    packed = jaxwin.pack(w, x)
    np.testing.assert_array_equal(in_layout(layout, x, packed), jaxwin.conv(x, w))
    own = jaxwin.pack(w, jaxwin.to_layout(x, layout), layout=layout)
    np.testing.assert_array_equal(in_layout(layout, x, own), jaxwin.conv(x, w))


@pytest.mark.parametrize("algorithm", ["direct", "im2win", "planar"])
@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_algorithms_by_name(layout: str, algorithm: str) -> None:
    x, w = values(0, 9, 8, 9, 6), values(1, 3, 3, 6, 10)
    result = in_layout(layout, x, w, padding="VALID", algorithm=algorithm)
    np.testing.assert_array_equal(result, jaxwin.conv(x, w, padding="VALID"))


@pytest.mark.parametrize("layout", LAYOUTS[2:])
@pytest.mark.parametrize(
    ("size", "c", "k", "window", "stride"),
    [(112, 64, 128, 3, 1), (28, 128, 128, 3, 1), (14, 256, 256, 3, 1), (56, 64, 256, 1, 1)],
)
def test_kernels_for_neighbouring_images(
    layout: str, size: int, c: int, k: int, window: int, stride: int
) -> None:
    """None that takes images one element at a time is chosen, in any direction."""
    struct: Any = jax.ShapeDtypeStruct
    x = struct((16, size, size, c), jnp.float32)
    x = jax.eval_shape(lambda x: jaxwin.to_layout(x, layout), x)
    w = struct((window, window, c, k), jnp.float32)

    def both(x: jax.Array, w: jax.Array) -> Any:
        y, pullback = jax.vjp(lambda x, w: jaxwin.conv(x, w, layout=layout), x, w)
        return y, pullback(y)

    rows = list(jaxwin.explain(both, x, w))
    assert len(rows) == 3 or window == 1
    assert {row.algorithm for row in rows} == {"planar", "weight_grad"}
    (grad,) = (row for row in rows if row.algorithm == "weight_grad")
    assert grad.parameters["copy"] == 1
    assert grad.problem.chunk_rows > 0


def test_blocks_have_the_order_of_images() -> None:
    """A depth that is only summed over, in every algorithm; the reference says what that means."""
    x = problems.make(
        5, 3, 4, (3, 4, 6), (3, 3, 5), layout=("NDHWC", "DHWIO"), padding=((0, 0), (1, 0), (1, 1))
    )
    assert isinstance(x, Problem)
    assert x.chunk_rows > 0
    lhs, rhs = problems.operands(x, np.random.default_rng(0))
    whole = reference.chain(x, lhs, rhs)
    # The same with depth and channels as one: [n, z, y, x, c] is read as [n, y, x, (z, c)].
    flat = problems.make(5, 9, 4, (4, 6), (3, 5), layout=("NHWC", "HWIO"), padding=((1, 0), (1, 1)))
    assert isinstance(flat, Problem)
    assert flat.chunk_rows == x.chunk_rows
    merged = reference.chain(
        flat,
        np.moveaxis(lhs, 1, 3).reshape(5, 4, 6, 9),
        np.moveaxis(rhs, 0, 2).reshape(3, 5, 9, 4),
    )
    np.testing.assert_array_equal(whole[:, 0], merged)
    np.testing.assert_array_equal(problems.run(x, lhs, rhs, "weight_grad"), whole)


X = np.zeros((3, 5, 5, 4), np.float32)
X8 = np.zeros((1, 4, 5, 5, 8), np.float32)
W = np.zeros((3, 3, 4, 6), np.float32)
ERRORS = {
    "to_layout: unknown layout 'HWNC'; choose one of 'NHWC', 'channels_last', 'NCHW'": lambda: (
        jaxwin.to_layout(X, "HWNC")
    ),
    "to_layout: unknown source 'N'": lambda: jaxwin.to_layout(X, "NCHW", source="N"),
    "from_layout: unknown target 'N'": lambda: jaxwin.from_layout(X, "NCHW", target="N"),
    "to_layout: layout 'CWN8' has 1 spatial dimensions but x has 2; 'CHWN8' holds": lambda: (
        jaxwin.to_layout(X, "CWN8")
    ),
    "to_layout: x must have 1 to 3 spatial dimensions, got shape (3, 5)": lambda: jaxwin.to_layout(
        X[:, 0, :, 0], "NCHW"
    ),
    "from_layout: batch is needed for layout 'CHWN8': how many of the 8 images": lambda: (
        jaxwin.from_layout(X8, "CHWN8")
    ),
    "from_layout: batch=9 does not fit x of shape (1, 4, 5, 5, 8)": lambda: jaxwin.from_layout(
        X8, "CHWN8", batch=9
    ),
    "from_layout: batch=0 does not fit": lambda: jaxwin.from_layout(X8, "CHWN8", batch=0),
    "to_layout: batch=4 does not fit x of shape (3, 5, 5, 4)": lambda: jaxwin.to_layout(
        X, "CHWN", batch=4
    ),
    "from_layout: batch must be an int or None, got batch=1.5": lambda: jaxwin.from_layout(
        X8, "CHWN8", batch=1.5
    ),  # type: ignore[arg-type]
    "to_layout: x must be an array, got list": lambda: jaxwin.to_layout([1.0], "NCHW"),  # type: ignore[arg-type]
    "conv: x in layout 'CHWN16' must have blocks of 16 images as its last": lambda: jaxwin.conv(
        X8, W, layout="CHWN16"
    ),
    "conv: x in layout 'CHWN8' must have 4, 5 or 6 dimensions": lambda: jaxwin.conv(
        X8[0, 0], W, layout="CHWN8"
    ),
    "conv: w must have 4 dimensions, (window..., C / groups, K), got w.shape=(3, 4, 6)": lambda: (
        jaxwin.conv(X8, W[0], layout="CHWN8")
    ),
    "conv: residual must have the shape of the output, (1, 6, 5, 5, 8), got (1, 6": lambda: (
        jaxwin.conv(X8, W, layout="CHWN8", residual=X8[:, :1].repeat(6, 1)[..., :4])
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        ERRORS[message]()
    assert "\n" not in str(caught.value)


def test_every_name_is_a_layout_of_conv() -> None:
    x = values(0, 3, 5, 5, 4)
    for name, (layout, rank) in _layouts._named().items():
        if rank in (0, 2):
            y = jaxwin.conv(jaxwin.to_layout(x, name), jnp.ones((3, 3, 4, 6)), layout=name)
            assert layout.features(y.shape) == 6


def test_costs_of_lone_elements_keep_other_layouts_plans() -> None:
    """NHWC and NCHW are planned as if images could not be lanes."""
    for layout in ("NHWC", "NCHW"):
        problem = problems.make(4, 64, 64, (20, 20), (3, 3), layout=(layout, "HWIO"))
        assert isinstance(problem, Problem)
        decision = _dispatch.decide(problem, enforce=False)
        assert decision.plan is not None
        assert decision.plan.algorithm != "planar"
