# SPDX-License-Identifier: Apache-2.0
"""conv and the fused primitive: values and every transformation, against a jax composition."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.test_util import check_grads

import jaxwin
from jaxwin import _registry
from jaxwin._conv import conv
from jaxwin._fused import ACTIVATIONS, decompose

NAMES = [None, *ACTIVATIONS]
FUNCTIONS: dict[Any, Any] = {
    None: lambda z: z,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
SPATIAL = {1: (9,), 2: (6, 5), 3: (4, 3, 5)}
C, K = 4, 6


def _draw(seed: int, *shape: int, dtype: Any = jnp.float32) -> Any:
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(values, dtype)


def reference(
    x: Any,
    w: Any,
    *,
    stride: Any = 1,
    padding: Any = "SAME",
    dilation: Any = 1,
    groups: int = 1,
    bias: Any = None,
    residual: Any = None,
    activation: str | None = None,
    layout: str = "NHWC",
) -> Any:
    """The same through lax and jax.nn."""
    rank = x.ndim - 2
    letters = "DHW"[-rank:] if rank > 1 else "W"
    last = layout == "NHWC"
    data = f"N{letters}C" if last else f"NC{letters}"
    many = lambda v: (v,) * rank if isinstance(v, int) else tuple(v)  # noqa: E731
    z = lax.conv_general_dilated(
        x,
        w,
        many(stride),
        padding,
        rhs_dilation=many(dilation),
        dimension_numbers=(data, letters + "IO", data),
        feature_group_count=groups,
    )
    if bias is not None:
        z = z + (bias if last else bias.reshape(-1, *(1,) * rank))
    if residual is not None:
        z = z + residual
    return FUNCTIONS[activation](z)


def problem(
    rank: int = 2, layout: str = "NHWC", groups: int = 1, dtype: Any = jnp.float32, n: int = 2
) -> dict[str, Any]:
    """x, w, bias, residual for the default stride and padding."""
    space = SPATIAL[rank]
    shape = lambda c: (n, *space, c) if layout == "NHWC" else (n, c, *space)  # noqa: E731
    draw = functools.partial(_draw, dtype=dtype)
    return {
        "x": draw(1, *shape(C)),
        "w": draw(2, *(3, 2, 3)[:rank], C // groups, K) * 0.5,
        "bias": draw(3, K),
        "residual": draw(4, *shape(K)),
    }


def assert_close(actual: Any, expected: Any, rtol: float = 2e-5, atol: float = 2e-5) -> None:
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(e, np.float64), rtol=rtol, atol=atol
        )


# --- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("has_bias", "has_residual"), list(itertools.product([False, True], repeat=2))
)
def test_values(rank: int, layout: str, has_bias: bool, has_residual: bool) -> None:
    operands = problem(rank, layout)
    if not has_bias:
        del operands["bias"]
    if not has_residual:
        del operands["residual"]

    @functools.partial(jax.jit, static_argnums=0)
    def all_activations(call: Any, operands: Any) -> Any:
        return [call(**operands, layout=layout, activation=activation) for activation in NAMES]

    assert_close(all_activations(conv, operands), all_activations(reference, operands))


@pytest.mark.parametrize("padding", ["SAME", "VALID", "SAME_LOWER", [(1, 2), (0, 3)]])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize(("dilation", "groups"), [(1, 1), (1, 2), ((2, 1), 2)])
def test_geometry(padding: Any, stride: Any, dilation: Any, groups: int) -> None:
    p = problem(groups=groups)
    del p["residual"]
    options = {"padding": padding, "stride": stride, "dilation": dilation, "groups": groups}
    assert_close(conv(**p, **options), reference(**p, **options))


def test_padding_forms() -> None:
    p = problem()
    x, w = p["x"], p["w"]
    pairs = reference(x, w, padding=[(2, 2), (2, 2)])
    for padding in (2, (2, 2), [2, 2], ((2, 2), (2, 2)), np.int32(2), np.array([[2, 2], [2, 2]])):
        assert_close(conv(x, w, padding=padding), pairs)
    assert_close(conv(x, w, padding=[1, (0, 2)]), reference(x, w, padding=[(1, 1), (0, 2)]))
    assert_close(conv(x, w, padding=-1), reference(x, w, padding=[(-1, -1), (-1, -1)]))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layout_names(rank: int) -> None:
    for base, names in (("NHWC", ["channels_last"]), ("NCHW", ["channels_first"])):
        own = (
            {1: "NWC", 2: "NHWC", 3: "NDHWC"}
            if base == "NHWC"
            else {1: "NCW", 2: "NCHW", 3: "NCDHW"}
        )
        p = problem(rank, base)
        expected = conv(**p, layout=base)
        for name in [*names, own[rank]]:
            np.testing.assert_array_equal(conv(**p, layout=name), expected)


def test_operands_may_be_numpy() -> None:
    p = problem()
    assert_close(conv(**jax.tree.map(np.asarray, p)), conv(**p), 0, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "tanh"])
def test_narrow_types_round_once(dtype: Any, activation: str | None) -> None:
    p = problem(dtype=dtype)
    out = conv(**p, activation=activation)
    assert out.dtype == dtype
    wide = reference(**jax.tree.map(lambda v: v.astype(jnp.float32), p), activation=activation)
    # Half a unit in the last place of the exact result, and a little for ties.
    assert_close(out, wide.astype(dtype), rtol=1.01 * float(jnp.finfo(dtype).eps), atol=1e-6)
    gradient = jax.grad(lambda p: conv(**p, activation=activation).astype(jnp.float32).sum())(p)
    assert jax.tree.map(lambda v: v.dtype, gradient) == jax.tree.map(lambda v: v.dtype, p)


def test_double_precision() -> None:
    with jax.enable_x64(True):
        p = problem(dtype=jnp.float64)
        for activation in NAMES:
            out = conv(**p, activation=activation)
            assert out.dtype == jnp.float64
            assert_close(out, reference(**p, activation=activation), 1e-12, 1e-12)


def test_empty_batch_and_empty_output() -> None:
    p = problem(n=0)
    assert conv(**p, activation="relu").shape == (0, 6, 5, K)
    p = problem()
    assert conv(p["x"], p["w"], bias=p["bias"], padding=0, dilation=9).shape == (2, 0, 0, K)


@pytest.mark.parametrize("algorithm", ["auto", "im2win", "xla"])
def test_algorithm_and_workspace_reach_the_primitive(algorithm: str) -> None:
    p = problem()
    call = functools.partial(conv, algorithm=algorithm, max_workspace=1 << 20)
    [equation] = jax.make_jaxpr(call)(p["x"], p["w"]).eqns
    assert equation.params["algorithm"] == algorithm
    assert equation.params["max_workspace"] == 1 << 20
    assert_close(call(p["x"], p["w"]), reference(p["x"], p["w"]))


def test_names_are_those_of_the_native_core() -> None:
    assert {"none", *ACTIVATIONS} == set(_registry.registry()["activations"])


@pytest.mark.parametrize("activation", NAMES)
def test_epilogue_is_part_of_the_native_call(activation: str | None) -> None:
    p = problem()
    call = lambda p: conv(**p, activation=activation)  # noqa: E731
    lowered = jax.jit(call).lower(p).as_text()
    assert lowered.count("@jaxwin_conv") == 1
    assert "stablehlo.add" not in lowered and "stablehlo.convolution" not in lowered


def test_without_a_kernel_the_parts_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("JAXWIN_DISABLE", "1")
        p = problem()
        lowered = jax.jit(lambda p: conv(**p, activation="relu")).lower(p).as_text()
    assert "stablehlo.convolution" in lowered and "@jaxwin_conv" not in lowered
    p = problem()
    lowered = jax.jit(lambda p: conv(**p, algorithm="xla")).lower(p).as_text()
    assert "stablehlo.convolution" in lowered and "@jaxwin_conv" not in lowered


def test_plain_call_is_the_convolution_primitive() -> None:
    p = problem()
    [equation] = jax.make_jaxpr(conv)(p["x"], p["w"]).eqns
    assert equation.primitive.name == "jaxwin_conv_general_dilated"


@pytest.mark.parametrize("activation", NAMES)
def test_fused_equals_its_decomposition(activation: str | None) -> None:
    p = problem()
    call = functools.partial(conv, activation=activation)
    traced = jax.make_jaxpr(lambda p: call(**p))(p)
    [equation] = traced.eqns
    by_parts = decompose(p["x"], p["w"], p["bias"], p["residual"], **equation.params)
    exact = activation in (None, "relu", "relu6", "leaky_relu")
    tolerance = 0 if exact else 2e-6
    assert_close(call(**p), by_parts, tolerance, tolerance)


@pytest.mark.parametrize("activation", NAMES)
def test_activation_over_its_whole_range(activation: str | None) -> None:
    ends = [0.0, 1e-37, 1e-20, 0.5, 5.999999, 6.0, 88.0, 89.5, 104.0, 1e20, 3e38, np.inf]
    z = np.array([*ends, *(-v for v in ends), np.nan, *np.linspace(-12, 12, 2000)], np.float32)
    x = jnp.asarray(z).reshape(-1, 1, 1)
    ours = conv(x, jnp.ones((1, 1, 1)), bias=jnp.zeros(1), activation=activation)
    theirs = jax.jit(FUNCTIONS[activation])(x)
    # jax.nn.gelu cancels in 1 + tanh: it is off by an ulp of 1, times z / 2.
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6 if activation == "gelu" else 1e-7)


@pytest.mark.parametrize("activation", ["gelu", "silu", "sigmoid", "tanh"])
def test_small_values_of_an_activation_have_all_their_digits(activation: str) -> None:
    """As far as normal numbers reach; an exponent's rounding counts as often as it is large."""
    z = np.linspace(-9, 9, 4001).astype(np.float32)
    x = jnp.asarray(z).reshape(-1, 1, 1)
    y = conv(x, jnp.ones((1, 1, 1)), bias=jnp.zeros(1), activation=activation)
    v = z.astype(np.float64)
    exact = {
        "gelu": v / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (v + 0.044715 * v**3))),
        "silu": v / (1 + np.exp(-v)),
        "sigmoid": 1 / (1 + np.exp(-v)),
        "tanh": np.tanh(v),
    }[activation]
    tolerance = 2e-5 if activation == "gelu" else 1e-6
    np.testing.assert_allclose(np.ravel(y), exact, rtol=tolerance)


# --- derivatives -----------------------------------------------------------------------------


def loss(call: Any, options: dict[str, Any]) -> Any:
    """A scalar whose gradient is not symmetric in the outputs."""

    def total(p: dict[str, Any]) -> Any:
        y = call(**p, **options)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)).sum()

    return total


CASES = [
    {},
    {"layout": "NCHW", "stride": 2},
    {"groups": 2, "dilation": (1, 2)},
    {"padding": "VALID", "stride": (2, 1)},
]


def derivative_problem(options: dict[str, Any]) -> dict[str, Any]:
    layout = options.get("layout", "NHWC")
    p = problem(2, layout, options.get("groups", 1))
    out = jax.eval_shape(lambda p: conv(p["x"], p["w"], **options), p)
    return {**p, "residual": _draw(5, *out.shape)}


@pytest.mark.parametrize(
    ("activation", "options"),
    [*itertools.product([None, "relu", "gelu"], CASES), *((name, {}) for name in NAMES[2:])],
)
def test_first_derivatives(activation: str | None, options: dict[str, Any]) -> None:
    options = {**options, "activation": activation}
    p = derivative_problem(options)
    tangent = jax.tree.map(lambda v: _draw(7, *v.shape), p)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(call: Any) -> Any:
        total = loss(call, options)
        return jax.grad(total)(p), jax.jvp(total, (p,), (tangent,))

    assert_close(derivatives(conv), derivatives(reference), 1e-4, 1e-3)


@pytest.mark.parametrize("operand", ["x", "w", "bias", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_derivative_of_each_operand_alone(activation: str | None, operand: str) -> None:
    p = problem()
    rest = {k: v for k, v in p.items() if k != operand}

    def along(call: Any) -> Any:
        return lambda v: loss(call, {**rest, "activation": activation})({operand: v})

    ours, theirs = jax.jit(jax.grad(along(conv))), jax.jit(jax.grad(along(reference)))
    assert_close(ours(p[operand]), theirs(p[operand]), 1e-4, 1e-4)


def small(activation: str | None) -> tuple[Any, Any, dict[str, Any]]:
    """Few enough numbers for a full second derivative."""
    p = {
        "x": _draw(1, 1, 3, 2, 2),
        "w": _draw(2, 2, 2, 2, 2),
        "bias": _draw(3, 2),
        "residual": _draw(4, 1, 3, 2, 2),
    }
    options = {"activation": activation}
    return loss(conv, options), loss(reference, options), p


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_second_derivatives(activation: str | None) -> None:
    ours, theirs, p = small(activation)
    expected = jax.jit(jax.hessian(theirs))(p)
    for second in (
        jax.hessian,
        lambda f: jax.jacrev(jax.grad(f)),
        lambda f: jax.jacfwd(jax.jacfwd(f)),
    ):
        assert_close(jax.jit(second(ours))(p), expected, 1e-4, 1e-4)


def test_derivatives_against_differences() -> None:
    with jax.enable_x64(True):
        ours, _, p = small("silu")
        p = jax.tree.map(lambda v: v.astype(jnp.float64), p)
        check_grads(
            jax.jit(ours), (p,), order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5, eps=1e-4
        )


@pytest.mark.parametrize(
    ("activation", "z", "slope"),
    [
        ("relu", [-1.0, 0.0, 1.0], [0, 0, 1]),
        ("relu6", [-1.0, 0.0, 1.0, 6.0, 7.0], [0, 0, 1, 0, 0]),
        ("leaky_relu", [-1.0, 0.0, 1.0], [0.01, 1, 1]),
        ("leaky_relu", [-1e-37], [0.01]),
    ],
)
def test_kinks_as_in_jax_nn(activation: str, z: list[float], slope: list[float]) -> None:
    x = jnp.asarray(z).reshape(-1, 1, 1)
    total = lambda call: lambda x: call(x, jnp.ones((1, 1, 1)), activation=activation).sum()  # noqa: E731
    ours, theirs = jax.grad(total(conv))(x), jax.grad(total(reference))(x)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours.ravel(), slope)


def primitives(jaxpr: Any) -> list[str]:
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for sub in jaxprs_in_params(equation.params):
            names += primitives(sub)
    return names


@pytest.mark.parametrize("activation", NAMES)
def test_training_keeps_the_fused_forward(activation: str | None) -> None:
    p = problem()
    total = loss(conv, {"activation": activation})
    names = primitives(jax.make_jaxpr(jax.grad(total))(p).jaxpr)
    assert names.count("jaxwin_fused_conv") == 1
    # one convolution per gradient, none for the values
    assert names.count("jaxwin_conv_general_dilated") == 2
    assert "conv_general_dilated" not in names


def test_constant_operands_cost_no_convolution() -> None:
    p = problem()
    by_weight = jax.grad(lambda w: conv(**{**p, "w": w}, activation="relu").sum())
    by_bias = jax.grad(lambda b: conv(**{**p, "bias": b}, activation="relu").sum())
    for f, v, count in ((by_weight, p["w"], 1), (by_bias, p["bias"], 0)):
        names = primitives(jax.make_jaxpr(f)(v).jaxpr)
        assert names.count("jaxwin_conv_general_dilated") == count


@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh", "relu"])
def test_reverse_mode_keeps_one_array_for_the_activation(activation: str) -> None:
    p = problem()
    _, pullback = jax.vjp(lambda p: conv(**p, activation=activation), p)
    size = p["residual"].size
    kept = [v for v in jax.tree.leaves(pullback) if v.size == size and bool(v.any())]
    assert len(kept) == 1
    if activation == "relu":
        assert kept[0].dtype == jnp.bool_


# --- transformations -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("batched", list(itertools.product([False, True], repeat=4))[1:])
def test_vmap(batched: tuple[bool, ...], layout: str) -> None:
    p = problem(layout=layout)
    names = list(p)
    axes, values = [], []
    for i, (name, is_batched) in enumerate(zip(names, batched, strict=True)):
        axis = (i + 1) % p[name].ndim if is_batched else None
        values.append(
            p[name] if axis is None else jnp.stack([p[name] * s for s in (1, -0.5, 2)], axis)
        )
        axes.append(axis)

    def call(f: Any) -> Any:
        return lambda *v: f(**dict(zip(names, v, strict=True)), activation="silu", layout=layout)

    ours = jax.jit(jax.vmap(call(conv), in_axes=axes, out_axes=1))
    theirs = jax.jit(jax.vmap(call(reference), in_axes=axes, out_axes=1))
    assert_close(ours(*values), theirs(*values))
    fused = primitives(jax.make_jaxpr(ours)(*values).jaxpr).count("jaxwin_fused_conv")
    assert fused == (batched in [(True, False, False, True)])


def test_vmap_of_input_stays_fused() -> None:
    p = problem()
    x = _draw(9, 2, 3, *p["x"].shape)
    call = lambda x: conv(x, p["w"], bias=p["bias"], activation="relu")  # noqa: E731
    nested = jax.vmap(jax.vmap(call))
    assert primitives(jax.make_jaxpr(nested)(x).jaxpr).count("jaxwin_fused_conv") == 1
    expected = jnp.stack([jnp.stack([call(b) for b in a]) for a in x])
    np.testing.assert_array_equal(nested(x), expected)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "tanh"])
def test_nested_vmap_of_derivatives(activation: str | None) -> None:
    p = problem(n=1)
    x, w = _draw(8, 3, *p["x"].shape), _draw(9, 2, *p["w"].shape)

    def per_example(f: Any) -> Any:
        total = lambda x, w: (f(x, w, bias=p["bias"], activation=activation) ** 2).sum()  # noqa: E731
        over_x = jax.vmap(jax.grad(total, (0, 1)), (0, None))
        return jax.jit(jax.vmap(over_x, (None, 0)))(x, w)

    assert_close(per_example(conv), per_example(reference), 1e-4, 1e-3)


def test_vmap_over_nothing() -> None:
    p = problem()
    f = lambda x: conv(x, p["w"], bias=p["bias"], activation="relu")  # noqa: E731
    assert jax.vmap(f)(jnp.zeros((0, *p["x"].shape))).shape == (0, *p["residual"].shape)


@pytest.mark.parametrize(("activation", "groups"), [("relu", 1), ("gelu", 2)])
def test_control_flow_and_checkpoint(activation: str, groups: int) -> None:
    x = _draw(1, 1, 5, 5, 4)
    ws = _draw(2, 3, 3, 3, 4 // groups, 4) * 0.3
    bs = _draw(3, 3, 4)

    def scanned(f: Any, wrap: Any) -> Any:
        @wrap
        def layer(x: Any, wb: Any) -> Any:
            w, b = wb
            options = {"bias": b, "residual": x, "activation": activation, "groups": groups}
            return f(x, w, **options), None

        return lambda x, ws, bs: (lax.scan(layer, x, (ws, bs))[0] ** 2).sum()

    plain = lambda f: f  # noqa: E731
    gradient = lambda total: jax.jit(jax.value_and_grad(total, (0, 1, 2)))(x, ws, bs)  # noqa: E731
    expected = gradient(scanned(reference, plain))
    for wrap in (plain, jax.checkpoint):
        assert_close(gradient(scanned(conv, wrap)), expected, 1e-4, 1e-3)

    def branch(f: Any) -> Any:
        step = lambda i, v: f(v, ws[i], bias=bs[i], activation=activation, groups=groups)  # noqa: E731
        chosen = lambda x: lax.cond(x.sum() > 0, lambda v: step(0, v), lambda v: step(1, v), x)  # noqa: E731
        return jax.jit(jax.grad(lambda x: lax.fori_loop(0, 2, step, chosen(x)).sum()))(x)

    assert_close(branch(conv), branch(reference), 1e-4, 1e-4)


def test_linearize_and_transpose() -> None:
    p = problem()
    ours, theirs = loss(conv, {"activation": "silu"}), loss(reference, {"activation": "silu"})
    tangent = jax.tree.map(lambda v: _draw(7, *v.shape), p)
    linearized = lambda total: jax.linearize(jax.jit(total), p)[1](tangent)  # noqa: E731
    assert_close(linearized(ours), linearized(theirs), 1e-4, 1e-4)
    affine = lambda x: conv(x, p["w"], residual=x @ p["w"][0, 0])  # noqa: E731
    _, linear = jax.linearize(affine, p["x"])
    [transposed] = jax.linear_transpose(linear, p["x"])(p["residual"])
    _, pullback = jax.vjp(affine, p["x"])
    assert_close(transposed, pullback(p["residual"])[0], 1e-5, 1e-5)


def test_custom_derivatives_around() -> None:
    p = problem()

    @jax.custom_vjp
    def scaled(x: Any) -> Any:
        return conv(x, p["w"], bias=p["bias"], activation="relu")

    scaled.defvjp(
        lambda x: jax.vjp(lambda x: conv(x, p["w"], bias=p["bias"], activation="relu"), x),
        lambda pullback, g: jax.tree.map(lambda v: 2 * v, pullback(g)),
    )
    plain = lambda x: conv(x, p["w"], bias=p["bias"], activation="relu").sum()  # noqa: E731
    doubled = jax.grad(lambda x: scaled(x).sum())(p["x"])
    assert_close(doubled, 2 * jax.grad(plain)(p["x"]))


def test_shapes_are_known_without_running() -> None:
    p = problem(dtype=jnp.bfloat16)
    out = jax.eval_shape(lambda p: conv(**p, stride=1, activation="gelu"), p)
    assert (out.shape, out.dtype) == ((2, 6, 5, K), jnp.bfloat16)


def test_shard_map_with_varying_axes() -> None:
    p = problem()
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    sharded = {"x", "residual"}
    specs = {name: spec("batch") if name in sharded else spec() for name in p}

    def total(p: dict[str, Any]) -> Any:
        return lax.psum(conv(**p, activation="relu").sum(), "batch")

    run = jax.jit(jax.shard_map(jax.value_and_grad(total), mesh=mesh, in_specs=(specs,),
                                out_specs=(spec(), specs)))  # fmt: skip
    expected = jax.value_and_grad(lambda p: reference(**p, activation="relu").sum())(p)
    assert_close(run(p), expected, 1e-4, 1e-4)


def test_export_with_symbolic_batch() -> None:
    p = problem()
    (n,) = jax.export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, *p["x"].shape[1:]), jnp.float32)
    f = lambda x: conv(x, p["w"], bias=p["bias"], activation="relu")  # noqa: E731
    exported = jax.export.export(jax.jit(f))(x)
    assert_close(
        exported.call(p["x"]), reference(p["x"], p["w"], bias=p["bias"], activation="relu")
    )


# --- algorithms by name, in lax's signatures -------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sfc", "im2win", "rows", "any", "xla"])
def test_integers_by_named_algorithms(algorithm: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (2, 9, 10, 16)).astype(np.int8)
    w = rng.integers(-128, 128, (3, 3, 16, 8)).astype(np.int8)

    def f(convolve, x, w, **wishes):
        numbers = ("NHWC", "HWIO", "NHWC")
        return convolve(
            x, w, (1, 1), "SAME", dimension_numbers=numbers, preferred_element_type=jnp.int32,
            **wishes,
        )  # fmt: skip

    expected = f(jax.lax.conv_general_dilated, x, w)
    named = functools.partial(f, jaxwin.conv_general_dilated, algorithm=algorithm)
    for way in (named, jax.jit(named), jax.jit(jaxwin.accelerate(named))):
        np.testing.assert_array_equal(way(x, w), expected)
        (row,) = jaxwin.explain(way, x, w)
        assert row.algorithm == algorithm or algorithm == "any"


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed_by_a_named_algorithm(transpose_kernel: bool) -> None:
    """The kernel that lax flips before, too; gradients are planned on their own."""
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((2, 5, 6, 4), (4, 3, 4, 4)))

    def f(x, w, **wishes):
        return jaxwin.conv_transpose(
            x, w, (2, 3), "SAME", transpose_kernel=transpose_kernel, **wishes
        )

    def named(x, w):
        return f(x, w, algorithm="segregated", max_workspace=1 << 20)

    (row,) = jaxwin.explain(named, x, w)
    assert row.algorithm == "segregated"
    np.testing.assert_array_equal(named(x, w), f(x, w))
    np.testing.assert_array_equal(
        jax.vmap(named, (0, None))(x[None], w), jax.vmap(f, (0, None))(x[None], w)
    )
    for argument in (0, 1):
        gradients = [jax.grad(lambda *a, g=g: (g(*a) ** 2).sum(), argument) for g in (named, f)]
        np.testing.assert_array_equal(*(jax.jit(gradient)(x, w) for gradient in gradients))


def test_wishes_that_cannot_be_met_in_lax_signatures() -> None:
    x, w = jnp.ones((1, 5, 6, 4)), jnp.ones((3, 3, 4, 4))

    def f(**wishes):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jaxwin.conv_general_dilated(x, w, (1, 1), "SAME", None, None, numbers, **wishes)

    with pytest.raises(ValueError, match="conv_general_dilated: unknown algorithm 'abacus'"):
        f(algorithm="abacus")
    with pytest.raises(ValueError, match="conv_transpose: max_workspace must be a number of bytes"):
        jaxwin.conv_transpose(x, w, (1, 1), "SAME", max_workspace=-1)
    with pytest.raises(ValueError, match="'segregated' cannot compute"):
        f(algorithm="segregated")
    with pytest.raises(ValueError, match="max_workspace"):
        f(algorithm="im2win", max_workspace=16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_dilated_layers_and_their_gradients(dtype: str) -> None:
    """C = K = 15, 51 taps at distance 8, as in arXiv 2104.08002: native in every direction."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((2, 900, 15)), dtype)
    w = jnp.asarray(rng.standard_normal((51, 15, 15)) / 16, dtype)
    y = jnp.asarray(rng.standard_normal((2, 500, 15)), dtype)

    def all_of(convolve, x, w, y):
        result, pullback = jax.vjp(convolve, x, w)
        return result, *pullback(y.astype(result.dtype))

    def ours(x, w):
        return conv(x, w, dilation=8, padding="VALID")

    def theirs(x, w):
        numbers = ("NWC", "WIO", "NWC")
        return lax.conv_general_dilated(
            x, w, (1,), "VALID", rhs_dilation=(8,), dimension_numbers=numbers
        )

    rows = list(jaxwin.explain(functools.partial(all_of, ours), x, w, y))
    assert len(rows) == 3 and "xla" not in {row.algorithm for row in rows}
    results = jax.jit(functools.partial(all_of, ours))(x, w, y)
    with jax.enable_x64(True):
        wide = (jnp.asarray(v, "float64") for v in (x, w, y))
        exact = [np.asarray(v) for v in all_of(theirs, *wide)]
    for result, right in zip(results, exact, strict=True):
        assert result.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        wrong = np.abs(np.asarray(result, np.float64) - right).max()
        assert wrong <= (1 if dtype == "bfloat16" else 32) * eps * np.abs(right).max()
