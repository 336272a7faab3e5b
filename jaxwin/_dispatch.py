# SPDX-License-Identifier: Apache-2.0
"""From a problem to a plan, at lowering time.

Tiers, first hit wins: a tuned row of exactly this problem, the nearest tuned row of its class, the
native core's heuristic, XLA. Nothing here runs when a compiled program does.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import sys
from collections.abc import Iterator

from jaxwin import _cuda, _ffi, _record, _registry, _settings, _tuning
from jaxwin._plan import Decision, Plan
from jaxwin._problem import Problem
from jaxwin._tuning import Row, Table


@dataclasses.dataclass(frozen=True)
class Forced:
    """What a comparison of plans wants; None: as it would be.

    algorithm: "xla" or the name of an algorithm, for the problems that it can compute. isa: the
    instruction set. threads: how many the plan is for.
    """

    algorithm: str | None = None
    isa: str | None = None
    threads: int | None = None


_forced: contextvars.ContextVar[Forced | None] = contextvars.ContextVar("forced", default=None)


@contextlib.contextmanager
def forcing(forced: Forced) -> Iterator[None]:
    """Decisions in this context, on the CPU, are as `forced` wants them.

    Of what is compiled in it nothing may be found in JAX's caches: jit a function of its own.
    """
    token = _forced.set(forced)
    try:
        yield
    finally:
        _forced.reset(token)


def decide(
    problem: Problem,
    *,
    algorithm: str = "auto",
    max_workspace: int | None = None,
    enforce: bool = True,
    platform: str = "cpu",
    exact: bool = False,
) -> Decision:
    """The plan for a problem under the environment as it is now.

    algorithm: "auto" (the canonical family), "any" (XLA and the algorithms of other numerical
        families take part, as with JAXWIN_FAMILY=any), "xla", or the name of an algorithm, which
        must be able to compute the problem. max_workspace: bytes, or None for any. enforce: whether
        a program is being compiled, so that JAXWIN_MODE=require raises here and the problem is
        recorded. platform: "cpu" or "cuda". exact: whether precision forbids tensor cores; of
        meaning on CUDA only.

    Raises:
        ValueError: the algorithm is unknown, or it was asked for by name and cannot compute the
            problem within max_workspace; JAXWIN_MAX_ISA is no instruction set, JAXWIN_MODE no mode
            or JAXWIN_FAMILY no family.
        RuntimeError: JAXWIN_MODE is "require", and there are kernels for the problem but no tuned
            row.
    """
    settings = _settings.settings()
    if settings.disable:
        return Decision(_registry.XLA, None, "JAXWIN_DISABLE is set")
    mode = settings.mode if settings.mode in _settings.MODES else _settings.mode()
    if algorithm == "auto" and settings.family != "canonical":
        algorithm = "any" if _settings.family() == "any" else "auto"
    table = None if mode == "off" else _tuning.table()
    if platform == "cuda":
        gpu_mode = _cuda.mode()
        decision = _cuda.decide(problem, algorithm, max_workspace, exact, gpu_mode, table)
        if enforce:
            isa = _cuda.filed_under(problem, exact, gpu_mode)
            _enforce(problem, decision, settings, isa, _cuda.THREADS)
        if settings.verbose:
            _say(problem, decision)
        return decision
    isa = _registry.best_isa(settings.max_isa)
    threads = settings.threads or _registry.cpus()
    forced = _forced.get()
    if forced is not None:
        isa, threads, enforce = forced.isa or isa, forced.threads or threads, False
        if forced.algorithm is not None:
            with contextlib.suppress(ValueError):
                return _decide(problem, forced.algorithm, max_workspace, isa, threads, table)
    decision = _decide(problem, algorithm, max_workspace, isa, threads, table)
    if enforce:
        _enforce(problem, decision, settings, isa, threads)
    if settings.verbose:
        _say(problem, decision)
    return decision


def _enforce(
    problem: Problem, decision: Decision, settings: _settings.Settings, isa: str, threads: int
) -> None:
    """Records a problem that is being compiled; JAXWIN_MODE=require raises for want of a row."""
    if settings.record or _record.recordings:
        _record.note(problem, settings.record)
    if not decision.untried or settings.mode == "off":
        return
    if settings.misses:
        _record.miss(problem, threads, isa if _registry.side(isa) else "")
    if settings.mode == "require":
        raise RuntimeError(untuned(problem, isa, threads))


def _say(problem: Problem, decision: Decision) -> None:
    plan = decision.plan
    chosen = f"{plan.algorithm} {plan.params} {plan.isa}" if plan else f"xla: {decision.reason}"
    tier = f"{decision.tier}: {decision.row}" if decision.row else decision.tier
    print(f"jaxwin: {problem}: {chosen} ({tier})", file=sys.stderr)


def untuned(problem: Problem, isa: str, threads: int) -> str:
    """What JAXWIN_MODE=require says of a problem without a tuned row."""
    seen = [
        f"{file.path} ({file.state})"
        for file in _tuning.table().files
        if file.state not in _tuning.ABSENT or file.tier in ("environment", "user")
    ]
    count = "" if _registry.side(isa) else f" and {threads} threads"  # GPU plans have none
    return (
        f"JAXWIN_MODE=require: no tuned row for {problem} with {isa}{count} in "
        f"{', '.join(seen) or 'any file'}: tune it, or set JAXWIN_MODE=cached"
    )


@functools.lru_cache(maxsize=4096)
def _decide(
    problem: Problem,
    algorithm: str,
    max_workspace: int | None,
    isa: str,
    threads: int,
    table: Table | None,
) -> Decision:
    if algorithm not in _algorithms():
        raise ValueError(f"algorithm: {algorithm!r} is not one of {', '.join(_algorithms())}")
    if algorithm == _registry.XLA:
        return Decision(_registry.XLA, None, "asked for")
    choose = algorithm in ("auto", "any")
    reason = unsupported(problem)
    if not reason:
        if algorithm == "any":
            other = _of_another_family(problem, isa, threads, max_workspace, table)
            if other is not None:
                return other
        if table is not None and choose:
            row = table.exact(problem, isa, threads)
            if row is not None:
                plan = propose(problem, row, isa, threads, max_workspace)
                if isinstance(plan, Plan):
                    return Decision("tuned", plan, row=row)
            for row in table.nearest(problem, isa, threads):
                if row.confirms_the_heuristic:
                    break
                plan = propose(problem, row, isa, threads, max_workspace)
                if isinstance(plan, Plan):
                    return Decision("transferred", plan, row=row)
        if table is not None and not choose:
            row = table.named(problem, isa, threads, algorithm)
            if row is not None:
                plan = propose(problem, row, isa, threads, max_workspace)
                if isinstance(plan, Plan):
                    return Decision("requested", plan, row=row)
        plan = _make_plan(problem, "auto" if choose else algorithm, (), isa, threads, max_workspace)
        if isinstance(plan, Plan):
            return Decision("heuristic" if choose else "requested", plan)
        reason = plan
    if not choose:
        raise ValueError(f"algorithm: {algorithm!r} cannot compute {problem}: {reason}")
    return Decision(_registry.XLA, None, reason)


def _of_another_family(
    problem: Problem,
    isa: str,
    threads: int,
    max_workspace: int | None,
    table: Table | None,
) -> Decision | None:
    """What is faster than the canonical family: by measurement, or by the model where none is."""
    if table is not None:
        row = table.other(problem, isa, threads)
        if row is not None and row.algorithm == _registry.XLA:
            return Decision("tuned", None, "XLA was measured to be faster", row)
        if row is not None:
            plan = propose(problem, row, isa, threads, max_workspace)
            if isinstance(plan, Plan):
                return Decision("tuned", plan, row=row)
        if table.exact(problem, isa, threads) is not None:
            return None
    plan = _make_plan(problem, "any", (), isa, threads, max_workspace)
    if isinstance(plan, str) or _registry.family(plan.algorithm) == _registry.CANONICAL:
        return None
    if table is not None and table.named(problem, isa, threads, plan.algorithm) is not None:
        return None
    return Decision("heuristic", plan)


@functools.cache
def _algorithms() -> tuple[str, ...]:
    return "auto", *_registry.algorithm_names(), _registry.XLA, "any"


def propose(
    problem: Problem, row: Row, isa: str, threads: int, max_workspace: int | None
) -> Plan | str:
    """The plan that a row's parameters give for a problem, or why the native core refuses them."""
    return _make_plan(problem, row.algorithm, row.params, isa, threads, max_workspace)


def _make_plan(
    problem: Problem,
    algorithm: str,
    params: tuple[int, ...],
    isa: str,
    threads: int,
    max_workspace: int | None,
) -> Plan | str:
    limit = -1 if max_workspace is None else max_workspace
    answer = _ffi.plan(problem.asked(), algorithm, isa, threads, limit, params)
    return answer if isinstance(answer, str) else Plan(*answer)


def unsupported(problem: Problem) -> str:
    """Why the native core cannot take a problem, as far as Python knows; else empty."""
    plain = problem.lhs_dtype == problem.rhs_dtype == problem.out_dtype == "float32"
    if not plain and (wrong := _no_kernels(problem)):
        return wrong
    if not 1 <= problem.spatial_rank <= 3:
        return f"no kernels for {problem.spatial_rank} spatial dimensions"
    return ""


def without_epilogue(problem: Problem) -> Problem:
    """The problem, or that without its epilogue if only this has no kernel (XLA has)."""
    bare = dataclasses.replace(problem, bias=False, residual=False, activation=None)
    return bare if unsupported(problem) and not unsupported(bare) else problem


def _no_kernels(problem: Problem) -> str:
    """What the registry lacks for a problem's dtypes and epilogue; else empty."""
    operands, out = {problem.lhs_dtype, problem.rhs_dtype}, problem.out_dtype
    native = problem.native()["lhs_dtype"]
    known = _registry.registry()["dtypes"].get(native)
    if not problem.widened and (len(operands) > 1 or known is None or out not in known["results"]):
        return f"no kernels for {', '.join(sorted({*operands, out}))}"
    epilogue = problem.bias or problem.residual or problem.activation is not None
    if known and epilogue and (problem.activation or "none") not in known["activations"]:
        return f"no {native} kernels with {problem.activation or 'bias or residual'}"
    return ""
