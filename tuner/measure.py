# SPDX-License-Identifier: Apache-2.0
"""The stopwatch: several computations timed in turn, and what their samples say.

Two clocks. With one thread it is the CPU time of the process: a share of the core that other
processes took is then not counted. With more it is wall-clock time, since CPU time adds up all
threads and would hide that they wait for each other; and on a GPU (threads: 0).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import random
import resource
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

SLOW_SECONDS = 1.0  # a call as long as this needs no loop, and no second warm-up
_WAKE_SECONDS = 0.01  # within which the system has given each thread a CPU of its own
_FEW = 3  # fewer rounds than these say nothing about how they differ


@dataclasses.dataclass(frozen=True)
class Timed:
    """A computation to be timed: what a call of `call` computes is finished on return.

    around: a context in which it runs, such as a library's global switch. calls: how often one call
    of `call` computes it.
    """

    call: Callable[[], Any]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    calls: int = 1


@dataclasses.dataclass
class Samples:
    """Measurements of one computation, per computation.

    inner: computations per sample. ns: the clock that counts; wall_ns and cpu_ns: both of them.
    faults: page faults that needed no disk.
    """

    inner: int
    ns: list[float] = dataclasses.field(default_factory=list)
    wall_ns: list[float] = dataclasses.field(default_factory=list)
    cpu_ns: list[float] = dataclasses.field(default_factory=list)
    faults: list[float] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def median_ns(self) -> float:
        """Median of the samples."""
        return statistics.median(self.ns)

    @property
    def mad_ns(self) -> float:
        """Median absolute deviation of the samples from their median."""
        return mad(self.ns)


def mad(values: Iterable[float]) -> float:
    """Median absolute deviation from the median.

    Raises:
        statistics.StatisticsError: there are no values.
    """
    values = list(values)
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)


def relative(one: Sequence[float], other: Sequence[float]) -> float:
    """How much time `other` takes relative to `one`: the median over the rounds of their ratios.

    Both are samples of one `interleave`, in order. The samples of a round lie near each other, so
    this says the same whether the machine runs fast or slow, which often changes for seconds. Where
    there are fewer than three rounds, it is the ratio of the medians.

    Raises:
        statistics.StatisticsError: one has no samples.
    """
    taken = _ratios(one, other)
    if len(taken) < _FEW:
        return statistics.median(other) / statistics.median(one)
    return statistics.median(taken)


def relative_error(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The standard error of `relative`; None where there are fewer than three rounds."""
    taken = _ratios(one, other)
    return None if len(taken) < _FEW else error(taken)


def _ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [b / a for a, b in zip(one, other, strict=False)]


def error(values: Sequence[float]) -> float:
    """The standard error of the median of values, from their median absolute deviation.

    Raises:
        statistics.StatisticsError: there are no values.
    """
    return 1.2533 * 1.4826 * mad(values) / math.sqrt(len(values))


def geomean(values: Iterable[float]) -> float:
    """Geometric mean of positive values.

    Raises:
        statistics.StatisticsError: there are no values, or one is not positive.
    """
    return statistics.geometric_mean(values)


def interleave(
    computations: Mapping[str, Timed],
    *,
    threads: int,
    rounds: int,
    min_seconds: float,
    budget_seconds: float,
    rng: random.Random,
    slower_than: float = math.inf,
    keep: Collection[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Samples]:
    """Times computations in rounds, each round in another random order.

    Before each sample the process sleeps and the computation runs untimed, once or with several
    threads for a while: threads of the computation before it, which spin for a while in wait of
    work, have then gone to sleep, and its own are awake, each on a CPU of its own (until then the
    system may need some of its ticks). A sample is a loop of at least `min_seconds`. A computation
    that has had `budget_seconds` gets no further samples, but at least one. One that is more than
    `slower_than` times slower than the fastest gets none after its first (with several threads,
    whose clock is less sure: its second), unless it is in `keep`. One that raises gets no (further)
    samples; its `error` then says why.
    """
    settle = 0.03 if threads > 1 else 0.004 * threads
    results: dict[str, Samples] = {}
    spent = dict.fromkeys(computations, 0.0)
    for name, timed in computations.items():
        progress(f"{name}: warm-up")
        start = time.perf_counter()
        results[name] = Samples(inner=1)
        try:
            with timed.around():
                results[name].inner = timed.calls * calls_per_sample(timed.call, min_seconds)
        except Exception as error:  # any library may fail in its own way; the others go on
            results[name].error = first_line(error)
        spent[name] += time.perf_counter() - start
    for number in range(rounds):
        order = list(computations)
        rng.shuffle(order)
        # Of whole rounds, so that the order within one does not matter.
        limit = slower_than * min((min(s.ns) for s in results.values() if s.ns), default=math.inf)
        for name in order:
            samples = results[name]
            if samples.error or (samples.ns and spent[name] > budget_seconds):
                continue
            enough = len(samples.ns) > (threads > 1)
            if enough and min(samples.ns) > limit and name not in keep:
                continue
            progress(f"round {number + 1} of {rounds}: {name}")
            start = time.perf_counter()
            try:
                with computations[name].around():
                    _take(computations[name], samples, threads, settle)
            except Exception as error:
                samples.error = first_line(error)
            spent[name] += time.perf_counter() - start
    return results


def first_line(error: Exception) -> str:
    """An exception as one line of text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def calls_per_sample(call: Callable[[], Any], min_seconds: float) -> int:
    """How many calls take at least so long, by the fastest of some."""
    seconds = math.inf
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > SLOW_SECONDS:
            break
    return max(1, math.ceil(min_seconds / max(seconds, 1e-7)))


def _take(timed: Timed, samples: Samples, threads: int, settle: float) -> None:
    call = timed.call
    time.sleep(settle)
    if not samples.ns or samples.ns[-1] * timed.calls < SLOW_SECONDS * 1e9:
        awake = time.perf_counter() + (_WAKE_SECONDS if threads > 1 else 0.0)
        call()
        while time.perf_counter() < awake:
            call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        cpu = time.process_time_ns()
        wall = time.perf_counter_ns()
        for _ in range(samples.inner // timed.calls):
            call()
        wall = time.perf_counter_ns() - wall
        cpu = time.process_time_ns() - cpu
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    finally:
        if collecting:
            gc.enable()
    samples.wall_ns.append(wall / samples.inner)
    samples.cpu_ns.append(cpu / samples.inner)
    samples.ns.append((cpu if threads == 1 else wall) / samples.inner)
    samples.faults.append(faults / samples.inner)
