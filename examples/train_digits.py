# SPDX-License-Identifier: Apache-2.0
"""Train a small convolutional network of jaxwin.flax layers on scikit-learn's handwritten digits.

    python examples/train_digits.py

Prints the accuracy on the test set and exits with 1 if it is 98 % or less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx
    from jax import Array
    from jax.typing import ArrayLike
    from rich.console import Console
    from rich.progress import Progress
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    from jaxwin.flax import nnx as jnnx
except ModuleNotFoundError as error:
    sys.exit(
        f"train_digits: {error}; `make demo` has everything that the examples need, as has "
        "pip install '.[demo]'"
    )

SEED = 0
EPOCHS = 30
BATCH = 64
WANTED = 0.98


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = jnnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = jnnx.Conv(32, 32, kernel_size=(3, 3), rngs=rngs)
        self.conv3 = jnnx.Conv(32, 64, kernel_size=(3, 3), strides=(2, 2), rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, images: ArrayLike) -> Array:
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.conv3(x))
        return self.dense(self.dropout(x.reshape(x.shape[0], -1)))


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer, images: ArrayLike, labels: ArrayLike
) -> Array:
    def loss(model: Network) -> Array:
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def count_correct(model: Network, images: ArrayLike, labels: ArrayLike) -> Array:
    return jnp.sum(jnp.argmax(model(images), axis=-1) == labels)


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, test images and labels; a quarter is for the test."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=0.25, random_state=SEED, stratify=digits.target
    )
    return train_x, train_y, test_x, test_y


def shifted(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each image moved by up to one pixel, for variety."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, x = random.integers(0, 3, (2, len(images), 1, 1))
    rows, columns = np.arange(8)[None, :, None] + y, np.arange(8)[None, None, :] + x
    return padded[np.arange(len(images))[:, None, None], rows, columns]


def with_progress(epochs: Iterable[tuple[int, float, float]], console: Console) -> None:
    """A bar on a terminal, a line every five epochs otherwise."""
    if console.is_terminal:
        with Progress(console=console) as progress:
            bar = progress.add_task("training", total=EPOCHS)
            for epoch, loss, test in epochs:
                text = f"epoch {epoch:2d}  loss {loss:.4f}  test accuracy {100 * test:.2f} %"
                progress.update(bar, advance=1, description=text)
    else:
        for epoch, loss, test in epochs:
            if epoch == 1 or epoch % 5 == 0:
                print(f"epoch {epoch:2d}/{EPOCHS}  loss {loss:.4f}  "
                      f"test accuracy {100 * test:.2f} %", flush=True)  # fmt: skip


def train(model: Network) -> Iterator[tuple[int, float, float]]:
    """Yields (epoch, mean loss, accuracy on the test set)."""
    train_x, train_y, test_x, test_y = data()
    steps = len(train_x) // BATCH
    schedule = optax.cosine_decay_schedule(3e-3, EPOCHS * steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=nnx.Param)
    random = np.random.default_rng(SEED)
    for epoch in range(1, EPOCHS + 1):
        model.train()
        losses = []
        for batch in random.permutation(len(train_x))[: steps * BATCH].reshape(steps, BATCH):
            images = shifted(train_x[batch], random)
            losses.append(train_step(model, optimizer, images, train_y[batch]))
        model.eval()
        correct = int(count_correct(model, test_x, test_y))
        yield epoch, float(np.mean(jax.device_get(losses))), correct / len(test_y)


def main() -> int:
    argparse.ArgumentParser(description="Train a network of jaxwin.flax layers.").parse_args()
    start = time.perf_counter()
    model = Network(nnx.Rngs(SEED))
    history: list[float] = []

    def watched() -> Iterator[tuple[int, float, float]]:
        for epoch in train(model):
            history.append(epoch[2])
            yield epoch

    with_progress(watched(), Console())
    passed = history[-1] > WANTED
    print(
        f"{'OK' if passed else 'FAILED'}: test accuracy {100 * history[-1]:.2f} % "
        f"(wanted: over {100 * WANTED:.0f} %) in {time.perf_counter() - start:.1f} s"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
