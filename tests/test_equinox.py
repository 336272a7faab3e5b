# SPDX-License-Identifier: Apache-2.0
"""Equinox's layers, which know nothing of jaxwin, on its kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxwin

eqx = pytest.importorskip("equinox")

CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("Conv1d", (6, 11), {"kernel_size": 4, "stride": 2}),
    ("Conv2d", (6, 9, 8), {"kernel_size": (3, 2), "stride": (2, 1), "padding": ((1, 2), (0, 1))}),
    ("Conv2d", (6, 9, 8), {"kernel_size": 3, "dilation": 2, "groups": 3, "use_bias": False}),
    ("Conv2d", (6, 9, 8), {"kernel_size": 3, "padding": "SAME", "groups": 6}),
    ("Conv3d", (6, 4, 5, 6), {"kernel_size": 3, "padding": 1}),
    ("ConvTranspose2d", (6, 7, 5), {"kernel_size": 4, "stride": 2, "padding": 1}),
    ("ConvTranspose2d", (6, 7, 5), {"kernel_size": 3, "stride": (2, 3), "output_padding": (1, 2)}),
    ("ConvTranspose2d", (6, 7, 5), {"kernel_size": 3, "stride": 2, "dilation": 2, "groups": 3}),
]


@pytest.mark.parametrize(
    ("layer", "shape", "options"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_layer_and_its_gradients(
    layer: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    model = getattr(eqx.nn, layer)(6, 12, key=jax.random.key(0), **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, *shape)), jnp.float32)
    parameters, static = eqx.partition(model, eqx.is_array)

    def loss(parameters: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = jax.vmap(eqx.combine(parameters, static))(x)
        return jnp.sum(jnp.sin(y)), y

    f = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    expected = f(parameters, x)
    with jaxwin.installed():
        lowered = f.lower(parameters, x)
        got = lowered.compile()(parameters, x)
    text = lowered.as_text()
    assert text.count("custom_call @jaxwin_conv(") == 3  # forward, both gradients
    assert "stablehlo.convolution" not in text
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, lax in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, lax, rtol=1e-5, atol=2e-5 * np.abs(lax).max())


def test_filter_jit_of_a_model_trains_alike() -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1, key=keys[1]),
        ]
    )
    x = jax.random.normal(keys[2], (4, 1, 12, 12))

    def step(model: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        def loss(model: Any) -> jax.Array:
            return jnp.mean((jax.vmap(model)(x) - x) ** 2)

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        return value, eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradient))

    def losses() -> list[float]:
        trained, values, compiled = model, [], eqx.filter_jit(step)
        for _ in range(5):
            value, trained = compiled(trained, x)
            values.append(float(value))
        return values

    expected = losses()
    with jaxwin.installed():
        got = losses()
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
