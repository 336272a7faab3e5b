# SPDX-License-Identifier: Apache-2.0
"""install, uninstall, installed: which lowering convolutions of lax get, and when."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxwin import _compat, _install, _lowering, _primitive
from jaxwin._install import install, installed, is_installed, uninstall


@pytest.fixture(autouse=True)
def clean():
    assert not is_installed()
    yield
    uninstall()
    assert not is_installed()
    mlir = _compat._mlir
    assert mlir._lowerings[_compat.lax_conv_p] is _compat._LAX_DEFAULT_RULE
    for platform, entry in _compat._LAX_RULES.items():
        assert mlir._platform_specific_lowerings[platform][_compat.lax_conv_p] is entry
    assert _compat.lax_conv_p not in mlir._uncacheable_primitives


@pytest.fixture
def seen(monkeypatch):
    """Number of convolutions that reached lower_conv, as a list that grows."""
    calls = []
    real = _lowering.lower_conv

    def counting(ctx, lhs, rhs, **params):
        calls.append(params)
        return real(ctx, lhs, rhs, **params)

    monkeypatch.setattr(_lowering, "lower_conv", counting)
    return calls


@pytest.fixture
def operands():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 9, 8)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((4, 3, 3, 3)), jnp.float32)
    return x, w


def conv(x, w):
    return lax.conv_general_dilated(x, w, (2, 1), "SAME")


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_jitted_function_is_lowered_anew_at_each_switch(seen, operands):
    f = jax.jit(conv)
    want = f(*operands)
    assert len(seen) == 0
    install()
    close(f(*operands), want)
    assert len(seen) == 1
    f(*operands)
    assert len(seen) == 1
    uninstall()
    close(f(*operands), want)
    assert len(seen) == 1


def test_eager_call(seen, operands):
    want = conv(*operands)
    with installed():
        close(conv(*operands), want)
    assert len(seen) == 1
    conv(*operands)
    assert len(seen) == 1


def test_every_convolution_of_a_training_step(seen, operands):
    def step(x, w):
        return jax.value_and_grad(lambda *a: (conv(*a) ** 2).sum(), (0, 1))(x, w)

    want = jax.jit(step)(*operands)
    with installed():
        close(jax.jit(step)(*operands), want)
    assert len(seen) == 3  # forward, input gradient, weight gradient


def stacked(a):
    return jnp.stack([a, 2 * a])


@pytest.mark.parametrize(
    "transformed",
    [
        lambda x, w: jax.vmap(conv, (0, None))(stacked(x), w),
        lambda x, w: jax.vmap(conv, (None, 0))(x, stacked(w)),
        lambda x, w: jax.vmap(jax.grad(lambda w, x: (conv(x, w) ** 2).sum()), (None, 0))(
            w, stacked(x)
        ),
        lambda x, w: jax.grad(lambda w: (jax.checkpoint(conv)(x, w) ** 2).sum())(w),
        lambda x, w: jax.jacrev(conv, 1)(x, w),
    ],
    ids=["vmap x", "vmap w", "per-example gradients", "checkpoint", "jacrev"],
)
def test_transformations(seen, operands, transformed):
    want = transformed(*operands)
    assert not seen
    with installed():
        close(transformed(*operands), want)
    assert seen


def test_install_is_idempotent(seen, operands):
    install()
    install()
    assert is_installed()
    conv(*operands)
    uninstall()
    assert not is_installed()
    uninstall()


def test_nesting():
    with installed():
        with installed():
            assert is_installed()
        assert is_installed()
    assert not is_installed()


def test_context_inside_install_leaves_it_in_force():
    install()
    with installed():
        pass
    assert is_installed()


def test_uninstall_inside_context_takes_effect_at_its_end():
    install()
    with installed():
        uninstall()
        assert is_installed()
    assert not is_installed()


def test_install_inside_context_outlives_it():
    with installed():
        install()
    assert is_installed()


def test_context_ends_on_exception():
    with pytest.raises(KeyError), installed():
        raise KeyError
    assert not is_installed()


def test_threads(operands):
    want = np.asarray(conv(*operands))
    errors = []
    gate = threading.Barrier(4)

    def work():
        try:
            gate.wait()
            for _ in range(3):
                with installed():
                    assert is_installed()
                    close(jax.jit(conv)(*operands), want)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert _install._contexts == 0


def test_fallback_does_not_recurse(operands):
    """Where there is no kernel lax computes: complex numbers, and integers."""
    x, w = operands
    for dtype in (jnp.complex64, jnp.int32):
        a, b = (4 * x).astype(dtype), (4 * w).astype(dtype)
        want = conv(a, b)
        with installed():
            close(jax.jit(conv)(a, b), want)
            close(
                jax.jit(_primitive.conv_general_dilated, static_argnums=(2, 3))(
                    a, b, (2, 1), "SAME"
                ),
                want,
            )


def test_our_primitive_is_not_affected(seen, operands):
    want = conv(*operands)
    with installed():
        close(_primitive.conv_general_dilated(*operands, (2, 1), "SAME"), want)
    assert len(seen) == 1


def test_symbolic_batch_size_exports(operands):
    x, w = operands
    (n,) = jax.export.symbolic_shape("n")
    like = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
    with installed():
        exported = jax.export.export(jax.jit(conv))(*like)
    close(exported.call(x, w), conv(x, w))


def test_input_gradient_reads_the_filter_backwards(operands):
    x, w = operands

    def gradient(x, w):
        return jax.grad(lambda x: conv(x, w).sum())(x)

    with installed():
        compiled = jax.jit(gradient).lower(x, w).compile()
    assert "reverse(" not in compiled.as_text()
    close(compiled(x, w), gradient(x, w))


def test_export_for_several_platforms(operands):
    x, w = operands
    want = conv(x, w)
    checks = _primitive.export_safety_checks()
    with installed():
        exported = jax.export.export(
            jax.jit(conv), platforms=("cpu", "cuda", "tpu"), disabled_checks=checks
        )(x, w)
    assert "jaxwin_conv" in exported.mlir_module()
    close(exported.call(x, w), want)
