# SPDX-License-Identifier: Apache-2.0
"""Every transformation of JAX on our convolution gives what it gives on lax's.

Transformations times problems; each case is one function of a convolution, evaluated with ours
and with lax's. Sharding has its own file, since it needs several devices.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxwin
from jaxwin import _compat
from jaxwin._primitive import (
    conv_general_dilated,
    conv_p,
    conv_transpose,
    export_safety_checks,
)

NUMBERS = ("NHWC", "HWIO", "NHWC")
# name: lhs shape, rhs shape, parameters
PROBLEMS = {
    "dense": ((2, 5, 4, 3), (3, 2, 3, 4), {"padding": "SAME"}),
    "strided": ((2, 6, 5, 3), (3, 2, 3, 4), {"window_strides": (2, 3)}),
    "dilated": ((2, 6, 5, 3), (3, 2, 3, 4), {"rhs_dilation": (2, 3), "padding": "SAME_LOWER"}),
    "grouped": ((2, 5, 4, 4), (2, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": ((2, 5, 4, 3), (3, 3, 1, 6), {"feature_group_count": 3, "padding": "SAME"}),
    "transposed": (
        (2, 3, 4, 3),
        (3, 2, 3, 4),
        {"lhs_dilation": (2, 3), "padding": ((1, 2), (-1, 2))},
    ),
}


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def operands(problem):
    lhs, rhs, _ = PROBLEMS[problem]
    return draw(lhs, 0), draw(rhs, 1)


def bound(function, problem):
    """The problem's convolution as a function of the two operands."""
    parameters = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": NUMBERS}
    parameters |= PROBLEMS[problem][2]
    return lambda x, w: function(x, w, **parameters)


def close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max(initial=1e-30))


def loss(f):
    return lambda x, w: (jnp.sin(f(x, w)) ** 2).sum()


def two(a):
    return jnp.stack([a, 0.5 - a])


def smooth_custom_jvp(f):
    @jax.custom_jvp
    def g(x, w):
        return f(x, w)

    @g.defjvp
    def rule(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return f(x, w), f(dx, w) + f(x, dw)

    return g


def smooth_custom_vjp(f):
    @jax.custom_vjp
    def g(x, w):
        return f(x, w)

    g.defvjp(lambda x, w: (f(x, w), (x, w)), lambda res, ct: jax.vjp(f, *res)[1](2 * ct))
    return g


def chain(f):
    """A square function of x that ends in a convolution, for loops that carry x."""
    return lambda x, w: x + jnp.sum(jnp.cos(f(x, w))) / 10


TRANSFORMATIONS = {
    "eager": lambda f, x, w: f(x, w),
    "jit": lambda f, x, w: jax.jit(f)(x, w),
    "grad x": lambda f, x, w: jax.grad(loss(f), 0)(x, w),
    "grad w": lambda f, x, w: jax.jit(jax.grad(loss(f), 1))(x, w),
    "value_and_grad": lambda f, x, w: jax.jit(jax.value_and_grad(loss(f), (0, 1)))(x, w),
    "jvp": lambda f, x, w: jax.jvp(f, (x, w), (2 * x, 1 - w)),
    "jvp x": lambda f, x, w: jax.jvp(lambda x: f(x, w), (x,), (1 - x,)),
    "vjp": lambda f, x, w: jax.vjp(f, x, w)[1](f(x, w)),
    "linearize": lambda f, x, w: jax.linearize(f, x, w)[1](x, w),
    "jacfwd": lambda f, x, w: jax.jit(jax.jacfwd(f, 1))(x, w),
    "jacrev": lambda f, x, w: jax.jit(jax.jacrev(f, 0))(x[:1], w),
    "hessian w": lambda f, x, w: jax.jit(jax.hessian(loss(f), 1))(x, w),
    "hessian x w": lambda f, x, w: jax.jit(jax.jacfwd(jax.grad(loss(f), 0), 1))(x[:1], w),
    "grad of grad": lambda f, x, w: jax.jit(
        jax.grad(lambda x, w: (jax.grad(loss(f), 1)(x, w) ** 2).sum(), (0, 1))
    )(x, w),
    "jvp of grad": lambda f, x, w: jax.jit(
        lambda x, w: jax.jvp(jax.grad(loss(f), (0, 1)), (x, w), (w.sum() * x, w))
    )(x, w),
    "vmap x": lambda f, x, w: jax.vmap(f, (0, None))(two(x), w),
    "vmap w": lambda f, x, w: jax.vmap(f, (None, 0))(x, two(w)),
    "vmap both": lambda f, x, w: jax.vmap(f)(two(x), two(w)),
    "vmap other axes": lambda f, x, w: jax.vmap(f, (2, -1), 1)(
        jnp.moveaxis(two(x), 0, 2), jnp.moveaxis(two(w), 0, -1)
    ),
    "nested vmap": lambda f, x, w: jax.vmap(jax.vmap(f, (0, None)), (None, 0))(two(x), two(w)),
    "vmap of vmap both": lambda f, x, w: jax.jit(jax.vmap(jax.vmap(f)))(two(two(x)), two(two(w))),
    "vmap of no examples": lambda f, x, w: jax.vmap(f, (0, None))(two(x)[:0], w),
    "per-example gradients": lambda f, x, w: jax.jit(jax.vmap(jax.grad(loss(f), 1), (0, None)))(
        two(x), w
    ),
    "grad of vmap": lambda f, x, w: jax.jit(
        jax.grad(lambda w: (jax.vmap(f, (0, None))(two(x), w) ** 2).sum())
    )(w),
    "vmap of jvp": lambda f, x, w: jax.vmap(lambda t: jax.jvp(lambda w: f(x, w), (w,), (t,))[1])(
        two(w)
    ),
    "vmap with axis name": lambda f, x, w: jax.vmap(
        lambda x: lax.psum(f(x, w), "i"), axis_name="i"
    )(two(x)),
    "checkpoint": lambda f, x, w: jax.jit(jax.grad(loss(jax.checkpoint(f)), (0, 1)))(x, w),
    "scan": lambda f, x, w: jax.jit(
        jax.grad(
            lambda x, w: lax.scan(lambda c, _: (chain(f)(c, w), None), x, None, length=2)[0].sum(),
            (0, 1),
        )
    )(x, w),
    "while_loop": lambda f, x, w: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, chain(f)(s[1], w)), (0, x)
    )[1],
    "fori_loop": lambda f, x, w: lax.fori_loop(0, 2, lambda _, c: chain(f)(c, w), x),
    "jvp of while_loop": lambda f, x, w: jax.jvp(
        lambda w: lax.fori_loop(0, jnp.int32(2), lambda _, c: chain(f)(c, w), x), (w,), (w,)
    ),
    "cond": lambda f, x, w: jax.jit(
        jax.grad(lambda x, w: lax.cond(x.sum() > 0, loss(f), lambda x, w: w.sum(), x, w), 1)
    )(x, w),
    "vmap of cond": lambda f, x, w: jax.vmap(
        lambda x: lax.cond(x.sum() > 0, lambda: f(x, w), lambda: f(x, -w))
    )(two(x)),
    "custom_jvp": lambda f, x, w: jax.grad(loss(smooth_custom_jvp(f)), (0, 1))(x, w),
    "hessian of custom_jvp": lambda f, x, w: jax.jit(jax.hessian(loss(smooth_custom_jvp(f)), 1))(
        x, w
    ),
    "custom_vjp": lambda f, x, w: jax.grad(loss(smooth_custom_vjp(f)), (0, 1))(x, w),
    "vmap of custom_vjp": lambda f, x, w: jax.vmap(
        jax.grad(loss(smooth_custom_vjp(f)), 1), (0, None)
    )(two(x), w),
    "linear_transpose x": lambda f, x, w: jax.linear_transpose(lambda x: f(x, w), x)(f(x, w)),
    "linear_transpose w": lambda f, x, w: jax.linear_transpose(lambda w: f(x, w), w)(f(x, w)),
    "double linear_transpose": lambda f, x, w: jax.linear_transpose(
        lambda y: jax.linear_transpose(lambda w: f(x, w), w)(y)[0], f(x, w)
    )(w),
    "named_call": lambda f, x, w: jax.named_call(f, name="layer")(x, w),
    "closed_call": lambda f, x, w: jax.closure_convert(f, x, w)[0](x, w),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_equals_lax(problem, transformation):
    transformed = TRANSFORMATIONS[transformation]
    x, w = operands(problem)
    got = transformed(bound(conv_general_dilated, problem), x, w)
    want = transformed(bound(lax.conv_general_dilated, problem), x, w)
    close(got, want)


def primitives(jaxpr):
    found = [equation.primitive for equation in jaxpr.eqns]
    for inner in jax.extend.core.subjaxprs(jaxpr):
        found += primitives(inner)
    return found


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_is_made_of_our_primitive_only(transformation):
    """The program of each transformation has our convolution where lax's program has lax's."""
    transformed = TRANSFORMATIONS[transformation]
    x, w = operands("grouped")

    def program(function):
        f = bound(function, "grouped")
        return primitives(jax.make_jaxpr(lambda x, w: transformed(f, x, w))(x, w).jaxpr)

    ours, theirs = program(conv_general_dilated), program(lax.conv_general_dilated)
    assert [_compat.lax_conv_p if p is conv_p else p for p in ours] == theirs
    assert _compat.lax_conv_p not in ours


def test_third_order():
    x, w = draw((1, 3, 3, 2), 0), draw((2, 2, 2, 1), 1)

    def third(function):
        def f(w):
            y = function(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS)
            return (y**3).sum()

        return jax.jit(jax.jacfwd(jax.jacrev(jax.grad(f))))(w)

    close(third(conv_general_dilated), third(lax.conv_general_dilated))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_other_ranks(rank):
    spatial = (4, 5, 3)[:rank]
    x, w = draw((2, 3, *spatial), 0), draw((4, 3, *(2,) * rank), 1)

    def both(function):
        def f(x, w):
            return function(x, w, (1,) * rank, "VALID")

        return f(x, w), jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))(x, w)

    close(both(conv_general_dilated), both(lax.conv_general_dilated))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "complex64"])
def test_other_dtypes(dtype):
    x, w = (jnp.round(a * 4).astype(dtype) for a in operands("dense"))
    got = jax.jit(bound(conv_general_dilated, "dense"))(x, w)
    want = jax.jit(bound(lax.conv_general_dilated, "dense"))(x, w)
    assert got.dtype == want.dtype
    wide = jnp.complex64 if dtype == "complex64" else jnp.float32
    np.testing.assert_allclose(got.astype(wide), want.astype(wide), rtol=1e-2, atol=0.5)


def test_preferred_element_type_and_precision():
    x, w = (a.astype(jnp.bfloat16) for a in operands("dense"))
    options = {"preferred_element_type": jnp.float32, "precision": lax.Precision.HIGHEST}

    def f(function):
        return lambda x, w: function(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS, **options)

    got, want = f(conv_general_dilated)(x, w), f(lax.conv_general_dilated)(x, w)
    assert got.dtype == want.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-2 * float(jnp.abs(want).max()))
    for argument in (0, 1):
        g = [
            jax.grad(lambda *a, c=c: (f(c)(*a) ** 2).sum(), argument)(x, w).astype(jnp.float32)
            for c in (conv_general_dilated, lax.conv_general_dilated)
        ]
        np.testing.assert_allclose(g[0], g[1], atol=2e-2 * float(jnp.abs(g[1]).max()))


# --- signature and errors --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(conv_general_dilated, lax.conv_general_dilated), (conv_transpose, lax.conv_transpose)],
)
def test_signature_is_lax_own(ours, theirs):
    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    keyword, automatic = inspect.Parameter.KEYWORD_ONLY, ("auto", None)
    added = [
        (n, keyword, d) for n, d in zip(("algorithm", "max_workspace"), automatic, strict=True)
    ]
    assert shape(ours) == shape(theirs) + added


BAD_CALLS = {
    "rank": lambda f: f(jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3, 3)), (1,), "SAME"),
    "channels": lambda f: f(jnp.ones((1, 2, 3, 3)), jnp.ones((1, 3, 3, 3)), (1, 1), "SAME"),
    "strides": lambda f: f(jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3, 3)), (1,), ((0, 0),)),
    "padding name": lambda f: f(jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3, 3)), (1, 1), "SOME"),
    "padding value": lambda f: f(jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3, 3)), (1, 1), (1, 1)),
    "negative padding": lambda f: f(
        jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3, 3)), (1, 1), ((-9, 0), (0, 0))
    ),
    "dimension numbers": lambda f: f(
        jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3, 3)), (1, 1), "SAME", None, None, ("NCHH",) * 3
    ),
    "dtypes": lambda f: f(
        jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3, 3), jnp.int32), (1, 1), "SAME"
    ),
    "two group counts": lambda f: f(
        jnp.ones((2, 2, 3, 3)),
        jnp.ones((2, 1, 3, 3)),
        (1, 1),
        "SAME",
        feature_group_count=2,
        batch_group_count=2,
    ),
    "string padding and dilation": lambda f: f(
        jnp.ones((1, 2, 3, 3)), jnp.ones((1, 2, 3, 3)), (1, 1), "SAME", (2, 2)
    ),
    "list": lambda f: f([1.0], jnp.ones((1, 2, 3, 3)), (1, 1), "SAME"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_lax_own(call):
    with pytest.raises(Exception) as theirs:
        BAD_CALLS[call](lax.conv_general_dilated)
    with pytest.raises(Exception) as ours:
        BAD_CALLS[call](conv_general_dilated)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(type(theirs.value)):
        jax.jit(lambda: BAD_CALLS[call](conv_general_dilated))()


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 1))])
def test_conv_transpose(padding, transpose_kernel):
    x = draw((2, 3, 4, 3), 0)
    w = draw((3, 2, 4, 3) if transpose_kernel else (3, 2, 3, 4), 1)
    for consistent in (False, True):
        if consistent and isinstance(padding, tuple):
            padding = ((0, 1), (1, 0))

        def both(function, consistent=consistent, padding=padding):
            def f(x, w):
                return function(
                    x,
                    w,
                    (2, 3),
                    padding,
                    transpose_kernel=transpose_kernel,
                    use_consistent_padding=consistent,
                )

            return f(x, w), jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1)))(x, w)

        close(both(conv_transpose), both(lax.conv_transpose))
    names = primitives(
        jax.make_jaxpr(
            lambda x: conv_transpose(x, w, (1, 1), "SAME", transpose_kernel=transpose_kernel)
        )(x).jaxpr
    )
    assert conv_p in names
    assert _compat.lax_conv_p not in names


def test_conv_transpose_dilated_numpy_operands():
    x, w = np.asarray(draw((2, 5, 3), 0)), np.asarray(draw((3, 3, 4), 1))
    options = {"rhs_dilation": (2,), "dimension_numbers": ("NHC", "HIO", "NHC")}
    close(
        conv_transpose(x, w, (2,), "SAME", **options),
        lax.conv_transpose(x, w, (2,), "SAME", **options),
    )


# --- staging, compilation, export ------------------------------------------------------------


def test_eval_shape_and_make_jaxpr():
    x, w = operands("strided")
    f = bound(conv_general_dilated, "strided")
    got, want = jax.eval_shape(f, x, w), bound(lax.conv_general_dilated, "strided")(x, w)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    (equation,) = jax.make_jaxpr(f)(x, w).eqns
    assert equation.primitive.name == "jaxwin_conv_general_dilated"
    (theirs,) = jax.make_jaxpr(bound(lax.conv_general_dilated, "strided"))(x, w).eqns
    assert equation.params == theirs.params
    close(jax.extend.core.jaxpr_as_fun(jax.make_jaxpr(f)(x, w))(x, w)[0], want)


def test_ahead_of_time_and_serialised():
    from jax.experimental import serialize_executable

    x, w = operands("dense")
    f = bound(conv_general_dilated, "dense")
    compiled = jax.jit(f).lower(x, w).compile()
    want = bound(lax.conv_general_dilated, "dense")(x, w)
    close(compiled(x, w), want)
    again = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    close(again(x, w), want)


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda"), ("cuda", "cpu", "tpu")])
@pytest.mark.parametrize("problem", ["dense", "grouped"])
def test_export(problem, platforms):
    x, w = operands(problem)
    f = jax.jit(bound(conv_general_dilated, problem))
    exported = jax.export.export(f, platforms=platforms, disabled_checks=export_safety_checks())(
        x, w
    )
    want = bound(lax.conv_general_dilated, problem)(x, w)
    close(exported.call(x, w), want)
    pytest.importorskip("flatbuffers")
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    close(again.call(x, w), want)
    gradients = [
        jax.grad(lambda x, w, c=c: (c(x, w) ** 2).sum(), (0, 1))(x, w)
        for c in (again.call, bound(lax.conv_general_dilated, problem))
    ]
    close(*gradients)


@pytest.mark.parametrize("problem", ["dense", "strided", "dilated", "transposed", "depthwise"])
def test_input_gradient_makes_no_reversed_copy_of_the_filter(problem):
    x, w = operands(problem)
    f = bound(conv_general_dilated, problem)

    def gradient(f):
        return jax.jit(lambda x, w: jax.vjp(lambda x: f(x, w), x)[1](jnp.ones_like(f(x, w))))

    compiled = gradient(f).lower(x, w).compile()
    assert "reverse(" not in compiled.as_text()
    close(compiled(x, w), gradient(bound(lax.conv_general_dilated, problem))(x, w))
    rows = list(jaxwin.explain(gradient(f), x, w))
    assert any(any(row.problem.rhs_reversal) for row in rows)


EXPORTED = """
import sys
import jax
import numpy as np
import jaxwin
with open(sys.argv[1], "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
x, w = (np.load(name) for name in sys.argv[2:4])
np.save(sys.argv[4], jax.jit(exported.call)(x, w))
"""


def test_exported_program_runs_in_a_new_process(tmp_path):
    """There jaxwin is imported, and nothing else of it used."""
    pytest.importorskip("flatbuffers")
    x, w = operands("dense")
    f = jax.jit(bound(conv_general_dilated, "dense"))
    exported = jax.export.export(f, disabled_checks=export_safety_checks())(x, w)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "w.npy", w)
    names = [str(tmp_path / name) for name in ("program", "x.npy", "w.npy", "y.npy")]
    command = [sys.executable, "-c", EXPORTED, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    close(jnp.asarray(np.load(names[3])), f(x, w))


def test_export_with_symbolic_batch_size():
    x, w = operands("dense")
    (n,) = jax.export.symbolic_shape("n")
    like = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
    f = jax.jit(bound(conv_general_dilated, "dense"))
    exported = jax.export.export(
        f, platforms=("cpu", "cuda"), disabled_checks=export_safety_checks()
    )(*like)
    for size in (1, 2, 5):
        a = draw((size, *x.shape[1:]), size)
        close(exported.call(a, w), bound(lax.conv_general_dilated, "dense")(a, w))
    pytest.importorskip("flatbuffers")
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    gradients = [
        jax.grad(lambda w, c=c: (c(x, w) ** 2).sum())(w)
        for c in (again.call, bound(lax.conv_general_dilated, "dense"))
    ]
    close(*gradients)


def test_export_with_symbolic_spatial_size():
    w = operands("dense")[1]
    (h,) = jax.export.symbolic_shape("h")
    like = jax.ShapeDtypeStruct((2, h, 4, 3), w.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
    exported = jax.export.export(jax.jit(bound(conv_general_dilated, "dense")))(*like)
    a = draw((2, 7, 4, 3), 0)
    close(exported.call(a, w), bound(lax.conv_general_dilated, "dense")(a, w))


PERSISTENT = """
import sys
import jax, jax.numpy as jnp
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
import jax.monitoring
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
from jaxwin._primitive import conv_general_dilated
f = jax.jit(lambda x, w: conv_general_dilated(x, w, (1, 1), "SAME").sum())
x = jnp.arange(2 * 3 * 5 * 5, dtype=jnp.float32).reshape(2, 3, 5, 5)
print(float(f(x, jnp.ones((4, 3, 3, 3)))))
print(hits.count("/jax/compilation_cache/cache_hits"))
"""


def test_persistent_compilation_cache(tmp_path):
    def run():
        command = [sys.executable, "-c", PERSISTENT, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        value, hits = done.stdout.split()
        return value, int(hits)

    first, second = run(), run()
    assert first[0] == second[0]
    assert second[1] > first[1]


def test_debug_nans():
    x, w = operands("dense")
    f = bound(conv_general_dilated, "dense")
    with jax.debug_nans(True):
        close(f(x, w), bound(lax.conv_general_dilated, "dense")(x, w))
        for g in (f, jax.jit(f)):
            with pytest.raises(FloatingPointError):
                g(x.at[0, 0, 0, 0].set(jnp.nan), w)


def test_checking_leaks():
    x, w = operands("dense")
    with jax.checking_leaks():
        got = jax.jit(jax.grad(loss(bound(conv_general_dilated, "dense"))))(x, w)
    close(got, jax.grad(loss(bound(lax.conv_general_dilated, "dense")))(x, w))


def test_lowering_for_another_platform_is_lax_own():
    x, w = operands("dense")
    f = bound(conv_general_dilated, "dense")
    text = jax.jit(f).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.convolution" in text


# --- layering --------------------------------------------------------------------------------


def test_private_jax_modules_are_mentioned_in_one_file_only():
    root = Path(inspect.getfile(_compat)).parent
    mentioning = [p.name for p in root.rglob("*.py") if "jax._src" in p.read_text()]
    assert mentioning == ["_compat.py"]
