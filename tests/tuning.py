# SPDX-License-Identifier: Apache-2.0
"""Measurements and tuning databases made up for tests. None of them was ever measured."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import problems

from jaxwin import _ffi, _registry
from jaxwin._machine import this_machine
from jaxwin._problem import Problem
from jaxwin.tuner.database import Measurement

DENSE = problems.make(2, 8, 16, (12, 13), (3, 3), padding=((1, 1), (1, 1)))


@functools.cache
def unusual(problem: Problem) -> tuple[str, dict[str, int]]:
    """An algorithm and parameters that are valid for a problem and not what the heuristic takes."""
    native, isa, threads = problem.native(), _registry.isa(), _registry.threads()
    usual = _ffi.make_plan(native, isa=isa, threads=threads)["plan"]
    for row in _registry.registry()["algorithms"]:
        names = [spec["name"] for spec in row["params"]]
        values = (spec["values"] for spec in row["params"])
        for params in itertools.islice(itertools.product(*values), 2000):
            answer = _ffi.make_plan(
                native, algorithm=row["name"], isa=isa, threads=threads, params=params
            )
            if "plan" in answer and (row["name"], params) != (
                usual["algorithm"],
                tuple(usual["params"]),
            ):
                return row["name"], dict(zip(names, params, strict=True))
    raise AssertionError("there is only one plan")


def measurement(problem: Problem = DENSE, **changes: Any) -> Measurement:
    """A confirmed measurement of `unusual` here, but for the changes; `machine=` takes changes."""
    algorithm, parameters = unusual(problem)
    values: dict[str, Any] = {
        "problem": problem,
        "algorithm": algorithm,
        "parameters": parameters,
        "isa": _registry.isa(),
        "threads": _registry.threads(),
        "status": "ok",
        "ns_min": 900.0,
        "ns_median": 1000.0,
        "ns_mad": 10.0,
        "repeats": 7,
        "confirmed": changes.get("status", "ok") == "ok",
    }
    if "machine" in changes:
        changes["machine"] = dataclasses.replace(this_machine(), **changes["machine"])
    return Measurement(**(values | changes))
