# SPDX-License-Identifier: Apache-2.0
"""On a GPU only: CUDA algorithms through XLA, bit for bit; bounds of tensor cores; gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import reference
from gpu_cases import SETS, forced, plan_of

import jaxwin
from jaxwin import _compat, _ffi, _fused, _registry

if "cuda" not in _compat.platform_version().lower():
    pytest.skip("no GPU that CUDA can use", allow_module_level=True)

REGISTRY = {row["name"]: row for row in _registry.registry()["cuda"]["algorithms"]}
CANONICAL = [name for name, row in REGISTRY.items() if row["family"] == "canonical"]


def _compiled(problem: Any, plan: Any, arrays: Any, **epilogue: Any) -> Any:
    """The convolution of a problem by a plan, compiled for the GPU."""

    said = dataclasses.replace(
        problem,
        bias="bias" in epilogue,
        residual="residual" in epilogue,
        activation=epilogue.get("activation"),
    )

    def convolve(*operands: Any) -> Any:
        # "direct": so that a call is made; the plan is forced
        return _fused.of_problem(said, *operands, algorithm="direct")

    with forced(plan):
        return jax.jit(convolve).lower(*arrays).compile()


def _poison(shape: tuple[int, ...]) -> None:
    """Leaves NaN in memory that XLA will use again."""
    for _ in range(3):
        jnp.full(shape, jnp.nan, jnp.float32).block_until_ready().delete()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("algorithm", CANONICAL)
def test_bits_of_the_chain(algorithm: str, seed: int) -> None:
    rng = np.random.default_rng([seed, CANONICAL.index(algorithm)])
    kinds = {name: name for name in ("depthwise", "grouped", "segregated", "weight_grad")}
    kinds["lanes_grad"] = "weight_grad"
    while True:
        problem = problems.draw(rng, kinds.get(algorithm))
        if "rejected" not in _ffi.cuda_candidates(problem.native())[algorithm]:
            break
    x, w = problems.operands(problem, rng)
    expected = reference.chain(problem, x, w)
    specs = REGISTRY[algorithm]["params"]
    tried = [(), tuple(int(rng.choice(spec["values"])) for spec in specs)]
    for params in tried:
        plan = plan_of(problem, algorithm, params)
        if isinstance(plan, str):
            continue
        run = _compiled(problem, plan, (x, w))
        for _ in range(2):
            _poison(problem.out_shape)
            np.testing.assert_array_equal(run(x, w), expected, f"{problem} {plan}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("algorithm", [n for n in CANONICAL if len(REGISTRY[n]["dtypes"]) > 1])
def test_sixteen_bits_are_widened_and_rounded_once(algorithm: str, dtype: str) -> None:
    rng = np.random.default_rng([CANONICAL.index(algorithm), 55])
    kind = "weight_grad" if algorithm == "lanes_grad" else algorithm
    while True:
        problem = problems.draw(rng, kind if kind != "direct" else None)
        narrow = dataclasses.replace(problem, lhs_dtype=dtype, rhs_dtype=dtype, out_dtype=dtype)
        plan = plan_of(narrow, algorithm, dtype=dtype)
        if not isinstance(plan, str):
            break
    x, w = (np.asarray(jnp.asarray(a, dtype)) for a in problems.operands(problem, rng))
    chain = reference.chain(problem, x.astype(np.float32), w.astype(np.float32))
    expected = np.asarray(jnp.asarray(chain, dtype))
    np.testing.assert_array_equal(_compiled(narrow, plan, (x, w))(x, w), expected)


@pytest.mark.parametrize("activation", _registry.registry()["activations"])
def test_epilogues_have_the_bits_of_the_cpu(activation: str) -> None:
    problem = problems.make(3, 8, 12, (9, 11), (3, 3), padding=((1, 1), (1, 1)))
    assert problem is not None
    rng = np.random.default_rng(0)
    x, w = problems.operands(problem, rng)
    bias = rng.standard_normal(12, np.float32)
    residual = rng.standard_normal(problem.out_shape, np.float32)
    expected = problems.run(
        problem, x, w, "auto", bias=bias, residual=residual, activation=activation
    )
    plan = plan_of(problem, "im2win")
    epilogue = {"bias": bias, "residual": residual}
    if activation != "none":
        epilogue["activation"] = activation
    run = _compiled(problem, plan, (x, w, bias, residual), **epilogue)
    np.testing.assert_array_equal(run(x, w, bias, residual), expected)


def test_denormals_are_flushed_as_on_the_cpu() -> None:
    problem = problems.make(1, 4, 8, (6, 6), (3, 3))
    assert problem is not None
    rng = np.random.default_rng(4)
    x, w = problems.operands(problem, rng)
    x = (x * 10.0 ** rng.integers(-22, -16, x.shape)).astype(np.float32)
    w = (w * 10.0 ** rng.integers(-22, -16, w.shape)).astype(np.float32)
    expected = problems.run(problem, x, w, "auto")
    for algorithm in ("im2win", "direct"):
        run = _compiled(problem, plan_of(problem, algorithm), (x, w))
        np.testing.assert_array_equal(run(x, w), expected, algorithm)


@pytest.mark.parametrize("dtype", REGISTRY["tensor"]["dtypes"])
@pytest.mark.parametrize("seed", range(2))
def test_tensor_cores(dtype: str, seed: int) -> None:
    rng = np.random.default_rng([seed, 77])
    while True:
        problem = problems.draw(rng)
        narrow = dataclasses.replace(problem, lhs_dtype=dtype, rhs_dtype=dtype, out_dtype=dtype)
        plan = plan_of(narrow, "tensor", dtype=dtype)
        if not isinstance(plan, str):
            break
    x, w = (np.asarray(jnp.asarray(a, dtype)) for a in problems.operands(problem, rng))
    result = np.asarray(_compiled(narrow, plan, (x, w))(x, w).astype(np.float32))
    exact, size = reference.float64(problem, x.astype(np.float32), w.astype(np.float32))
    bound = {"float32": 2**-10, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    assert (np.abs(result - exact) <= bound * size + 1e-6).all()


@pytest.mark.parametrize("name", ["depthwise", "transposed", "grouped"])
def test_what_is_chosen_by_itself_agrees_with_lax(name: str) -> None:
    case = dataclasses.replace(SETS[name][0], n=2)
    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(case.shapes)]
    (row,) = jaxwin.explain(case.function(True), *arrays)
    assert row.algorithm != "xla"

    def value(ours: bool) -> Any:
        function = case.function(ours)
        return jax.jit(jax.value_and_grad(lambda x, w: (function(x, w) ** 2).sum(), (0, 1)))

    for got, wanted in zip(
        jax.tree.leaves(value(True)(*arrays)), jax.tree.leaves(value(False)(*arrays)), strict=True
    ):
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5 * scale)


def test_many_calls_in_one_program() -> None:
    """Enough of them for a command buffer; each result depends on the one before."""
    case = dataclasses.replace(SETS["depthwise"][0], n=2)
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(case.shapes))
    function = case.function(True)

    def chain(x: Any, w: Any) -> Any:
        for _ in range(12):
            x = function(x, w) * 0.25
        return x

    expected = x
    single = jax.jit(lambda x, w: function(x, w) * 0.25)
    for _ in range(12):
        expected = single(expected, w)
    compiled = jax.jit(chain)
    for _ in range(4):
        np.testing.assert_array_equal(compiled(x, w), expected)
