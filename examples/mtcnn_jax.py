# SPDX-License-Identifier: Apache-2.0
"""The MTCNN face detector (Zhang et al., 2016) in plain JAX, with the convolution passed in.

Three small networks look at an image one after the other. P-Net slides over an image pyramid and
proposes boxes, R-Net refines them, O-Net refines once more and places five landmarks. `Detector`
takes the convolution as an argument, so that the same code runs through jaxwin and through lax.

The weights are the pretrained ones that the PyPI package `mtcnn` (MIT) ships. They are read as
data: that package itself needs TensorFlow and is not imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import joblib
import numpy as np
from jax import Array, lax

Convolution = Callable[..., Array]  # called as jax.lax.conv_general_dilated
Network = list[tuple[Array, ...]]  # (kernel, bias) or (kernel, bias, PReLU slope) of each layer

CELL, STRIDE = 12, 2  # P-Net sees 12 x 12 pixels at a time, 2 pixels apart
SCALE_STEP = 0.709  # from one level of the pyramid to the next
P_THRESHOLD, R_THRESHOLD, O_THRESHOLD = 0.6, 0.7, 0.7
PER_LEVEL, PROPOSALS = 256, 512  # the best boxes that are kept of one level and of all levels
R_BATCH, O_BATCH = 64, 16  # fixed batches: one compilation serves any number of boxes
LANDMARKS = ("left eye", "right eye", "nose", "mouth left", "mouth right")  # as seen in the image


class Face(NamedTuple):
    box: tuple[float, float, float, float]  # left, top, right, bottom in pixels
    score: float
    landmarks: tuple[tuple[float, float], ...]  # (x, y) in the order of LANDMARKS


class Weights(NamedTuple):
    pnet: Network
    rnet: Network
    onet: Network


# --- weights -------------------------------------------------------------------------------------


def load_weights() -> Weights:
    """Read the weights from the installed `mtcnn` distribution without importing it."""
    files = importlib.metadata.files("mtcnn") or []
    paths = {f.stem: Path(str(f.locate())) for f in files if f.suffix == ".lz4"}

    def read(name: str, layers: int) -> Network:
        # A joblib pickle inside an lz4 frame: a flat list of float32 arrays in layer order.
        # Kernels are HWIO; dense kernels are (inputs, outputs). Hidden layers have a PReLU slope.
        flat = [jnp.asarray(np.squeeze(a) if a.ndim == 3 else a) for a in joblib.load(paths[name])]
        hidden = [tuple(flat[3 * i : 3 * i + 3]) for i in range(layers)]
        heads = [tuple(flat[i : i + 2]) for i in range(3 * layers, len(flat), 2)]
        return hidden + heads

    return Weights(read("pnet", 3), read("rnet", 4), read("onet", 5))


# --- networks ------------------------------------------------------------------------------------


def _conv(conv: Convolution, x: Array, layer: tuple[Array, ...]) -> Array:
    y = conv(x, layer[0], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) + layer[1]
    return y if len(layer) == 2 else jnp.where(y >= 0, y, layer[2] * y)


def _dense(x: Array, layer: tuple[Array, ...]) -> Array:
    y = x @ layer[0] + layer[1]
    return y if len(layer) == 2 else jnp.where(y >= 0, y, layer[2] * y)


def _max_pool(x: Array, window: int, padding: str) -> Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, 2, 2, 1), padding)


def _flatten(x: Array) -> Array:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], -1)  # the dense weights go column by column


def pnet(conv: Convolution, net: Network, x: Array) -> tuple[Array, Array]:
    """Box offsets and face probability at every cell."""
    x = _max_pool(_conv(conv, x, net[0]), 2, "SAME")
    x = _conv(conv, _conv(conv, x, net[1]), net[2])
    return _conv(conv, x, net[3]), jax.nn.softmax(_conv(conv, x, net[4]))[..., 1]


def rnet(conv: Convolution, net: Network, x: Array) -> tuple[Array, Array]:
    """Box offsets and face probability of patches of 24 x 24."""
    x = _max_pool(_conv(conv, x, net[0]), 3, "SAME")
    x = _max_pool(_conv(conv, x, net[1]), 3, "VALID")
    x = _dense(_flatten(_conv(conv, x, net[2])), net[3])
    return _dense(x, net[4]), jax.nn.softmax(_dense(x, net[5]))[..., 1]


def onet(conv: Convolution, net: Network, x: Array) -> tuple[Array, Array, Array]:
    """Box offsets, face probability and landmarks (five x, then five y) of patches of 48 x 48."""
    x = _max_pool(_conv(conv, x, net[0]), 3, "SAME")
    x = _max_pool(_conv(conv, x, net[1]), 3, "VALID")
    x = _max_pool(_conv(conv, x, net[2]), 2, "SAME")
    x = _dense(_flatten(_conv(conv, x, net[3])), net[4])
    return _dense(x, net[5]), jax.nn.softmax(_dense(x, net[7]))[..., 1], _dense(x, net[6])


# --- boxes: arrays (..., 4) of left, top, right, bottom ------------------------------------------


def _sizes(boxes: Array) -> Array:
    return boxes[..., 2:] - boxes[..., :2]


def _shift(boxes: Array, offsets: Array) -> Array:
    """Move the corners by offsets that are given in box sizes."""
    return boxes + offsets * jnp.tile(_sizes(boxes), 2)


def _square(boxes: Array) -> Array:
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    half = jnp.max(_sizes(boxes), axis=-1, keepdims=True) / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def _suppress(boxes: Array, scores: Array, threshold: float, by_smaller: bool = False) -> Array:
    """Non-maximum suppression of boxes in falling order of score; suppressed scores become 0.

    The overlap is taken relative to the union, or with `by_smaller` to the smaller box.
    """
    corner = jnp.maximum(boxes[:, None, :2], boxes[None, :, :2])
    opposite = jnp.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = jnp.prod(jnp.maximum(opposite - corner, 0), axis=-1)
    area = jnp.prod(jnp.maximum(_sizes(boxes), 0), axis=-1)
    smaller = jnp.minimum(area[:, None], area)
    whole = smaller if by_smaller else area[:, None] + area - shared
    overlaps = shared > threshold * whole
    rank = jnp.arange(len(boxes))

    def visit(i: Array, scores: Array) -> Array:
        return jnp.where(overlaps[i] & (rank > i) & (scores[i] > 0), 0.0, scores)

    return lax.fori_loop(0, len(boxes), visit, scores)


def _best(boxes: Array, scores: Array, count: int) -> tuple[Array, Array, Array]:
    scores, index = lax.top_k(scores, min(count, len(scores)))
    return boxes[index], scores, index


def _crop(image: Array, boxes: Array, size: int) -> Array:
    """Resize each box to size x size: the mean of 2 x 2 bilinear samples; outside counts as 0."""
    place = (jnp.arange(2 * size) + 0.5) / (2 * size)

    def one(box: Array) -> Array:
        width, height = _sizes(box)
        x, y = box[0] + place * width - 0.5, box[1] + place * height - 0.5
        x0, y0 = jnp.floor(x).astype(int), jnp.floor(y).astype(int)
        fx, fy = (x - x0)[None, :, None], (y - y0)[:, None, None]

        def at(i: Array, j: Array) -> Array:
            inside = ((i >= 0) & (i < image.shape[0]))[:, None] & (j >= 0) & (j < image.shape[1])
            return jnp.where(inside[..., None], image[i[:, None], j], 0.0)

        upper = (1 - fx) * at(y0, x0) + fx * at(y0, x0 + 1)
        lower = (1 - fx) * at(y0 + 1, x0) + fx * at(y0 + 1, x0 + 1)
        samples = (1 - fy) * upper + fy * lower
        return samples.reshape(size, 2, size, 2, -1).mean((1, 3))

    return jax.vmap(one)(boxes)


# --- the three stages ----------------------------------------------------------------------------


def pyramid_sizes(height: int, width: int, min_face: int) -> list[tuple[int, int]]:
    """(height, width) of the levels; a face of `min_face` pixels fills one cell of the first."""
    sizes, scale = [], CELL / min_face
    while min(height, width) * scale >= CELL:
        sizes.append((round(height * scale), round(width * scale)))
        scale *= SCALE_STEP
    return sizes


def _propose(
    image: Array, net: Network, *, conv: Convolution, sizes: tuple[tuple[int, int], ...]
) -> tuple[Array, Array]:
    """P-Net over the whole pyramid: the best boxes and their scores (0: suppressed)."""
    height, width, channels = image.shape
    all_boxes, all_scores, level = [], [], image
    for rows, columns in sizes:
        level = jax.image.resize(level, (rows, columns, channels), "linear")
        (offsets,), (scores,) = pnet(conv, net, level[None])
        y, x = STRIDE * jnp.indices(scores.shape)
        cells = jnp.stack([x, y, x + CELL, y + CELL], axis=-1)
        boxes = _shift(cells, offsets).reshape(-1, 4)
        scores = jnp.where(scores > P_THRESHOLD, scores, 0.0).ravel()
        boxes, scores, _ = _best(boxes, scores, PER_LEVEL)
        all_boxes.append(boxes * jnp.tile(jnp.array([width / columns, height / rows]), 2))
        all_scores.append(_suppress(boxes, scores, 0.5))
    boxes, scores, _ = _best(jnp.concatenate(all_boxes), jnp.concatenate(all_scores), PROPOSALS)
    return _square(boxes), _suppress(boxes, scores, 0.7)


def _refine(image: Array, boxes: Array, net: Network, *, conv: Convolution) -> tuple[Array, Array]:
    offsets, scores = rnet(conv, net, _crop(image, boxes, 24))
    return _shift(boxes, offsets), jnp.where(scores > R_THRESHOLD, scores, 0.0)


def _place(
    image: Array, boxes: Array, net: Network, *, conv: Convolution
) -> tuple[Array, Array, Array]:
    offsets, scores, marks = onet(conv, net, _crop(image, boxes, 48))
    places = boxes[:, None, :2] + marks.reshape(-1, 2, 5).swapaxes(1, 2) * _sizes(boxes)[:, None]
    return _shift(boxes, offsets), jnp.where(scores > O_THRESHOLD, scores, 0.0), places


@functools.partial(jax.jit, static_argnames=("threshold", "by_smaller"))
def _select(
    boxes: Array, scores: Array, threshold: float, by_smaller: bool = False
) -> tuple[Array, Array, Array]:
    """Sort, suppress, and say which box each one was."""
    boxes, scores, index = _best(boxes, scores, len(scores))
    return boxes, _suppress(boxes, scores, threshold, by_smaller), index


class Detector:
    """A face detector for images of one size."""

    def __init__(
        self, weights: Weights, conv: Convolution, height: int, width: int, min_face: int = 20
    ) -> None:
        self.weights = weights
        self.sizes = tuple(pyramid_sizes(height, width, min_face))
        self.propose = jax.jit(functools.partial(_propose, conv=conv, sizes=self.sizes))
        self.refine = jax.jit(functools.partial(_refine, conv=conv))
        self.place = jax.jit(functools.partial(_place, conv=conv))

    def __call__(self, pixels: np.ndarray[Any, Any]) -> list[Face]:
        """The faces in an RGB image (height, width, 3) of bytes, best first."""
        image = (jnp.asarray(pixels, jnp.float32) - 127.5) / 128
        (proposed,) = _present(*self.propose(image, self.weights.pnet))
        if len(proposed) == 0:
            return []
        boxes, scores = _in_batches(
            R_BATCH, proposed, lambda batch: self.refine(image, batch, self.weights.rnet)
        )
        boxes, scores, _ = _select(boxes, scores, 0.7)
        (refined,) = _present(_square(boxes), scores)
        if len(refined) == 0:
            return []
        boxes, scores, places = _in_batches(
            O_BATCH, refined, lambda batch: self.place(image, batch, self.weights.onet)
        )
        boxes, scores, index = _select(boxes, scores, 0.7, by_smaller=True)
        found = _present(boxes, scores, scores, places[index])
        return [
            Face(tuple(box.tolist()), float(score), tuple((float(x), float(y)) for x, y in place))
            for box, score, place in zip(*found, strict=True)
        ]


def _present(boxes: Array, scores: Array, *more: Array) -> tuple[np.ndarray[Any, Any], ...]:
    """On the host: the boxes, and what else is given, whose score is not 0."""
    keep = np.asarray(scores) > 0
    return tuple(np.asarray(a)[keep] for a in (boxes, *more))


def _in_batches(
    size: int, boxes: np.ndarray[Any, Any], stage: Callable[[Array], tuple[Array, ...]]
) -> tuple[Array, ...]:
    """Run a stage in batches of one size; the filling has score 0 afterwards."""
    count = len(boxes)
    padded = np.pad(boxes, ((0, -count % size), (0, 0)))
    parts = [stage(jnp.asarray(padded[i : i + size])) for i in range(0, len(padded), size)]
    out_boxes, scores, *more = (jnp.concatenate(p) for p in zip(*parts, strict=True))
    return (out_boxes, jnp.where(jnp.arange(len(scores)) < count, scores, 0.0), *more)
