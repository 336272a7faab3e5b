# SPDX-License-Identifier: Apache-2.0
"""Whole layers of a residual network: convolution, batch normalisation, residual, relu.

Each layer is computed by XLA, by jaxwin through `accelerate`, and by one call of `jaxwin.conv` with
the normalisation folded into the weights, and these packed. The results are compared, the times
taken in turn; run it under `taskset -c 0` for one thread.
"""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxwin
from jaxwin.tuner import measure

# Input size, channels, features, window: the layers of ResNet-50 that end a residual block, and two
# 3x3 layers as ResNet-18 has them.
LAYERS = (
    (56, 64, 256, 1),
    (28, 128, 512, 1),
    (14, 256, 1024, 1),
    (7, 512, 2048, 1),
    (56, 64, 64, 3),
    (14, 256, 256, 3),
)
NUMBERS = ("NHWC", "HWIO", "NHWC")


def layer(x, w, scale, bias, mean, var, residual):
    """As a framework writes it."""
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS)
    y = (y - mean) * (lax.rsqrt(var + 1e-5) * scale) + bias
    return jax.nn.relu(y + residual)


def fused(x, w, bias, residual):
    """The same as one call; w and bias from `jaxwin.fold_batch_norm`."""
    return jaxwin.conv(x, w, bias=bias, residual=residual, activation="relu")


def main() -> None:
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    (large,) = jaxwin.explain(jaxwin.conv, draw(8, 64, 64, 64), draw(3, 3, 64, 64))
    print("layer                  xla   folded   jaxwin    fused   packed   (microseconds)")
    ratios = []
    for size, channels, features, window in LAYERS:
        x, residual = draw(1, size, size, channels), draw(1, size, size, features)
        w = draw(window, window, channels, features) / (window * channels**0.5)
        scale, bias, mean = draw(features), draw(features), draw(features)
        var = draw(features) ** 2 + 0.1
        w2, b2 = jaxwin.fold_batch_norm(w, None, scale, bias, mean, var)
        packed = jaxwin.pack(w2, x)
        programs = {
            "xla": (layer, (x, w, scale, bias, mean, var, residual)),
            "folded": (
                lambda x, w, b, r: jax.nn.relu(
                    lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS)
                    + b
                    + r
                ),
                (x, w2, b2, residual),
            ),
            "jaxwin": (jaxwin.accelerate(layer), (x, w, scale, bias, mean, var, residual)),
            "fused": (fused, (x, w2, b2, residual)),
            "packed": (fused, (x, packed, b2, residual)),
        }
        timed, expected = {}, None
        for name, (fn, args) in programs.items():
            compiled = jax.jit(fn).lower(*args).compile()
            got = np.asarray(compiled(*args))
            expected = got if expected is None else expected
            if np.abs(got - expected).max() > 1e-4 * np.abs(expected).max():
                raise SystemExit(f"{name} gives another result")
            timed[name] = measure.Timed(
                lambda compiled=compiled, args=args: compiled(*args).block_until_ready()
            )
        samples = measure.interleave(
            timed,
            threads=large.threads,
            rounds=11,
            min_seconds=0.01,
            budget_seconds=5,
            rng=random.Random(0),
        )
        times = [samples[name].median_ns / 1e3 for name in programs]
        ratios.append([time / times[3] for time in times])
        text = f"{size}x{size} {channels}->{features} {window}x{window}"
        print(f"{text:20}", *(f"{time:8.0f}" for time in times))
    means = np.exp(np.mean(np.log(ratios), 0))
    print("times as long as fused", *(f"{ratio:.2f}" for ratio in means))


if __name__ == "__main__":
    main()
