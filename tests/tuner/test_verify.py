# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune verify`."""

from __future__ import annotations

import json
from pathlib import Path

import problems
import pytest
from click.testing import CliRunner, Result

from jaxwin import _dispatch, _registry, _tuning
from jaxwin._machine import this_machine
from jaxwin.tuner import verify_command, worker
from jaxwin.tuner.cli import main
from jaxwin.tuner.database import Database, Measurement
from jaxwin.tuner.laboratory import Finding
from jaxwin.tuner.space import Candidate, Space

PROBLEM = problems.make(1, 8, 16, (6, 7), (3, 3))
SPACE = Space(PROBLEM, _registry.isa(), 1, 2**30)
OTHER = next(c for c in SPACE.ranked() if c != SPACE.incumbent())


@pytest.fixture
def path(own_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NPROC", "1")
    return own_database


def _store(path: Path, ns: float, candidate: Candidate = OTHER, threads: int = 1) -> Measurement:
    row = Measurement(
        PROBLEM, candidate.algorithm, candidate.parameters, _registry.isa(), threads, "ok",
        ns, ns, 0.0, 9, confirmed=True,
    )  # fmt: skip
    with Database(path) as db:
        db.add([row])
    _tuning.reload()
    return row


def _verify(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", *arguments])


def test_a_winner_that_is_right(path: Path) -> None:
    _store(path, 1.0)
    done = _verify("--json")
    (row,) = json.loads(done.stdout)["rows"]
    assert row["status"] in ("drifted", "regressed"), "nothing takes one nanosecond"
    assert row["ratio"] > 1 and row["ns"] > 1
    assert done.exit_code == (row["status"] == "regressed")
    assert "[1/1]" in done.stderr and "stored time" in done.stderr
    assert json.loads(_verify("of no problem", "--json").stdout)["rows"] == []


@pytest.mark.parametrize(("kind", "status"), [("wrong", "wrong"), ("crash", "crashed")])
def test_a_winner_that_is_wrong_never_wins_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, status: str
) -> None:
    _store(path, 1000.0)
    assert _dispatch.decide(PROBLEM).tier == "tuned"
    fault = f"{kind} {OTHER.algorithm} {','.join(map(str, OTHER.params))}"
    monkeypatch.setenv(worker.FAULTS, fault)
    done = _verify()
    assert done.exit_code == 1 and f"1 {status}" in done.stdout
    with Database(path) as db:
        assert [m.status for m in db.measurements(PROBLEM)] == ["ok", status]
    monkeypatch.delenv(worker.FAULTS)
    _tuning.reload()
    with pytest.warns(RuntimeWarning, match="holds no winner"):
        assert _dispatch.decide(PROBLEM).tier == "heuristic"
    assert "0 winners checked" in _verify().stdout


def test_what_the_native_core_refuses(path: Path) -> None:
    _store(path, 1000.0, Candidate(OTHER.algorithm, tuple(-1 for _ in OTHER.params)))
    done = _verify("--quiet")
    assert done.exit_code == 1 and "refused" in done.stdout and not done.stderr


def test_threads_that_are_not_there(path: Path) -> None:
    _store(path, 1000.0, threads=4096)
    done = _verify()
    assert done.exit_code == 0 and "1 skipped" in done.stdout


@pytest.mark.parametrize(
    ("default", "winner", "stored", "status"),
    [
        (2.0, 1.0, 1.0, "ok"),
        (2.0, 1.0, 1.03, "ok"),
        (2.0, 1.0, 2.0, "drifted"),
        (1.0, 1.02, 1.0, "ok"),
        (1.0, 1.5, 1.5, "regressed"),
        (1.0, 1.5, 1.0, "regressed"),
    ],
)
def test_what_times_say(default: float, winner: float, stored: float, status: str) -> None:
    row = Measurement(
        PROBLEM, OTHER.algorithm, OTHER.parameters, _registry.isa(), 1, "ok",
        stored, stored, 0.0, 9, machine=this_machine(),
    )  # fmt: skip
    noise = (0.999, 1.0, 1.001, 1.0, 0.9995)
    samples = [Finding("ok", "", tuple(t * n for n in noise), 5) for t in (default, winner)]
    verdict = verify_command._judge(row, *samples)
    assert verdict.status == status and verdict.bad == (status == "regressed")
