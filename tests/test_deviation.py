# SPDX-License-Identifier: Apache-2.0
"""jaxwin.deviation: which convolution causes which difference."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxwin
from jaxwin import _deviation, _dispatch, _registry
from jaxwin._accelerate import accelerate
from jaxwin._dispatch import Forced

RNG = np.random.default_rng(0)
W3 = jnp.asarray(RNG.standard_normal((3, 3, 8, 8), np.float32))
W1 = jnp.asarray(RNG.standard_normal((1, 1, 8, 8), np.float32))
X = jnp.asarray(RNG.standard_normal((1, 12, 12, 8), np.float32))
NHWC = ("NHWC", "HWIO", "NHWC")


def _plain(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)


def _rows(found: jaxwin.Deviation, variant: str) -> dict[int, jaxwin.LayerDeviation]:
    return {row.layer: row for row in found if row.variant == variant}


def test_the_layer_that_causes_a_difference_is_named() -> None:
    """A tiled algorithm computes the 3x3 layer only; instruction sets and threads change no bit."""
    here = _registry.isa()
    other = next(
        (r["name"] for r in _registry.registry()["isas"] if r["runnable"] and r["name"] != here),
        here,
    )
    variants = ["winograd", "xla", f"isa={other}", "threads=1", "threads=3", "im2win"]
    found = jaxwin.deviation(lambda x: _plain(jax.nn.relu(_plain(x, W1)), W3), X, variants=variants)
    assert found.causes("winograd") == (1,)
    assert found.outputs["winograd"].differing > 0.1
    assert 1 in found.causes("xla")
    for variant in found.outputs:
        if variant not in ("winograd", "xla"):
            assert found.causes(variant) == ()
            assert found.outputs[variant] == jaxwin.Difference()
    row = _rows(found, "winograd")[1]
    assert row.family == "winograd" and row.plan.startswith("winograd tile=")
    assert row.difference.ulps > 1 and row.difference.absolute > 0
    default = _rows(found, "default")
    assert default[1].errors[0] < default[1].errors[1] <= default[1].errors[2] < 100
    text = str(found)
    assert "layers that cause it: 1\n" in text and "the same bits: " in text
    assert json.dumps([dataclasses.asdict(r) for r in found])


def test_loops_branches_calls_and_derivatives() -> None:
    """Every convolution is found, in whatever it stands; its calls are counted."""

    @jax.custom_vjp
    def special(x):
        return _plain(x, W1)

    special.defvjp(lambda x: (special(x), None), lambda _, g: (_plain(g, W1),))

    def program(x, n):
        x, sums = lax.scan(lambda c, _: (jnp.tanh(_plain(c, W1)), c.sum()), x, length=3)
        x = lax.cond(n > 1, lambda x: _plain(x, W3), lambda x: x, x)
        _, x = lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(_plain(c[1], W3))), (0, x)
        )
        x = jax.checkpoint(lambda x: _plain(x, W1))(special(x))
        return jax.jit(jaxwin.conv)(x, W3), sums

    found = jaxwin.deviation(program, X, 2, variants=["xla", "threads=1"])
    assert [row.calls for row in _rows(found, "default").values()] == [3, 1, 2, 1, 1, 1]
    assert "xla" in found.outputs

    grad = jax.grad(lambda w: (_plain(X, w) ** 2).sum())
    found = jaxwin.deviation(grad, W3, variants=["xla"])
    assert {row.problem.direction for row in found} >= {"fwd", "dw"}


def test_the_program_that_is_looked_at_is_the_users() -> None:
    """Operation by operation it gives what the function gives."""

    def program(x, n):
        ys = lax.scan(lambda c, d: (c + 1, _plain(d, W1) * c), 0.0, jnp.stack([x, 2 * x]))
        back = lax.scan(lambda c, d: (c, d + c), 1.0, ys[1], reverse=True)
        return {"y": back[1], "n": lax.switch(n, [lambda x: x, lambda x: _plain(x, W3)], x)}

    closed = jax.make_jaxpr(accelerate(program))(X, 1)
    found = _deviation._evaluate(
        closed.jaxpr,
        closed.consts,
        [X, 1],
        lambda equation, values, path: equation.primitive.bind(*values, **equation.params),
        (),
    )
    expected = jax.tree.leaves(accelerate(program)(X, 1))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_epilogues_and_packed_weights() -> None:
    packed = jaxwin.pack(W1, X)
    bias = jnp.arange(8.0)

    def program(x):
        return jaxwin.conv(x, packed, bias=bias, residual=x, activation="gelu")

    found = jaxwin.deviation(program, X, variants=["xla", "threads=3"])
    assert found.layers[0].problem.bias and found.layers[0].problem.rhs_panel
    assert found.causes("threads=3") == () and found.causes("xla") == (0,)
    assert _rows(found, "xla")[0].difference.absolute < 1e-4


def test_narrow_types_and_integers() -> None:
    found = jaxwin.deviation(
        lambda x, w: jaxwin.conv(x, w),
        X.astype("bfloat16"),
        W3.astype("bfloat16"),
        variants=["sfc"],
    )
    assert found.layers[0].errors[2] < 3, "rounded once"
    x, w = (RNG.integers(-128, 128, v.shape).astype(np.int8) for v in (X, W3))
    found = jaxwin.deviation(
        lambda x, w: jaxwin.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NHWC, preferred_element_type=jnp.int32
        ),
        x,
        w,
        variants=["sfc", "xla"],
    )
    assert found.causes("sfc") == found.causes("xla") == (), "exact"
    assert found.layers[0].errors is None


def test_nothing_stays_forced() -> None:
    problem = jaxwin.deviation(_plain, X, W3, variants=["sfc"]).layers[0].problem
    usual = _dispatch.decide(problem, enforce=False)
    with _dispatch.forcing(Forced(algorithm="sfc", threads=7)):
        assert _dispatch.decide(problem, enforce=False).plan[:3] == ("sfc", _registry.isa(), 7)
    assert _dispatch.decide(problem, enforce=False) == usual
    assert str(jaxwin.deviation(lambda x: x, X)) == "no convolutions"


@pytest.mark.parametrize("name", ["isa=mmx", "threads=0", "threads=x", "abacus", ""])
def test_variants_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match=r"variants: .* is not isa= one of .*, threads= a number"):
        jaxwin.deviation(_plain, X, W3, variants=[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_steps_between_numbers(dtype: str) -> None:
    kind = jnp.dtype(dtype)
    integer = f"int{8 * kind.itemsize}"
    one = np.array([1.0, -1.0, 0.0, 2.0, np.nan, np.nan, np.inf], kind)
    up = (one.view(integer) + 3).view(kind)  # away from zero
    other = np.array([up[0], up[1], -0.0, 2.0, np.nan, 1.0, np.inf], kind)
    steps = _deviation._steps(one, other)
    assert steps.tolist() == [3, 3, 1, 0, 0, math.inf, 0]
    smallest = np.array([1], integer).view(kind)
    assert _deviation._steps(smallest, -smallest).tolist() == [3]
    found = _deviation._difference([one[:4]], [other[:4]])
    assert (found.differing, found.ulps) == (0.75, 3)
    assert found.absolute == float(np.abs(up[:2].astype(np.float64) - one[:2]).max())
