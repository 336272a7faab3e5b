# SPDX-License-Identifier: Apache-2.0
"""How long dispatch takes per convolution, in each tier: `python tests/dispatch_speed.py`.

The median over problems that are all different and were described just before, as at lowering.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import problems
import tuning

from jaxwin import _dispatch, _ffi, _record, _registry, _tuning
from jaxwin._problem import Problem
from jaxwin.tuner.database import Database


def _made(batch: int, size: int, window: int = 3) -> Problem:
    return problems.make(batch, 8, 16, (12, size), (window, window), padding=((1, 1), (1, 1)))


def _few(batch: int, channels: int, number: int) -> Problem:
    return problems.make(batch, channels, 16, (9, 9 + number // 10), (3, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    """Problems by their number, the tier that decides them, and what `decide` is told."""

    draw: Callable[[int], Problem]
    tier: str
    algorithm: str = "auto"
    mode: str = "cached"


CASES = {
    "tuned": Case(lambda n: _made(2, 12 + n), "tuned"),
    "transferred, same channels": Case(lambda n: _few(3, 30, n), "transferred"),
    "transferred, of many": Case(lambda n: _made(3, 12 + n), "transferred"),
    "transferred, other channels": Case(lambda n: _few(2, 31, n), "transferred"),
    "heuristic": Case(lambda n: _made(2, 12 + n, 5), "heuristic"),
    "near a row that confirms it": Case(lambda n: _few(3, 200, n), "heuristic"),
    "no table": Case(lambda n: _made(2, 12 + n, 5), "heuristic", mode="off"),
    "xla": Case(lambda n: _made(2, 12 + n), "xla", algorithm="xla"),
}


def fill(count: int) -> None:
    """A database with rows for so many problems of each case, in place of what was loaded."""
    usual = _few(2, 200, 0)
    isa, threads = _registry.isa(), _registry.threads()
    plan = _ffi.make_plan(usual.native(), isa=isa, threads=threads)["plan"]
    names = _registry.parameter_names(plan["algorithm"]) or ()
    parameters = dict(zip(names, plan["params"], strict=True))
    with Database() as db:
        db.add(tuning.measurement(_made(2, 12 + n)) for n in range(count))
        db.add(
            tuning.measurement(problems.make(n, c, 16, (9, 9), (3, 3)))
            for c in range(20, 60, 5)
            for n in (1, 4)
        )
        db.add([tuning.measurement(usual, algorithm=plan["algorithm"], parameters=parameters)])
    _tuning.reload()


def microseconds(case: Case, count: int) -> float:
    """The median time of so many decisions, which must be of the case's tier."""
    os.environ["JAXWIN_MODE"] = case.mode
    taken = []
    for number in range(count):
        problem = Problem.from_key(case.draw(number).key)
        _dispatch._decide.cache_clear()
        start = time.perf_counter_ns()
        decision = _dispatch.decide(problem, algorithm=case.algorithm)
        taken.append((time.perf_counter_ns() - start) / 1e3)
        assert decision.tier == case.tier, decision
    return statistics.median(taken)


def main() -> None:
    """Prints the best of a few medians for each tier."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "JAXWIN_MODE": "cached",
            "JAXWIN_TUNING_DB": f"{folder}/tuning.db",
            "XDG_CACHE_HOME": folder,
        }
        fill(200)
        for name, case in CASES.items():
            best = min(microseconds(case, 200) for _ in range(5))
            print(f"{name:<30} {best:6.1f} us")
        _record._missed.clear()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
