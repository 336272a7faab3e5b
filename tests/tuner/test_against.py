# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune verify --against`: two tunings compared. Times are made up but in one test."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import problems
import pytest
from click.testing import CliRunner, Result

from jaxwin import _registry
from jaxwin._machine import this_machine
from jaxwin._plan import Plan
from jaxwin._problem import Problem
from jaxwin.tuner import against, exits, search, verify_command, worker
from jaxwin.tuner.cli import main
from jaxwin.tuner.database import Database, Measurement
from jaxwin.tuner.laboratory import Finding, LaboratoryError
from jaxwin.tuner.space import Candidate, Space

PROBLEM = problems.make(1, 8, 16, (6, 7), (3, 3))
SPACE = Space(PROBLEM, _registry.isa(), 1, search.MAX_WORKSPACE)
FIRST, SECOND = [c for c in SPACE.ranked() if c != SPACE.incumbent()][:2]


def _winner(candidate: Candidate = FIRST, problem: Problem = PROBLEM, **more: Any) -> Measurement:
    return Measurement(
        problem, candidate.algorithm, candidate.parameters, _registry.isa(), more.pop("threads", 1),
        "ok", 900.0, 1000.0, 1.0, 9, **{"confirmed": True, **more},
    )  # fmt: skip


PAIR = against.Pair(_winner(FIRST), _winner(SECOND))


class Fake:
    """A measurer: the default plan takes 2000 ns, the first winner 1000, the second as told.

    spread: of the samples; calm: from which comparison on there is none. fate: a finding of the
    second winner.
    """

    def __init__(
        self, ratio: float, spread: float = 0.001, calm: int = 99, fate: Finding | None = None
    ) -> None:
        self._times, self._spread, self._calm, self._fate = (
            (2e3, 1e3 * ratio, 1e3),
            spread,
            calm,
            fate,
        )
        self.comparisons = self.stops = 0
        self._random = random.Random(1)

    def compare(
        self,
        problem: Problem,
        plans: Sequence[Plan],
        *,
        rounds: int,
        min_seconds: float,
        slower_than: float,
        budget_seconds: float = 1.0,
    ) -> list[Finding]:
        assert [(p.algorithm, p.params) for p in plans[1:]] == [
            (c.algorithm, c.params) for c in (FIRST, SECOND)
        ]
        self.comparisons += 1
        spread = self._spread if self.comparisons < self._calm else 0.0
        findings = [
            Finding("ok", "", tuple(ns * (1 + spread * self._random.random()) for _ in range(n)), n)
            for ns, n in zip(self._times, (rounds, rounds, rounds - 2), strict=True)
        ]
        return [*findings[:2], self._fate or findings[2]]

    def stop(self) -> None:
        self.stops += 1


def _compare(measurer: Any, pair: against.Pair = PAIR, tolerance: float = 0.03) -> Any:
    (agreement,) = against.compare([pair], measurer, tolerance)
    return agreement


@pytest.mark.parametrize(
    ("ratio", "tolerance", "status"),
    [
        (1.0, 0.03, "agree"),
        (1.02, 0.03, "agree"),
        (1 / 1.02, 0.03, "agree"),
        (1.04, 0.03, "differ"),
        (1 / 1.04, 0.03, "differ"),
        (1.02, 0.01, "differ"),
        (1.2, 0.25, "agree"),
    ],
)
def test_times_that_leave_no_doubt(ratio: float, tolerance: float, status: str) -> None:
    measurer = Fake(ratio)
    found = _compare(measurer, tolerance=tolerance)
    assert (found.status, found.bad) == (status, status == "differ")
    assert found.ratio == pytest.approx(ratio, rel=2e-3)
    assert found.gains == pytest.approx((2 / ratio, 2), rel=2e-3)
    assert measurer.comparisons == measurer.stops == 1, "in a process of its own"
    assert "ratio" in str(found) and str(FIRST) in str(found) and str(SECOND) in str(found)


def test_more_samples_where_they_do_not_tell() -> None:
    measurer = Fake(1.05, spread=0.8, calm=2)
    found = _compare(measurer)
    assert found.status == "differ" and 1 < measurer.comparisons == measurer.stops


def test_a_busy_machine_is_said() -> None:
    measurer = Fake(1.03, spread=0.8)
    found = _compare(measurer)
    assert found.status == "unsure" and not found.bad and "busy" in str(found)
    assert measurer.comparisons == 1 + against._MORE_COMPARISONS


@pytest.mark.parametrize(
    ("ratio", "error", "medians", "minima", "status"),
    [
        (1.03, 0.002, 1.03, 1.03, "unsure"),
        (1.05, 0.002, 1.05, 1.05, "differ"),
        (1.05, 0.02, 1.05, 1.05, "unsure"),
        (1.05, 0.002, 1.02, 1.05, "unsure"),  # the machine's speed has jumped
        (1.05, 0.002, 1.05, 0.99, "unsure"),
        (0.95, 0.002, 0.95, 0.95, "differ"),
        (0.95, 0.002, 0.95, 1.01, "unsure"),
        (1.0, 0.02, 1.0, 1.0, "unsure"),
    ],
)
def test_doubt(ratio: float, error: float, medians: float, minima: float, status: str) -> None:
    assert against.judge(search.Paired(ratio, error, medians, minima), 0.03) == status


def test_one_plan_is_not_timed() -> None:
    measurer = Fake(1.0)
    found = _compare(measurer, against.Pair(_winner(), _winner(threads=1)))
    assert (found.status, found.ratio, measurer.comparisons) == ("same", 1.0, 0)
    assert not found.bad


def test_blocks_as_large_as_the_whole_are_one_plan() -> None:
    pairs = [(c, SPACE.normal(c)) for c in SPACE.ranked()]
    whole = next((c, n) for c, n in pairs if c != n and SPACE.plan(n) is not None)
    assert _compare(Fake(1.0), against.Pair(*map(_winner, whole))).status == "same"


def test_a_winner_that_is_no_good() -> None:
    found = _compare(Fake(1.0, fate=Finding("wrong", "one bit")))
    assert found.bad and str(SECOND) in found.reason and "one bit" in found.reason
    bad = Candidate(FIRST.algorithm, tuple(-1 for _ in FIRST.params))
    assert _compare(Fake(1.0), against.Pair(_winner(bad), _winner())).status == "refused"

    class Broken(Fake):
        def compare(self, *_: Any, **__: Any) -> list[Finding]:
            raise LaboratoryError("does not start")

    found = _compare(Broken(1.0))
    assert (found.status, found.reason) == ("error", "does not start")


def test_pairs_are_of_the_same_problem_threads_and_family() -> None:
    larger = problems.make(2, 8, 16, (6, 7), (3, 3))
    old = _winner(SECOND, created="2020-01-01T00:00:00+00:00")
    ones = [old, _winner(), _winner(threads=2), _winner(problem=larger)]
    others = [_winner(SECOND), _winner(threads=3), _winner(problem=larger, threads=1)]
    found = against.pairs(ones, others)
    assert [p.one.uid for p in found] == [ones[3].uid, ones[1].uid]
    assert [p.other.uid for p in found] == [others[2].uid, others[0].uid]


def test_summary() -> None:
    found = [
        against.Agreement(PAIR, "same", ratio=1.0),
        against.Agreement(PAIR, "differ", ratio=0.8),
        against.Agreement(PAIR, "skipped"),
    ]
    told = against.summary(found)
    assert told["counts"] == {"differ": 1, "same": 1, "skipped": 1}
    assert told["geomean"] == pytest.approx(0.8**0.5)
    assert told["distance"] == pytest.approx(0.25)
    assert against.summary([]) == {"counts": {}, "geomean": None, "distance": None}


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def other(own_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another database; that of the environment has `FIRST`."""
    monkeypatch.setenv("NPROC", "1")
    with Database(own_database) as db:
        db.add([_winner()])
    return own_database.with_name("other.db")


def _store(path: Path, *rows: Measurement) -> None:
    with Database(path) as db:
        db.add(rows)


def _verify(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def _fake(monkeypatch: pytest.MonkeyPatch, measurer: Any) -> None:
    def laboratories(winners: Any, timeout: float) -> Any:
        yield list(winners), measurer, ""

    monkeypatch.setattr(verify_command, "_laboratories", laboratories)


@pytest.mark.parametrize(
    ("ratio", "spread", "code"),
    [(1.0, 0.001, exits.OK), (1.3, 0.001, exits.FOUND), (1.03, 0.8, exits.BUSY)],
)
def test_exit_codes(
    other: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, spread: float, code: int
) -> None:
    _store(other, _winner(SECOND))
    _fake(monkeypatch, Fake(ratio, spread))
    done = _verify("--against", other)
    assert done.exit_code == code and "1 problems with a winner in both" in done.stdout
    assert "[1/1]" in done.stderr and "geometric mean" in done.stdout
    done = _verify("--against", other, "--json", "--quiet", "--tolerance", 50)
    told = json.loads(done.stdout)
    assert told["tolerance"] == 0.5 and told["complete"] and not done.stderr
    (row,) = told["rows"]
    assert row["status"] == "agree" and row["ratio"] == told["geomean"] and done.exit_code == 0


def test_in_a_real_process(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both run, the wrong one is told, and nothing is stored."""
    _store(other, _winner(SECOND))
    _store(other, _winner(threads=4096, problem=problems.make(2, 8, 16, (6, 7), (3, 3))))
    told = json.loads(_verify("--against", other, "--json", "--tolerance", 1e6).stdout)
    (row,) = told["rows"]
    assert row["status"] in ("agree", "unsure") and min(row["ns"]) > 0
    fault = f"wrong {SECOND.algorithm} {','.join(map(str, SECOND.params))}"
    monkeypatch.setenv(worker.FAULTS, fault)
    done = _verify("--against", other)
    assert done.exit_code == exits.FOUND and "differ from the default plan's" in done.stdout
    with Database(other) as db:
        assert {m.status for m in db.measurements()} == {"ok"}


def test_nothing_to_compare(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _store(other, _winner(threads=4096))
    done = _verify("--against", other)
    assert done.exit_code == exits.FOUND and "0 problems with a winner in both" in done.stdout
    assert json.loads(_verify("--against", other, "--json").stdout)["rows"] == []
    missing = _verify("--against", other.with_name("missing.db"))
    assert missing.exit_code == exits.DATABASE and "missing.db: does not exist" in missing.stderr
    wrong = _verify("--tolerance", 3)
    assert wrong.exit_code == exits.USAGE and "--against" in wrong.stderr
    _store(other, _winner(problem=PROBLEM, machine=this_machine()))
    assert _verify("--against", other).exit_code == exits.OK


def test_threads_that_are_not_there(other: Path, own_database: Path) -> None:
    for path, candidate in ((other, FIRST), (own_database, SECOND)):
        _store(path, _winner(candidate, threads=4096))
    done = _verify("--against", other)
    assert done.exit_code == exits.FOUND and "1 skipped" in done.stdout, "nothing was compared"


def test_ctrl_c_tells_what_was_compared(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _store(other, _winner(SECOND))

    class Stopped(Fake):
        def compare(self, *_: Any, **__: Any) -> list[Finding]:
            raise KeyboardInterrupt

    _fake(monkeypatch, Stopped(1.0))
    done = _verify("--against", other, "--json")
    assert done.exit_code == exits.INTERRUPTED and json.loads(done.stdout)["complete"] is False
