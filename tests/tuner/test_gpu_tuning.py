# SPDX-License-Identifier: Apache-2.0
"""Tuning for a GPU that is made up: the search, the rows, and what dispatch makes of them.

Only the kernels do not run: in the measuring process the CPU's take their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import problems
import pytest

import jaxwin
from jaxwin import _dispatch, _explain, _machine, _record, _tuning
from jaxwin._plan import Decision, Plan
from jaxwin._problem import Problem
from jaxwin.tuner import database_commands, gpu, search, tune, tune_command
from jaxwin.tuner.database import Database, Measurement
from jaxwin.tuner.laboratory import Finding, Laboratory
from jaxwin.tuner.space import Space

DENSE = problems.make(2, 8, 16, (12, 13), (3, 3))
LARGER = problems.make(4, 8, 16, (12, 13), (3, 3))
NARROW = dataclasses.replace(
    DENSE, lhs_dtype="bfloat16", rhs_dtype="bfloat16", out_dtype="bfloat16"
)
GPU = ("Made-up GPU", 7, "9.0")


@pytest.fixture
def path(own_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(gpu.REHEARSAL, "1")
    monkeypatch.setattr(_machine, "_gpu", lambda: GPU)
    return own_database


class Fake:
    """A measurer with made-up times, in units of one that all other plans take."""

    def __init__(self, times: Callable[[Plan], float]) -> None:
        self.times = times
        self.seen: list[Plan] = []

    def compare(
        self, problem: Problem, plans: Sequence[Plan], *, rounds: int, **options: float
    ) -> list[Finding]:
        self.seen += plans
        return [Finding("ok", "", (1e5 * self.times(plan),) * rounds, rounds) for plan in plans]

    def stop(self) -> None:
        pass


def _tune(
    times: Callable[[Plan], float], problem: Problem = DENSE, **options
) -> tuple[Fake, search.Outcome]:
    fake = Fake(times)
    result = tune.run([tune.Task("x", problem)], tune.Options(**options), measurer=fake)
    assert result.complete and result.isa == "cuda" and result.threads == 1
    ((_, outcome),) = result.outcomes
    return fake, outcome


def _rows(path: Path, problem: Problem = DENSE) -> list[Measurement]:
    with Database(path) as database:
        return list(database.measurements(problem))


def _decide(problem: Problem = DENSE, **options) -> Decision:
    return _dispatch.decide(problem, platform="cuda", enforce=False, **options)


def _prefer(algorithm: str, xla: float = 2.0) -> Callable[[Plan], float]:
    """One algorithm's unusual parameters are the fastest."""

    def times(plan: Plan) -> float:
        if plan.algorithm == "xla":
            return xla
        return (0.7 if plan.algorithm == algorithm else 1.0) + 0.01 * (plan.params != ())

    return times


def test_for_highest_precision_only_kernels_with_the_bits_of_the_contract(path: Path) -> None:
    fake, outcome = _tune(_prefer("direct"), exact=True)
    families = {plan.algorithm for plan in fake.seen}
    assert "im2win" in families and not families & {"tensor", "two_stage"}
    assert outcome.status == "tuned" and outcome.winner and outcome.winner.algorithm == "direct"
    assert outcome.others["xla"] == pytest.approx(2.0 / 0.7)
    rows = _rows(path)
    assert {(row.isa, row.threads) for row in rows} == {("cuda", 1)}
    assert {row.machine.gpu_name for row in rows} == {GPU[0]}
    assert {row.family for row in rows} == {"canonical", "any"}
    _tuning.reload()
    decision = _decide(exact=True)
    assert decision.tier == "tuned" and decision.plan and decision.plan.algorithm == "direct"
    assert _decide(exact=False).plan is None  # that is measured apart
    assert _tune(_prefer("direct"), exact=True)[1].status == "known"


def test_below_that_all_families_and_xla(path: Path) -> None:
    fake, outcome = _tune(_prefer("tensor"), budget_seconds=60.0)
    assert {"im2win", "tensor", "two_stage"} <= {plan.algorithm for plan in fake.seen}
    assert outcome.winner and outcome.winner.algorithm == "tensor"
    assert {row.isa for row in _rows(path)} == {"cuda-tensor"}
    _tuning.reload()
    decision = _decide(exact=False)
    assert decision.tier == "tuned" and decision.plan and decision.plan.algorithm == "tensor"
    assert _decide(exact=True).plan is None  # never below the precision that is asked for


def test_cudnn_stays_where_it_is_faster(path: Path) -> None:
    _, outcome = _tune(_prefer("tensor", xla=0.5), NARROW)
    assert outcome.others["xla"] == pytest.approx(0.5 / 0.71, rel=0.02)
    _tuning.reload()
    decision = _decide(NARROW)
    assert (decision.tier, decision.plan) == ("tuned", None)
    assert decision.reason == "XLA was measured to be faster"


def test_at_highest_cudnn_takes_part_where_its_bits_are_allowed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tune(_prefer("direct", xla=0.5), exact=True)
    _tuning.reload()
    ours = _decide(exact=True)
    assert ours.plan and ours.plan.algorithm == "direct"
    assert _decide(exact=True, algorithm="any").plan is None
    monkeypatch.setenv("JAXWIN_FAMILY", "any")
    assert _decide(exact=True).reason == "XLA was measured to be faster"


def test_parameters_are_lent_where_the_lender_beats_xla(path: Path) -> None:
    _tune(_prefer("direct", xla=0.5), exact=True)
    _tuning.reload()
    assert _decide(LARGER, exact=True).plan is None
    _tune(_prefer("direct"), exact=True, again=True)
    _tuning.reload()
    decision = _decide(LARGER, exact=True)
    assert decision.tier == "transferred" and decision.plan and decision.row
    assert decision.plan.algorithm == "direct"
    assert decision.row.problem == DENSE


def test_an_algorithm_by_name_takes_its_measured_parameters(path: Path) -> None:
    def times(plan: Plan) -> float:  # the larger the tile, the faster
        return 1.0 - 0.001 * plan.params[0] if plan.algorithm == "im2win" else 1.0

    _, outcome = _tune(times, exact=True)
    assert outcome.winner and outcome.winner.algorithm == "im2win"
    _tuning.reload()
    decision = _decide(exact=True, algorithm="im2win")
    assert decision.tier == "requested" and decision.plan and decision.row
    assert decision.plan.params == outcome.winner.params


def test_another_gpu_and_the_cpu_take_no_notice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tune(_prefer("direct"), exact=True)
    _tuning.reload()
    assert _dispatch.decide(DENSE, enforce=False).tier == "heuristic"
    monkeypatch.setattr(_machine, "_gpu", lambda: (GPU[0], 8, GPU[2]))
    _tuning.reload()
    with pytest.warns(RuntimeWarning, match="holds no winner for this machine"):
        assert _decide(exact=True).plan is None


def test_explain_shows_the_measurement(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tune(_prefer("direct"), exact=True)
    _tuning.reload()
    monkeypatch.setattr(_explain, "default_platform", lambda: "cuda")

    def fn(x: jax.Array, w: jax.Array, precision: str | None) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jaxwin.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=numbers, precision=precision
        )

    shapes = (jax.ShapeDtypeStruct(s, "float32") for s in (DENSE.lhs_shape, DENSE.rhs_shape))
    x, w = shapes
    (row,) = jaxwin.explain(lambda x, w: fn(x, w, "highest"), x, w)
    assert (row.algorithm, row.tier) == ("direct", "tuned")
    assert str(path) in row.measured and row.rejected["im2win"] == "not the tuned choice"
    (row,) = jaxwin.explain(lambda x, w: fn(x, w, None), x, w)
    assert row.algorithm == "xla" and "tensor cores are allowed" in row.reason
    # What a function needs is tuned for the precision that it has.
    (task,) = tune.traced(lambda x, w: fn(x, w, "highest"), x, w)
    assert task.exact is True


def test_rows_that_a_precision_does_not_allow_are_not_taken(path: Path) -> None:
    gpu_here = _machine.this_gpu()
    space = Space(DENSE, "cuda-tensor", 1, 2**30)
    default = space.defaults["tensor"]
    with Database(path) as database:
        database.add(
            [
                Measurement(
                    DENSE,
                    "tensor",
                    default.parameters,
                    "cuda",
                    1,
                    "ok",
                    1.0,
                    1.0,
                    0.0,
                    machine=gpu_here,
                )
            ]
        )
    _tuning.reload()
    with pytest.warns(RuntimeWarning, match="holds no winner for this machine and these kernels"):
        assert _decide(exact=True).plan is None


def test_what_programs_missed_on_a_gpu_is_tuned_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for problem, threads, isa in (
        (DENSE, 1, "cuda"),
        (DENSE, 1, "cuda-tensor"),
        (LARGER, 1, "cuda"),
        (LARGER, 3, ""),
    ):
        _record.miss(problem, threads, isa)
    tasks, others = tune.missed(3, "cuda")
    assert {(task.problem, task.exact) for task in tasks} == {
        (DENSE, True),
        (DENSE, False),
        (LARGER, True),
    }
    assert others == {("on the CPU", "--device cpu"): 1}
    on_cpu, others = tune.missed(3, "cpu")
    assert on_cpu == [tune.Task(str(LARGER), LARGER)]
    assert others == {("on a GPU", "--device cuda"): 3}
    assert database_commands._missed()[0].startswith("3 on GPUs, 1 with 3 threads (")
    result = tune.run(tasks, tune.Options(), measurer=Fake(lambda plan: 1.0))
    assert {result.gpu_isa(task) for task, _ in result.outcomes} == {"cuda", "cuda-tensor"}
    tune_command._forget(result)
    assert [*_record.misses()] == [(LARGER, 3, "")]
    monkeypatch.setenv("JAXWIN_MODE", "require")
    for exact in (True, False):
        assert _dispatch.decide(DENSE, platform="cuda", exact=exact).tier == "tuned"


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpu.REHEARSAL, raising=False)
    assert tune.device(None) == "cpu"
    with pytest.raises(ValueError, match="device: JAX has no CUDA plugin"):
        tune.device("cuda")


def test_a_gpu_that_no_kernel_can_run_on_is_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpu.REHEARSAL, raising=False)
    monkeypatch.setattr(tune._compat, "may_use_cuda", lambda: True)
    monkeypatch.setattr(_machine, "_gpu", lambda: GPU)
    monkeypatch.setattr(tune._cuda, "unusable", lambda: "")
    assert tune.device(None) == tune.device("cuda") == "cuda"
    monkeypatch.setattr(tune._cuda, "unusable", lambda: "compute capability 7.5")
    assert tune.device(None) == "cpu"
    with pytest.raises(ValueError, match=r"device: compute capability 7\.5"):
        tune.device("cuda")


@pytest.mark.parametrize("isa", ["cuda", "cuda-tensor"])
def test_candidates_in_the_measuring_process(
    isa: str, laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, checks and timing as on a GPU; XLA beside the plans."""
    problem = DENSE if isa == "cuda" else dataclasses.replace(NARROW, bias=True, activation="relu")
    space = Space(problem, isa, 1, search.MAX_WORKSPACE)
    laboratory.isa = isa
    names = ["im2win", "direct", "few_channels"] if isa == "cuda" else ["tensor", "direct"]
    plans = [space.plan(space.defaults[name]) for name in names]
    plans.append(Plan("xla", isa, 1, (), 0))
    found = laboratory.compare(problem, plans, rounds=2, min_seconds=1e-6, slower_than=1e9)
    statuses = [finding.status for finding in found]
    assert statuses == ["ok", "wrong", *["ok"] * (len(plans) - 2)], found
    assert "differ" in found[1].error
    assert all(len(finding.ns) == 2 and finding.calls >= 4 for finding in found if finding.ns)


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(gpu.REHEARSAL, "1")
        monkeypatch.setenv("JAXWIN_TUNER_FAULTS", "wrong direct")
        with Laboratory(1, 10.0, 0, "cuda") as made:
            yield made


def test_small_operands_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.REHEARSAL, "1")
    seen: list[np.ndarray] = []

    def finished(results: list[jax.Array]) -> list[jax.Array]:
        seen.append(np.asarray(results[0]).copy())
        return jax.block_until_ready(results)

    monkeypatch.setattr(gpu, "_finished", finished)
    subject = gpu.Subject(DENSE.key, 1, "cuda")
    run, status, error = subject.compile(Plan("xla", "cuda", 1, (), 0))
    assert (status, error) == ("ok", "")
    for _ in range(3):
        run()
    judged, first, second, third = seen
    np.testing.assert_array_equal(first, judged)
    np.testing.assert_array_equal(third, judged)
    assert (second != judged).any()

    monkeypatch.delenv(gpu.REHEARSAL)
    size = 4 * (2 * 12 * 13 * 8 + 3 * 3 * 8 * 16 + 2 * 10 * 11 * 16)
    monkeypatch.setattr(gpu, "_MOST_CALLS", 2)
    for total, sets in ((5 * size, 3), (9999 * size, 16)):
        monkeypatch.setattr(gpu, "_ROTATED_BYTES", total)
        subject = gpu.Subject(DENSE.key, 1, "cuda")
        assert len(subject.sets) == sets
        assert {len(operands) for operands in subject.sets} == {subject.calls} == {2}
