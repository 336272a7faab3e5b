# SPDX-License-Identifier: Apache-2.0
"""The stopwatch and its statistics."""

from __future__ import annotations

import contextlib
import random
import statistics

import numpy as np
import pytest

from jaxwin.tuner import measure


def test_statistics() -> None:
    assert measure.mad([1, 1, 2, 2, 4, 6, 9]) == 1
    assert measure.mad([5]) == 0
    assert measure.geomean([1, 100]) == pytest.approx(10)
    samples = measure.Samples(inner=1, ns=[3.0, 1.0, 2.0, 100.0])
    assert (samples.median_ns, samples.mad_ns) == (2.5, 1.0)
    for empty in (measure.mad, measure.geomean):
        with pytest.raises(statistics.StatisticsError):
            empty([])


def test_the_error_of_a_ratio_shrinks_with_the_rounds() -> None:
    """It is about as large as medians of normal values scatter."""
    rng = np.random.default_rng(0)
    for count in (11, 44):
        drawn = rng.normal(1.0, 0.1, (2000, count))
        scatter = np.median(drawn, 1).std()
        assert np.mean([measure.error(list(row)) for row in drawn]) == pytest.approx(scatter, 0.1)
    assert measure.relative_error([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == 0
    assert measure.relative_error([1.0, 1.0, 1.0, 1.0], [2.0, 2.5, 3.0]) == (
        pytest.approx(0.5 * 1.4826 * 1.2533 / 3**0.5)
    )
    assert measure.relative_error([1.0, 2.0], [2.0, 4.0, 8.0]) is None


def _interleave(computations, **kwargs):
    options = {"threads": 1, "rounds": 4, "min_seconds": 1e-9, "budget_seconds": 60.0}
    rng = random.Random(kwargs.pop("seed", 0))
    timed = {name: measure.Timed(call) for name, call in computations.items()}
    return measure.interleave(timed, rng=rng, **(options | kwargs))


def _order(seed: int) -> list[str]:
    """The order in which computations are called, without repetitions."""
    calls: list[str] = []
    _interleave({name: lambda name=name: calls.append(name) for name in "abcd"}, seed=seed)
    return [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]


def test_rounds_have_a_random_order_that_the_seed_decides() -> None:
    assert _order(1) == _order(1)
    assert len({tuple(_order(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("threads", [1, 2])
def test_one_sample_per_round_and_computation(threads: int) -> None:
    results = _interleave({"a": lambda: None, "b": lambda: sum(range(50))}, threads=threads)
    for samples in results.values():
        assert samples.error == ""
        lengths = {len(v) for v in (samples.ns, samples.wall_ns, samples.cpu_ns, samples.faults)}
        assert lengths == {4}
        assert samples.ns == (samples.cpu_ns if threads == 1 else samples.wall_ns)


def test_a_sample_is_long_enough() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    (samples,) = _interleave({"a": call}, min_seconds=1e-3).values()
    assert samples.inner > 1
    assert count == 3 + 4 * (1 + samples.inner)


def test_a_computation_that_raises_does_not_stop_the_others() -> None:
    calls = 0

    def breaks() -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("first line\nsecond line")

    results = _interleave({"bad": breaks, "good": lambda: None})
    assert results["bad"].error == "RuntimeError: first line"
    assert len(results["good"].ns) == 4


def test_without_budget_there_is_one_sample() -> None:
    (samples,) = _interleave({"a": lambda: None}, budget_seconds=0).values()
    assert len(samples.ns) == 1


def test_calls_run_in_their_context() -> None:
    inside = False

    @contextlib.contextmanager
    def around():
        nonlocal inside
        inside = True
        yield
        inside = False

    def call() -> None:
        assert inside

    timed = {"a": measure.Timed(call, around)}
    results = measure.interleave(
        timed, threads=1, rounds=2, min_seconds=1e-9, budget_seconds=1, rng=random.Random(0)
    )
    assert results["a"].error == ""
    assert not inside


@pytest.mark.parametrize(("threads", "samples"), [(1, 1), (2, 2)])
def test_the_slow_are_given_up_unless_they_are_kept(threads: int, samples: int) -> None:
    work = {"fast": 10, "slow": 100_000, "kept": 100_000}
    results = _interleave(
        {name: lambda n=n: sum(range(n)) for name, n in work.items()},
        threads=threads,
        slower_than=3.0,
        keep=("kept",),
    )
    assert {name: len(found.ns) for name, found in results.items()} == {
        "fast": 4,
        "slow": samples,
        "kept": 4,
    }
