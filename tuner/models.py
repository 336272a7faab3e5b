# SPDX-License-Identifier: Apache-2.0
"""Whole networks, each written once, for JAX and for PyTorch.

A network is a function of a `Net` and its inputs. It asks the net for layers; the net of a
framework computes them with the parameters that it holds. So what the layers are stands in one
place, and both frameworks get the same numbers. Weights are random.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxwin

Layer = dict[str, Any]  # arrays by name: w, b, and those of the normalisation
Layers = list[Layer]
EPS = 1e-5
LEARNING_RATE, MOMENTUM = 1e-5, 0.9


class Net:
    """What networks are written in. Arrays have the framework's own layout.

    layers: the parameters of the layers in the order in which the network asks for them.
    training: whether normalisation uses the statistics of the batch.
    """

    def __init__(self, layers: Sequence[Layer], training: bool = False) -> None:
        self._layers = iter(layers)
        self.training = training

    def channels(self, x: Any) -> int:
        raise NotImplementedError

    def conv(
        self,
        x: Any,
        features: int,
        window: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        transposed: bool = False,
        norm: bool = True,
        activation: str | None = "relu",
        residual: Any = None,
    ) -> Any:
        """activation(norm(convolution) + residual), with a bias where there is no norm.

        transposed: the transpose of the convolution with this stride and padding.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "w": (window, window, self.channels(x) // groups, features)
        }
        for name in ("scale", "bias", "mean", "var") if norm else ("b",):
            shapes[name] = (features,)
        kind = "transposed" if transposed else "conv"
        layer = self._next(kind, shapes, branch=residual is not None)
        return self.convolve(x, layer, stride, padding, groups, transposed, activation, residual)

    def dense(self, x: Any, features: int) -> Any:
        """A matrix product and a bias, of a (batch, channels) array."""
        layer = self._next("dense", {"w": (self.channels(x), features), "b": (features,)}, False)
        return self.multiply(x, layer)

    def _next(self, kind: str, shapes: dict[str, tuple[int, ...]], branch: bool) -> Layer:
        """branch: whether the layer's result is added to something."""
        return next(self._layers)

    def convolve(
        self,
        x: Any,
        layer: Layer,
        stride: int,
        padding: int,
        groups: int,
        transposed: bool,
        activation: str | None,
        residual: Any,
    ) -> Any:
        raise NotImplementedError

    def multiply(self, x: Any, layer: Layer) -> Any:
        raise NotImplementedError

    def max_pool(self, x: Any, window: int, stride: int, padding: int = 0) -> Any:
        raise NotImplementedError

    def average(self, x: Any) -> Any:
        """Over the image: (batch, channels)."""
        raise NotImplementedError

    def concatenate(self, *arrays: Any) -> Any:
        """Along the channels."""
        raise NotImplementedError

    def mean(self, x: Any) -> Any:
        """Of all elements."""
        raise NotImplementedError

    def softplus(self, x: Any) -> Any:
        raise NotImplementedError


# --- the networks ----------------------------------------------------------------------------


def resnet(net: Net, x: Any, blocks: Sequence[int], width: int, classes: int) -> Any:
    """The bottleneck form with the stride in the 3x3 layer (v1.5)."""
    x = net.conv(x, width, 7, stride=2, padding=3)
    x = net.max_pool(x, 3, 2, 1)
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            y = net.conv(x, inner, 1)
            y = net.conv(y, inner, 3, stride=stride, padding=1)
            if block == 0:
                x = net.conv(x, 4 * inner, 1, stride=stride, activation=None)
            x = net.conv(y, 4 * inner, 1, residual=x)
    return net.dense(net.average(x), classes)


def mobilenet(net: Net, x: Any) -> Any:
    """MobileNetV2, width 1."""
    plan = (  # expansion, features, blocks, stride of the first
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    x = net.conv(x, 32, 3, stride=2, padding=1, activation="relu6")
    for expansion, features, count, first in plan:
        for block in range(count):
            stride = first if block == 0 else 1
            channels = net.channels(x)
            inner = channels * expansion
            y = x if expansion == 1 else net.conv(x, inner, 1, activation="relu6")
            y = net.conv(y, inner, 3, stride=stride, padding=1, groups=inner, activation="relu6")
            keep = x if stride == 1 and channels == features else None
            x = net.conv(y, features, 1, activation=None, residual=keep)
    x = net.conv(x, 1280, 1, activation="relu6")
    return net.dense(net.average(x), 1000)


def unet(net: Net, x: Any, width: int, depth: int) -> Any:
    """With padding, so that sizes stay; two classes."""
    skips = []
    for level in range(depth):
        x = net.conv(x, width * 2**level, 3, padding=1)
        x = net.conv(x, width * 2**level, 3, padding=1)
        skips.append(x)
        x = net.max_pool(x, 2, 2)
    x = net.conv(x, width * 2**depth, 3, padding=1)
    x = net.conv(x, width * 2**depth, 3, padding=1)
    for level in reversed(range(depth)):
        features = width * 2**level
        x = net.conv(x, features, 2, stride=2, transposed=True, norm=False, activation=None)
        x = net.concatenate(skips[level], x)
        x = net.conv(x, features, 3, padding=1)
        x = net.conv(x, features, 3, padding=1)
    return net.conv(x, 2, 1, norm=False, activation=None)


def generator(net: Net, z: Any, width: int) -> Any:
    """DCGAN's, from 1x1 to 64x64."""
    x = net.conv(z, 8 * width, 4, transposed=True)
    for factor in (4, 2, 1):
        x = net.conv(x, factor * width, 4, stride=2, padding=1, transposed=True)
    return net.conv(x, 3, 4, stride=2, padding=1, transposed=True, norm=False, activation="tanh")


def discriminator(net: Net, x: Any, width: int) -> Any:
    """DCGAN's, from 64x64 to one number."""
    x = net.conv(x, width, 4, stride=2, padding=1, norm=False, activation="leaky_relu")
    for factor in (2, 4, 8):
        x = net.conv(x, factor * width, 4, stride=2, padding=1, activation="leaky_relu")
    return net.conv(x, 1, 4, norm=False, activation=None)


# A loss: of a function that applies a network by name, the ops, and the inputs.
Apply = Callable[..., Any]
Loss = Callable[[Net, Apply, Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network, or several, and what is measured of them.

    networks: by name. inputs: shapes with channels last, of one example each. steps: of one
    training step in order, the network whose weights move and the loss; empty for inference,
    which is the one network applied to the one input. batch: the usual one.
    """

    summary: str
    batch: int
    networks: Mapping[str, Callable[..., Any]]
    inputs: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[str, Loss], ...] = ()

    @property
    def training(self) -> bool:
        """Whether a training step is measured, else inference."""
        return bool(self.steps)


def _distance(net: Net, apply: Apply, inputs: Sequence[Any]) -> Any:
    """Mean square distance of the network's output from the second input."""
    difference = apply("net", inputs[0]) - inputs[1]
    return net.mean(difference * difference)


def _judge(net: Net, apply: Apply, inputs: Sequence[Any]) -> Any:
    """The discriminator's loss on real images and on generated ones."""
    z, real = inputs
    fake = apply("generator", z)
    return net.mean(
        net.softplus(-apply("discriminator", real)) + net.softplus(apply("discriminator", fake))
    )


def _deceive(net: Net, apply: Apply, inputs: Sequence[Any]) -> Any:
    """The generator's loss."""
    return net.mean(net.softplus(-apply("discriminator", apply("generator", inputs[0]))))


_resnet50 = functools.partial(resnet, blocks=(3, 4, 6, 3), width=64, classes=1000)
_unet = functools.partial(unet, width=64, depth=4)
_small = functools.partial(resnet, blocks=(1, 1), width=8, classes=10)
_image = (224, 224, 3)

MODELS: dict[str, Model] = {
    "resnet50": Model("ResNet-50 (v1.5), inference", 1, {"net": _resnet50}, (_image,)),
    "resnet50-train": Model(
        "ResNet-50 (v1.5), training step",
        8,
        {"net": _resnet50},
        (_image, (1000,)),
        (("net", _distance),),
    ),
    "mobilenetv2": Model("MobileNetV2, inference", 1, {"net": mobilenet}, (_image,)),
    "unet": Model("U-Net at 128x128, inference", 1, {"net": _unet}, ((128, 128, 3),)),
    "unet-train": Model(
        "U-Net at 128x128, training step",
        1,
        {"net": _unet},
        ((128, 128, 3), (128, 128, 2)),
        (("net", _distance),),
    ),
    "dcgan-train": Model(
        "DCGAN at 64x64, training step of both networks",
        16,
        {
            "generator": functools.partial(generator, width=128),
            "discriminator": functools.partial(discriminator, width=128),
        },
        ((1, 1, 100), (64, 64, 3)),
        (("discriminator", _judge), ("generator", _deceive)),
    ),
    "small": Model("a small residual network, inference", 2, {"net": _small}, ((32, 32, 3),)),
    "small-train": Model(
        "small networks that learn to deceive each other, training step",
        2,
        {
            "generator": functools.partial(generator, width=4),
            "discriminator": functools.partial(discriminator, width=4),
        },
        ((1, 1, 8), (64, 64, 3)),
        (("discriminator", _judge), ("generator", _deceive)),
    ),
}


# --- JAX -------------------------------------------------------------------------------------

NUMBERS = ("NHWC", "HWIO", "NHWC")
_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.01),
    "tanh": jnp.tanh,
}


class JaxNet(Net):
    """Layers by `jax.lax`, channels last."""

    def channels(self, x: Any) -> int:
        return int(x.shape[-1])

    def convolve(
        self,
        x: Any,
        layer: Layer,
        stride: int,
        padding: int,
        groups: int,
        transposed: bool,
        activation: str | None,
        residual: Any,
    ) -> Any:
        y = self.convolution(x, layer["w"], stride, padding, groups, transposed)
        return self.finished(y, layer, activation, residual)

    def finished(self, y: Any, layer: Layer, activation: str | None, residual: Any) -> Any:
        """What follows the convolution."""
        y = self.normalised(y, layer) if "scale" in layer else y + layer["b"]
        if residual is not None:
            y = y + residual
        return y if activation is None else _ACTIVATIONS[activation](y)

    def convolution(
        self, x: Any, w: Any, stride: int, padding: int, groups: int, transposed: bool
    ) -> Any:
        """Without anything after it."""
        pad = w.shape[0] - 1 - padding if transposed else padding
        return lax.conv_general_dilated(
            x,
            w,
            (1, 1) if transposed else (stride, stride),
            [(pad, pad)] * 2,
            lhs_dilation=(stride, stride) if transposed else None,
            dimension_numbers=NUMBERS,
            feature_group_count=groups,
        )

    def normalised(self, y: Any, layer: Layer) -> Any:
        """Batch normalisation."""
        if self.training:
            mean = jnp.mean(y, (0, 1, 2))
            var = jnp.mean(y * y, (0, 1, 2)) - mean * mean
        else:
            mean, var = layer["mean"], layer["var"]
        return (y - mean) * (lax.rsqrt(var + EPS) * layer["scale"]) + layer["bias"]

    def multiply(self, x: Any, layer: Layer) -> Any:
        return x @ layer["w"] + layer["b"]

    def max_pool(self, x: Any, window: int, stride: int, padding: int = 0) -> Any:
        pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), pads
        )

    def average(self, x: Any) -> Any:
        return jnp.mean(x, (1, 2))

    def concatenate(self, *arrays: Any) -> Any:
        return jnp.concatenate(arrays, -1)

    def mean(self, x: Any) -> Any:
        return jnp.mean(x)

    def softplus(self, x: Any) -> Any:
        return jax.nn.softplus(x)


class FusedNet(JaxNet):
    """Layers by `jaxwin.conv`, with bias, residual and activation in the same call."""

    def convolve(
        self,
        x: Any,
        layer: Layer,
        stride: int,
        padding: int,
        groups: int,
        transposed: bool,
        activation: str | None,
        residual: Any,
    ) -> Any:
        if transposed:
            return super().convolve(
                x, layer, stride, padding, groups, transposed, activation, residual
            )
        return jaxwin.conv(
            x,
            layer["w"],
            stride=stride,
            padding=padding,
            groups=groups,
            bias=layer["b"],
            residual=residual,
            activation=activation,
        )


class FusedTrainingNet(JaxNet):
    """Layers of training by `jaxwin.batch_norm`, with residual and activation in the same call."""

    def finished(self, y: Any, layer: Layer, activation: str | None, residual: Any) -> Any:
        if "scale" not in layer:
            return super().finished(y, layer, activation, residual)
        z, _, _ = jaxwin.batch_norm(
            y, layer["scale"], layer["bias"], residual=residual, activation=activation, eps=EPS
        )
        return z

    def max_pool(self, x: Any, window: int, stride: int, padding: int = 0) -> Any:
        # XLA's gradient of reduce_window carries four arrays of indices along. The first of the
        # largest values has it here as well: of a row, and then of the rows.
        pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        x = jnp.pad(x, pads, constant_values=-jnp.inf)
        for axis in (2, 1):
            count = (x.shape[axis] - window) // stride + 1
            best = None
            for i in range(window):
                last = i + (count - 1) * stride + 1
                there = lax.slice_in_dim(x, i, last, stride, axis)
                best = there if best is None else jnp.where(there > best, there, best)
            x = best
        return x


class _Meeting(FusedNet):
    """Writes down how each layer's weights would be packed for the input that they meet."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.found: list[Callable[[Any], Any]] = []

    def convolve(
        self,
        x: Any,
        layer: Layer,
        stride: int,
        padding: int,
        groups: int,
        transposed: bool,
        activation: str | None,
        residual: Any,
    ) -> Any:
        struct: Any = jax.ShapeDtypeStruct
        like = struct(x.shape, x.dtype)
        pack = functools.partial(jaxwin.pack, x=like, stride=stride, padding=padding, groups=groups)
        self.found.append((lambda w: w) if transposed else pack)
        return super().convolve(x, layer, stride, padding, groups, transposed, activation, residual)

    def multiply(self, x: Any, layer: Layer) -> Any:
        self.found.append(lambda w: w)
        return super().multiply(x, layer)


class _Listing(JaxNet):
    """Writes down what a network asks for."""

    def __init__(self) -> None:
        super().__init__([])
        self.found: list[tuple[str, dict[str, tuple[int, ...]], bool]] = []

    def _next(self, kind: str, shapes: dict[str, tuple[int, ...]], branch: bool) -> Layer:
        self.found.append((kind, shapes, branch))
        return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def input_shapes(model: Model, batch: int) -> list[tuple[int, ...]]:
    """Of the model's inputs, channels last."""
    return [(batch, *shape) for shape in model.inputs]


def inputs(model: Model, batch: int, rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """Random inputs, channels last."""
    return [rng.standard_normal(shape, np.float32) for shape in input_shapes(model, batch)]


def layers(model: Model, rng: np.random.Generator) -> dict[str, Layers]:
    """Random weights that keep the size of the values, by network; each layer says its kind.

    Residual branches are scaled down, as is usual at the start of a training: rounding then does
    not grow from block to block.

    Training has no running statistics: it does not use them.
    """
    found = {}
    for name, network in model.networks.items():
        # The input of a network that is not the first one is what the model's last input is.
        shape = model.inputs[0] if name == next(iter(model.networks)) else model.inputs[-1]
        listing = _Listing()
        struct: Any = jax.ShapeDtypeStruct
        like = struct((1, *shape), np.float32)
        jax.eval_shape(functools.partial(network, listing), like)
        found[name] = [
            {"kind": kind}
            | {
                part: _draw(part, shape, rng, 0.2 if branch and part == "scale" else 1.0)
                for part, shape in shapes.items()
                if not (model.training and part in ("mean", "var"))
            }
            for kind, shapes, branch in listing.found
        ]
    return found


def _draw(
    part: str, shape: tuple[int, ...], rng: np.random.Generator, size: float = 1.0
) -> np.ndarray[Any, Any]:
    if part == "w":
        size *= float(np.sqrt(2 / np.prod(shape[:-1])))
        return rng.standard_normal(shape, np.float32) * np.float32(size)
    noise = rng.uniform(-0.1, 0.1, shape).astype(np.float32)
    return (noise + np.float32(part in ("scale", "var"))) * np.float32(size)


def arrays(of: Layers) -> Layers:
    """The layers without what are no arrays, for JAX."""
    return [{k: jnp.asarray(v) for k, v in layer.items() if k != "kind"} for layer in of]


def folded(of: Layers) -> Layers:
    """Inference layers whose normalisation is part of the weights."""
    return [
        layer
        if "scale" not in layer
        else dict(
            zip(
                ("w", "b"),
                jaxwin.fold_batch_norm(
                    layer["w"],
                    None,
                    layer["scale"],
                    layer["bias"],
                    layer["mean"],
                    layer["var"],
                    EPS,
                ),
                strict=True,
            )
        )
        for layer in of
    ]


def packed(model: Model, of: Layers, x: Any) -> Layers:
    """Folded layers with weights packed for an input of the model."""
    (network,) = model.networks.values()
    net = _Meeting(of)
    jax.eval_shape(functools.partial(network, net), x)
    return [layer | {"w": pack(layer["w"])} for layer, pack in zip(of, net.found, strict=True)]


def jax_inference(model: Model, net: type[JaxNet] = JaxNet) -> Callable[..., Any]:
    """A function of the layers and the input."""
    (network,) = model.networks.values()

    def infer(of: Layers, x: Any) -> Any:
        return network(net(of), x)

    return infer


def jax_training(model: Model, net: type[JaxNet] = JaxNet) -> Callable[..., Any]:
    """A function of ((layers, momenta) by network, inputs): both after the step, and the losses."""

    def train(state: tuple[Any, Any], data: Sequence[Any]) -> tuple[Any, Any]:
        weights, momenta = ({k: list(v) for k, v in part.items()} for part in state)
        losses = []
        for moving, loss in model.steps:

            def of(own: Layers, moving: str = moving, loss: Loss = loss) -> Any:
                def apply(name: str, x: Any) -> Any:
                    mine = own if name == moving else weights[name]
                    return model.networks[name](net(mine, training=True), x)

                return loss(net([]), apply, data)

            value, slopes = jax.value_and_grad(of)(weights[moving])
            losses.append(value)
            momenta[moving] = jax.tree.map(lambda m, g: MOMENTUM * m + g, momenta[moving], slopes)
            weights[moving] = jax.tree.map(
                lambda p, m: p - LEARNING_RATE * m, weights[moving], momenta[moving]
            )
        return (weights, momenta), jnp.stack(losses)

    return train


# --- PyTorch ---------------------------------------------------------------------------------


def torch_net() -> type[Net]:
    """Layers by PyTorch, channels last in memory. Imports torch."""
    import torch
    import torch.nn.functional as tf

    activations = {
        "relu": tf.relu,
        "relu6": tf.relu6,
        "leaky_relu": lambda x: tf.leaky_relu(x, 0.01),
        "tanh": torch.tanh,
    }

    class TorchNet(Net):
        def channels(self, x: Any) -> int:
            return int(x.shape[1])

        def convolve(
            self,
            x: Any,
            layer: Layer,
            stride: int,
            padding: int,
            groups: int,
            transposed: bool,
            activation: str | None,
            residual: Any,
        ) -> Any:
            bias = layer.get("b")
            if transposed:
                y = tf.conv_transpose2d(x, layer["w"], bias, stride, padding, 0, groups)
            else:
                y = tf.conv2d(x, layer["w"], bias, stride, padding, 1, groups)
            if "scale" in layer:
                y = tf.batch_norm(
                    y,
                    None if self.training else layer["mean"],
                    None if self.training else layer["var"],
                    layer["scale"],
                    layer["bias"],
                    self.training,
                    0.1,
                    EPS,
                )
            if residual is not None:
                y = y + residual
            return y if activation is None else activations[activation](y)

        def multiply(self, x: Any, layer: Layer) -> Any:
            return tf.linear(x, layer["w"], layer["b"])

        def max_pool(self, x: Any, window: int, stride: int, padding: int = 0) -> Any:
            return tf.max_pool2d(x, window, stride, padding)

        def average(self, x: Any) -> Any:
            return tf.adaptive_avg_pool2d(x, 1).flatten(1)

        def concatenate(self, *arrays: Any) -> Any:
            return torch.cat(arrays, 1)

        def mean(self, x: Any) -> Any:
            return x.mean()

        def softplus(self, x: Any) -> Any:
            return tf.softplus(x)

    return TorchNet


def to_torch_weights(w: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """A layer's `w` in PyTorch's order."""
    if kind == "dense":
        return w.T
    if kind == "transposed":
        return w[::-1, ::-1].transpose(2, 3, 0, 1)
    return w.transpose(3, 2, 0, 1)


def from_torch_weights(w: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """The inverse of `to_torch_weights`."""
    if kind == "dense":
        return w.T
    if kind == "transposed":
        return w.transpose(2, 3, 0, 1)[::-1, ::-1]
    return w.transpose(2, 3, 1, 0)
