# SPDX-License-Identifier: Apache-2.0
"""From a problem to a plan, at lowering time.

Tiers, first hit wins: a tuned row of exactly this problem, the nearest tuned row of its class, the
native core's heuristic, XLA. Nothing here runs when a compiled program does.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

from jaxwin import _ffi, _registry, _tuning
from jaxwin._plan import Decision, Plan
from jaxwin._problem import Problem
from jaxwin._tuning import Row, Table

_FALSE = ("", "0", "false", "off", "no")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in _FALSE


def decide(
    problem: Problem,
    *,
    algorithm: str = "auto",
    max_workspace: int | None = None,
    enforce: bool = True,
) -> Decision:
    """The plan for a problem under the environment as it is now.

    algorithm: "auto", "xla", or the name of an algorithm, which must be able to compute the
        problem. max_workspace: bytes, or None for any. enforce: whether JAXWIN_MODE=require
        raises here.

    Raises:
        ValueError: the algorithm is unknown, or it was asked for by name and cannot compute the
            problem within max_workspace; JAXWIN_MAX_ISA is no instruction set, or JAXWIN_MODE
            no mode.
        RuntimeError: JAXWIN_MODE is "require", and the native core computes the problem but no
            tuned row is for it.
    """
    if _flag("JAXWIN_DISABLE"):
        return Decision("xla", None, "JAXWIN_DISABLE is set")
    mode = _tuning.mode()
    table = None if mode == "off" else _tuning.table()
    isa, threads = _registry.isa(), _registry.threads()
    decision = _decide(problem, algorithm, max_workspace, isa, threads, table)
    if enforce and mode == "require" and decision.tier in ("transferred", "heuristic"):
        raise RuntimeError(untuned(problem, isa, threads))
    if _flag("JAXWIN_VERBOSE"):
        plan = decision.plan
        chosen = f"{plan.algorithm} {plan.params} {plan.isa}" if plan else f"xla: {decision.reason}"
        tier = f"{decision.tier}: {decision.row}" if decision.row else decision.tier
        print(f"jaxwin: {problem}: {chosen} ({tier})", file=sys.stderr)
    return decision


def untuned(problem: Problem, isa: str, threads: int) -> str:
    """What JAXWIN_MODE=require says of a problem without a tuned row."""
    seen = [
        f"{file.path} ({file.state})"
        for file in _tuning.table().files
        if file.state not in _tuning.ABSENT or file.tier in ("environment", "user")
    ]
    return (
        f"JAXWIN_MODE=require: no tuned row for {problem} with {isa} and {threads} threads in "
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
    if algorithm not in ("auto", "xla", *_registry.algorithm_names()):
        names = ", ".join(("auto", *_registry.algorithm_names(), "xla"))
        raise ValueError(f"algorithm: {algorithm!r} is not one of {names}")
    if algorithm == "xla":
        return Decision("xla", None, "asked for")
    reason = unsupported(problem)
    if not reason:
        native = problem.native()
        if table is not None and algorithm == "auto":
            row = table.exact(problem, isa, threads)
            if row is not None:
                plan = propose(native, row, isa, threads, max_workspace)
                if isinstance(plan, Plan):
                    return Decision("tuned", plan, row=row)
            for row in table.nearest(problem, isa, threads):
                plan = propose(native, row, isa, threads, max_workspace)
                if isinstance(plan, Plan):
                    return Decision("transferred", plan, row=row)
        plan = _make_plan(native, algorithm, (), isa, threads, max_workspace)
        if isinstance(plan, Plan):
            return Decision("heuristic" if algorithm == "auto" else "requested", plan)
        reason = plan
    if algorithm != "auto":
        raise ValueError(f"algorithm: {algorithm!r} cannot compute {problem}: {reason}")
    return Decision("xla", None, reason)


def propose(
    native: dict[str, Any], row: Row, isa: str, threads: int, max_workspace: int | None
) -> Plan | str:
    """The plan that a row's parameters give for a problem, or why the native core refuses them."""
    return _make_plan(native, row.algorithm, row.params, isa, threads, max_workspace)


def _make_plan(
    native: dict[str, Any],
    algorithm: str,
    params: tuple[int, ...],
    isa: str,
    threads: int,
    max_workspace: int | None,
) -> Plan | str:
    answer = _ffi.make_plan(
        native,
        algorithm=algorithm,
        isa=isa,
        threads=threads,
        max_workspace=-1 if max_workspace is None else max_workspace,
        params=params,
    )
    if "plan" not in answer:
        return str(answer["error"])
    plan = answer["plan"]
    return Plan(
        algorithm=plan["algorithm"],
        isa=plan["isa"],
        threads=plan["threads"],
        params=tuple(plan["params"]),
        workspace_bytes=plan["workspace_bytes"],
    )


def unsupported(problem: Problem) -> str:
    """Why the native core cannot take a problem, as far as Python knows; else empty."""
    operands, out = {problem.lhs_dtype, problem.rhs_dtype}, problem.out_dtype
    native = problem.native()["dtype"]
    known = _registry.registry()["dtypes"].get(native)
    if not problem.widened and (len(operands) > 1 or known is None or out not in known["results"]):
        return f"no kernels for {', '.join(sorted({*operands, out}))}"
    epilogue = problem.bias or problem.residual or problem.activation is not None
    if known and epilogue and (problem.activation or "none") not in known["activations"]:
        return f"no {native} kernels with {problem.activation or 'bias or residual'}"
    if not 1 <= problem.spatial_rank <= 3:
        return f"no kernels for {problem.spatial_rank} spatial dimensions"
    return ""
