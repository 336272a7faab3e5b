# SPDX-License-Identifier: Apache-2.0
"""The search, with made-up times: nothing here depends on a clock."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import problems
import pytest

import jaxwin
from jaxwin import _dispatch, _registry, _tuning
from jaxwin._machine import this_machine
from jaxwin._plan import Plan
from jaxwin._problem import Problem
from jaxwin.tuner import search, tune
from jaxwin.tuner.database import Database, Measurement
from jaxwin.tuner.laboratory import Finding, LaboratoryError
from jaxwin.tuner.space import Candidate, Space

DENSE = problems.make(2, 8, 16, (12, 13), (3, 3))
LARGER = problems.make(4, 8, 16, (12, 13), (3, 3))
ISA, THREADS = _registry.isa(), _registry.threads()
SPACE = Space(DENSE, ISA, THREADS, search.MAX_WORKSPACE)
DEFAULT = SPACE.incumbent()
assert DEFAULT is not None
# Two steps of the parameters away: not among the first that are tried.
GOAL = next(
    c
    for step in SPACE.neighbours(DEFAULT)
    for c in SPACE.neighbours(step)
    if sum(a != b for a, b in zip(c.params, DEFAULT.params, strict=True)) == 2
    if SPACE.normal(c) == c and SPACE.normal(step) == step
)


def _candidate(plan: Plan) -> Candidate:
    return Candidate(plan.algorithm, plan.params)


class Fake:
    """A measurer with times by formula; `fates` are candidates that go wrong."""

    def __init__(
        self,
        ratio: Callable[[Candidate], float],
        fates: dict[Candidate, str] | None = None,
        spread: float = 0.001,
        interrupt_after: int | None = None,
    ) -> None:
        self.ratio, self.fates, self.spread = ratio, fates or {}, spread
        self.interrupt_after = interrupt_after
        self.comparisons: list[list[Candidate]] = []
        self.stops = 0
        self._rng = random.Random(0)

    def compare(
        self, problem: Problem, plans: Sequence[Plan], *, rounds: int, **options: float
    ) -> list[Finding]:
        if len(self.comparisons) == self.interrupt_after:
            raise KeyboardInterrupt
        candidates = [_candidate(plan) for plan in plans]
        assert len(set(candidates)) == len(candidates)
        self.comparisons.append(candidates)
        findings = []
        for candidate in candidates:
            if candidate in self.fates:
                findings.append(Finding(self.fates[candidate], "made up"))
                continue
            noise = [1 + self.spread * self._rng.uniform(-1, 1) for _ in range(rounds)]
            ns = tuple(1e6 * self.ratio(candidate) * factor for factor in noise)
            findings.append(Finding("ok", "", ns, rounds))
        return findings

    def stop(self) -> None:
        self.stops += 1

    @property
    def seen(self) -> set[Candidate]:
        return {candidate for comparison in self.comparisons for candidate in comparison}


def _towards(goal: Candidate, gain: float = 0.3) -> Callable[[Candidate], float]:
    """The fewer parameters differ from the goal's, the faster; the default takes 1."""

    def distance(candidate: Candidate) -> float:
        if candidate.algorithm != goal.algorithm:
            return 5.0
        mine, theirs = SPACE.normal(candidate).params, SPACE.normal(goal).params
        return sum(a != b for a, b in zip(mine, theirs, strict=True))

    most = distance(DEFAULT)
    return lambda candidate: 1 - gain * (1 - distance(candidate) / most)


@pytest.fixture
def path(own_database: Path) -> Path:
    return own_database


def _run(fake: Fake, *tasks: Problem, **options) -> tune.Result:
    options = {"threads": THREADS} | options
    named = [tune.Task(str(problem), problem) for problem in tasks or (DENSE,)]
    return tune.run(named, tune.Options(**options), measurer=fake)


def _rows(path: Path, problem: Problem = DENSE) -> list[Measurement]:
    with Database(path) as database:
        return list(database.measurements(problem))


def _of(row: Measurement) -> Candidate:
    names = _registry.parameter_names(row.algorithm)
    return Candidate(row.algorithm, tuple(row.parameters[name] for name in names))


def _confirmed(path: Path) -> list[Candidate]:
    return [_of(row) for row in _rows(path) if row.confirmed]


def test_the_fastest_is_found_and_dispatch_takes_it(path: Path) -> None:
    fake = Fake(_towards(GOAL))
    result = _run(fake)
    ((_, outcome),) = result.outcomes
    assert (outcome.status, outcome.winner, outcome.default) == ("tuned", GOAL, DEFAULT)
    assert outcome.ratio == pytest.approx(1 / 0.7, rel=0.01)
    assert result.exit_code() == 0
    assert _confirmed(path) == [GOAL]
    assert all(comparison[0] == DEFAULT for comparison in fake.comparisons)
    assert fake.stops == 1, "the last comparison is in a process of its own"
    assert len(fake.seen) <= search.EFFORTS["quick"].candidates
    decision = _dispatch.decide(DENSE)
    assert decision.tier == "tuned"
    assert decision.plan is not None and _candidate(decision.plan) == GOAL


def test_every_measurement_is_stored(path: Path) -> None:
    fake = Fake(_towards(GOAL))
    _run(fake)
    rows = _rows(path)
    assert {_of(row) for row in rows} == fake.seen
    assert len(rows) == sum(map(len, fake.comparisons))
    for row in rows:
        assert (row.isa, row.threads, row.status) == (ISA, THREADS, "ok")
        assert row.abi == _registry.abi(row.algorithm)
        assert row.machine == this_machine()
        assert 0 < row.ns_min <= row.ns_median


def test_what_is_known_is_not_measured_again_unless_asked_for(path: Path) -> None:
    _run(Fake(_towards(GOAL)))
    before = len(_rows(path))
    second = Fake(_towards(GOAL))
    ((_, outcome),) = _run(second).outcomes
    assert second.comparisons == [] and len(_rows(path)) == before
    assert (outcome.status, outcome.winner, outcome.measured) == ("known", GOAL, 0)
    third = Fake(_towards(GOAL))
    ((_, outcome),) = _run(third, again=True).outcomes
    assert third.comparisons and outcome.winner == GOAL
    assert GOAL in third.comparisons[0] + third.comparisons[1], "the last winner comes early"
    assert _run(Fake(_towards(GOAL)), effort="normal").outcomes[0][1].measured > 0


def test_interrupted_and_resumed(path: Path) -> None:
    first = Fake(_towards(GOAL), interrupt_after=2)
    result = _run(first)
    assert result.exit_code() == 130 and result.outcomes == []
    assert "goes on" in result.warnings()[-1]
    assert {_of(row) for row in _rows(path)} == first.seen and len(first.seen) > 2
    second = Fake(_towards(GOAL))
    ((_, outcome),) = _run(second).outcomes
    assert outcome.winner == GOAL and outcome.known == len(first.seen)
    *searched, _, _ = second.comparisons
    assert not {c for comparison in searched for c in comparison} & (first.seen - {DEFAULT})


@pytest.mark.parametrize("status", ["wrong", "crashed", "timeout", "refused"])
def test_what_goes_wrong_never_wins_and_is_never_tried_again(path: Path, status: str) -> None:
    fates = dict.fromkeys(SPACE.neighbours(DEFAULT), status)
    first = Fake(_towards(GOAL), fates)
    ((_, outcome),) = (result := _run(first)).outcomes
    tried = first.seen & fates.keys()
    assert tried and outcome.winner not in fates
    assert outcome.bad == {status: len(tried)}
    assert any("report" in warning for warning in result.warnings())
    for candidate in tried:
        assert sum(candidate in comparison for comparison in first.comparisons) == 1
    assert {_of(row) for row in _rows(path) if row.status == status} == tried
    second = Fake(_towards(GOAL))  # it would be right now
    _run(second, again=True)
    assert not second.seen & tried
    assert second.seen, "the others are measured again"


def test_an_error_is_tried_again_in_another_run_only(path: Path) -> None:
    fates = {SPACE.neighbours(DEFAULT)[0]: "error"}
    first = Fake(_towards(GOAL), fates)
    _run(first)
    if first.seen & fates.keys():
        assert sum(c in fates for comparison in first.comparisons for c in comparison) == 1
    second = Fake(_towards(GOAL))
    _run(second, again=True)
    assert second.seen & fates.keys()


def test_a_finalist_that_goes_wrong_at_last(path: Path) -> None:
    class Late(Fake):
        def stop(self) -> None:
            self.fates = {GOAL: "wrong"}

    ((_, outcome),) = _run(Late(_towards(GOAL))).outcomes
    assert outcome.winner != GOAL and outcome.bad == {"wrong": 1}
    assert GOAL not in _confirmed(path)
    decision = _dispatch.decide(DENSE)
    assert decision.plan is not None and _candidate(decision.plan) == outcome.winner


@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({"status": "wrong", "machine": {"model": 999}}, False),
        ({"status": "crashed", "threads": THREADS + 1}, False),
        ({"status": "timeout"}, False),
        ({"status": "timeout", "machine": {"model": 999}}, True),
        ({"status": "wrong", "abi": "old"}, True),
        ({"status": "wrong", "isa": "baseline"}, ISA != "baseline"),
        ({"status": "ok", "abi": "old"}, True),
        ({"status": "ok", "threads": THREADS + 1}, True),
        ({"status": "ok", "machine": {"model": 999}}, True),
    ],
)
def test_which_rows_count(path: Path, changes: dict, tried: bool) -> None:
    (first, *_) = [c for c in SPACE.ranked() if c != DEFAULT]
    changes = dict(changes)
    machine = dataclasses.replace(this_machine(), **changes.pop("machine", {}))
    times = dict.fromkeys(("ns_min", "ns_median", "ns_mad"), 1.0)
    values = {"isa": ISA, "threads": THREADS, "machine": machine} | times | changes
    with Database(path) as database:
        database.add([Measurement(DENSE, first.algorithm, first.parameters, **values)])
    fake = Fake(_towards(GOAL))
    _run(fake)
    assert (first in fake.seen) == tried


def test_a_gain_too_small_does_not_replace(path: Path) -> None:
    ((_, outcome),) = _run(Fake(_towards(GOAL, 0.005), spread=0.0)).outcomes
    assert (outcome.status, outcome.winner) == ("default", DEFAULT)
    assert _confirmed(path) == [DEFAULT]
    ((_, outcome),) = _run(Fake(_towards(GOAL, 0.02), spread=0.0), again=True).outcomes
    assert outcome.winner == GOAL


def test_an_earlier_winner_stays_unless_another_is_clearly_faster(path: Path) -> None:
    _run(Fake(_towards(GOAL)))
    nearly = next(c for c in SPACE.neighbours(GOAL) if c != DEFAULT)

    def ratio(candidate: Candidate) -> float:
        return {GOAL: 0.70, nearly: 0.697}.get(candidate, _towards(GOAL)(candidate))

    ((_, outcome),) = _run(Fake(ratio, spread=0.0), effort="normal").outcomes
    assert outcome.measured > 0 and outcome.winner == GOAL


def test_a_busy_machine_decides_nothing(path: Path) -> None:
    result = _run(Fake(_towards(GOAL, 0.05), spread=0.9))
    ((_, outcome),) = result.outcomes
    assert outcome.status == "undecided", outcome
    assert "busy" in outcome.reason and result.exit_code() == 5
    assert _confirmed(path) == []
    calm = _run(Fake(_towards(GOAL)))
    assert calm.exit_code() == 0 and len(_confirmed(path)) == 1


def test_the_first_tried_are_winners_of_near_problems(path: Path) -> None:
    space = Space(LARGER, ISA, THREADS, search.MAX_WORKSPACE)
    assert space.plan(GOAL) is not None
    _run(Fake(_towards(GOAL)))
    fake = Fake(_towards(GOAL))
    _run(fake, LARGER)
    assert GOAL in fake.comparisons[0]


def test_a_small_space_is_measured_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [*SPACE.ranked()[:7], DEFAULT]
    monkeypatch.setattr(Space, "everything", lambda self, limit: everything)
    fake = Fake(lambda candidate: 1.0)
    _run(fake)
    assert fake.seen == set(everything)


def test_tpe_goes_on_where_no_step_helps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Space, "neighbours", lambda self, centre: [])
    asked: list[Candidate] = []
    ask = search._Study.ask

    def spy(self: search._Study) -> Candidate:
        asked.append(ask(self))
        return asked[-1]

    monkeypatch.setattr(search._Study, "ask", spy)
    fake = Fake(_towards(GOAL))
    _run(fake, effort="normal")
    proposed = set(asked) & fake.seen
    assert len(proposed) > 20
    assert len(fake.seen) <= search.EFFORTS["normal"].candidates
    best = min(map(_towards(GOAL), proposed))
    assert best < 1.0


def test_machines_share_a_storage(path: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    first, second = Fake(_towards(GOAL)), Fake(_towards(GOAL))
    _run(first, storage=url)
    ((_, outcome),) = _run(second, storage=url, database=tmp_path / "other.db").outcomes
    *searched, _, final = second.comparisons
    repeated = {c for comparison in searched for c in comparison} & first.seen
    assert repeated <= {DEFAULT}, "what the first measured is not measured again"
    assert SPACE.normal(outcome.winner) == GOAL and outcome.winner in final
    import optuna

    names = optuna.get_all_study_names(url)
    assert len(names) == len(SPACE.defaults)
    for name in names:
        states = {trial.state for trial in optuna.load_study(study_name=name, storage=url).trials}
        assert optuna.trial.TrialState.RUNNING not in states


def test_studies_are_of_one_problem_kernel_and_kind_of_machine() -> None:
    context = search.Context(Fake(lambda c: 1.0), None, THREADS, ISA, search.EFFORTS["quick"])
    here = this_machine()

    def name(problem: Problem = DENSE, algorithm: str = "direct", machine=here, **changes) -> str:
        changed = dataclasses.replace(context, **changes)
        return search.study_name(problem, algorithm, changed, machine)

    assert name() == name(machine=dataclasses.replace(here, usable_cores=99, stepping=99))
    others = [
        name(LARGER),
        name(algorithm="im2win"),
        name(machine=dataclasses.replace(here, l2_bytes=1)),
        name(threads=THREADS + 1),
        name(isa="abacus"),
    ]
    assert len({name(), *others}) == 6


def test_a_budget_goes_to_what_takes_most_time(path: Path) -> None:
    small = problems.make(1, 4, 4, (6, 6), (3, 3))
    fake = Fake(lambda candidate: 1.0)
    result = _run(fake, small, DENSE, budget_seconds=60.0)
    assert [task.problem for task, _ in result.outcomes] == [DENSE, small]
    result = _run(Fake(lambda candidate: 1.0), small, DENSE, budget_seconds=1e-9, again=True)
    assert {outcome.status for _, outcome in result.outcomes} == {"skipped"}


def test_a_default_plan_that_fails_fails_its_problem_only(path: Path) -> None:
    class Failing(Fake):
        def compare(self, problem: Problem, plans: Sequence[Plan], **options) -> list[Finding]:
            if problem == DENSE:
                raise LaboratoryError("the default plan crashed: SIGSEGV")
            return super().compare(problem, plans, **options)

    result = _run(Failing(lambda candidate: 1.0), DENSE, LARGER)
    assert [outcome.status for _, outcome in result.outcomes] == ["failed", "default"]
    assert result.exit_code() == 1
    assert "SIGSEGV" in str(result)


def test_without_a_native_kernel(path: Path) -> None:
    result = _run(Fake(lambda candidate: 1.0), dataclasses.replace(DENSE, lhs_dtype="float64"))
    assert result.outcomes[0][1].status == "unsupported"
    assert result.exit_code() == 3


def test_counts_of_equal_problems_add_up() -> None:
    tasks = [tune.Task("a", DENSE, 2), tune.Task("b", LARGER), tune.Task("c", DENSE, 3)]
    assert [(t.name, t.count) for t in tune.merged(tasks)] == [("a", 5), ("b", 1)]


@pytest.mark.parametrize(
    ("options", "blame"),
    [
        ({"effort": "heroic"}, "effort"),
        ({"threads": 0}, "threads"),
        ({"budget_seconds": 0.0}, "budget_seconds"),
    ],
)
def test_wrong_options(options: dict, blame: str) -> None:
    with pytest.raises(ValueError, match=blame):
        tune.Options(**options)


def test_more_threads_than_cpus(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(lambda candidate: 1.0)
    with pytest.raises(ValueError, match="threads: 10000 asked for"):
        _run(fake, threads=10_000)
    monkeypatch.setenv("NPROC", "9999")
    with pytest.raises(ValueError, match="threads: 9999 asked for"):
        _run(fake, threads=None)


def test_a_machine_whose_speed_jumps_does_not_make_winners() -> None:
    """Round by round the first seems faster; it was only measured before the machine got slow."""
    one = Finding("ok", "", (1.0, 1.0, 2.0, 2.0, 2.0), 5)
    other = Finding("ok", "", (1.1, 1.1, 2.2, 1.0, 1.0), 5)
    assert search.Paired.of(one, other).ratio < 0.95
    assert not search.Paired.of(one, other).faster()
    sure = Finding("ok", "", (1.0, 1.01, 2.0, 2.0, 2.0), 5)
    slower = Finding("ok", "", tuple(1.1 * ns for ns in sure.ns), 5)
    assert search.Paired.of(sure, slower).faster()
    assert not search.Paired.of(slower, sure).faster()
    assert not search.Paired.of(sure, sure).faster()


def test_recorded_lines() -> None:
    line = f'{{"count": 3, "problem": {DENSE.key}}}'
    tasks = tune.recorded([line, "", f'{{"problem": {LARGER.key}}}'])
    assert [(task.problem, task.count) for task in tasks] == [(DENSE, 3), (LARGER, 1)]
    for wrong, blame in {
        "nonsense": "Expecting value",
        "[]": "not an object",
        '{"problem": {}, "size": 1}': "not an object",
        '{"count": 2}': "not an object",
        f'{{"count": 0, "problem": {DENSE.key}}}': "count: 0",
        f'{{"count": true, "problem": {DENSE.key}}}': "count: True",
        '{"problem": {"lhs_shape": [1]}}': "fields are missing",
    }.items():
        with pytest.raises(ValueError, match=f"shapes.jsonl:2: .*{blame}"):
            tune.recorded([line, wrong], "shapes.jsonl")


# --- XLA ---------------------------------------------------------------------------------------


def _with_xla(ratio: float) -> Callable[[Candidate], float]:
    ours = _towards(GOAL)
    return lambda candidate: ratio if candidate.algorithm == "xla" else ours(candidate)


def test_xla_takes_part_only_where_it_may(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(_with_xla(0.1))
    _run(fake)
    assert "xla" not in {candidate.algorithm for candidate in fake.seen}
    assert _dispatch.decide(DENSE, algorithm="any").plan is not None, "not measured"
    late = Fake(_with_xla(0.1))
    ((_, outcome),) = _run(late, family="any").outcomes
    assert outcome.status == "known" and outcome.others["xla"] == pytest.approx(0.1 / 0.7, rel=0.01)
    compared = [candidate.algorithm for candidate in late.comparisons[0]]
    assert (compared[0], compared[-1]) == (GOAL.algorithm, "xla")
    assert all(_registry.family(name) != "canonical" for name in compared[1:])
    assert _dispatch.decide(DENSE).plan is not None, "canonical is canonical"
    for options in ({"algorithm": "any"}, {}):
        if not options:
            monkeypatch.setenv("JAXWIN_FAMILY", "any")
        decision = _dispatch.decide(DENSE, **options)
        assert (decision.tier, decision.plan) == ("tuned", None)
        assert decision.reason == "XLA was measured to be faster"
    (row,) = jaxwin.explain(DENSE)
    assert (row.tier, row.algorithm) == ("tuned", "xla") and str(path) in row.measured
    again = Fake(_with_xla(0.1))
    _run(again, family="any")
    assert not again.comparisons, "it is known"
    _run(Fake(_with_xla(0.9)), family="any", again=True)
    assert _dispatch.decide(DENSE).plan is not None, "the last comparison counts"


def test_another_family_wins_only_where_it_may(path: Path) -> None:
    """It is compared with the winner of the canonical family, and stored as what it is."""
    ours = _towards(GOAL)

    def ratio(candidate: Candidate) -> float:
        return 0.2 if candidate.algorithm == "winograd" else ours(candidate)

    ((_, outcome),) = _run(Fake(ratio), family="any").outcomes
    assert outcome.winner == GOAL, "of the canonical family"
    assert outcome.others["winograd"] == pytest.approx(0.2 / 0.7, rel=0.01)
    assert "winograd takes 0.29 of its time" in str(outcome)
    rows = [row for row in _rows(path) if row.algorithm == "winograd"]
    assert {row.family for row in rows} == {"winograd"}
    assert [row.confirmed for row in rows].count(True) == 1
    found = _dispatch.decide(DENSE, algorithm="any")
    assert found.tier == "tuned" and found.plan is not None and found.plan.algorithm == "winograd"
    decision = _dispatch.decide(DENSE)
    assert decision.plan is not None and _candidate(decision.plan) == GOAL


@pytest.mark.parametrize("fate", ["wrong", "crashed", "timeout", "error"])
def test_xla_that_goes_wrong(path: Path, fate: str) -> None:
    xla = Candidate("xla", ())
    ((_, outcome),) = _run(Fake(_with_xla(0.1), {xla: fate}), family="any").outcomes
    assert outcome.status == "tuned" and "xla" not in outcome.others
    assert _dispatch.decide(DENSE, algorithm="any").plan is not None


def test_a_family_that_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_FAMILY", "kin")
    with pytest.raises(ValueError, match="JAXWIN_FAMILY: 'kin' is not one of canonical, any"):
        _dispatch.decide(DENSE)


def test_an_algorithm_by_name_takes_its_own_tuned_parameters(path: Path) -> None:
    other = next(a for a in SPACE.defaults if a != GOAL.algorithm)
    best = SPACE.neighbours(SPACE.defaults[other])[-1]
    rows = [
        Measurement(
            DENSE, candidate.algorithm, candidate.parameters, ISA, THREADS, "ok", ns, ns, 0.0, 1,
            confirmed=confirmed,
        )
        for candidate, ns, confirmed in (
            (GOAL, 1e3, True),
            (SPACE.defaults[other], 9e3, False),
            (best, 8e3, False),
        )
    ]  # fmt: skip
    with Database(path) as database:
        database.add(rows)
    _tuning.reload()
    assert _candidate(_dispatch.decide(DENSE).plan) == GOAL
    decision = _dispatch.decide(DENSE, algorithm=other)
    assert decision.tier == "requested" and _candidate(decision.plan) == best
    assert decision.row.nanoseconds == 8e3
    assert _dispatch.decide(LARGER, algorithm=other).row is None


def test_what_does_the_same_is_measured_once(path: Path) -> None:
    fake = Fake(_towards(GOAL))
    _run(fake)
    normal = [SPACE.normal(candidate) for candidate in fake.seen]
    assert len(set(normal)) == len(normal)
