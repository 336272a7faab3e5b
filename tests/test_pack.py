# SPDX-License-Identifier: Apache-2.0
"""Weights packed once: the same bits, in every transformation and on every machine."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import chain

import jaxwin
from jaxwin import _pack, _registry
from jaxwin._problem import Problem

# x, w, and what conv is told besides.
CASES = {
    "few pixels": ((1, 5, 6, 24), (3, 3, 24, 70), {}),
    "valid": ((2, 9, 8, 5), (3, 2, 5, 33), {"padding": "VALID", "stride": (2, 1)}),
    "pointwise": ((3, 7, 7, 32), (1, 1, 32, 50), {}),
    "1-D": ((2, 40, 6), (5, 6, 20), {"dilation": 2}),
    "3-D": ((1, 5, 6, 7, 8), (3, 2, 3, 8, 40), {"padding": 1}),
    "groups": ((2, 8, 8, 12), (3, 3, 4, 63), {"groups": 3}),
    "channels first": ((2, 12, 9, 8), (3, 3, 12, 24), {"layout": "NCHW"}),
    "much padding": ((1, 3, 3, 8), (2, 2, 8, 16), {"padding": 3, "dilation": 2}),
}


def _draw(name: str, dtype: str = "float32"):
    x, w, options = CASES[name]
    rng = np.random.default_rng(0)
    arrays = (jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in (x, w))
    return *arrays, options


def _plan(fn, *args):
    (row,) = jaxwin.explain(fn, *args)
    return row


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_MODE", "off")


@pytest.mark.parametrize("isa", [row["name"] for row in _registry.registry()["isas"]])
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_packed_and_not(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not next(row for row in _registry.registry()["isas"] if row["name"] == isa)["runnable"]:
        pytest.skip(f"this CPU does not run {isa}")
    monkeypatch.setenv("JAXWIN_MAX_ISA", isa)
    x, w, options = _draw(name)
    packed = jaxwin.pack(w, x, **options)
    assert packed.panel > 0
    assert packed.array.shape == packed.packing.packed_shape

    def f(x, w):
        return jaxwin.conv(x, w, **options)

    row = _plan(f, x, packed)
    assert row.isa == isa and row.problem.rhs_panel == packed.panel
    assert f"packed{packed.panel}" in str(row.problem)
    assert row.parameters["pack"] == 3
    np.testing.assert_array_equal(jax.jit(f)(x, packed), jax.jit(f)(x, w))
    np.testing.assert_array_equal(jaxwin.unpack(packed), w)
    assert Problem.from_key(row.problem.key) == row.problem


def test_the_bits_of_the_contract() -> None:
    x, w, _ = _draw("few pixels")
    row = _plan(jaxwin.conv, x, w)
    got = jaxwin.conv(x, jaxwin.pack(w))
    np.testing.assert_array_equal(got, chain(row.problem, np.asarray(x), np.asarray(w)))


@pytest.mark.parametrize("algorithm", ["rows", "im2win", "im2col"])
@pytest.mark.parametrize("panel", [16, 32, 48, 64])
def test_every_algorithm_and_panel(algorithm: str, panel: int) -> None:
    if panel % _registry.width(_registry.isa(), "float32"):
        pytest.skip("not of this instruction set")
    x, w, _ = _draw("few pixels")
    packing = _pack.Packing(w.shape, 1, panel)
    packed = jaxwin.PackedWeights(_pack.pack_array(w, packing), w.shape, 1, panel)

    def f(x, w):
        return jaxwin.conv(x, w, algorithm=algorithm, activation="relu", bias=w_bias)

    w_bias = jnp.linspace(-1, 1, w.shape[-1])
    widest = max(
        nv
        for row in _registry.registry()["isas"]
        if row["name"] == _registry.isa()
        for _, nv in row["tiles"]
    )
    if panel // _registry.width(_registry.isa(), "float32") <= widest:
        assert _plan(f, x, packed).parameters["pack"] == 3
    np.testing.assert_array_equal(f(x, packed), f(x, w))


def test_the_documented_order() -> None:
    w = jnp.arange(2 * 3 * 4 * 10, dtype=jnp.float32).reshape(2, 3, 4, 10)
    packing = _pack.Packing(w.shape, 2, 16)
    array = _pack.pack_array(w, packing)
    assert array.shape == (2, 1, 24, 16)
    for g, feature, y, v, c in [(0, 0, 0, 0, 0), (1, 4, 1, 2, 3), (0, 3, 0, 1, 2)]:
        r = (v * 2 + y) * 4 + c
        assert array[g, 0, r, feature] == w[y, v, c, g * 5 + feature]
    assert not array[:, :, :, 5:].any()


def test_any_input_and_epilogue() -> None:
    """Packed for one input, used with others."""
    x, w, _ = _draw("few pixels")
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.standard_normal(w.shape[-1], np.float32))
    packed = jaxwin.pack(w, jax.ShapeDtypeStruct((8, 30, 30, 24), jnp.float32), stride=2)
    for shape, stride in (((1, 5, 6, 24), 1), ((3, 20, 21, 24), 2), ((2, 4, 4, 24), 1)):
        x = jnp.asarray(rng.standard_normal(shape, np.float32))
        plain = jaxwin.conv(x, w, stride=stride)
        residual = jnp.asarray(rng.standard_normal(plain.shape, np.float32))
        for extra in ({}, {"bias": bias}, {"residual": residual, "activation": "relu"}):
            got = jaxwin.conv(x, packed, stride=stride, **extra)
            np.testing.assert_array_equal(got, jaxwin.conv(x, w, stride=stride, **extra))


@pytest.mark.parametrize(
    ("x", "w", "groups"),
    [((1, 9, 9, 16), (3, 3, 1, 16), 16), ((1, 1, 1, 8), (3, 3, 8, 40), 1)],
)
def test_where_no_kernel_reads_panels(x, w, groups) -> None:
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in (x, w))
    kept = jaxwin.pack(w, x, groups=groups)
    assert kept.panel == 0 and kept.packing is None
    np.testing.assert_array_equal(kept.array, w)
    np.testing.assert_array_equal(jaxwin.unpack(kept), w)
    got = jaxwin.conv(x, kept, groups=groups)
    np.testing.assert_array_equal(got, jaxwin.conv(x, w, groups=groups))
    # and the other way round: packed, and then met by an input for which no plan reads panels
    if groups == 1:
        packed = jaxwin.pack(w)
        assert packed.panel > 0
        assert _plan(jaxwin.conv, x, packed).algorithm == "xla"
        np.testing.assert_array_equal(jaxwin.conv(x, packed), jaxwin.conv(x, w))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_padding(value: float) -> None:
    x, w, options = _draw("much padding")
    for feature in (0, 15):
        bad = w.at[1, 0, 3, feature].set(value)
        expected = jaxwin.conv(x, bad, **options)
        got = jaxwin.conv(x, jaxwin.pack(bad, x, **options), **options)
        np.testing.assert_array_equal(got, expected)
        assert np.isnan(got[..., feature]).any()
        lax = jax.lax.conv_general_dilated(
            x,
            bad,
            (1, 1),
            [(3, 3)] * 2,
            rhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        np.testing.assert_array_equal(np.isnan(got), np.isnan(lax))


def test_not_finite_beyond_the_first_panel() -> None:
    x, w, _ = _draw("few pixels")
    bad = w.at[2, 0, 23, 69].set(np.nan)
    packed = jaxwin.pack(bad, x)
    assert packed.array.shape[1] > 1
    np.testing.assert_array_equal(jaxwin.conv(x, packed), jaxwin.conv(x, bad))


@pytest.mark.parametrize("name", ["few pixels", "groups", "3-D"])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_derivatives(name: str, activation: str | None) -> None:
    x, w, options = _draw(name)
    packed = jaxwin.pack(w, x, **options)

    def loss(x, w):
        return (jaxwin.conv(x, w, activation=activation, **options) ** 2).sum()

    dx, dw = jax.jit(jax.grad(loss, (0, 1)))(x, w)
    packed_dx, packed_dw = jax.jit(jax.grad(loss, (0, 1)))(x, packed)
    np.testing.assert_array_equal(packed_dx, dx)
    assert isinstance(packed_dw, jaxwin.PackedWeights)
    np.testing.assert_array_equal(jaxwin.unpack(packed_dw), dw)
    assert not np.asarray(packed_dw.array)[..., packed.shape[-1] :].any()
    tangents = (jnp.ones_like(x), jax.tree.map(jnp.ones_like, packed))
    _, along = jax.jvp(loss, (x, packed), tangents)
    _, expected = jax.jvp(loss, (x, w), (jnp.ones_like(x), jnp.ones_like(w)))
    np.testing.assert_allclose(along, expected, rtol=1e-6)
    hessian = jax.jvp(jax.grad(loss), (x, packed), tangents)[1]
    assert hessian.shape == x.shape


def test_vmap() -> None:
    x, w, _ = _draw("few pixels")
    xs = jnp.stack([x, 2 * x, -x])
    packed = jaxwin.pack(w, x)
    over_x = jax.vmap(jaxwin.conv, (0, None))
    np.testing.assert_array_equal(jax.jit(over_x)(xs, packed), over_x(xs, w))
    assert _plan(over_x, xs, packed).problem.rhs_panel == packed.panel  # folded, still packed
    ws = jnp.stack([w, 3 * w, w - 1])
    each = jax.vmap(jaxwin.pack)(ws)
    assert each.array.shape[0] == 3
    np.testing.assert_array_equal(jax.vmap(jaxwin.unpack)(each), ws)
    over_both = jax.vmap(jaxwin.conv)
    np.testing.assert_array_equal(over_both(xs, each), over_both(xs, ws))
    over_w = jax.vmap(jaxwin.conv, (None, 0))
    np.testing.assert_array_equal(over_w(x, each), over_w(x, ws))


def test_scan_over_layers() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 6, 6, 32), np.float32))
    ws = jnp.asarray(rng.standard_normal((4, 3, 3, 32, 32), np.float32)) / 20
    packed = jax.vmap(jaxwin.pack)(ws)

    def layer(x, w):
        return jaxwin.conv(x, w, activation="relu"), None

    got, _ = jax.jit(lambda x, w: jax.lax.scan(layer, x, w))(x, packed)
    expected, _ = jax.jit(lambda x, w: jax.lax.scan(layer, x, w))(x, ws)
    np.testing.assert_array_equal(got, expected)


def test_a_pytree_that_can_be_stored() -> None:
    x, w, _ = _draw("few pixels")
    packed = jaxwin.pack(w, x)
    leaves, tree = jax.tree.flatten({"layer": packed})
    assert [leaf.shape for leaf in leaves] == [packed.packing.packed_shape]
    (path, _), *_ = jax.tree_util.tree_flatten_with_path({"layer": packed})[0]
    assert jax.tree_util.keystr(path) == "['layer'].array"
    again = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, packed)))
    assert (again.shape, again.groups, again.panel) == (packed.shape, 1, packed.panel)
    np.testing.assert_array_equal(jaxwin.conv(x, again), jaxwin.conv(x, w))
    assert jax.tree.unflatten(tree, [None])["layer"].array is None
    assert f"panel={packed.panel}" in repr(packed)
    doubled = jax.tree.map(lambda v: 2 * v, packed)
    np.testing.assert_array_equal(jaxwin.unpack(doubled), 2 * w)


def test_flax_serialization() -> None:
    serialization = pytest.importorskip("flax.serialization")
    x, w, _ = _draw("few pixels")
    packed = jaxwin.pack(w, x)
    stored = serialization.msgpack_serialize(
        {"array": np.asarray(packed.array), "shape": list(packed.shape)}
    )
    read = serialization.msgpack_restore(stored)
    again = jaxwin.PackedWeights(read["array"], read["shape"], packed.groups, packed.panel)
    np.testing.assert_array_equal(jaxwin.conv(x, again), jaxwin.conv(x, w))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, w, _ = _draw("few pixels", dtype)
        packed = jaxwin.pack(w, x)
        assert packed.dtype == w.dtype
        np.testing.assert_array_equal(jaxwin.conv(x, packed), jaxwin.conv(x, w))
        np.testing.assert_array_equal(jaxwin.unpack(packed), w)


def test_packed_for_another_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after loading weights that another machine packed: unpacked in the program."""
    x, w, _ = _draw("few pixels")
    packed = jaxwin.pack(w, x)
    expected = jaxwin.conv(x, w)
    monkeypatch.setenv("JAXWIN_MAX_ISA", "baseline")
    wide = 5 * 16  # no instruction set's panel
    packing = _pack.Packing(w.shape, 1, wide)
    for other in (packed, jaxwin.PackedWeights(_pack.pack_array(w, packing), w.shape, 1, wide)):
        jax.clear_caches()
        np.testing.assert_array_equal(jax.jit(jaxwin.conv)(x, other), expected)
    monkeypatch.setenv("JAXWIN_DISABLE", "1")
    jax.clear_caches()
    np.testing.assert_allclose(jax.jit(jaxwin.conv)(x, packed), expected, rtol=1e-4, atol=1e-4)
    jax.clear_caches()


def test_over_devices() -> None:
    """In shard_map each device sees whole shapes; in a divided program weights are unpacked."""
    x, w, _ = _draw("few pixels")
    packed = jaxwin.pack(w, x)
    mesh = Mesh(np.array(jax.devices()[:1]), ("b",))
    spec = PartitionSpec
    mapped = jax.shard_map(
        jaxwin.conv, mesh=mesh, in_specs=(spec("b"), spec()), out_specs=spec("b")
    )
    np.testing.assert_array_equal(jax.jit(mapped)(x, packed), jaxwin.conv(x, w))
    placed = jax.device_put(x, NamedSharding(mesh, spec("b")))
    np.testing.assert_array_equal(jax.jit(jaxwin.conv)(placed, packed), jaxwin.conv(x, w))


def test_exported() -> None:
    x, w, _ = _draw("few pixels")
    packed = jaxwin.pack(w, x)
    checks = jaxwin.export_safety_checks()
    program = jax.export.export(
        jax.jit(
            lambda x, array: jaxwin.conv(x, jaxwin.PackedWeights(array, w.shape, 1, packed.panel))
        ),
        disabled_checks=checks,
    )(x, packed.array)
    again = jax.export.deserialize(program.serialize())
    np.testing.assert_array_equal(again.call(x, packed.array), jaxwin.conv(x, w))


def test_errors() -> None:
    x, w, _ = _draw("groups")
    packed = jaxwin.pack(w, x, groups=3)
    with pytest.raises(ValueError, match=r"packed with groups=3, got groups=1"):
        jaxwin.conv(x[..., :4], packed)
    with pytest.raises(ValueError, match=r"must have shape .* another call of jaxwin\.pack"):
        jaxwin.conv(
            x, jaxwin.PackedWeights(packed.array[..., :-1], w.shape, 3, packed.panel), groups=3
        )
    with pytest.raises(ValueError, match="must have shape"):
        jaxwin.unpack(jaxwin.PackedWeights(packed.array, w.shape, 3, 2 * packed.panel))
    with pytest.raises(ValueError, match="must have shape"):
        jaxwin.conv(x, jaxwin.PackedWeights(None, w.shape, 3, packed.panel), groups=3)
    with pytest.raises(TypeError, match="dtype"):
        jaxwin.conv(x.astype(jnp.bfloat16), packed, groups=3)
    with pytest.raises(ValueError, match="w must have C / groups"):
        jaxwin.conv(jnp.concatenate([x, x], -1), packed, groups=3)
    with pytest.raises(ValueError, match="pack: w must have 3 to 5 dimensions"):
        jaxwin.pack(jnp.ones((3, 3)))
    with pytest.raises(TypeError, match="w must be an array"):
        jaxwin.pack(None)


def test_a_lying_call_is_refused() -> None:
    """The native core checks the packed buffer against what the call says."""
    x, w, _ = _draw("few pixels")
    packed = jaxwin.pack(w, x)
    (row,) = jaxwin.explain(jaxwin.conv, x, packed)
    from jaxwin import _dispatch, _lowering

    plan = _dispatch.decide(row.problem).plan
    good = _lowering.attributes(row.problem, plan)
    out = jax.ShapeDtypeStruct(row.problem.out_shape, jnp.float32)

    def call(array, attributes):
        return jax.ffi.ffi_call(_lowering.TARGET, out)(x, array, **attributes)

    workspace_free = call(packed.array, good)  # it brings its own workspace
    np.testing.assert_array_equal(workspace_free, jaxwin.conv(x, w))
    wrong = {
        "packed filters of another shape": (packed.array[..., 1:], good),
        "rhs_panel": (packed.array, good | {"rhs_panel": np.int64(-1)}),
        "another shape": (packed.array, good | {"rhs_panel": np.int64(packed.panel - 1)}),
        "nv: the filters are packed in other panels": (
            jnp.zeros(_pack.Packing(w.shape, 1, 8).packed_shape),
            good | {"rhs_panel": np.int64(8)},
        ),
        "pack: 3 is for filters": (w, good | {"rhs_panel": np.int64(0)}),
        "rhs_shape": (packed.array, {k: v for k, v in good.items() if k != "rhs_shape"}),
        "packed for other algorithms": (
            packed.array,
            good | {"algorithm": "planar", "params": np.zeros(0, np.int64)},
        ),
    }
    for text, (array, attributes) in wrong.items():
        with pytest.raises(Exception, match=text):
            call(array, attributes).block_until_ready()
