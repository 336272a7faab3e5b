# SPDX-License-Identifier: Apache-2.0
"""accelerate: every convolution of a function is ours, and its values are unchanged."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxwin import _compat, _lowering
from jaxwin._accelerate import accelerate
from jaxwin._primitive import conv_p
from jaxwin._substitute import _substitute_closed

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 6, 6, 4)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((3, 3, 4, 4)) / 6, jnp.float32)


def conv(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def primitives(jaxpr, found=None):
    """Every primitive of a program and of the programs in it."""
    found = [] if found is None else found
    for equation in jaxpr.eqns:
        found.append(equation.primitive)
    for inner in jax.extend.core.subjaxprs(jaxpr):
        primitives(inner, found)
    return found


def check(f, *args, differentiate=True):
    """f and its gradient keep their values, and all their convolutions are replaced."""
    fast = accelerate(f)
    close(fast(*args), f(*args))
    close(jax.jit(fast)(*args), f(*args))
    assert_replaced(fast, *args)
    if differentiate:

        def gradient(f):
            return jax.grad(lambda *a: (f(*a) ** 2).sum(), tuple(range(len(args))))

        want = gradient(f)(*args)
        for g in (gradient(fast), accelerate(gradient(f)), jax.jit(gradient(fast))):
            close(g(*args), want)
            assert_replaced(g, *args)


def assert_replaced(f, *args):
    found = primitives(jax.make_jaxpr(f)(*args).jaxpr)
    assert conv_p in found
    assert _compat.lax_conv_p not in found


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def scanned(x, w):
    return lax.scan(lambda c, _: (conv(c, w), c.sum()), x, None, length=3)[0]


def looped(x, w):
    return lax.fori_loop(0, 3, lambda i, c: conv(c, w), x)


def while_looped(x, w):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, conv(s[1], w)), (0, x))[1]


def conditional(x, w):
    return lax.cond(x[0, 0, 0, 0] > 0, lambda: conv(x, w), lambda: conv(x, 2 * w))


def switched(x, w):
    return lax.switch(1, [lambda a: a, lambda a: conv(a, w), lambda a: conv(a, -w)], x)


@jax.custom_jvp
def with_jvp(x, w):
    return conv(x, w)


@with_jvp.defjvp
def _with_jvp_rule(primals, tangents):
    x, w = primals
    dx, dw = tangents
    return conv(x, w), conv(dx, w) + conv(x, dw)


@jax.custom_vjp
def with_vjp(x, w):
    return conv(x, w)


def _with_vjp_forward(x, w):
    return conv(x, w), (x, w)


def _with_vjp_backward(residuals, g):
    return jax.vjp(conv, *residuals)[1](g)


with_vjp.defvjp(_with_vjp_forward, _with_vjp_backward)

FUNCTIONS = {
    "plain": conv,
    "jit": jax.jit(conv),
    "jit in jit": jax.jit(lambda x, w: jax.jit(conv)(jax.jit(conv)(x, w), w)),
    "scan": scanned,
    "jit of scan": jax.jit(scanned),
    "fori_loop": looped,
    "cond": conditional,
    "switch": switched,
    "checkpoint": jax.checkpoint(conv),
    "vmap": lambda x, w: jax.vmap(conv, (None, 0))(x, jnp.stack([w, 2 * w])),
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "jit of custom_jvp": jax.jit(with_jvp),
    "jit of custom_vjp": jax.jit(with_vjp),
    "scan of custom_vjp": lambda x, w: lax.scan(
        lambda c, _: (with_vjp(c, w), None), x, None, length=2
    )[0],
    "scan of custom_jvp": lambda x, w: lax.scan(
        lambda c, _: (with_jvp(c, w), None), x, None, length=2
    )[0],
    "vmap of custom_vjp": lambda x, w: jax.vmap(with_vjp, (0, None))(x[:, None], w),
    "jit of vmap of custom_vjp": jax.jit(lambda x, w: jax.vmap(with_vjp, (0, None))(x[:, None], w)),
    "checkpoint of custom_jvp": jax.checkpoint(with_jvp),
    "gradient inside": lambda x, w: jax.grad(lambda w: (conv(x, w) ** 2).sum())(w),
    "jvp inside": lambda x, w: jax.jvp(conv, (x, w), (x, w))[1],
    "linearize inside": lambda x, w: jax.linearize(conv, x, w)[1](x, w),
    "accelerate inside": accelerate(conv),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replaced_inside(name):
    check(FUNCTIONS[name], X, W)


def test_while_loop():
    check(while_looped, X, W, differentiate=False)
    close(jax.jvp(accelerate(while_looped), (X, W), (X, W)), jax.jvp(while_looped, (X, W), (X, W)))


def test_second_order():
    f = with_jvp
    small_x, small_w = X[:1, :3, :3, :2], W[:2, :2, :2, :2]

    def hessian(f):
        return jax.hessian(lambda w: (f(small_x, w) ** 3).sum())

    want = hessian(f)(small_w)
    close(hessian(accelerate(f))(small_w), want)
    close(accelerate(hessian(f))(small_w), want)
    assert_replaced(hessian(accelerate(f)), small_w)


def test_vmap_outside():
    f = jax.vmap(accelerate(conv), (None, 0))
    ws = jnp.stack([W, 2 * W])
    close(f(X, ws), jax.vmap(conv, (None, 0))(X, ws))
    assert_replaced(f, X, ws)


def test_static_arguments_and_python_values():
    def f(x, w, mode, *, stride, activation=None):
        y = lax.conv_general_dilated(
            x, w, (stride, stride), mode, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return {"y": y if activation is None else activation(y), "mode": mode}

    fast = accelerate(f)
    got = fast(X, W, "SAME", stride=2, activation=jnp.tanh)
    want = f(X, W, "SAME", stride=2, activation=jnp.tanh)
    assert got["mode"] == "SAME"
    close(got["y"], want["y"])
    assert fast.__name__ == "f"

    jitted = jax.jit(lambda x, w, mode: fast(x, w, mode, stride=1)["y"], static_argnums=2)
    close(jitted(X, W, "VALID"), f(X, W, "VALID", stride=1)["y"])


def test_jit_with_static_arguments_inside():
    @functools.partial(jax.jit, static_argnames=("padding",))
    def f(x, w, padding):
        return lax.conv_general_dilated(
            x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    for padding in ("SAME", "VALID", "SAME"):
        close(accelerate(f)(X, W, padding=padding), f(X, W, padding=padding))
        assert_replaced(accelerate(functools.partial(f, padding=padding)), X, W)


def test_values_stay_concrete_and_python_control_flow_works():
    def f(x, w):
        y = conv(x, w)
        return y if float(y.sum()) < 1e30 else conv(y, w)

    close(accelerate(f)(X, W), conv(X, W))


def test_pytrees_closures_and_none():
    def f(parameters, x, nothing):
        assert nothing is None
        return [conv(x, parameters["w"]), (x,)]

    got = jax.jit(accelerate(f))({"w": W}, X, None)
    close(got, f({"w": W}, X, None))
    close(accelerate(lambda x: conv(x, W))(X), conv(X, W))


def test_errors_leave_no_trace():
    def f(x):
        raise KeyError("no")

    with pytest.raises(KeyError):
        accelerate(f)(X)
    assert "conv_general_dilated" in str(jax.make_jaxpr(conv)(X, W))
    assert conv_p.name not in str(jax.make_jaxpr(conv)(X, W))


def test_shape_error_is_lax_own():
    with pytest.raises(ValueError, match="feature_group_count"):
        accelerate(conv)(X, W[:, :, :3])


def test_function_without_convolution():
    f = jax.jit(lambda x: jnp.sin(x).sum())
    close(accelerate(f)(X), f(X))


def test_jit_outside_and_inside_do_not_share_caches(monkeypatch):
    """Also not JAX's fast path, which a jitted function takes from its second call on."""
    calls = []
    real = _lowering.lower_conv
    monkeypatch.setattr(
        _lowering, "lower_conv", lambda *a, **k: (calls.append(1), real(*a, **k))[1]
    )
    f = jax.jit(lambda x, w: conv(x, w) + 1)
    for _ in range(3):
        f(X, W)
    assert not calls
    for _ in range(3):
        accelerate(f)(X, W)
    assert len(calls) == 1
    f(X, W)
    assert conv_p not in primitives(jax.make_jaxpr(f)(X, W).jaxpr)
    assert_replaced(accelerate(f), X, W)


def test_jitted_program_is_substituted_once():
    closed = jax.make_jaxpr(jax.jit(conv))(X, W)
    assert _substitute_closed(closed) is not closed
    assert _substitute_closed(closed) is _substitute_closed(closed)
    plain = jax.make_jaxpr(jnp.sin)(X)
    assert _substitute_closed(plain) is plain


def test_vjp_function_that_outlives_the_call_is_correct():
    _, pullback = accelerate(lambda x: jax.vjp(conv, x, W))(X)
    close(pullback(X), jax.vjp(conv, X, W)[1](X))


@pytest.mark.parametrize("policy", ["dots_saveable", "nothing_saveable", "everything_saveable"])
def test_checkpoint_policy_sees_lax_names(policy):
    policy = getattr(jax.checkpoint_policies, policy)

    def f(x, w):
        return (jnp.sin(conv(jnp.sin(x), w)) ** 2).sum()

    remat = jax.checkpoint(f, policy=policy)
    ours = jax.make_jaxpr(jax.grad(accelerate(remat), 1))(X, W)
    theirs = jax.make_jaxpr(jax.grad(remat, 1))(X, W)
    assert primitives(ours.jaxpr).count(conv_p) == primitives(theirs.jaxpr).count(
        _compat.lax_conv_p
    )
    close(jax.grad(accelerate(remat), 1)(X, W), jax.grad(f, 1)(X, W))


def test_random_numbers_and_donation():
    def f(key, x, w):
        return conv(x + jax.random.normal(key, x.shape), w)

    key = jax.random.key(0)
    close(accelerate(f)(key, X, W), f(key, X, W))
    g = jax.jit(accelerate(lambda x, w: conv(x, w)), donate_argnums=0)
    close(g(X + 0, W), conv(X, W))


def test_flax_linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), use_bias=False)(x))
            x = nn.BatchNorm(use_running_average=False)(x + 0.1)
            x = nn.remat(nn.Conv)(4, (3, 3), strides=2)(x)
            return nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)

    net = Net()
    variables = net.init(jax.random.key(0), X)

    def step(variables, x):
        def loss(params):
            y, updates = net.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return (y**2).mean(), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    close(accelerate(step)(variables, X), step(variables, X))
    close(jax.jit(accelerate(step))(variables, X), step(variables, X))
    assert_replaced(accelerate(step), variables, X)
    assert_replaced(accelerate(jax.jit(step)), variables, X)


def test_flax_nnx_state_is_updated_in_place():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.conv(x)))

    def gradient(net, x):
        return nnx.grad(lambda net: (net(x) ** 2).mean())(net)

    ours, theirs = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    for transform in (lambda f: f, nnx.jit):
        close(accelerate(transform(gradient))(ours, X), transform(gradient)(theirs, X))
        close(nnx.state(ours), nnx.state(theirs))
    close(nnx.jit(accelerate(gradient))(ours, X), gradient(theirs, X))
    close(nnx.state(ours), nnx.state(theirs))
