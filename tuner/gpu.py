# SPDX-License-Identifier: Apache-2.0
"""Candidates on a GPU, in the measuring process: what their results must be, and their time.

A candidate is timed as a user's program runs it: through XLA, with all its kernels, several calls
in one program, so that a launch from Python does not count. Each call has operands of its own, and
where those of a program are small, programs take turns between sets of them, so that they do not
stay in the second-level cache. Results go into donated buffers, which are NaN at first:
what a kernel leaves unwritten shows.

What is of the canonical family must have the bits of the first such candidate, and that must agree
with XLA at its highest precision. Others must agree with XLA within the rounding of their operands.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxwin import _cuda, _fused, _lowering, _registry
from jaxwin._plan import Plan
from jaxwin._problem import Problem

# For tests, where there is no GPU: everything but the kernels, which the CPU's take the place of.
REHEARSAL = "JAXWIN_TUNER_REHEARSAL"

_ROTATED_BYTES = 192 << 20  # of all operands that take turns: some times a second-level cache
_MOST_BYTES = 6 << 30
_MOST_CALLS = 32  # of one program
_MOST_SETS = 16
# Of the sum of the products' magnitudes: an operand's rounding twice, or the result's.
_BOUNDS = {"tf32": 2.0**-9, "bfloat16": 2.0**-7, "float16": 2.0**-9}
_EXACT_BOUND = 2.0**-16  # float32 sums of any order, and cuDNN's transforms


# Each one program: what is done operation by operation is compiled so, too.
@jax.jit
def _all_finite(results: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(result).all() for result in results]).all()


@jax.jit
def _differing(results: list[jax.Array], others: list[jax.Array]) -> jax.Array:
    return jnp.stack([(a != b).sum() for a, b in zip(results, others, strict=True)]).sum()


@jax.jit
def _worst(result: jax.Array, expected: jax.Array, size: jax.Array) -> jax.Array:
    return (jnp.abs(result.astype(jnp.float32) - expected) / jnp.maximum(size, 1e-20)).max()


_struct: Any = jax.ShapeDtypeStruct
_finished: Any = jax.block_until_ready


def _drawn(
    key: Any, count: int, shape: tuple[int, ...], dtype: str, *, together: bool
) -> list[jax.Array]:
    """Arrays of random values; together: at once, which takes their memory twice for a moment."""
    if together:
        return list(jax.random.normal(key, (count, *shape), dtype))
    return [jax.random.normal(each, shape, dtype) for each in jax.random.split(key, count)]


def rehearsing() -> bool:
    """Whether this process only plays a GPU."""
    return bool(os.environ.get(REHEARSAL))


class Subject:
    """A problem with data on the GPU. isa: as in the tuning database, "cuda" or "cuda-tensor".

    spoiled: for tests, plans whose results shall be wrong.
    """

    def __init__(
        self, key: str, seed: int, isa: str, spoiled: Callable[[Plan], bool] = lambda plan: False
    ) -> None:
        self.problem = problem = Problem.from_key(key)
        self.isa, self._spoiled = isa, spoiled
        self.exact = isa == _cuda.ISA
        shapes: list[tuple[int, ...]] = [problem.lhs_shape, problem.rhs_shape]
        if problem.bias:
            shapes.append((problem.out_shape[problem.out_spec[1]],))
        if problem.residual:
            shapes.append(problem.out_shape)
        width = np.dtype(jnp.dtype(problem.lhs_dtype)).itemsize
        size = width * sum(math.prod(shape) for shape in (*shapes, problem.out_shape))
        wanted = min(_MOST_CALLS, max(2, math.ceil(_ROTATED_BYTES / max(size, 1))))
        self.calls = max(1, min(wanted, _MOST_BYTES // max(size, 1)))
        held = self.calls * size
        sets = min(_MOST_SETS, max(1, math.ceil(_ROTATED_BYTES / max(held, 1))))
        if rehearsing():
            self.calls = sets = 2
        generator = jax.random.key(seed, impl="rbg")  # compiles fast
        self.sets = []
        for one in jax.random.split(generator, sets):
            keys = jax.random.split(one, len(shapes))
            drawn = (
                _drawn(key, self.calls, shape, problem.lhs_dtype, together=sets > 1)
                for key, shape in zip(keys, shapes, strict=True)
            )
            self.sets.append(list(zip(*drawn, strict=True)))
        self.operands = self.sets[0]  # of what is judged
        self.temporary_bytes: int | None = None  # of the program compiled last, by XLA's account
        self._bits: list[jax.Array] | None = None
        self._expected: dict[int, tuple[jax.Array, jax.Array]] = {}

    def check(self, plan: Plan) -> tuple[str, str]:
        """Nothing: what there is to check needs the compiled program."""
        return "ok", ""

    def compile(self, plan: Plan) -> tuple[Callable[[], Any], str, str]:
        """`calls` calls of a plan in one program, the status of their first results, and why."""
        problem = self.problem
        out = _struct(problem.out_shape, jnp.dtype(problem.out_dtype))

        def program(previous: list[Any], operands: list[tuple[Any, ...]]) -> list[Any]:
            return [self._call(plan, *each) for each in operands]

        jitted = jax.jit(program, donate_argnums=0, keep_unused=True)
        compiled = jitted.lower([out] * self.calls, self.operands).compile()
        memory = compiled.memory_analysis()
        self.temporary_bytes = None if memory is None else int(memory.temp_size_in_bytes)
        held = [jnp.full(out.shape, jnp.nan, out.dtype) for _ in range(self.calls)]
        if plan.workspace_bytes > 0:  # memory that XLA will use again
            jnp.full(plan.workspace_bytes, 0xFF, jnp.uint8).block_until_ready().delete()
        first = _finished(compiled(held, self.operands))
        if self._spoiled(plan):
            first[-1] = first[-1].at[(-1,) * out.ndim].add(1)
        status, error = self._judge(plan, first)
        state = [first]
        turns = itertools.cycle(self.sets)
        del held, first

        def run() -> None:
            state.append(_finished(compiled(state.pop(), next(turns))))

        return run, status, error

    def _call(self, plan: Plan, x: Any, w: Any, *epilogue: Any) -> Any:
        problem = self.problem
        if plan.algorithm == _registry.XLA:
            precision = jax.lax.Precision.HIGHEST if self.exact else None
            return _fused.of_problem(problem, x, w, *epilogue, algorithm="xla", precision=precision)
        if rehearsing():
            return _fused.of_problem(problem, x, w, *epilogue, algorithm="auto")
        wide = _cuda.operand_dtype(problem, plan.algorithm) != problem.lhs_dtype
        operands = [a.astype(jnp.float32) if wide else a for a in (x, w, *epilogue)]
        results = [_struct(problem.out_shape, jnp.float32 if wide else problem.out_dtype)]
        if plan.workspace_bytes > 0:
            results.append(_struct((plan.workspace_bytes,), np.uint8))
        call = jax.ffi.ffi_call(_lowering.TARGET, results)
        answer: Any = call(*operands, **_lowering.attributes(problem, plan))
        return answer[0].astype(problem.out_dtype)

    def _judge(self, plan: Plan, results: list[jax.Array]) -> tuple[str, str]:
        if not bool(_all_finite(results)):
            return "wrong", "leaves a part of its result unwritten"
        canonical = _cuda.family(plan.algorithm) == "canonical"
        if canonical and self._bits is not None:
            if count := int(_differing(results, self._bits)):
                return "wrong", f"{count} values differ from the first plan's"
            return "ok", ""
        single = self.problem.lhs_dtype == "float32"
        float32_sums = canonical or _cuda.family(plan.algorithm) == "pieces" or self.exact
        bound = _EXACT_BOUND if single and float32_sums else 0.0
        if not bound:
            bound = _BOUNDS["tf32" if single else self.problem.lhs_dtype]
        for number in {0, len(results) - 1}:
            expected, size = self._reference(number)
            worst = float(_worst(results[number], expected, size))
            if not worst <= bound:
                told = f"{worst:g} of the products' magnitude, allowed are {bound:g}"
                return "wrong", f"differs from XLA's result by {told}"
        if canonical:
            self._bits = [jnp.copy(result) for result in results]
        return "ok", ""

    def _reference(self, number: int) -> tuple[jax.Array, jax.Array]:
        """XLA's result for the operands of a call in float32, and the sum of the magnitudes."""
        if number not in self._expected:
            problem = dataclasses.replace(self.problem, out_dtype="float32")
            highest: Any = {"algorithm": "xla", "precision": jax.lax.Precision.HIGHEST}
            wide = [a.astype(jnp.float32) for a in self.operands[number]]

            def compute(*operands: Any) -> Any:
                return _fused.of_problem(problem, *operands, **highest)

            bare = dataclasses.replace(problem, activation=None)

            def magnitude(*operands: Any) -> Any:
                return _fused.of_problem(bare, *(jnp.abs(a) for a in operands), **highest)

            self._expected[number] = jax.jit(compute)(*wide), jax.jit(magnitude)(*wide)
        return self._expected[number]


def is_sick() -> bool:
    """Whether a fault has left this process without its GPU, so that all that follows fails."""
    try:
        return not bool((jnp.arange(8) + 1).sum() == 36)
    except Exception:  # whatever XLA raises then
        return True
