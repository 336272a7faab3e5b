# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

from jaxwin import _compat, _cuda, _dispatch, _ffi, _install, _registry, _settings, _tuning
from jaxwin._fused import fused_conv_p
from jaxwin._plan import Decision, Plan
from jaxwin._primitive import conv_p
from jaxwin._problem import Problem, from_equation


@dataclasses.dataclass(frozen=True)
class ExplanationRow:
    """What dispatch decides for one convolution.

    count: how often it stands in the program (a loop's body counts once).
    tier: "tuned", "transferred", "heuristic", "requested" or "xla". algorithm: its name, "xla"
    where lax computes it.
    parameters: those of the algorithm, by name. threads: how many it works on at most; few where
    there is little to do. reason: why lax computes it, else empty.
    workspace_bytes: scratch memory of one call, all threads together.
    rejected: why each of the other algorithms was not taken, by name.
    measured: for "tuned", "transferred" and "requested" the measurement behind it, if there is one,
    and in what its problem differs from this one. unused: why other measurements of this problem
    were not taken. family: the numerical family; "canonical" has the bits that the README promises,
    "any" is XLA's.
    """

    problem: Problem
    count: int
    tier: str
    algorithm: str
    parameters: dict[str, int]
    isa: str
    threads: int
    workspace_bytes: int
    reason: str
    rejected: dict[str, str]
    measured: str = ""
    unused: tuple[str, ...] = ()
    family: str = _registry.CANONICAL


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The convolutions of a program, in order of appearance; `str()` gives a table."""

    rows: tuple[ExplanationRow, ...]

    def __iter__(self) -> Iterator[ExplanationRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fallbacks(self) -> int:
        """How many convolutions lax computes."""
        return sum(row.count for row in self.rows if row.algorithm == "xla")

    def __str__(self) -> str:
        if not self.rows:
            return "no convolutions"
        header = ("convolution", "times", "algorithm", "tier", "parameters", "threads", "workspace")
        table = [header]
        for row in self.rows:
            parameters = " ".join(f"{name}={value}" for name, value in row.parameters.items())
            table.append(
                (
                    str(row.problem),
                    str(row.count),
                    row.algorithm,
                    row.tier,
                    parameters or row.reason,
                    str(row.threads or "-"),
                    _bytes(row.workspace_bytes),
                )
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        total = sum(row.count for row in self.rows)
        lines.append(f"{total} convolutions, {self.fallbacks} of them computed by XLA")
        for row in self.rows:
            notes = [f"{row.tier}: {row.measured}"] if row.measured else []
            notes += [f"not used: {text}" for text in row.unused]
            if row.family not in (_registry.CANONICAL, "any"):
                notes.append(f"numbers of the family {row.family}, not the canonical ones")
            if notes:
                lines += [str(row.problem), *(f"  {note}" for note in notes)]
        return "\n".join(lines)


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    if count < 1024**2:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.1f} MiB"


def explain(fn_or_problem: Callable[..., Any] | Problem, *args: Any, **kwargs: Any) -> Explanation:
    """What dispatch decides for a function's convolutions, or for one problem.

    Traces `fn(*args, **kwargs)` (nothing is computed; arrays or `jax.ShapeDtypeStruct`s will do)
    and asks dispatch about every convolution in it, inside jit, scan, cond, and derivative rules
    too, under the environment as it is now. Convolutions of lax itself are listed as XLA's, unless
    `install()` is in force. On several devices each sees its part of a problem, which this does
    not know. The answer is for the platform that JAX runs on by default.

    Raises:
        whatever tracing `fn` raises.
    """
    if isinstance(fn_or_problem, Problem):
        return Explanation((_row(fn_or_problem, 1, {}),))
    rows = []
    found = _found(fn_or_problem, args, kwargs, by_precision=default_platform() == "cuda")
    for (problem, native, options), count in found.items():
        if native:
            rows.append(_row(problem, count, dict(options)))
        else:
            reason = "lax's own convolution: use jaxwin's, accelerate() or install()"
            rows.append(_xla_row(problem, count, reason, {}))
    return Explanation(tuple(rows))


def problems(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[Problem, int]:
    """The convolutions of a function that dispatch decides on, and how often each occurs.

    Traces the function as `explain` does, but neither asks dispatch nor starts a JAX backend: a
    caller may still choose how many threads that gets.
    """
    counts: dict[Problem, int] = {}
    for (problem, native, _), count in _found(fn, args, kwargs, by_precision=False).items():
        if native:
            counts[problem] = counts.get(problem, 0) + count
    return counts


def problems_by_precision(
    fn: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[tuple[Problem, bool], int]:
    """As `problems`, with whether the precision forbids tensor cores."""
    counts: dict[tuple[Problem, bool], int] = {}
    for (problem, native, options), count in _found(fn, args, kwargs, by_precision=True).items():
        if native:
            key = problem, dict(options)["exact"]
            counts[key] = counts.get(key, 0) + count
    return counts


def _found(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, by_precision: bool
) -> dict[tuple[Any, ...], int]:
    """(problem, whether it is ours, options) of a function's convolutions, with their counts.

    by_precision: whether the precision decides something, as it does on GPUs; it is an option then.
    """
    found: dict[tuple[Any, ...], int] = {}
    _walk(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, found, by_precision)
    return found


def _walk(jaxpr: Any, found: dict[tuple[Any, ...], int], by_precision: bool) -> None:
    reversed_dimensions = {
        equation.outvars[0]: equation.params["dimensions"]
        for equation in jaxpr.eqns
        if equation.primitive is lax.rev_p
    }
    for equation in jaxpr.eqns:
        primitive = equation.primitive
        if primitive in (conv_p, fused_conv_p, _compat.lax_conv_p):
            params = equation.params
            backwards = reversed_dimensions.get(equation.invars[1], ())
            problem = from_equation(equation, _spatial(backwards, params))
            problem = _dispatch.without_epilogue(problem)
            native = primitive is not _compat.lax_conv_p or _install.is_installed()
            options = tuple(
                (name, params[name]) for name in ("algorithm", "max_workspace") if name in params
            )
            if by_precision:
                options += (("exact", _cuda.is_exact(params["precision"])),)
            key = (problem, native, options)
            found[key] = found.get(key, 0) + 1
        for inner in _compat.inner_jaxprs(equation.params):
            _walk(inner, found, by_precision)


def default_platform() -> str:
    """ "cuda" where JAX runs on NVIDIA's GPUs by default, else "cpu"."""
    return "cuda" if "cuda" in _compat.platform_version().lower() else "cpu"


def _spatial(dimensions: tuple[int, ...], params: dict[str, Any]) -> tuple[int, ...]:
    """The reversed dimensions, if the lowering would take them into the problem."""
    spatial = params["dimension_numbers"].rhs_spec[2:]
    return dimensions if set(dimensions) <= set(spatial) else ()


def _row(problem: Problem, count: int, options: dict[str, Any]) -> ExplanationRow:
    platform = default_platform()
    decision = _dispatch.decide(problem, **options, enforce=False, platform=platform)
    gpu_isa, limit = "", options.get("max_workspace")
    if platform == "cuda":
        gpu_isa = _cuda.filed_under(problem, options.get("exact", False), _cuda.mode())
    if decision.plan is None:
        row = _xla_row(problem, count, decision.reason, {})
        return dataclasses.replace(
            row,
            tier=decision.tier,
            measured="" if decision.row is None else str(decision.row),
            unused=_unused(
                problem,
                decision,
                gpu_isa,
                _cuda.THREADS,
                lambda row: _cuda.propose(problem, row, limit),
            ),
        )
    plan = decision.plan
    if gpu_isa:
        return ExplanationRow(
            problem,
            count,
            decision.tier,
            plan.algorithm,
            _named_parameters(plan),
            plan.isa,
            plan.threads,
            plan.workspace_bytes,
            "",
            _cuda.rejections(problem, decision),
            _measured(problem, decision),
            _unused(
                problem,
                decision,
                gpu_isa,
                plan.threads,
                lambda row: _cuda.propose(problem, row, limit),
            ),
            _registry.family(plan.algorithm, plan.isa),
        )
    any_family = options.get("algorithm") == "any" or _settings.family() == "any"
    rejected = {}
    for name, candidate in _ffi.candidates(
        problem.native(), isa=plan.isa, threads=plan.threads
    ).items():
        if name == plan.algorithm:
            continue
        if "rejected" in candidate:
            rejected[name] = candidate["rejected"]
        elif decision.tier == "requested":
            rejected[name] = "not asked for"
        elif candidate["family"] != _registry.CANONICAL and not any_family:
            rejected[name] = f"another numerical family ({candidate['family']}): not asked for"
        elif decision.row is not None:
            rejected[name] = f"not the {decision.tier} choice"
        else:
            rejected[name] = "slower by the cost model"
    return ExplanationRow(
        problem,
        count,
        decision.tier,
        plan.algorithm,
        _named_parameters(plan),
        plan.isa,
        _ffi.describe(problem.native(), threads=plan.threads)["useful_threads"],
        plan.workspace_bytes,
        "",
        rejected,
        _measured(problem, decision),
        _unused(
            problem,
            decision,
            plan.isa,
            plan.threads,
            lambda row: _dispatch.propose(problem, row, plan.isa, plan.threads, limit),
        ),
        _registry.family(plan.algorithm),
    )


def _measured(problem: Problem, decision: Decision) -> str:
    row, plan = decision.row, decision.plan
    if row is None or plan is None:
        return ""
    if decision.tier in ("tuned", "requested"):
        return str(row)
    return f"{_tuning.difference(row, problem)}; {row}"


def _unused(
    problem: Problem,
    decision: Decision,
    isa: str,
    threads: int,
    propose: Callable[[_tuning.Row], Plan | str],
) -> tuple[str, ...]:
    if not decision.untried or _settings.mode() == "off":
        return ()
    table = _tuning.table()
    notes = [str(row) for row in _tuning.unused(table, problem, isa, threads)]
    if exact := table.exact(problem, isa, threads):
        notes.insert(0, f"{exact.algorithm} in {exact.path}: refused: {propose(exact)}")
    if _settings.mode() == "require":
        notes.append("JAXWIN_MODE=require: compiling this raises an error")
    return tuple(dict.fromkeys(notes))


def _xla_row(problem: Problem, count: int, reason: str, rejected: dict[str, str]) -> ExplanationRow:
    return ExplanationRow(
        problem, count, "xla", "xla", {}, "", 0, 0, reason, rejected, family="any"
    )


def _named_parameters(plan: Plan) -> dict[str, int]:
    names = _registry.parameter_names(plan.algorithm, plan.isa)
    if names is None:
        raise KeyError(plan.algorithm)
    return dict(zip(names, plan.params, strict=True))
