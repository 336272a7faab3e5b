# SPDX-License-Identifier: Apache-2.0
"""Workspace, as XLA's memory analysis of the compiled program sees it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jaxwin
from jaxwin import _registry

# The twelve benchmark layers of the im2win papers: C, H = W, K, window, stride.
LAYERS = {
    "conv1": (3, 227, 96, 11, 4),
    "conv2": (3, 231, 96, 11, 4),
    "conv3": (3, 227, 64, 7, 2),
    "conv4": (64, 224, 64, 7, 2),
    "conv5": (96, 24, 256, 5, 1),
    "conv6": (256, 12, 512, 3, 1),
    "conv7": (3, 224, 64, 3, 1),
    "conv8": (64, 112, 128, 3, 1),
    "conv9": (64, 56, 64, 3, 1),
    "conv10": (128, 28, 128, 3, 1),
    "conv11": (256, 14, 256, 3, 1),
    "conv12": (512, 7, 512, 3, 1),
}
MIB = 1 << 20


def _temporary_bytes(layer: str, batch: int, algorithm: str) -> tuple[int, int]:
    c, size, k, window, stride = LAYERS[layer]
    x = jax.ShapeDtypeStruct((batch, size, size, c), jnp.float32)
    w = jax.ShapeDtypeStruct((window, window, c, k), jnp.float32)
    f = jax.jit(lambda x, w: jaxwin.conv(x, w, stride=stride, padding="VALID", algorithm=algorithm))
    temporary = f.lower(x, w).compile().memory_analysis().temp_size_in_bytes
    # The packed copy of the filter: features padded to whole panels, four vectors at most.
    lanes = 4 * max(row["width"] for row in _registry.registry()["isas"])
    packed = 4 * window * window * c * (-(-k // lanes) * lanes)
    return temporary, packed


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("layer", LAYERS)
def test_blocked_im2win_needs_a_strip_per_thread(
    layer: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC", str(threads))
    small, packed = _temporary_bytes(layer, 1, "im2win")
    large, _ = _temporary_bytes(layer, 128, "im2win")
    assert small <= threads * MIB + packed
    assert large <= threads * MIB + packed


@pytest.mark.parametrize("layer", LAYERS)
def test_dispatch_needs_no_more(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "4")
    temporary, packed = _temporary_bytes(layer, 8, "auto")
    assert temporary <= 4 * MIB + packed


def test_max_workspace_is_kept() -> None:
    x = jnp.ones((1, 28, 28, 64))
    w = jnp.ones((3, 3, 64, 64))
    limit = 150_000
    f = jax.jit(lambda x, w: jaxwin.conv(x, w, max_workspace=limit))
    assert f.lower(x, w).compile().memory_analysis().temp_size_in_bytes <= limit
    with pytest.raises(ValueError, match="max_workspace"):
        jax.jit(lambda x, w: jaxwin.conv(x, w, algorithm="im2win", max_workspace=100)).lower(x, w)


def test_calls_of_a_program_share_their_workspace() -> None:
    x = jnp.ones((1, 56, 56, 64))
    w = jnp.ones((3, 3, 64, 64))

    def chain(depth: int) -> int:
        def f(x):
            for _ in range(depth):
                x = jaxwin.conv(x, w)
            return x

        return jax.jit(f).lower(x).compile().memory_analysis().temp_size_in_bytes

    activations = 2 * x.nbytes
    assert chain(6) <= chain(1) + activations
