# SPDX-License-Identifier: Apache-2.0
"""Two tunings of the same problems: how far apart are the times of the plans that they chose?

Times that were stored at different hours cannot be compared: where the plans differ, both run
again, in turn, in one process, beside the default plan that their bits are checked against. As long
as the samples do not tell, more are taken, each time in another process.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from jaxwin import _registry
from jaxwin._problem import Problem
from jaxwin.tuner import measure
from jaxwin.tuner.database import Measurement
from jaxwin.tuner.laboratory import Finding, LaboratoryError
from jaxwin.tuner.search import EFFORTS, MAX_WORKSPACE, SURE, Measurer, Paired, duration
from jaxwin.tuner.space import Candidate, Space

_EFFORT = EFFORTS["normal"]  # samples as in its last comparison
_MORE_COMPARISONS = 3  # where the samples do not tell
_MAX_SECONDS = 10.0  # of samples of one plan in one comparison

Key = tuple[Problem, str, int, str]


class Pair(NamedTuple):
    """The winners of two tunings for one problem, instruction set, thread count and family."""

    one: Measurement
    other: Measurement


@dataclasses.dataclass
class Agreement:
    """How the winner of the first tuning compares with that of the second.

    status: "same" (one plan), "agree" (their times differ by no more than the tolerance), "differ"
    (by more), "unsure" (the machine is too busy to tell); "wrong", "crashed", "timeout", "refused",
    "error" (as in the database), of the winner that `reason` names; "skipped".
    ratio: the first winner's time relative to the second's; error: its standard error. gains: the
    default plan's time relative to each.
    """

    pair: Pair
    status: str
    reason: str = ""
    ns: tuple[float, float] | None = None
    ratio: float | None = None
    error: float | None = None
    gains: tuple[float, float] | None = None

    @property
    def bad(self) -> bool:
        """Whether the tunings disagree, or a winner is no good."""
        return self.status not in ("same", "agree", "unsure", "skipped")

    def __str__(self) -> str:
        text = f"{self.pair.one.problem}: {self.status}"
        if self.ns is not None and self.ratio is not None and self.error is not None:
            first, second = map(duration, self.ns)
            text += f", {first} and {second}, ratio {self.ratio:.3f} +- {self.error:.3f}"
        if self.status not in ("same", "skipped"):
            text += f"; {words(self.pair.one)} | {words(self.pair.other)}"
        return text + (f": {self.reason}" if self.reason else "")

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        one = self.pair.one
        return {
            "problem": str(one.problem),
            "isa": one.isa,
            "threads": one.threads,
            "family": one.family,
            "winners": [
                {
                    "algorithm": m.algorithm,
                    "parameters": m.parameters,
                    "uid": m.uid,
                }
                for m in self.pair
            ],
            "status": self.status,
            "reason": self.reason,
            "ns": self.ns,
            "ratio": self.ratio,
            "error": self.error,
            "gains": self.gains,
        }


def words(winner: Measurement) -> str:
    """A winner's plan, for people."""
    return " ".join((winner.algorithm, *(f"{k}={v}" for k, v in winner.parameters.items())))


def pairs(ones: Iterable[Measurement], others: Iterable[Measurement]) -> list[Pair]:
    """The winners that are for the same, in the order of the first."""
    first, second = _by_key(ones), _by_key(others)
    return [Pair(first[key], second[key]) for key in first if key in second]


def _by_key(winners: Iterable[Measurement]) -> dict[Key, Measurement]:
    """Of several machines of this kind the winner that was confirmed last."""
    order = sorted(winners, key=lambda m: m.created, reverse=True)
    found: dict[Key, Measurement] = {}
    for m in order:
        found.setdefault((m.problem, m.isa, m.threads, m.family), m)
    return found


def compare(found: Iterable[Pair], measurer: Measurer, tolerance: float) -> Iterator[Agreement]:
    """Times the winners of pairs of one number of threads. tolerance: a share, such as 0.03."""
    for pair in found:
        try:
            yield _compare(pair, measurer, tolerance)
        except LaboratoryError as error:
            yield Agreement(pair, "error", str(error))


def _compare(pair: Pair, measurer: Measurer, tolerance: float) -> Agreement:
    problem, isa = pair.one.problem, pair.one.isa
    space = Space(problem, isa, pair.one.threads, MAX_WORKSPACE)
    default = space.incumbent()
    candidates = [candidate_of(space, m) for m in pair]
    plans = [space.plan(c) for c in (default, *candidates) if c is not None]
    runnable = [plan for plan in plans if plan is not None]
    if len(runnable) < 3:
        return Agreement(pair, "refused", "the native core does not take the parameters")
    if space.normal(candidates[0]) == space.normal(candidates[1]):
        return Agreement(pair, "same", ratio=1.0)
    findings = [Finding("ok")] * 3
    for _ in range(1 + _MORE_COMPARISONS):
        measurer.stop()  # every process has its own luck with memory
        taken = measurer.compare(
            problem,
            runnable,
            rounds=_EFFORT.final_rounds,
            min_seconds=_EFFORT.min_seconds,
            slower_than=float("inf"),
            budget_seconds=_MAX_SECONDS,
        )
        for winner, finding in zip(pair, taken[1:], strict=True):
            if finding.status != "ok":
                return Agreement(pair, finding.status, f"{words(winner)}: {finding.error}")
        # Samples belong together by their round, which slow plans do not get to the end of.
        rounds = min(len(finding.ns) for finding in taken)
        findings = [
            known.joined(dataclasses.replace(new, ns=new.ns[:rounds]))
            for known, new in zip(findings, taken, strict=True)
        ]
        anchor, one, other = findings
        paired = Paired.of(one, other)
        status = judge(paired, tolerance)
        if status != "unsure":
            break
    return Agreement(
        pair,
        status,
        "the machine is too busy to tell" if status == "unsure" else "",
        (one.median_ns, other.median_ns),
        paired.ratio,
        paired.error,
        (Paired.of(anchor, one).ratio, Paired.of(anchor, other).ratio),
    )


def judge(paired: Paired, tolerance: float) -> str:
    """Whether they "agree" or "differ", where the samples leave no doubt; else "unsure"."""
    most, least = 1 + tolerance, 1 / (1 + tolerance)
    low, high = paired.ratio - SURE * paired.error, paired.ratio + SURE * paired.error
    if least <= low and high <= most:
        return "agree"
    slower = min(low, paired.medians) > most and paired.minima > 1
    faster = max(high, paired.medians) < least and paired.minima < 1
    return "differ" if slower or faster else "unsure"


def candidate_of(space: Space, winner: Measurement) -> Candidate:
    """The plan of a stored winner, as a candidate."""
    names = _registry.parameter_names(winner.algorithm, winner.isa) or ()
    return space.candidate(winner.algorithm, (winner.parameters[name] for name in names))


def summary(agreements: Iterable[Agreement]) -> dict[str, Any]:
    """How many of each status, the geometric mean of the ratios, and the largest distance.

    geomean, distance: None where nothing was compared. distance: of a ratio from 1, as a share.
    """
    agreements = list(agreements)
    ratios = [a.ratio for a in agreements if a.ratio is not None]
    return {
        "counts": dict(sorted(collections.Counter(a.status for a in agreements).items())),
        "geomean": measure.geomean(ratios) if ratios else None,
        "distance": max(max(r, 1 / r) - 1 for r in ratios) if ratios else None,
    }
