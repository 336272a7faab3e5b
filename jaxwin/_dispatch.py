# SPDX-License-Identifier: Apache-2.0
"""From a problem to a plan, at lowering time.

Tiers, first hit wins: the native core's heuristic, then XLA. Nothing here runs when a compiled
program does.
"""

from __future__ import annotations

import functools
import os
import sys

from jaxwin import _ffi, _registry
from jaxwin._plan import Decision, Plan
from jaxwin._problem import Problem

_FALSE = ("", "0", "false", "off", "no")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in _FALSE


def decide(
    problem: Problem, *, algorithm: str = "auto", max_workspace: int | None = None
) -> Decision:
    """The plan for a problem under the environment as it is now.

    algorithm: "auto", "xla", or the name of an algorithm, which must be able to compute the
        problem. max_workspace: bytes, or None for any.

    Raises:
        ValueError: the algorithm is unknown, or it was asked for by name and cannot compute the
            problem within max_workspace; JAXWIN_MAX_ISA is no instruction set.
    """
    if _flag("JAXWIN_DISABLE"):
        return Decision("xla", None, "JAXWIN_DISABLE is set")
    decision = _decide(problem, algorithm, max_workspace, _registry.isa(), _registry.threads())
    if _flag("JAXWIN_VERBOSE"):
        plan = decision.plan
        chosen = f"{plan.algorithm} {plan.params} {plan.isa}" if plan else f"xla: {decision.reason}"
        print(f"jaxwin: {problem}: {chosen} ({decision.tier})", file=sys.stderr)
    return decision


@functools.lru_cache(maxsize=4096)
def _decide(
    problem: Problem, algorithm: str, max_workspace: int | None, isa: str, threads: int
) -> Decision:
    if algorithm not in ("auto", "xla", *_registry.algorithm_names()):
        names = ", ".join(("auto", *_registry.algorithm_names(), "xla"))
        raise ValueError(f"algorithm: {algorithm!r} is not one of {names}")
    if algorithm == "xla":
        return Decision("xla", None, "asked for")
    reason = _unsupported(problem)
    if not reason:
        answer = _ffi.make_plan(
            problem.native(),
            algorithm=algorithm,
            isa=isa,
            threads=threads,
            max_workspace=-1 if max_workspace is None else max_workspace,
        )
        if "plan" in answer:
            plan = answer["plan"]
            return Decision(
                "heuristic" if algorithm == "auto" else "requested",
                Plan(
                    algorithm=plan["algorithm"],
                    isa=plan["isa"],
                    threads=plan["threads"],
                    params=tuple(plan["params"]),
                    workspace_bytes=plan["workspace_bytes"],
                ),
            )
        reason = answer["error"]
    if algorithm != "auto":
        raise ValueError(f"algorithm: {algorithm!r} cannot compute {problem}: {reason}")
    return Decision("xla", None, reason)


def _unsupported(problem: Problem) -> str:
    """Why the native core cannot take a problem, as far as Python knows; else empty."""
    dtypes = {problem.lhs_dtype, problem.rhs_dtype, problem.out_dtype}
    if dtypes != {"float32"}:
        return f"no kernels for {', '.join(sorted(dtypes))}"
    if not 1 <= problem.spatial_rank <= 3:
        return f"no kernels for {problem.spatial_rank} spatial dimensions"
    return ""
