# SPDX-License-Identifier: Apache-2.0
"""accelerate: one function's convolutions on jaxwin's kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from jaxwin._substitute import substituting

P = ParamSpec("P")
R = TypeVar("R")


def accelerate(fn: Callable[P, R]) -> Callable[P, R]:
    """`fn` with every convolution in it computed by jaxwin; nothing else changes.

    Args:
      fn: any callable. Its arguments and results are passed through as they are: arrays, pytrees,
        modules, strings, None. It may be jitted or transformed already.

    Returns:
      A callable with the signature of `fn`. Shapes, dtypes and errors are those of `fn`; values
      follow the numerical contract of `jaxwin.conv_general_dilated`.

    Convolutions are replaced wherever `fn` meets them: directly, inside jit, scan, while_loop,
    cond, checkpoint, shard_map, vmap, grad, and in the rules of custom_jvp and custom_vjp
    functions, also when the differentiation happens outside (`grad(accelerate(f))`).

    Compose it freely with transformations. For speed keep `jax.jit` outermost,
    `jax.jit(accelerate(f))`: outside of any jit, calls of jitted functions inside `fn` go
    through JAX's slower Python path.

    Not replaced, and computed by lax as before: convolutions of functions that `fn` returns and
    that run after it has returned (such as the function that `jax.vjp` gives, where the vjp was
    taken inside `fn`), of other threads that `fn` starts, of programs compiled ahead of time, and
    of host callbacks.

    A policy of `jax.checkpoint` that names lax's primitive (`jax.checkpoint_policies.dots_saveable`
    and its like) is honoured for a checkpoint inside `fn`. For `jax.checkpoint(accelerate(f))`
    it does not recognise our primitive, and recomputes what it would have saved.
    """

    @functools.wraps(fn)
    def accelerated(*args: P.args, **kwargs: P.kwargs) -> R:
        with substituting():
            return fn(*args, **kwargs)

    return accelerated
