# SPDX-License-Identifier: Apache-2.0
"""Running code with lax's convolution primitive replaced by ours.

`substituting()` puts a trace on top of the current one that hands every operation down
unchanged, except that lax's convolution becomes ours. Operations that carry programs of their
own (jit, scan, while, cond, remat, shard_map, ...) have the same replacement made inside those
programs: an equation's primitive is exchanged and nothing else, since both primitives take the
same parameters and give the same types. Derivative rules of custom_jvp and custom_vjp run under
the same replacement whenever they run.

Because nothing is traced again, values stay what they are (concrete outside jit), and mesh,
axis-name and configuration contexts need no reconstruction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jax.extend.core import Primitive

from jaxwin import _compat

# Set by _primitive, which defines the replacement and needs this module to derive its rules.
_REPLACEMENTS: dict[Any, Any] = {}


def register_replacement(source: Any, target: Any) -> None:
    """Makes `substituting()` replace primitive `source` by `target` (same parameters, types)."""
    _REPLACEMENTS[source] = target


class substituting:
    """Context: every convolution of lax that this thread binds in it is ours instead."""

    __slots__ = ("_entered",)

    def __enter__(self) -> None:
        parent = _compat.current_trace()
        if isinstance(parent, _SubstitutionTrace):
            self._entered = None
            return
        context = _compat.substitution_context(True)
        trace = _compat.set_current_trace(_SubstitutionTrace(parent))
        context.__enter__()
        trace.__enter__()
        self._entered = (trace, context)

    def __exit__(self, *exception: object) -> None:
        if self._entered is not None:
            for manager in self._entered:
                manager.__exit__(*exception)


def call_substituted(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`fun(*args, **kwargs)` under `substituting()`."""
    with substituting():
        return fun(*args, **kwargs)


class _SubstitutionTrace(_compat.Trace):  # type: ignore[misc]
    """Hands every operation to `parent_trace`, with convolutions replaced.

    It makes no tracers of its own. It answers to its parent's identity, so that libraries that
    ask "has the trace changed since this object was made?" (Flax NNX) see no change; JAX's own
    caches are kept apart by `substitution_context`.
    """

    def __init__(self, parent: Any) -> None:
        super().__init__()
        self.parent_trace = parent
        self.requires_low = parent.requires_low
        self._weakref = parent._weakref

    def __getattr__(self, name: str) -> Any:
        return getattr(self.parent_trace, name)

    def __repr__(self) -> str:
        return f"Substitution({self.parent_trace!r})"

    def is_valid(self) -> bool:
        return bool(self.parent_trace.is_valid())

    def stage_value(self, val: Any) -> Any:
        return self.parent_trace.stage_value(val)

    def process_primitive(self, primitive: Any, tracers: Any, params: dict[str, Any], /) -> Any:
        primitive, params = _substitute_operation(primitive, params)
        return self.parent_trace.process_primitive(primitive, tracers, params)

    def process_call(self, primitive: Any, f: Any, tracers: Any, params: Any, /) -> Any:
        _, params = _substitute_operation(primitive, params)
        return self.parent_trace.process_call(primitive, _wrap(f), tracers, params)

    def process_shard_map(self, primitive: Any, fun: Any, args: Any, /, **params: Any) -> Any:
        return self.parent_trace.process_shard_map(primitive, _wrap(fun), args, **params)

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, tracers: Any, /, **params: Any
    ) -> Any:
        return self.parent_trace.process_custom_jvp_call(
            primitive, _wrap(fun), _wrap(jvp), tracers, **params
        )

    def process_custom_vjp_call(
        self, primitive: Any, fun: Any, fwd: Any, bwd: Any, tracers: Any, /, **params: Any
    ) -> Any:
        return self.parent_trace.process_custom_vjp_call(
            primitive, _wrap(fun), _wrap(fwd), _wrap(bwd), tracers, **params
        )


def _run(fun: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `fun` under replacement; programs that it returns are replaced as well."""
    with substituting():
        return _substitute_value(fun(*args, **kwargs))


def _wrap(fun: Any) -> Any:
    return _compat.wrap_callable(fun, _run)


def _substitute_operation(primitive: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Primitive and parameters after replacement; the same objects where nothing changes."""
    replacement = _REPLACEMENTS.get(primitive)
    if replacement is not None:
        return replacement, params
    changed = {}
    for name, value in params.items():
        new = _substitute_value(value)
        if new is not value:
            changed[name] = new
    if changed and callable(policy := params.get("policy")):
        changed["policy"] = _policy_by_lax_names(policy)
    return (primitive, {**params, **changed}) if changed else (primitive, params)


def _substitute_value(value: Any) -> Any:
    """A parameter with every program in it replaced; the same object where nothing changes."""
    if isinstance(value, _compat.ClosedJaxpr):
        return _substitute_closed(value)
    if isinstance(value, _compat.Jaxpr):
        return _substitute_jaxpr(value)
    if isinstance(value, _compat.WrappedFun):
        return _wrap(value)
    if type(value) in (tuple, list):
        new = [_substitute_value(item) for item in value]
        if any(a is not b for a, b in zip(new, value, strict=True)):
            return type(value)(new)
    return value


@_compat.weakref_lru_cache  # type: ignore[untyped-decorator]
def _substitute_closed(closed: Any) -> Any:
    jaxpr = _substitute_jaxpr(closed.jaxpr)
    return closed if jaxpr is closed.jaxpr else closed.replace(jaxpr=jaxpr)


@_compat.weakref_lru_cache  # type: ignore[untyped-decorator]
def _substitute_jaxpr(jaxpr: Any) -> Any:
    changed = False
    equations = []
    for equation in jaxpr.eqns:
        primitive, params = _substitute_operation(equation.primitive, equation.params)
        if primitive is not equation.primitive or params is not equation.params:
            changed = True
            equation = equation.replace(primitive=primitive, params=params)
        equations.append(equation)
    return jaxpr.replace(eqns=equations) if changed else jaxpr


@functools.lru_cache(maxsize=256)
def _policy_by_lax_names(policy: Callable[..., Any]) -> Callable[..., Any]:
    """A rematerialisation policy that sees lax's primitive where ours has taken its place."""
    names = {target: source for source, target in _REPLACEMENTS.items()}

    def renamed(primitive: Primitive, *args: Any, **params: Any) -> Any:
        return policy(names.get(primitive, primitive), *args, **params)

    return renamed
