# SPDX-License-Identifier: Apache-2.0
"""Dimensions in another order: lax's transposition with a lowering of its own on the CPU.

XLA's takes four to ten times as long as memory does, where the last dimension becomes another one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxwin import _compat, _lowering, _registry, _settings

transpose_p: Any = Primitive("jaxwin_transpose")


def transpose(x: jax.Array, permutation: Sequence[int]) -> jax.Array:
    """`lax.transpose(x, permutation)`."""
    permutation = tuple(permutation)
    if permutation == tuple(range(x.ndim)):
        return x
    result: jax.Array = transpose_p.bind(x, permutation=permutation)
    return result


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(d) for d in np.argsort(permutation))


def _transpose_rule(cotangent: Any, x: Any, *, permutation: tuple[int, ...]) -> list[Any]:
    return [transpose(cotangent, _inverse(permutation))]


def _batch(args: Any, dims: Any, *, permutation: tuple[int, ...]) -> tuple[Any, int]:
    (x,), (dim,) = args, dims
    # Where it is: the first of the result, the others in their order.
    others = [d for d in range(x.ndim) if d != dim]
    return transpose(x, (dim, *(others[d] for d in permutation))), 0


_lower_to_lax: Any = mlir.lower_fun(
    lambda x, permutation: lax.transpose(x, permutation), multiple_results=False
)


def _lower_on_cpu(ctx: Any, x: Any, *, permutation: tuple[int, ...]) -> Sequence[Any]:
    aval = ctx.avals_in[0]
    static = all(isinstance(size, int | np.integer) for size in aval.shape)
    native = (
        static
        and aval.size > 0
        and aval.dtype.itemsize in (4, 8)
        and permutation[-1] != aval.ndim - 1
        and _compat.placement(ctx) == "local"
        and not _settings.settings().disable
    )
    if not native:
        through_lax: Sequence[Any] = _lower_to_lax(ctx, x, permutation=permutation)
        return through_lax
    isa = _registry.best_isa(_settings.settings().max_isa)
    lower = jax.ffi.ffi_lowering(_lowering.TRANSPOSE_TARGET)
    return list(lower(ctx, x, permutation=np.asarray(permutation, np.int64), isa=isa))


transpose_p.def_impl(functools.partial(_compat.apply_primitive, transpose_p))
transpose_p.def_effectful_abstract_eval(lax.transpose_p.abstract_eval)
deflinear: Any = ad.deflinear2
deflinear(transpose_p, _transpose_rule)
batching.primitive_batchers[transpose_p] = _batch
_compat.require_devices(transpose_p)
_compat.register_lowering(transpose_p, {"cpu": _lower_on_cpu}, _lower_to_lax)
