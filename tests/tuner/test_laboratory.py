# SPDX-License-Identifier: Apache-2.0
"""The process in which candidates run, and what it does with those that go wrong."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import problems
import pytest

from jaxwin import _registry
from jaxwin._plan import Plan
from jaxwin._problem import Problem
from jaxwin.tuner import bench, peers, search, tune, worker
from jaxwin.tuner import problems as known
from jaxwin.tuner.database import Database
from jaxwin.tuner.laboratory import Finding, Laboratory, LaboratoryError
from jaxwin.tuner.space import Candidate, Space

DENSE = problems.make(1, 8, 16, (6, 7), (3, 3))
ISA = _registry.isa()
SPACE = Space(DENSE, ISA, 1, 2**30)
FAST = {"rounds": 2, "min_seconds": 1e-6, "slower_than": 1e9}


def _plan(candidate: Candidate, space: Space = SPACE) -> Plan:
    plan = space.plan(candidate)
    assert plan is not None
    return plan


def _fault(kind: str, candidate: Candidate) -> str:
    return f"{kind} {candidate.algorithm} {','.join(map(str, candidate.params))}"


@pytest.fixture(scope="module")
def calm() -> Iterator[Laboratory]:
    """A process without faults."""
    with Laboratory(1) as laboratory:
        yield laboratory


@pytest.mark.parametrize(
    "problem",
    [
        DENSE,
        problems.make(2, 6, 6, (9, 8), (3, 3), groups=6, padding=((1, 1), (0, 2))),
        problems.make(1, 4, 8, (5, 5), (4, 4), lhs_dilation=(2, 2), reversal=(True, True)),
        dataclasses.replace(DENSE, bias=True, residual=True, activation="gelu"),
        dataclasses.replace(DENSE, bias=True),
    ],
    ids=str,
)
def test_every_algorithm_gives_the_bits_of_the_default_plan(
    calm: Laboratory, problem: Problem
) -> None:
    space = Space(problem, ISA, 1, 2**30)
    default = space.incumbent()
    assert default is not None
    candidates = [default, *(c for c in space.defaults.values() if c != default)]
    findings = calm.compare(problem, [_plan(c, space) for c in candidates], **FAST)
    assert [(f.status, f.error) for f in findings] == [("ok", "")] * len(candidates)
    for finding in findings:
        assert len(finding.ns) == 2 and min(finding.ns) > 0 and finding.calls >= 2
        assert finding.ratios(finding) == [1.0, 1.0]


def test_slow_candidates_are_dropped_but_never_the_first(calm: Laboratory) -> None:
    plans = [_plan(SPACE.incumbent()), _plan(SPACE.ranked()[-1])]
    options = FAST | {"rounds": 4, "slower_than": 1e-9}
    first, second = calm.compare(DENSE, plans, **options)
    assert (len(first.ns), len(second.ns)) == (4, 1)


def test_what_goes_wrong_is_found_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = ["crash", "hang", "wrong", "late-crash"]
    default, *others = dict.fromkeys([SPACE.incumbent(), *SPACE.ranked()])
    faults = dict(zip(kinds, others, strict=False))
    monkeypatch.setenv(worker.FAULTS, ";".join(_fault(k, c) for k, c in faults.items()))
    sound = others[len(kinds)]
    with Laboratory(1, seconds=3.0) as laboratory:
        plans = [_plan(c) for c in (default, *faults.values(), sound)]
        findings = laboratory.compare(DENSE, plans, **FAST)
    statuses = [finding.status for finding in findings]
    assert statuses == ["ok", "crashed", "timeout", "wrong", "crashed", "ok"]
    assert "SIGSEGV" in findings[1].error and "SIGSEGV" in findings[4].error
    assert "no sign of life" in findings[2].error
    assert "1 of 320 values differ" in findings[3].error
    assert len(findings[0].ns) == len(findings[5].ns) == 2


def test_a_default_plan_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(worker.FAULTS, _fault("crash", SPACE.incumbent()))
    with Laboratory(1) as laboratory:
        with pytest.raises(LaboratoryError, match="default plan crashed: SIGSEGV"):
            laboratory.compare(DENSE, [_plan(SPACE.incumbent())], **FAST)


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with Laboratory(10_000) as laboratory:
        with pytest.raises(LaboratoryError, match=r"does not start.*threads: 10000 asked for"):
            laboratory.compare(DENSE, [_plan(SPACE.incumbent())], **FAST)


def test_faults_in_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored with their status, not tried again, and never the winner."""
    monkeypatch.setenv("JAXWIN_TUNING_DB", str(tmp_path / "tuning.db"))
    default, *others = dict.fromkeys([SPACE.incumbent(), *SPACE.ranked()])
    faults = dict(zip(("crash", "wrong"), others, strict=False))
    monkeypatch.setenv(worker.FAULTS, ";".join(_fault(k, c) for k, c in faults.items()))
    effort = search.Effort(4, 60.0, 1, 1e-6, 1, 2)
    monkeypatch.setitem(search.EFFORTS, "quick", effort)
    task = tune.Task("dense", DENSE)
    everything = [default, *faults.values(), others[2]]
    monkeypatch.setattr(Space, "everything", lambda self, limit: everything)
    result = tune.run([task], tune.Options(threads=1))
    ((_, outcome),) = result.outcomes
    assert outcome.bad == {"crashed": 1, "wrong": 1}
    assert outcome.winner in (default, others[2])
    with Database() as database:
        rows = list(database.measurements(DENSE))
    found = {row.status: (row.algorithm, row.parameters) for row in rows if row.status != "ok"}
    assert found == {
        "crashed": (faults["crash"].algorithm, faults["crash"].parameters),
        "wrong": (faults["wrong"].algorithm, faults["wrong"].parameters),
    }
    monkeypatch.delenv(worker.FAULTS)
    ((_, again),) = tune.run([task], tune.Options(threads=1, again=True)).outcomes
    assert again.bad == {} and again.known == 2 and again.measured == 2
    with Database() as database:
        assert sum(row.status != "ok" for row in database.measurements(DENSE)) == 2


def test_the_process_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(SPACE.incumbent())
    monkeypatch.setenv(worker.FAULTS, _fault("hang", SPACE.incumbent()))
    with subprocess.Popen(
        [sys.executable, "-m", "jaxwin.tuner.worker", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"ready": True}
        fields = {"plans": [plan._asdict()], "threads": 1, "seed": 0, "budget_seconds": 9.0}
        for request in ({"problem": DENSE.key, "seed": 0}, fields | FAST):
            process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"running": 0}  # it hangs now
        process.stdin.close()
        assert process.wait(timeout=60) == 0


# --- the check -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "blame"),
    [
        (lambda y, workspace: None, "differ"),  # unwritten
        (lambda y, workspace: y.fill(0), "differ"),
        (lambda y, workspace: _beyond(y, 1), "outside"),
        (lambda y, workspace: _beyond(workspace, 1), "outside"),
        (lambda y, workspace: _before(y), "outside"),
    ],
    ids=["nothing written", "zeros", "beyond the result", "beyond the workspace", "before"],
)
def test_what_the_check_sees(monkeypatch: pytest.MonkeyPatch, damage, blame: str) -> None:
    subject = worker._Problem(DENSE.key, 0)
    plan = _plan(SPACE.incumbent())
    assert subject.check(plan) == subject.check(plan) == ("ok", "")
    assert not np.isnan(subject.reference).any()

    def run(*arguments: object) -> str:
        y, workspace = (array.view(np.float32) for array in arguments[7:9])
        assert np.isnan(y).all() and np.isnan(workspace).all(), "poisoned"
        assert y.ctypes.data % 64 == 0
        damage(y, workspace)
        return ""

    monkeypatch.setattr(worker._ffi, "run", run)
    status, error = subject.check(plan)
    assert status == "wrong" and blame in error


def _beyond(array: np.ndarray, count: int) -> None:
    flat = array.reshape(-1)
    np.lib.stride_tricks.as_strided(flat, (flat.size + count,))[-1] = 0


def _before(array: np.ndarray) -> None:
    ctypes.cast(array.ctypes.data - 4, ctypes.POINTER(ctypes.c_float))[0] = 0.0


def test_a_reference_that_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = worker._Problem(DENSE.key, 0)
    monkeypatch.setattr(worker._ffi, "run", lambda *arguments: "")
    assert subject.check(_plan(SPACE.incumbent()))[0] == "wrong"
    monkeypatch.setattr(worker._ffi, "run", lambda *arguments: "no")
    assert subject.check(_plan(SPACE.incumbent())) == ("refused", "no")


def test_joined_samples() -> None:
    one, two = Finding("ok", "", (1.0, 2.0), 4), Finding("ok", "", (3.0,), 1)
    assert one.joined(two) == Finding("ok", "", (1.0, 2.0, 3.0), 5)
    bad = Finding("wrong", "made up")
    assert one.joined(bad) == bad and bad.joined(one) == bad


@pytest.mark.parametrize(
    "problem",
    [
        DENSE,
        problems.make(1, 4, 8, (5, 5), (4, 4), lhs_dilation=(2, 2), reversal=(True, True)),
        dataclasses.replace(DENSE, bias=True, residual=True, activation="relu"),
    ],
    ids=str,
)
def test_xla_beside_a_plan(calm: Laboratory, problem: Problem) -> None:
    space = Space(problem, ISA, 1, 2**30)
    default = _plan(space.incumbent(), space)
    found = calm.compare(problem, [default, Plan("xla", ISA, 1, (), 0)], **FAST)
    assert [finding.status for finding in found] == ["ok", "ok"], found[1].error
    assert all(len(finding.ns) == 2 for finding in found)


def test_what_takes_long_gets_few_samples(calm: Laboratory) -> None:
    plans = [_plan(SPACE.incumbent()), _plan(SPACE.ranked()[1])]
    options = FAST | {"rounds": 9, "min_seconds": 0.02}
    found = calm.compare(DENSE, plans, **options, budget_seconds=1e-9)
    assert [len(finding.ns) for finding in found] == [1, 1]
    paired = search.Paired.of(found[1], found[0])
    assert paired.error >= 0.02, "they say nothing of their spread"


@pytest.mark.parametrize("dtype", known.DTYPES)
def test_results_that_candidates_are_compared_with_are_right(dtype: str) -> None:
    """The default plan's, against lax in float64; those of integers to the last bit."""
    conv = known.parse("n1 6x7 c5 k9 w3 p1", dtype=dtype)
    problem = conv.problem()
    space = Space(problem, _registry.isa(), 1, 2**30)
    default = space.incumbent()
    assert default is not None
    plan = space.plan(default)
    assert plan is not None
    try:
        subject = worker._Problem(problem.key, 3)
        assert subject.check(plan) == ("ok", "")
        xla = plan._replace(algorithm=_registry.XLA, params=(), workspace_bytes=0)
        assert subject.compile(plan)[1:] == subject.compile(xla)[1:] == ("ok", "")
    finally:
        jax.config.update("jax_enable_x64", False)  # which float64 needs, in its own process
    with jax.enable_x64(True):
        task = peers.Task(conv, "fwd", "nhwc", 1, subject.x, subject.w, subject.w)
        exact = bench.reference(task)
    assert subject.reference is not None
    difference = np.abs(subject.reference.astype(np.float64) - exact).max()
    assert difference <= bench.TOLERANCE[dtype] * np.abs(exact).max()
