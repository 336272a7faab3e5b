# SPDX-License-Identifier: Apache-2.0
"""Weights packed once, in the order in which the kernels read them.

The order depends on the weights' shape and one number, the panel: how many output features a
register tile covers. So a packed array says by its own last dimension what it is, means the same
on every machine, and can be unpacked on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxwin import _dispatch, _registry
from jaxwin._problem import Problem


class Packing(NamedTuple):
    """How weights are packed: their shape before (window..., C / groups, K), and the panel."""

    shape: tuple[int, ...]
    groups: int
    panel: int

    @property
    def packed_shape(self) -> tuple[int, int, int, int]:
        """(groups, panels, reduction, panel)"""
        panels = -(-self.shape[-1] // self.groups // self.panel)
        return self.groups, panels, math.prod(self.shape[:-1]), self.panel


@jax.tree_util.register_pytree_with_keys_class
class PackedWeights:
    """Weights that `jaxwin.conv` takes in place of an array; made by `jaxwin.pack`.

    A pytree with one array. `array` is the packed weights, of shape (groups, panels, reduction,
    panel): entry [g, p, r, i] is the weight of output feature p * panel + i of group g, zero
    beyond the last one; r counts the window and the input channels, the channel fastest, then the
    window's dimensions from the first to the last. With `panel` 0 the weights are as they were: no
    kernel for them reads panels.
    """

    def __init__(self, array: Any, shape: Sequence[int], groups: int, panel: int) -> None:
        self.array = array
        self.shape = tuple(shape)
        self.groups = groups
        self.panel = panel

    @property
    def ndim(self) -> int:
        """Of the weights before packing."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """Of the weights, before and after."""
        return self.array.dtype

    @property
    def packing(self) -> Packing | None:
        """None: not packed."""
        return Packing(self.shape, self.groups, self.panel) if self.panel else None

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """The array; the rest is static."""
        key = jax.tree_util.GetAttrKey("array")
        return ((key, self.array),), (self.shape, self.groups, self.panel)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> PackedWeights:
        """The inverse; the child may be anything that JAX puts into trees."""
        return cls(*children, *static)

    def __repr__(self) -> str:
        return (
            f"PackedWeights(shape={self.shape}, groups={self.groups}, panel={self.panel}, "
            f"array={self.array!r})"
        )


def pack_for(w: jax.Array, groups: int, problem: Problem) -> PackedWeights:
    """Weights packed for the plan that dispatch chooses for a problem."""
    panel = _panel(problem, groups)
    if not panel:
        return PackedWeights(w, w.shape, groups, 0)
    packing = Packing(w.shape, groups, panel)
    return PackedWeights(pack_array(w, packing), w.shape, groups, panel)


def _panel(problem: Problem, groups: int) -> int:
    """The features of a panel, or 0 where no kernel for the problem reads any."""
    plan = _dispatch.decide(problem, enforce=False).plan
    dtype = problem.native()["lhs_dtype"]
    if plan is None or not _registry.takes_packed(plan.algorithm, dtype):
        return 0
    names = _registry.parameter_names(plan.algorithm) or ()
    return plan.params[names.index("nv")] * _registry.width(plan.isa, dtype)


def pack_array(w: jax.Array, packing: Packing) -> jax.Array:
    """(window..., C / groups, K) to the packed shape."""
    groups, panels, reduction, panel = packing.packed_shape
    rank, features = w.ndim - 2, w.shape[-1] // groups
    w = jnp.transpose(w, (*reversed(range(rank)), rank, rank + 1))
    w = w.reshape(reduction, groups, features)
    w = jnp.pad(w, ((0, 0), (0, 0), (0, panels * panel - features)))
    return w.reshape(reduction, groups, panels, panel).transpose(1, 2, 0, 3)


def unpack_array(array: jax.Array, packing: Packing) -> jax.Array:
    """The inverse of `pack_array`, linear."""
    groups, panels, reduction, panel = packing.packed_shape
    *window, channels, k = packing.shape
    w = lax.transpose(array, (2, 0, 1, 3)).reshape(reduction, groups, panels * panel)
    w = w[:, :, : k // groups].reshape(*reversed(window), channels, k)
    rank = len(window)
    return lax.transpose(w, (*reversed(range(rank)), rank, rank + 1))


def unpack(w: PackedWeights | ArrayLike) -> jax.Array:
    """The weights before `jaxwin.pack`, of shape (window..., C / groups, K): the same bits.

    An array is returned as it is. Works inside jit, is differentiable, and runs on every machine,
    whatever the weights were packed on.
    """
    if not isinstance(w, PackedWeights):
        return jnp.asarray(w)
    if w.packing is None:
        return jnp.asarray(w.array)
    check(w)
    return unpack_array(w.array, w.packing)


def check(w: PackedWeights) -> None:
    """Raises ValueError where the array does not fit what the pytree says about it."""
    packing = w.packing
    expected = w.shape if packing is None else packing.packed_shape
    found = getattr(w.array, "shape", None)
    if found != expected:
        raise ValueError(
            f"packed weights: the array must have shape {expected} for weights of shape {w.shape}, "
            f"groups={w.groups} and panel={w.panel}, got {found}; was it packed by another call of "
            "jaxwin.pack?"
        )
