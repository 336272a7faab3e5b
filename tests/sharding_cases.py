# SPDX-License-Identifier: Apache-2.0
"""Programs over four devices. Run by test_sharding.py in a process that has them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxwin
import jaxwin._primitive as ours
from jaxwin._accelerate import accelerate
from jaxwin._install import installed

NUMBERS = ("NHWC", "HWIO", "NHWC")
# name: lhs shape, rhs shape, keyword arguments
PROBLEMS = {
    "dense": ((8, 6, 5, 8), (3, 3, 8, 8), {}),
    "strided": ((8, 7, 5, 8), (3, 2, 8, 8), {"window_strides": (2, 1)}),
    "dilated": ((8, 7, 6, 8), (3, 2, 8, 8), {"rhs_dilation": (2, 1)}),
    "grouped": ((8, 6, 5, 8), (3, 3, 2, 16), {"feature_group_count": 4}),
    "depthwise": ((8, 6, 5, 8), (3, 3, 1, 8), {"feature_group_count": 8}),
    "depth_multiplier": ((8, 6, 5, 4), (3, 3, 1, 8), {"feature_group_count": 4}),
    "two_groups": ((8, 6, 5, 8), (3, 3, 4, 8), {"feature_group_count": 2}),
    "transposed": (
        (8, 4, 3, 8),
        (3, 3, 8, 8),
        {"lhs_dilation": (2, 2), "padding": ((2, 1), (1, 1))},
    ),
    "batch_grouped": ((8, 6, 5, 8), (3, 3, 8, 8), {"batch_group_count": 4}),
}
LAYOUTS = {
    "data": (P("x"), P()),
    "data_both_axes": (P(("x", "y")), P()),
    "output": (P(), P(None, None, None, "y")),
    "data_output": (P("x"), P(None, None, None, "y")),
    "contraction": (P(None, None, None, "y"), P(None, None, "y")),
    "data_contraction": (P("x", None, None, "y"), P(None, None, "y")),
    "spatial": (P("x", "y"), P()),
    "replicated": (P(), P()),
}


def draw(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolve(function, kwargs):
    kwargs = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": NUMBERS, **kwargs}
    return lambda x, w: function(x, w, **kwargs)


def close(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()),
        got,
        jax.device_get(want),
    )


def mesh(types=AxisType.Auto):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(types, types))


def put(m, value, spec):
    return jax.device_put(value, NamedSharding(m, spec))


def divisible(shape, spec):
    return all(entry is None or size % 4 == 0 for size, entry in zip(shape, spec, strict=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_jit(problem, layout):
    lhs_shape, rhs_shape, kwargs = PROBLEMS[problem]
    lhs_spec, rhs_spec = LAYOUTS[layout]
    x, w = draw(lhs_shape, 0), draw(rhs_shape, 1)
    m = mesh()

    def both(function):
        conv = convolve(function, kwargs)
        return lambda x, w: (conv(x, w), jax.grad(lambda *a: (conv(*a) ** 2).sum(), (0, 1))(x, w))

    want = jax.jit(both(lax.conv_general_dilated))(x, w)
    if rhs_shape[2] % 2:
        rhs_spec = P(None, None, None, "y") if rhs_spec == P(None, None, "y") else rhs_spec
    if layout == "spatial":
        lhs_spec = P("x") if lhs_shape[1] % 2 else lhs_spec
    got = jax.jit(both(ours.conv_general_dilated))(put(m, x, lhs_spec), put(m, w, rhs_spec))
    close(got, want)


def collectives(compiled):
    names = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    return re.findall(rf" {names}(?:-start)?\(", compiled.as_text())


def test_batch_stays_divided():
    """Data parallelism: nothing is gathered, one all-reduce in the weight gradient."""
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    conv = convolve(ours.conv_general_dilated, kwargs)
    m = mesh()
    x, w = put(m, draw(lhs_shape, 0), P(("x", "y"))), put(m, draw(rhs_shape, 1), P())
    forward = jax.jit(conv).lower(x, w).compile()
    assert collectives(forward) == []
    assert forward(x, w).sharding.spec[0] == ("x", "y")
    backward = jax.jit(jax.grad(lambda x, w: (conv(x, w) ** 2).sum(), 1)).lower(x, w).compile()
    assert collectives(backward) == ["all-reduce"]


def test_data_and_tensor_parallel_gradients_stay_divided():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    conv = convolve(ours.conv_general_dilated, kwargs)
    m = mesh()
    x, w = put(m, draw(lhs_shape, 0), P("x")), put(m, draw(rhs_shape, 1), P(None, None, None, "y"))
    gradient = jax.jit(jax.grad(lambda x, w: (conv(x, w) ** 2).sum(), (0, 1))).lower(x, w).compile()
    assert collectives(gradient) == ["all-reduce", "all-reduce"]
    dx, dw = gradient(x, w)
    assert dx.sharding.spec[0] == "x"
    assert dw.sharding.spec[3] == "y"


@pytest.mark.parametrize("problem", ["grouped", "depthwise"])
def test_groups_stay_divided(problem):
    lhs_shape, rhs_shape, kwargs = PROBLEMS[problem]
    conv = convolve(ours.conv_general_dilated, kwargs)
    m = mesh()
    x = put(m, draw(lhs_shape, 0), P("x", None, None, "y"))
    w = put(m, draw(rhs_shape, 1), P(None, None, None, "y"))
    forward = jax.jit(conv).lower(x, w).compile()
    assert collectives(forward) == []


def test_vmap_over_divided_examples():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    x, w = draw(lhs_shape, 0)[:, None], draw(rhs_shape, 1)
    m = mesh()

    def per_example(function):
        conv = convolve(function, kwargs)
        return jax.vmap(jax.grad(lambda w, x: (conv(x, w) ** 2).sum()), (None, 0))

    want = per_example(lax.conv_general_dilated)(w, x)
    got = jax.jit(per_example(ours.conv_general_dilated))(put(m, w, P()), put(m, x, P("x")))
    close(got, want)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_shard_map_gradient(problem):
    lhs_shape, rhs_shape, kwargs = PROBLEMS[problem]
    if "batch_group_count" in kwargs:
        kwargs = {"batch_group_count": 1}
    x, w = draw(lhs_shape, 0), draw(rhs_shape, 1)
    m = mesh()

    def step(function):
        conv = convolve(function, kwargs)

        def loss(x, w):
            return lax.psum((conv(x, w) ** 2).sum(), ("x", "y"))

        f = jax.shard_map(loss, mesh=m, in_specs=(P(("x", "y")), P()), out_specs=P())
        return jax.jit(jax.value_and_grad(f, (0, 1)))

    want = step(lax.conv_general_dilated)(x, w)
    close(step(ours.conv_general_dilated)(x, w), want)
    close(accelerate(step(lax.conv_general_dilated))(x, w), want)
    inside = jax.shard_map(
        jax.grad(lambda w, x: (convolve(ours.conv_general_dilated, kwargs)(x, w) ** 2).sum()),
        mesh=m,
        in_specs=(P(), P(("x", "y"))),
        out_specs=P(),
    )
    close(jax.jit(inside)(w, x), want[1][1])


def test_shard_map_over_some_axes():
    """The rest of the mesh is left to XLA: computed by lax."""
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    x, w = draw(lhs_shape, 0), draw(rhs_shape, 1)
    conv = convolve(ours.conv_general_dilated, kwargs)
    f = jax.shard_map(conv, mesh=mesh(), in_specs=(P("x"), P()), out_specs=P("x"), axis_names={"x"})
    close(jax.jit(f)(x, w), convolve(lax.conv_general_dilated, kwargs)(x, w))


@pytest.mark.parametrize("inside", ["direct", "jit"])
def test_accelerate_shard_map(inside):
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    x, w = draw(lhs_shape, 0), draw(rhs_shape, 1)
    conv = convolve(lax.conv_general_dilated, kwargs)
    f = jax.shard_map(
        jax.jit(conv) if inside == "jit" else conv,
        mesh=mesh(),
        in_specs=(P(("x", "y")), P()),
        out_specs=P(("x", "y")),
    )
    text = str(jax.make_jaxpr(accelerate(f))(x, w))
    assert ours.conv_p.name in text
    assert " conv_general_dilated[" not in text
    close(accelerate(f)(x, w), conv(x, w))
    close(jax.jit(accelerate(f))(x, w), conv(x, w))


def test_explicit_sharding():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    x, w = draw(lhs_shape, 0), draw(rhs_shape, 1)
    m = mesh(AxisType.Explicit)

    def both(function):
        conv = convolve(function, kwargs)
        return lambda x, w: (conv(x, w), jax.grad(lambda *a: (conv(*a) ** 2).sum(), (0, 1))(x, w))

    want = both(lax.conv_general_dilated)(x, w)
    with jax.set_mesh(m):
        a, b = jax.device_put(x, P("x")), jax.device_put(w, P())
        got = jax.jit(both(ours.conv_general_dilated))(a, b)
        assert jax.typeof(got[0]).sharding.spec[0] == "x"
        close(got, want)
        b = jax.device_put(w, P(None, None, None, "y"))
        out = P("x", None, None, "y")
        named = jax.jit(convolve(ours.conv_general_dilated, {**kwargs, "out_sharding": out}))(a, b)
        assert named.sharding.spec == out
        close(named, want[0])


def test_sharding_error_is_lax_own():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    m = mesh(AxisType.Explicit)
    with jax.set_mesh(m):
        a = jax.device_put(draw(lhs_shape, 0), P("x"))
        b = jax.device_put(draw(rhs_shape, 1), P(None, None, None, "y"))
        with pytest.raises(Exception, match="out_sharding"):
            convolve(ours.conv_general_dilated, kwargs)(a, b)


def _normalised(x, residual, scale, bias):
    """A loss of a batch normalisation, and its gradients."""

    def loss(x, residual, scale, bias):
        y, mean, var = jaxwin.batch_norm(x, scale, bias, residual=residual, activation="relu")
        return jnp.sum(y * y) + jnp.sum(mean * var)

    return jax.value_and_grad(loss, (0, 1, 2, 3))(x, residual, scale, bias)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_batch_norm_over_divided_batches(types):
    """The statistics are those of the whole batch, and no device takes the others' part of it."""
    args = [draw((8, 6, 5, 8), i) for i in range(2)] + [draw((8,), i) for i in (2, 3)]
    want = jax.jit(_normalised)(*args)
    m = mesh(types)
    with jax.set_mesh(m):
        placed = [jax.device_put(a, P("x") if a.ndim == 4 else P()) for a in args]
        compiled = jax.jit(_normalised).lower(*placed).compile()
        close(compiled(*placed), want)
    assert "all-gather" not in collectives(compiled)


def test_batch_norm_inside_shard_map():
    """There, the statistics are those of a device's part, as Flax without an axis name has them."""
    args = [draw((8, 6, 5, 8), i) for i in range(2)] + [draw((8,), i) for i in (2, 3)]

    def local(x, residual, scale, bias):
        loss, gradients = _normalised(x, residual, scale, bias)
        return loss[None], gradients[0]

    f = jax.shard_map(
        local, mesh=mesh(), in_specs=(P("x"), P("x"), P(), P()), out_specs=(P("x"), P("x"))
    )
    assert "jaxwin_moments" in jax.jit(f).lower(*args).as_text()
    losses, slopes = jax.jit(f)(*args)
    halves = [local(args[0][part], args[1][part], *args[2:]) for part in (slice(4), slice(4, 8))]
    close(losses, np.concatenate([half[0] for half in halves]))
    close(slopes, np.concatenate([half[1] for half in halves]))


def test_pmap():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    x, w = draw((4, 2, *lhs_shape[1:]), 0), draw(rhs_shape, 1)

    def step(function):
        conv = convolve(function, kwargs)

        def gradient(w, x):
            return lax.pmean(jax.grad(lambda w: (conv(x, w) ** 2).sum())(w), "i")

        return jax.pmap(gradient, "i", in_axes=(None, 0))

    close(step(ours.conv_general_dilated)(w, x), step(lax.conv_general_dilated)(w, x))


def test_older_mesh_context_and_constraint():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    x, w = draw(lhs_shape, 0), draw(rhs_shape, 1)
    m = Mesh(np.array(jax.devices()).reshape(4), ("d",))
    conv = convolve(ours.conv_general_dilated, kwargs)

    @jax.jit
    def f(x, w):
        x = lax.with_sharding_constraint(x, NamedSharding(m, P("d")))
        return conv(x, w)

    close(f(x, w), convolve(lax.conv_general_dilated, kwargs)(x, w))


def test_installed():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    x, w = draw(lhs_shape, 0), draw(rhs_shape, 1)
    conv = convolve(lax.conv_general_dilated, kwargs)
    m = mesh()
    want = conv(x, w)
    with installed():
        a, b = put(m, x, P(("x", "y"))), put(m, w, P())
        compiled = jax.jit(conv).lower(a, b).compile()
        assert collectives(compiled) == []
        close(compiled(a, b), want)


def test_export_over_devices():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    conv = convolve(ours.conv_general_dilated, kwargs)
    m = mesh()
    x, w = put(m, draw(lhs_shape, 0), P("x")), put(m, draw(rhs_shape, 1), P())
    exported = jax.export.export(jax.jit(conv))(x, w)
    again = jax.export.deserialize(exported.serialize())
    close(jax.jit(again.call)(x, w), jax.jit(conv)(x, w))


def test_ahead_of_time():
    lhs_shape, rhs_shape, kwargs = PROBLEMS["dense"]
    conv = convolve(ours.conv_general_dilated, kwargs)
    m = mesh()
    like = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(m, spec))
        for shape, spec in ((lhs_shape, P("x")), (rhs_shape, P()))
    ]
    x, w = draw(lhs_shape, 0), draw(rhs_shape, 1)
    compiled = jax.jit(conv).lower(*like).compile()
    close(
        compiled(put(m, x, P("x")), put(m, w, P())),
        convolve(lax.conv_general_dilated, kwargs)(x, w),
    )
