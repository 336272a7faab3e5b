# SPDX-License-Identifier: Apache-2.0
"""By how much results depend on what computes them.

The same model gives other numbers on another machine where the convolutions are added up in another
order: Schlögl, Hofer and Böhme, "Causes and Effects of Unanticipated Numerical Deviations in Neural
Network Inference Frameworks" (NeurIPS 2023). This shows where that happens, and that it does not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from numpy.typing import NDArray

from jaxwin import _compat, _dispatch, _fused, _registry
from jaxwin._accelerate import accelerate
from jaxwin._dispatch import Forced
from jaxwin._fused import fused_conv_p
from jaxwin._plan import Decision
from jaxwin._primitive import conv_p
from jaxwin._problem import Problem, from_equation

# Instruction sets without fused multiply-adds are slow: by default only for so many operations.
_SLOW_FLOPS = 2e8


@dataclasses.dataclass(frozen=True)
class Difference:
    """What differs between two arrays.

    differing: the share of elements that are not the same. ulps: the largest distance in units in
    the last place, that is in steps from a number of the dtype to the next one; infinite between a
    number and NaN. absolute: the largest absolute difference.
    """

    differing: float = 0.0
    ulps: float = 0.0
    absolute: float = 0.0

    def __str__(self) -> str:
        if not self.differing:
            return "the same bits"
        return f"{self.differing:.1%} differ, {self.ulps:.0f} ulp, {self.absolute:.2g}"


@dataclasses.dataclass(frozen=True)
class LayerDeviation:
    """One convolution computed in one way, on the inputs that it has in the program.

    layer: its place in the program, from 0; calls: how often it ran. variant: the way, "default"
    for what dispatch takes. plan: the algorithm with its parameters and instruction set, or "xla".
    difference: from the default, the largest of all calls. errors: the median, the 99th percentile
    and the maximum of |result - exact result|, as multiples of the dtype's epsilon times the root
    mean square of the exact results; of the last call. None for integers.
    """

    layer: int
    problem: Problem
    calls: int
    variant: str
    plan: str
    family: str
    difference: Difference
    errors: tuple[float, float, float] | None


@dataclasses.dataclass(frozen=True)
class Deviation:
    """What `deviation` found; `str()` gives a report.

    layers: each convolution on the same inputs, by each way that can compute it. outputs: the
    results of the whole program by each way, beside those by default: what became of the layers'
    deviations.
    """

    layers: tuple[LayerDeviation, ...]
    outputs: dict[str, Difference]

    def __iter__(self) -> Iterator[LayerDeviation]:
        return iter(self.layers)

    def causes(self, variant: str) -> tuple[int, ...]:
        """The layers in which a way gives other bits than the default."""
        rows = (row for row in self.layers if row.variant == variant)
        return tuple(row.layer for row in rows if row.difference.differing)

    def __str__(self) -> str:
        if not self.layers:
            return "no convolutions"
        lines = []
        for layer in range(self.layers[-1].layer + 1):
            default, *rows = (row for row in self.layers if row.layer == layer)
            calls = f", {default.calls} calls" if default.calls > 1 else ""
            lines.append(f"{layer}: {default.problem}{calls}")
            lines.append(f"  {default.plan}{_errors(default)}")
            lines += _same([row.variant for row in rows if not row.difference.differing])
            lines += [
                f"  {row.variant}: {row.difference}{_errors(row)}"
                for row in rows
                if row.difference.differing
            ]
        lines.append("results of the program")
        lines += _same([name for name, found in self.outputs.items() if not found.differing])
        for name, found in self.outputs.items():
            if found.differing:
                causes = ", ".join(map(str, self.causes(name))) or "none alone"
                lines.append(f"  {name}: {found}; layers that cause it: {causes}")
        return "\n".join(lines)


def _same(names: list[str]) -> list[str]:
    return [f"  the same bits: {', '.join(names)}"] if names else []


def _errors(row: LayerDeviation) -> str:
    if row.errors is None:
        return ""
    return "; error {:.2g}, {:.2g}, {:.2g} eps".format(*row.errors)


def deviation(
    fn: Callable[..., Any], *args: Any, variants: Sequence[str] | None = None
) -> Deviation:
    """How much a function's results depend on what computes its convolutions.

    Runs `fn(*args)` once operation by operation, and each convolution on the inputs that it meets
    there by every way that there is; then the whole function by each of these ways. All
    convolutions are looked at, those of lax too, and those in loops, branches and calls. On the
    CPU.

    Args:
      fn: a function of arrays and pytrees of them. It runs many times.
      args: its arguments.
      variants: the ways to compare: ``"isa=avx2"`` (an instruction set), ``"threads=1"``,
        ``"xla"``, or the name of an algorithm. None for all of them; but instruction sets without
        fused multiply-adds, which are slow, where the convolutions are many or large.

    Returns:
      The deviations from the default, layer by layer and of the results. One layer's deviation is
      on equal inputs, so it names the convolution that causes a difference.

    Raises:
      ValueError: there is no such variant.
      whatever `fn` raises.

    A way that cannot compute a convolution leaves it as it is by default. The operations between
    convolutions are XLA's, the same in all variants, but in a compiled function XLA may fuse them
    otherwise around another call.
    """
    wanted = None if variants is None else [(name, _parse(name)) for name in variants]
    with jax.default_device(jax.devices("cpu")[0]):
        closed = jax.make_jaxpr(accelerate(fn))(*args)
        study = _Study(wanted)
        leaves = jax.tree.leaves(args)
        _evaluate(closed.jaxpr, closed.consts, leaves, study.visit, ())
        rows = study.rows()
        names = dict.fromkeys(row.variant for row in rows if row.variant != "default")
        compiled = functools.partial(_run_whole, fn, args)
        default = compiled(Forced())
        outputs = {name: _difference(compiled(_parse(name)), default) for name in names}
    return Deviation(rows, outputs)


def _run_whole(fn: Callable[..., Any], args: tuple[Any, ...], forced: Forced) -> list[Any]:
    accelerated = accelerate(fn)
    with _dispatch.forcing(forced):
        # A function of its own, so that nothing is found in JAX's caches.
        results = jax.jit(lambda *a: accelerated(*a))(*args)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(results)]


def _parse(name: str) -> Forced:
    kind, _, value = name.partition("=")
    isas = [row["name"] for row in _registry.registry()["isas"] if row["runnable"]]
    if kind == "isa" and value in isas:
        return Forced(isa=value)
    if kind == "threads" and value.isdecimal() and int(value) > 0:
        return Forced(threads=int(value))
    if name in (_registry.XLA, *_registry.algorithm_names()):
        return Forced(algorithm=name)
    raise ValueError(
        f"variants: {name!r} is not isa= one of {', '.join(isas)}, threads= a number, xla or an "
        "algorithm"
    )


def _all_variants(flops: float) -> list[tuple[str, Forced]]:
    here = _registry.isa()
    isas = [row["name"] for row in _registry.registry()["isas"] if row["runnable"]]
    threads = _registry.threads()
    names = [f"isa={n}" for n in isas if n != here and (n != isas[0] or flops <= _SLOW_FLOPS)]
    names += [f"threads={n}" for n in dict.fromkeys((1, 2 * threads)) if n != threads]
    names += [_registry.XLA, *_registry.algorithm_names()]
    return [(name, _parse(name)) for name in names]


class _Study:
    """What the convolutions of a program did, call by call."""

    def __init__(self, wanted: list[tuple[str, Forced]] | None) -> None:
        self._wanted = wanted
        self._layers: dict[Any, int] = {}
        self._found: list[dict[str, LayerDeviation]] = []
        self._programs: dict[Any, Any] = {}

    def rows(self) -> tuple[LayerDeviation, ...]:
        return tuple(row for found in self._found for row in found.values())

    def visit(self, equation: Any, values: list[Any], path: tuple[int, ...]) -> Any:
        """Runs one convolution by all ways; its result is the default's."""
        params = equation.params
        problem = from_equation(equation)
        layer = self._layers.setdefault(path, len(self._layers))
        if layer == len(self._found):
            self._found.append({})
        found = self._found[layer]
        options = {name: params[name] for name in ("algorithm", "max_workspace") if name in params}

        def decide(forced: Forced) -> Decision:
            with _dispatch.forcing(forced):
                return _dispatch.decide(problem, **options, enforce=False)

        # Where it is not all one call, such as an epilogue that XLA computes, the plan is another.
        default = decide(Forced())
        result = self._run(equation, values, problem, Forced())
        exact = _exact(equation, values) if jnp.issubdtype(result.dtype, jnp.floating) else None
        self._add(found, layer, problem, "default", default, Difference(), result, exact)
        wanted = _all_variants(problem.flops) if self._wanted is None else self._wanted
        for name, forced in wanted:
            decision = decide(forced)
            chosen = decision.plan.algorithm if decision.plan else _registry.XLA
            if forced.algorithm not in (None, chosen) or decision == default:
                continue
            if decision.plan == default.plan:
                continue
            other = self._run(equation, values, problem, forced)
            difference = _difference([other], [result])
            self._add(found, layer, problem, name, decision, difference, other, exact)
        return jnp.asarray(result)

    def _run(
        self, equation: Any, values: list[Any], problem: Problem, forced: Forced
    ) -> NDArray[Any]:
        params = equation.params
        key = (equation.primitive, problem, forced, tuple(sorted(map(str, params.items()))))
        if key not in self._programs:
            with _dispatch.forcing(forced):
                program = jax.jit(lambda *v: equation.primitive.bind(*v, **params))
                self._programs[key] = program.lower(*values).compile()
        return np.asarray(self._programs[key](*values))

    def _add(
        self,
        found: dict[str, LayerDeviation],
        layer: int,
        problem: Problem,
        variant: str,
        decision: Decision,
        difference: Difference,
        result: NDArray[Any],
        exact: NDArray[Any] | None,
    ) -> None:
        earlier = found.get(variant)
        if earlier is not None:
            difference = Difference(
                *map(max, dataclasses.astuple(earlier.difference), dataclasses.astuple(difference))
            )
        plan = decision.plan
        text, family = _registry.XLA, _registry.family(_registry.XLA)
        if plan is not None:
            names = _registry.parameter_names(plan.algorithm) or ()
            values = [f"{n}={v}" for n, v in zip(names, plan.params, strict=True)]
            text = " ".join((plan.algorithm, *values, plan.isa, f"threads={plan.threads}"))
            family = _registry.family(plan.algorithm)
        calls = 1 if earlier is None else earlier.calls + 1
        errors = None if exact is None else _error_quantiles(result, exact)
        found[variant] = LayerDeviation(
            layer, problem, calls, variant, text, family, difference, errors
        )


def _exact(equation: Any, values: list[Any]) -> NDArray[np.float64]:
    """The same convolution in float64, by XLA."""
    params = equation.params
    with jax.enable_x64(True), _dispatch.forcing(Forced(algorithm=_registry.XLA)):
        wide = [jnp.asarray(np.asarray(value).astype(np.float64)) for value in values]
        params = params | {"preferred_element_type": np.dtype(np.float64)}
        if equation.primitive is fused_conv_p:
            return np.asarray(jax.jit(lambda *v: _fused.decompose(*v, **params))(*wide))
        return np.asarray(jax.jit(lambda *v: _compat.lax_conv_p.bind(*v, **params))(*wide))


def _error_quantiles(
    result: NDArray[Any], exact: NDArray[np.float64]
) -> tuple[float, float, float] | None:
    if result.size == 0:
        return None
    error = np.abs(result.astype(np.float64) - exact)
    unit = float(jnp.finfo(result.dtype).eps) * math.sqrt(float(np.mean(exact**2)))  # type: ignore[no-untyped-call]
    if not unit > 0:
        return None
    median, high = np.quantile(error, (0.5, 0.99))
    return float(median) / unit, float(high) / unit, float(error.max()) / unit


def _difference(results: Sequence[Any], others: Sequence[Any]) -> Difference:
    """Between lists of arrays, all of their elements together."""
    differing, size, ulps, absolute = 0, 0, 0.0, 0.0
    for one, other in zip(results, others, strict=True):
        if jnp.issubdtype(one.dtype, jnp.complexfloating):
            one, other = (np.stack([v.real, v.imag]) for v in (one, other))
        size += one.size
        if one.size == 0:
            continue
        steps = _steps(one, other)
        differing += int((steps > 0).sum())
        ulps = max(ulps, float(steps.max()))
        with np.errstate(invalid="ignore"):
            apart = np.abs(one.astype(np.float64) - other.astype(np.float64))
        absolute = max(absolute, float(np.where(steps > 0, apart, 0.0).max()))
    return Difference(differing / max(1, size), ulps, absolute)


def _steps(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """How many numbers of the dtype lie between two arrays' elements; 0 and -0 are apart by one."""
    if not jnp.issubdtype(one.dtype, jnp.floating):
        return np.abs(one.astype(np.longdouble) - other.astype(np.longdouble))

    def order(array: NDArray[Any]) -> NDArray[Any]:
        bits = array.view(np.dtype(f"int{8 * array.itemsize}")).astype(np.int64)
        last = np.int64(-(2 ** (8 * array.itemsize - 1)))
        return np.where(bits < 0, last - bits - 1, bits).astype(np.longdouble)

    steps = np.abs(order(one) - order(other))
    nan, other_nan = (np.isnan(v.astype(np.float64)) for v in (one, other))
    steps = np.where(nan & other_nan, 0, steps)
    return np.where(nan != other_nan, math.inf, steps)


# --- running a program operation by operation ----------------------------------------------------

_Visit = Callable[[Any, list[Any], tuple[int, ...]], Any]
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # the parameter with the program of a call


def _evaluate(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], visit: _Visit, path: tuple[int, ...]
) -> list[Any]:
    """The results of a program, with `visit` for every convolution of ours.

    path: where in the whole program this one stands; the passes of a loop have the same.
    """
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else known[v]

    for number, equation in enumerate(jaxpr.eqns):
        values = [read(v) for v in equation.invars]
        here = (*path, number)
        results = _step(equation, values, visit, here)
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(equation: Any, values: list[Any], visit: _Visit, path: tuple[int, ...]) -> list[Any]:
    primitive, params = equation.primitive, equation.params
    if primitive in (conv_p, fused_conv_p):
        return [visit(equation, values, path)]
    name = primitive.name
    if name == "scan":
        return _scan(params, values, visit, path)
    if name == "while":
        return _while(params, values, visit, path)
    if name == "cond":
        index = int(np.clip(int(values[0]), 0, len(params["branches"]) - 1))
        return _inner(params["branches"][index], values[1:], visit, (*path, index))
    if _convolves(params) and name != "shard_map":
        for key in _CALLS:
            if isinstance(params.get(key), _compat.Jaxpr | _compat.ClosedJaxpr):
                return _inner(params[key], values, visit, path)
    return _compat.bind_equation(equation, values)


def _convolves(params: dict[str, Any]) -> bool:
    return any(
        equation.primitive in (conv_p, fused_conv_p) or _convolves(equation.params)
        for inner in _compat.inner_jaxprs(params)
        for equation in inner.eqns
    )


def _inner(program: Any, values: Sequence[Any], visit: _Visit, path: tuple[int, ...]) -> list[Any]:
    consts = program.consts if isinstance(program, _compat.ClosedJaxpr) else ()
    jaxpr = program.jaxpr if isinstance(program, _compat.ClosedJaxpr) else program
    return _evaluate(jaxpr, consts, values, visit, path)


def _scan(
    params: dict[str, Any], values: list[Any], visit: _Visit, path: tuple[int, ...]
) -> list[Any]:
    fixed = params["num_consts"]
    carried = params["num_carry"]
    consts, carry, columns = (
        values[:fixed],
        values[fixed : fixed + carried],
        values[fixed + carried :],
    )
    order = range(params["length"])
    outputs: list[list[Any]] = []
    for i in reversed(order) if params["reverse"] else order:
        rows = [column[i] for column in columns]
        results = _inner(params["jaxpr"], [*consts, *carry, *rows], visit, path)
        carry = results[:carried]
        outputs.append(results[carried:])
    if params["reverse"]:
        outputs.reverse()
    if not outputs:  # nothing to stack: the types say what there would be
        avals = [v.aval for v in params["jaxpr"].jaxpr.outvars[carried:]]
        return [*carry, *(jnp.zeros((0, *a.shape), a.dtype) for a in avals)]
    return [*carry, *(jnp.stack(column) for column in zip(*outputs, strict=True))]


def _while(
    params: dict[str, Any], values: list[Any], visit: _Visit, path: tuple[int, ...]
) -> list[Any]:
    first, second = params["cond_nconsts"], params["body_nconsts"]
    asking, going = values[:first], values[first : first + second]
    carry = values[first + second :]
    while bool(_inner(params["cond_jaxpr"], [*asking, *carry], visit, (*path, 0))[0]):
        carry = _inner(params["body_jaxpr"], [*going, *carry], visit, (*path, 1))
    return carry
