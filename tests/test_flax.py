# SPDX-License-Identifier: Apache-2.0
"""Our Flax layers against Flax's: parameters bit for bit, outputs, checkpoints both ways."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

flax = pytest.importorskip("flax")

from flax import linen, nnx, serialization  # noqa: E402

import jaxwin.flax  # noqa: E402

OURS: dict[str, Any] = {"linen": jaxwin.flax.linen, "nnx": jaxwin.flax.nnx}
THEIRS: dict[str, Any] = {"linen": linen, "nnx": nnx}
C, K = 4, 6
MASK = np.tril(np.ones((3 * C, K))).reshape(3, C, K)

# (kernel_size, shape of the input, fields)
CONV: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    *(
        ((3, 2), (2, 7, 6, C), {"padding": padding})
        for padding in ("SAME", "VALID", "CIRCULAR", "REFLECT", 1, (1, 0), ((0, 2), (1, 0)))
    ),
    (3, (2, 9, C), {"padding": "CAUSAL", "kernel_dilation": 2}),
    ((3, 3), (2, 7, 6, C), {"strides": 2, "padding": "CIRCULAR"}),
    ((3, 2), (2, 7, 6, C), {"strides": (1, 2), "use_bias": False}),
    ((3, 2), (2, 7, 6, C), {"kernel_dilation": (2, 1), "feature_group_count": 2}),
    ((3, 2), (2, 5, 4, C), {"input_dilation": 2, "padding": ((1, 1), (1, 1))}),
    (3, (2, 9, C), {"mask": MASK}),
    ((3, 3), (2, 7, 6, C), {"dtype": jnp.bfloat16}),
    ((3, 3), (2, 7, 6, C), {"param_dtype": jnp.bfloat16, "precision": "highest"}),
    ((3, 3), (7, 6, C), {}),
    ((3, 3), (2, 3, 7, 6, C), {}),
    ((2, 3, 2), (1, 4, 4, 4, C), {}),
]
CONV_TRANSPOSE: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = [
    *(
        ((3, 2), (2, 5, 4, C), {"padding": padding, "strides": (2, 3)})
        for padding in ("SAME", "VALID", "CIRCULAR", 1, (1, 0), ((0, 2), (1, 0)))
    ),
    ((4, 4), (1, 5, 5, C), {"padding": "CIRCULAR", "strides": (2, 2), "transpose_kernel": True}),
    ((3, 3), (1, 5, 5, C), {"padding": "SAME", "strides": (2, 2), "transpose_kernel": True}),
    ((5, 3), (1, 3, 4, C), {"padding": "CIRCULAR"}),
    ((3, 2), (2, 5, 4, C), {"kernel_dilation": (2, 1), "use_bias": False}),
    (3, (2, 9, C), {"mask": MASK, "strides": (2,)}),
    ((3, 3), (2, 5, 4, C), {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}),
    ((3, 3), (2, 5, 4, C), {"param_dtype": jnp.float16, "precision": "highest"}),
    ((3, 3), (5, 4, C), {}),
    ((3, 3), (2, 2, 5, 4, C), {}),
    ((2, 2, 2), (1, 3, 3, 3, C), {"strides": (2, 1, 2)}),
]
CASES = [("Conv", *case) for case in CONV] + [("ConvTranspose", *case) for case in CONV_TRANSPOSE]


def describe(case: Any) -> Any:
    if isinstance(case, dict):
        return ",".join(
            f"{k}={'array' if isinstance(v, np.ndarray) else getattr(v, '__name__', v)}"
            for k, v in case.items()
        )
    return "x".join(map(str, case)) if isinstance(case, tuple) else case


def draw(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_close(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        tolerance = 2e-5 if a.dtype.itemsize >= 4 else 4 * float(jnp.finfo(a.dtype).eps)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance
        )


def convolutions(f: Any, *args: Any) -> list[str]:
    """Names of the convolution primitives of a program."""

    def walk(jaxpr: Any) -> list[str]:
        names = []
        for equation in jaxpr.eqns:
            if "conv_general" in equation.primitive.name:
                names.append(equation.primitive.name)
            for sub in jaxprs_in_params(equation.params):
                names += walk(sub)
        return names

    return walk(jax.make_jaxpr(f)(*args).jaxpr)


def cheap_init(key: Any, shape: Any, dtype: Any = jnp.float32) -> Any:
    """Quick to compile; the libraries' own initialisers are compared in test_without_jit."""
    del key
    return jnp.sin(jnp.arange(math.prod(shape), dtype=jnp.float32)).reshape(shape).astype(dtype)


def run(package: Any, layer: str, kernel_size: Any, options: dict[str, Any], x: Any) -> Any:
    """Parameters of a new layer, and its result."""
    if package in (linen, OURS["linen"]):
        module = getattr(package, layer)(K, kernel_size, **options)
        y, variables = module.init_with_output(jax.random.key(3), x)
        return variables["params"], y
    module = getattr(package, layer)(C, K, kernel_size, rngs=nnx.Rngs(3), **options)
    return nnx.to_pure_dict(nnx.state(module)), module(x)


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize(("layer", "kernel_size", "shape", "options"), CASES, ids=describe)
def test_as_flax(
    library: str, layer: str, kernel_size: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    options = {"kernel_init": cheap_init, "bias_init": cheap_init, **options}

    def both(x: Any) -> Any:
        libraries = (OURS[library], THEIRS[library])
        return [run(package, layer, kernel_size, options, x) for package in libraries]

    x = draw(*shape)
    (params, ours), (expected, theirs) = jax.jit(both)(x)
    assert_same(params, expected)
    assert_close(ours, theirs)
    assert convolutions(both, x) == ["jaxwin_conv_general_dilated", "conv_general_dilated"]


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
def test_without_jit(library: str, layer: str) -> None:
    x = draw(1, 5, 4, C)
    libraries = (OURS[library], THEIRS[library])
    options = {"padding": "CIRCULAR", "bias_init": jax.nn.initializers.normal()}
    (params, ours), (expected, theirs) = [
        run(package, layer, (3, 2), options, x) for package in libraries
    ]
    assert_same(params, expected)
    assert_close(ours, theirs)


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize("layer", ["Conv", "ConvTranspose"])
def test_fields_and_defaults(library: str, layer: str) -> None:
    ours, theirs = getattr(OURS[library], layer), getattr(THEIRS[library], layer)
    assert issubclass(ours, theirs)
    assert (ours.__name__, ours.__doc__) == (theirs.__name__, theirs.__doc__)
    assert inspect.signature(ours.__init__) == inspect.signature(theirs.__init__)
    if library == "linen":
        fields = [[(f.name, f.default) for f in dataclasses.fields(c)] for c in (ours, theirs)]
        assert fields[0] == fields[1]
        arguments = {"features": K, "kernel_size": (3,)}
        assert repr(ours(**arguments)) == repr(theirs(**arguments))


class LinenNet(linen.Module):
    layers: Any

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.relu(self.layers.Conv(C, (3, 3), strides=2)(x))
        x = linen.relu(self.layers.Conv(C, (3, 3), padding="CIRCULAR")(x))
        return self.layers.ConvTranspose(C, (3, 3), strides=(2, 2))(x)


class NnxNet(nnx.Module):
    def __init__(self, layers: Any, rngs: nnx.Rngs) -> None:
        self.down = layers.Conv(C, C, (3, 3), strides=2, rngs=rngs)
        self.flat = layers.Conv(C, C, (3, 3), padding="CIRCULAR", rngs=rngs)
        self.up = layers.ConvTranspose(C, C, (3, 3), strides=(2, 2), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.up(nnx.relu(self.flat(nnx.relu(self.down(x)))))


def test_linen_checkpoint_both_ways() -> None:
    x = draw(2, 8, 8, C)
    ours, theirs = LinenNet(OURS["linen"]), LinenNet(linen)
    fresh = jax.tree.map(np.zeros_like, jax.jit(ours.init)(jax.random.key(0), x))
    trained = jax.jit(theirs.init)(jax.random.key(1), x)
    assert sorted(fresh["params"]) == ["ConvTranspose_0", "Conv_0", "Conv_1"]
    restored = serialization.from_bytes(fresh, serialization.to_bytes(trained))
    assert_same(restored, trained)
    assert_close(jax.jit(ours.apply)(restored, x), jax.jit(theirs.apply)(trained, x))
    back = serialization.from_state_dict(trained, serialization.to_state_dict(restored))
    assert_same(back, trained)


def test_nnx_checkpoint_both_ways() -> None:
    x = draw(2, 8, 8, C)
    ours, theirs = NnxNet(OURS["nnx"], nnx.Rngs(0)), NnxNet(nnx, nnx.Rngs(1))
    trained = nnx.to_pure_dict(nnx.state(theirs))
    expected = theirs(x)
    for source, target in ((theirs, ours), (ours, NnxNet(nnx, nnx.Rngs(2)))):
        nnx.update(target, nnx.state(source))
        assert_same(nnx.to_pure_dict(nnx.state(target)), trained)
        assert_close(target(x), expected)


def test_linen_training_step() -> None:
    x = draw(2, 8, 8, C)
    gradients, values = [], []
    for layers in (OURS["linen"], linen):
        net = LinenNet(layers)
        variables = jax.jit(net.init)(jax.random.key(0), x)
        step = jax.value_and_grad(lambda v, net=net: (net.apply(v, x) ** 2).sum())
        value, gradient = jax.jit(step)(variables)
        gradients.append(gradient)
        values.append(value)
    assert_close(gradients[0], gradients[1])
    assert_close(values[0], values[1])


def test_nnx_training_step() -> None:
    x = draw(2, 8, 8, C)

    @nnx.jit
    def step(net: Any) -> Any:
        value, gradient = nnx.value_and_grad(lambda net: (net(x) ** 2).sum())(net)
        return value, nnx.to_pure_dict(gradient)

    ours, theirs = (step(NnxNet(layers, nnx.Rngs(0))) for layers in (OURS["nnx"], nnx))
    assert_close(ours, theirs)


def test_linen_transforms() -> None:
    x = draw(2, 6, 6, C)
    rng = jax.random.key(0)

    def stacked(layers: Any) -> Any:
        class Block(linen.Module):
            @linen.compact
            def __call__(self, x: Any, _: None) -> Any:
                return linen.tanh(linen.remat(layers.Conv)(C, (3, 3))(x)), None

        scan = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan()

    @jax.jit
    def gradient(variables: Any) -> Any:
        total = lambda net, v: (net.apply(v, x, None)[0] ** 2).sum()  # noqa: E731
        return jax.grad(functools.partial(total, stacked(OURS["linen"])))(variables), jax.grad(
            functools.partial(total, stacked(linen))
        )(variables)

    variables, expected = (
        jax.jit(stacked(layers).init)(rng, x, None) for layers in (OURS["linen"], linen)
    )
    assert_same(variables, expected)
    assert_close(*gradient(variables))


def test_linen_records_a_call_once() -> None:
    x = draw(2, 6, 6, C)
    for layers in (OURS["linen"], linen):
        layer = layers.ConvTranspose(K, (3, 3))
        variables = layer.init(jax.random.key(0), x)
        _, state = layer.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
        assert len(state["intermediates"]["__call__"]) == 1


def test_nnx_vmap_of_layers() -> None:
    x = draw(3, 2, 6, 6, C)

    def ensemble(layers: Any) -> Any:
        @nnx.vmap
        def create(key: Any) -> Any:
            return layers.Conv(C, K, (3, 3), rngs=nnx.Rngs(key))

        layer = create(jax.random.split(jax.random.key(0), 3))
        return nnx.vmap(lambda layer, x: layer(x))(layer, x)

    assert_close(ensemble(OURS["nnx"]), ensemble(nnx))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_errors_are_those_of_flax(library: str) -> None:
    x = draw(2, 9, C)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("Conv", {"mask": MASK[:2]}),
        ("ConvTranspose", {"mask": MASK[:2]}),
        ("Conv", {"padding": "NONE"}),
        ("ConvTranspose", {"padding": "CAUSAL"}),
        ("Conv", {"padding": (1, 2, 3)}),
    ]
    for layer, options in bad:
        texts = []
        for package in (OURS[library], THEIRS[library]):
            with pytest.raises(Exception) as caught:
                run(package, layer, 3, options, x)
            texts.append((caught.type, str(caught.value)))
        assert texts[0] == texts[1]


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout


def test_package_is_lazy_and_says_what_is_missing() -> None:
    out = run_python(
        "import sys, jaxwin.flax\n"
        "print('flax' in sys.modules, dir(jaxwin.flax))\n"
        "sys.modules['flax'] = None\n"
        "for name in ('linen', 'nnx'):\n"
        "    try: getattr(jaxwin.flax, name)\n"
        "    except ImportError as e: print(e)\n"
    )
    lines = out.splitlines()
    assert lines[0].startswith("False") and "'linen'" in lines[0]
    for name, line in zip(("linen", "nnx"), lines[1:], strict=True):
        assert line == (
            f"jaxwin.flax.{name} needs Flax, which is not installed; "
            "run: pip install 'jaxwin[flax]'"
        )
    with pytest.raises(AttributeError, match="haiku"):
        jaxwin.flax.haiku  # noqa: B018
