# SPDX-License-Identifier: Apache-2.0
"""How long dispatch takes per convolution, in each tier: `python tests/dispatch_speed.py`.

The median over problems that are all different and were described just before, as at lowering.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import problems
import tuning

from jaxwin import _dispatch, _record, _tuning
from jaxwin._problem import Problem
from jaxwin.tuner.database import Database

_ROUNDS = 5


def _made(batch: int, size: int, window: int = 3) -> Problem:
    return problems.make(batch, 8, 16, (12, size), (window, window), padding=((1, 1), (1, 1)))


def microseconds(
    draw: Callable[[int], Problem], tier: str, first: bool = False, **options: str
) -> float:
    """The median time of a decision, which must be of that tier.

    first: no row has lent anything yet; otherwise it is known which confirm the heuristic.
    """
    taken = []
    for number in range(200):
        text = draw(number).key
        for row in _tuning.table()._lenders if first else ():
            vars(row).pop("confirms_the_heuristic", None)
        problem = Problem.from_key(text)
        _dispatch._decide.cache_clear()
        start = time.perf_counter_ns()
        decision = _dispatch.decide(problem, **options)
        taken.append((time.perf_counter_ns() - start) / 1e3)
        assert decision.tier == tier, decision
    return statistics.median(taken)


def main() -> None:
    """Prints the best of a few medians for each tier."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "JAXWIN_MODE": "cached",
            "JAXWIN_TUNING_DB": f"{folder}/tuning.db",
            "XDG_CACHE_HOME": folder,
        }
        with Database() as db:
            db.add(tuning.measurement(_made(2, 12 + n)) for n in range(200))
            db.add(
                tuning.measurement(problems.make(n, c, 16, (9, 9), (3, 3)))
                for c in range(20, 60, 5)
                for n in (1, 4)
            )
        _tuning.reload()
        cases = {
            "tuned": (lambda n: _made(2, 12 + n), "tuned", {}),
            "transferred, same channels": (
                lambda n: problems.make(3, 30, 16, (9, 9 + n // 10), (3, 3)),
                "transferred",
                {},
            ),
            "transferred, of many": (lambda n: _made(3, 12 + n), "transferred", {}),
            "transferred, other channels": (
                lambda n: problems.make(2, 31, 16, (9, 9 + n // 10), (3, 3)),
                "transferred",
                {},
            ),
            "transferred, the first time": (
                lambda n: problems.make(3, 30, 16, (9, 9 + n // 10), (3, 3)),
                "transferred",
                {"first": True},
            ),
            "heuristic": (lambda n: _made(2, 12 + n, 5), "heuristic", {}),
            "no table": (lambda n: _made(2, 12 + n, 5), "heuristic", {}),
            "xla": (lambda n: _made(2, 12 + n), "xla", {"algorithm": "xla"}),
        }
        for name, (draw, tier, options) in cases.items():
            os.environ["JAXWIN_MODE"] = "off" if name == "no table" else "cached"
            best = min(microseconds(draw, tier, **options) for _ in range(_ROUNDS))
            print(f"{name:<30} {best:6.1f} us")
        _record._missed.clear()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
