# SPDX-License-Identifier: Apache-2.0
"""A tuning database as one HTML page that needs nothing else."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxwin
from jaxwin import _ffi, _registry, _tuning
from jaxwin._machine import Machine, this_machine
from jaxwin._problem import Problem
from jaxwin.tuner import svg
from jaxwin.tuner.database import Measurement, read_measurements, read_winners
from jaxwin.tuner.search import MAX_WORKSPACE, duration
from jaxwin.tuner.space import Candidate, Space

# What a page shows of a large database; the text says so.
_BARS = 40
_PANELS = 6
_WINNERS = 400
_FAILURES = 200
_POINTS = 1500
_PEAK_ITERATIONS = 2_000_000
_PEAK_SECONDS = 0.3
_FAMILIES = ("canonical", "tensor")  # in which winners are looked for; XLA's rows are apart


@dataclasses.dataclass(frozen=True)
class Subject:
    """A problem with an instruction set and thread count on a machine, and what was measured of it.

    winner: what dispatch takes. default: the default plan's measurement, that of the comparison
    which made the winner if possible; None where it was not measured. rows: the oldest first.
    """

    problem: Problem
    isa: str
    threads: int
    machine: Machine
    winner: Measurement
    default: Measurement | None
    rows: list[Measurement]

    @property
    def before(self) -> float:
        """Nanoseconds of the default plan; of the winner where that is not known."""
        return (self.default or self.winner).ns_median or math.nan

    @property
    def after(self) -> float:
        """Nanoseconds of the winner."""
        return self.winner.ns_median or math.nan

    @property
    def gflops(self) -> float:
        """Of the winner."""
        return self.problem.flops / self.after

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte of operands and result, each moved once."""
        p = self.problem
        arrays = (
            (p.lhs_shape, p.lhs_dtype),
            (p.rhs_shape, p.rhs_dtype),
            (p.out_shape, p.out_dtype),
        )
        return p.flops / sum(math.prod(shape) * _bytes(dtype) for shape, dtype in arrays)

    def candidates(self) -> Iterator[tuple[Candidate, Measurement]]:
        """What has a time, in the order in which it was measured."""
        for row in self.rows:
            if row.status == "ok" and row.ns_median and row.family in _FAMILIES:
                names = _registry.parameter_names(row.algorithm, row.isa) or tuple(row.parameters)
                values = tuple(row.parameters.get(name, 0) for name in names)
                yield Candidate(row.algorithm, values, _registry.side(row.isa)), row

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes it."""
        return _registry.side(self.isa) != ""


def _bytes(dtype: str) -> int:
    try:
        return int(jnp.dtype(dtype).itemsize)
    except TypeError:  # a file may hold any word
        return 4


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What this machine does at best, measured: GFLOP/s of one thread, GB/s of all threads."""

    gflops: float
    memory: float
    cache: float


@dataclasses.dataclass(frozen=True)
class Content:
    """What a page is made from. left_out: rows of other machines and of kernels that changed."""

    path: Path
    subjects: list[Subject]
    failures: list[Measurement]
    measured: int
    left_out: int
    peaks: dict[int, Peaks]

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return {
            "database": str(self.path),
            "measurements": self.measured,
            "left_out": self.left_out,
            "peaks": {str(n): dataclasses.asdict(p) for n, p in self.peaks.items()},
            "problems": [
                {
                    "problem": str(s.problem),
                    "isa": s.isa,
                    "threads": s.threads,
                    "machine": str(s.machine),
                    "algorithm": s.winner.algorithm,
                    "parameters": s.winner.parameters,
                    "before_ns": s.before,
                    "after_ns": s.after,
                    "gflops": s.gflops,
                    "intensity": s.intensity,
                    "candidates": sum(1 for _ in s.candidates()),
                }
                for s in self.subjects
            ],
            "failures": [
                {"problem": str(m.problem), "algorithm": m.algorithm, "parameters": m.parameters}
                | {"status": m.status, "error": m.error}
                for m in self.failures
            ],
        }


def gather(path: Path, *, everything: bool = False, peaks: bool = True) -> Content:
    """Reads a database; one that is missing or empty gives an empty page.

    everything: measurements of other machines and of other kernels, too. peaks: whether this
    machine is measured, which takes a second or two.

    Raises:
        Unusable: the database cannot be read.
    """
    here = this_machine()
    try:
        with _tuning.reading(path) as connection:
            winners = {row["uid"]: row for row in read_winners(connection)}
            rows = list(read_measurements(connection))
    except _tuning.Unusable as error:
        if error.state not in _tuning.ABSENT:
            raise
        winners, rows = {}, []
    likeness = {machine: here.likeness(machine) for machine in {row.machine for row in rows}}

    def current(row: Measurement) -> bool:
        usable = likeness[row.machine] != "other" or row.machine.id == here.id
        return row.abi == _abi(row) and usable

    shown = [row for row in rows if everything or current(row)]
    groups: dict[tuple[Any, ...], list[Measurement]] = collections.defaultdict(list)
    for row in shown:
        groups[row.problem, row.isa, row.threads, row.machine.id].append(row)
    subjects = []
    for (problem, isa, threads, _), group in groups.items():
        best = [m for m in group if m.uid in winners and m.family in _FAMILIES]
        if not best:
            continue
        winner = min(best, key=lambda m: (m.abi != _abi(m), -m.confirmed, m.ns_median))
        default = _default(problem, isa, threads, group, winner)
        subjects.append(Subject(problem, isa, threads, winner.machine, winner, default, group))
    subjects.sort(key=lambda s: s.after - s.before)
    failures = [row for row in shown if row.status != "ok"]
    measure = {s.threads for s in subjects if not s.on_gpu} if peaks else set()
    return Content(
        path,
        subjects,
        failures,
        len(shown),
        len(rows) - len(shown),
        {threads: measure_peaks(threads) for threads in sorted(measure)[:3]},
    )


def _abi(row: Measurement) -> str | None:
    """The state of the kernels of a row's algorithm now; None where there is no such algorithm."""
    if _registry.parameter_names(row.algorithm, row.isa) is None:
        return None
    return _registry.abi(row.algorithm, row.isa)


def _default(
    problem: Problem, isa: str, threads: int, rows: list[Measurement], winner: Measurement
) -> Measurement | None:
    """The default plan's measurement that was made together with the winner's, or the nearest."""
    space = Space(problem, isa, threads, MAX_WORKSPACE)
    default = space.incumbent()
    if default is None:
        return None
    mine = [
        row
        for row in rows
        if row.status == "ok"
        and row.algorithm == default.algorithm
        and row.parameters == default.parameters
    ]
    made = datetime.datetime.fromisoformat(winner.created)

    def apart(row: Measurement) -> float:
        return abs((datetime.datetime.fromisoformat(row.created) - made).total_seconds())

    return min(mine, key=apart, default=None)


def measure_peaks(threads: int) -> Peaks:
    """Measures this machine, for the roofline."""
    isa = _registry.isa()

    def fastest(work: Callable[[], float], alone: bool) -> float:
        # As in the measurements: CPU time does not count what others took of the core.
        clock = time.process_time if alone else time.perf_counter
        rates: list[float] = []
        end = time.perf_counter() + _PEAK_SECONDS
        while not rates or time.perf_counter() < end:
            start = clock()
            amount = work()
            rates.append(amount / max(clock() - start, 1e-9) / 1e9)
        return max(rates)

    caches = _registry.registry()["caches"]
    # Three arrays that no cache holds, and three that one core's second cache does.
    large = min(max(4 * caches["l3"], 2**26), 2**29) // 3 // 4
    small = max(caches["l2"], 2**18) // 2 // 3 // 4
    return Peaks(
        threads * fastest(lambda: float(_ffi.measure_peak(isa, _PEAK_ITERATIONS)), True),
        fastest(_triad(large // threads, threads, 1), threads == 1),
        fastest(_triad(small, threads, 50), threads == 1),
    )


def _triad(size: int, threads: int, times: int) -> Callable[[], float]:
    arrays = [tuple(np.ones(size, np.float32) for _ in range(3)) for _ in range(threads)]

    def add(a: Any, b: Any, c: Any) -> None:
        for _ in range(times):
            np.add(a, b, out=c)

    def work() -> float:
        workers = [threading.Thread(target=add, args=mine) for mine in arrays[1:]]
        for worker in workers:
            worker.start()
        add(*arrays[0])
        for worker in workers:
            worker.join()
        return 12.0 * size * threads * times

    return work


# --- charts ----------------------------------------------------------------------------------


def _bars(subjects: Sequence[Subject]) -> str:
    """Before and after, per convolution; what saves most first."""
    shown = subjects[:_BARS]
    label, width, row = 345.0, 1060.0, 34.0
    unit, name = _unit(max(s.before for s in shown))
    high = max(max(s.before, s.after) for s in shown) / unit
    room = width - label - 150
    height = 30 + row * len(shown) + 26
    parts = []
    for tick in svg.nice_ticks(high):
        x = label + room * tick / high
        parts.append(svg.line(x, 14, x, height - 24, "grid"))
        parts.append(svg.text(x, height - 8, svg.plain(tick), "tick", "middle"))
    parts.append(svg.text(label + room + 14, height - 8, name, "tick"))
    for i, s in enumerate(shown):
        y = 18 + i * row
        plan = f"{s.winner.algorithm} {_parameters(s.winner)}"
        tip = f"{s.problem}, {s.threads} threads: {duration(s.before)} by default, "
        tip += f"{duration(s.after)} with {plan}"
        parts.append(svg.text(label - 10, y + 18, svg.shortened(_name(s), 47), "label", "end"))
        parts.append(svg.rectangle(label, y + 2, room * s.before / unit / high, 11, "before", tip))
        parts.append(svg.rectangle(label, y + 15, room * s.after / unit / high, 11, "after", tip))
        gain = s.before / s.after
        x = label + room * max(s.before, s.after) / unit / high + 8
        kind = "gain" if gain >= 1.005 else "tick"
        told = f"{gain:.2f}x" if gain >= 1.005 else "default is best"
        parts.append(svg.text(x, y + 18, told, kind))
    return svg.picture(width, height, parts, "time of each convolution before and after tuning")


def _name(s: Subject) -> str:
    return f"{s.problem} · GPU" if s.on_gpu else f"{s.problem} · {s.threads}T"


def _parameters(m: Measurement) -> str:
    return " ".join(f"{k}={v}" for k, v in m.parameters.items()) or "no parameters"


def _roofline(subjects: Sequence[Subject], peaks: Peaks | None, threads: int) -> str:
    """Where convolutions stand between what memory and what arithmetic allow."""
    width, height, left, bottom = 560.0, 380.0, 52.0, 332.0
    intensities = [s.intensity for s in subjects]
    speeds = [s.gflops for s in subjects]
    top = max(*speeds, peaks.gflops if peaks else 0) * 1.4
    low = min(*speeds, top / 30) / 1.5
    x = svg.Log(min(*intensities, 1.0) / 1.5, max(*intensities, 100.0) * 1.5, left, width - 16)
    y = svg.Log(low, top, bottom, 16)
    parts = [
        *(svg.line(x(t), 16, x(t), bottom, "grid") for t in x.ticks()),
        *(svg.text(x(t), bottom + 18, svg.plain(t), "tick", "middle") for t in x.ticks()),
        *(svg.line(left, y(t), width - 16, y(t), "grid") for t in y.ticks()),
        *(svg.text(left - 8, y(t) + 4, svg.plain(t), "tick", "end") for t in y.ticks()),
        svg.text((left + width) / 2, height - 8, "operations per byte", "tick", "middle"),
        svg.text(left - 8, 10, "GFLOP/s", "tick", "end"),
    ]
    if peaks:
        for rate, words in ((peaks.cache, "L2"), (peaks.memory, "memory")):
            ridge = peaks.gflops / rate
            start = max(x.low, low / rate)
            parts.append(
                svg.path(
                    [(x(start), y(start * rate)), (x(ridge), y(peaks.gflops))]
                    if ridge > start
                    else [],
                    "roof",
                )
            )
            at = math.sqrt(start * min(ridge, x.high)) if ridge > start else x.low
            parts.append(
                svg.text(x(at) + 8, y(at * rate) + 14, f"{words} {rate:.0f} GB/s", "roofname")
            )
        flat = max(x.low, peaks.gflops / peaks.cache)
        parts.append(svg.line(x(flat), y(peaks.gflops), width - 16, y(peaks.gflops), "roof"))
        parts.append(
            svg.text(width - 20, y(peaks.gflops) - 7, f"FMA {peaks.gflops:.0f}", "roofname", "end")
        )
    for s in subjects[:_POINTS]:
        share = f", {s.gflops / peaks.gflops:.0%} of the peak" if peaks else ""
        tip = f"{_name(s)}: {s.gflops:.0f} GFLOP/s{share}, {s.winner.algorithm}"
        if s.default is not None and s.before > s.after * 1.005:
            slow = y(s.problem.flops / s.before)
            parts.append(svg.line(x(s.intensity), slow, x(s.intensity), y(s.gflops), "rise"))
        kind = f"point a{_registry_index(s.winner.algorithm)}"
        radius = 5.0 if len(subjects) < 100 else 3.2
        parts.append(svg.dot(x(s.intensity), y(s.gflops), radius, kind, tip))
    return svg.picture(width, height, parts, f"roofline with {threads} threads")


def _registry_index(algorithm: str) -> int:
    names = _registry.algorithm_names()
    return names.index(algorithm) % 10 if algorithm in names else 9


def _legend(subjects: Sequence[Subject]) -> str:
    counts = collections.Counter(s.winner.algorithm for s in subjects)
    items = (
        f'<span><i class="swatch a{_registry_index(name)}"></i>{escape(name)} ({count})</span>'
        for name, count in counts.most_common()
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _progress(subject: Subject) -> list[tuple[float, float]]:
    """(time of a candidate, best so far), each relative to the default plan, in order."""
    points = []
    best = math.inf
    for _, row in subject.candidates():
        ratio = (row.ns_median or 0.0) / subject.before
        best = min(best, ratio)
        points.append((ratio, best))
    return points


def _history(subjects: Sequence[Subject]) -> str:
    """How the search went: each candidate, and the best so far."""
    shown = [s for s in subjects if sum(1 for _ in s.candidates()) > 2][:_PANELS]
    if not shown:
        return ""
    width, height = 330.0, 210.0
    panels = []
    for s in shown:
        points = _progress(s)
        left, bottom, right = 40.0, 172.0, width - 10
        low = min(best for _, best in points)
        y = svg.Log(min(0.5, low / 1.1), 2.2, bottom, 30)

        def x(i: int, left: float = left, right: float = right, n: int = len(points)) -> float:
            return left + (right - left) * (i + 0.5) / n

        parts = [svg.text(4, 16, svg.shortened(_name(s), 44), "panel")]
        for tick in (0.25, 0.5, 1.0, 2.0):
            if y.low <= tick <= y.high:
                parts.append(
                    svg.line(left, y(tick), right, y(tick), "base" if tick == 1 else "grid")
                )
                parts.append(svg.text(left - 6, y(tick) + 4, f"{tick:g}x", "tick", "end"))
        step = max(1, len(points) // 400)
        parts += [svg.dot(x(i), y(points[i][0]), 2.2, "trial") for i in range(0, len(points), step)]
        corners: list[tuple[float, float]] = []
        for i, (_, best) in enumerate(points):
            if corners:
                corners.append((x(i), corners[-1][1]))
            corners.append((x(i), y(best)))
        parts.append(svg.path([*corners, (right, corners[-1][1])], "incumbent"))
        parts.append(svg.text(right, bottom + 18, f"{len(points)} measurements", "tick", "end"))
        panels.append(svg.picture(width, height, parts, f"search for {s.problem}"))
    return f'<div class="panels">{"".join(panels)}</div>'


def _tiles(subjects: Iterable[Subject]) -> dict[str, dict[tuple[int, int], float]]:
    """By algorithm and register tile: the geometric mean of the loss against a problem's best."""
    logs: dict[str, dict[tuple[int, int], list[float]]] = {}
    for s in subjects:
        best: dict[tuple[str, int, int], float] = {}
        for candidate, row in s.candidates():
            p = candidate.parameters if _known(candidate) else {}
            if "mr" in p and "nv" in p:
                key = candidate.algorithm, p["mr"], p["nv"]
                best[key] = min(best.get(key, math.inf), row.ns_median or math.inf)
        for (algorithm, mr, nv), ns in best.items():
            cells = logs.setdefault(algorithm, {})
            cells.setdefault((mr, nv), []).append(math.log(max(ns / s.after, 1.0)))
    return {
        algorithm: {tile: math.exp(statistics.fmean(values)) for tile, values in cells.items()}
        for algorithm, cells in logs.items()
    }


def _known(candidate: Candidate) -> bool:
    return _registry.parameter_names(candidate.algorithm, candidate.side) is not None


def _heat_maps(subjects: Sequence[Subject]) -> str:
    found = sorted(_tiles(subjects).items(), key=lambda item: -len(item[1]))[:4]
    maps = []
    for algorithm, cells in found:
        if len(cells) < 2:
            continue
        rows = sorted({mr for mr, _ in cells})
        columns = sorted({nv for _, nv in cells})
        side, tall, left, top = 58.0, 26.0, 46.0, 46.0
        width, height = left + side * len(columns) + 12, top + tall * len(rows) + 24
        parts = [
            svg.text(left, 16, algorithm, "panel"),
            svg.text(left - 8, top - 8, "MR", "tick", "end"),
        ]
        for j, nv in enumerate(columns):
            parts.append(svg.text(left + side * (j + 0.5), top - 8, f"NV {nv}", "tick", "middle"))
        for i, mr in enumerate(rows):
            y = top + tall * i
            parts.append(svg.text(left - 8, y + 17, str(mr), "tick", "end"))
            for j, nv in enumerate(columns):
                x = left + side * j
                loss = cells.get((mr, nv))
                if loss is None:
                    parts.append(svg.rectangle(x + 1, y + 1, side - 2, tall - 2, "void"))
                    continue
                depth = max(0.06, 1 - math.log(loss) / math.log(2))
                tip = f"{algorithm} {mr}x{nv}: {loss:.2f} times the best time"
                more = f' fill-opacity="{max(depth, 0.06):.2f}"'
                parts.append(svg.rectangle(x + 1, y + 1, side - 2, tall - 2, "heat", tip, more))
                ink = "cell strong" if depth > 0.55 else "cell"
                parts.append(svg.text(x + side / 2, y + 17, f"{loss:.2f}", ink, "middle"))
        maps.append(svg.picture(width, height, parts, f"register tiles of {algorithm}"))
    return f'<div class="panels loose">{"".join(maps)}</div>' if maps else ""


def importance(subjects: Iterable[Subject]) -> dict[str, dict[str, float]]:
    """By algorithm and parameter: how much of the variance of log time the parameter explains.

    The parameter alone, by groups of equal value within a problem; the mean over the problems,
    each with as much weight as it has candidates.
    """
    sums: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for s in subjects:
        points: dict[tuple[str, str], dict[tuple[int, ...], float]] = {}
        for candidate, row in s.candidates():
            if _known(candidate):
                mine = points.setdefault((candidate.algorithm, candidate.side), {})
                mine[candidate.params] = math.log(row.ns_median or 1.0)
        for (name_of, side), mine in points.items():
            algorithm = f"{name_of} ({side.upper()})" if side else name_of
            if len(mine) < 8:
                continue
            mean = statistics.fmean(mine.values())
            total = sum((v - mean) ** 2 for v in mine.values())
            for place, name in enumerate(_registry.parameter_names(name_of, side) or ()):
                groups: dict[int, list[float]] = collections.defaultdict(list)
                for params, value in mine.items():
                    groups[params[place]].append(value)
                if len(groups) < 2 or total <= 0:
                    continue
                between = sum(len(g) * (statistics.fmean(g) - mean) ** 2 for g in groups.values())
                shares = sums.setdefault(algorithm, {}).setdefault(name, [])
                shares.append((between / total, len(mine)))
    return {
        algorithm: {
            name: sum(share * n for share, n in shares) / sum(n for _, n in shares)
            for name, shares in parameters.items()
        }
        for algorithm, parameters in sums.items()
    }


def _importances(subjects: Sequence[Subject]) -> str:
    charts = []
    for algorithm, shares in sorted(importance(subjects).items(), key=lambda i: -len(i[1]))[:6]:
        order = sorted(shares.items(), key=lambda item: -item[1])
        width, left, tall = 330.0, 62.0, 24.0
        height = 30 + tall * len(order) + 6
        parts = [svg.text(left, 16, algorithm, "panel")]
        for i, (name, share) in enumerate(order):
            y = 28 + tall * i
            length = (width - left - 50) * min(share, 1.0)
            parts.append(svg.text(left - 8, y + 14, name, "label", "end"))
            parts.append(svg.rectangle(left, y + 2, length, 16, "after", f"{name}: {share:.0%}"))
            parts.append(svg.text(left + length + 6, y + 15, f"{share:.0%}", "tick"))
        charts.append(svg.picture(width, height, parts, f"parameters of {algorithm}"))
    return f'<div class="panels">{"".join(charts)}</div>' if charts else ""


# --- tables ----------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if i in numeric else ''}>{escape(value)}</{tag}>"
            for i, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', header)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _winners(subjects: Sequence[Subject], peaks: dict[int, Peaks]) -> str:
    header = ("convolution", "is", "plan", "threads", "before", "after", "gain", "GFLOP/s", "peak",
              "noise", "measured")  # fmt: skip
    rows = []
    for s in subjects[:_WINNERS]:
        peak = None if s.on_gpu else peaks.get(s.threads)
        rows.append(
            (
                str(s.problem),
                s.problem.direction,
                f"{s.winner.algorithm} {_parameters(s.winner)}",
                f"{s.threads} {s.isa}",
                duration(s.before),
                duration(s.after),
                f"{s.before / s.after:.2f}x",
                f"{s.gflops:.0f}",
                f"{s.gflops / peak.gflops:.0%}" if peak else "",
                f"{1.4826 * (s.winner.ns_mad or 0) / s.after:.1%}",
                s.winner.created[:10],
            )
        )
    return table(header, rows, (4, 5, 6, 7, 8, 9))


def _failures(failures: Sequence[Measurement]) -> str:
    counts: dict[tuple[str, str, str, str], int] = collections.Counter(
        (m.status, str(m.problem), f"{m.algorithm} {_parameters(m)}", m.error) for m in failures
    )
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        (status, problem, plan, svg.shortened(error, 300), str(n))
        for (status, problem, plan, error), n in order[:_FAILURES]
    ]
    return table(("status", "convolution", "plan", "what it said", "times"), rows, (4,))


# --- the page --------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --ink: #1c2330; --soft: #667085;
  --rule: #e4e7ec; --before: #c3cad6; --after: #2563eb; --gain: #067647; --roof: #98a2b3;
  --bad: #b42318; --strong: #fff; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1318; --card: #171c23; --ink: #e6e9ef;
  --soft: #98a2b3; --rule: #2a313c; --before: #475467; --after: #5b9bff; --gain: #4ade80;
  --roof: #667085; --bad: #f97066; --strong: #0b1020; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 82ch; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 20px 22px; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 18px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 14px 16px; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums;
  letter-spacing: -.02em; }
.tile span { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 11px; }
svg .label { font-size: 11.5px; }
svg .panel { font-size: 12px; font-weight: 600; }
svg .gain { fill: var(--gain); font-weight: 600; }
svg .grid { stroke: var(--rule); }
svg .base { stroke: var(--roof); }
.before { fill: var(--before); background: var(--before); }
.after { fill: var(--after); background: var(--after); }
.roof { stroke: var(--roof); stroke-width: 2; fill: none; }
svg .roofname { fill: var(--soft); font-size: 11px; }
.rise { stroke: var(--after); stroke-opacity: .35; stroke-width: 2; }
.point { stroke: var(--card); stroke-width: .7; }
.trial { fill: var(--soft); fill-opacity: .45; }
.incumbent { stroke: var(--after); stroke-width: 2; fill: none; }
.heat { fill: var(--after); }
.void { fill: none; stroke: var(--rule); stroke-dasharray: 2 3; }
svg .cell { font-size: 11px; }
svg .cell.strong { fill: var(--strong); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 18px; }
.panels.loose { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-start; }
.panels.loose svg { width: auto; flex: 0 1 auto; min-width: 200px; }
.rooflines { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 18px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 6px; vertical-align: -1px; }
.scroll { overflow: auto; max-height: 560px; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 6px 10px; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: 13px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; color: var(--ink); }
pre { background: var(--back); border-radius: 8px; padding: 12px 14px; overflow: auto; margin: 0; }
footer { margin-top: 22px; color: var(--soft); font-size: 13px; }
"""
_COLOURS = ("#2563eb", "#0d9488", "#d97706", "#9333ea", "#dc2626", "#65a30d", "#db2777", "#0891b2",
            "#78716c", "#475569")  # fmt: skip
COLOURS = len(_COLOURS)  # classes a0, a1, ... of a page's style


def document(title: str, body: str) -> str:
    """A page with the style of all reports."""
    style = _STYLE + "".join(
        f".a{i} {{ fill: {c}; background: {c}; }}\n" for i, c in enumerate(_COLOURS)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def page(content: Content) -> str:
    """The whole document."""
    subjects = content.subjects
    here = this_machine()
    machines = collections.Counter(str(s.machine) for s in subjects)
    names = ", ".join(name for name, _ in machines.most_common(3)) or str(here)
    more = f" and {len(machines) - 3} more" if len(machines) > 3 else ""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        "<h1>Convolutions, tuned</h1>",
        f"<p>{escape(names + more)}. jaxwin {jaxwin.__version__}, {now}.</p>",
    ]
    body += [_numbers(content), *_sections(content)] if content.measured else [_EMPTY]
    left_out = (
        f" {content.left_out} measurements of other machines or of other kernels are not shown; "
        "<code>--all</code> shows them."
        if content.left_out
        else ""
    )
    body.append(f"<footer>From {escape(str(content.path))}.{left_out}</footer>")
    return document("jaxwin tuning report", "".join(body))


_EMPTY = """<section><h2>Nothing is measured yet</h2>
<p>The database holds no measurement of this machine with these kernels. To make some:</p>
<pre>jaxwin-tune run --preset resnet50
jaxwin-tune record -- python train.py && jaxwin-tune run --from recorded.jsonl
jaxwin-tune run                          # what your programs were seen to miss</pre></section>"""


def _numbers(content: Content) -> str:
    subjects = content.subjects
    tiles = [(str(len(subjects)), "convolutions tuned")]
    if subjects:
        before, after = sum(s.before for s in subjects), sum(s.after for s in subjects)
        gain = statistics.geometric_mean([s.before / s.after for s in subjects])
        faster = sum(s.before > s.after * 1.005 for s in subjects)
        tiles += [
            (f"{gain:.2f}x", "faster than the default plans (geometric mean)"),
            (f"{faster}", "have a better plan than the default"),
            (_change(before, after), "for one call of each"),
        ]
    tiles.append((f"{content.measured:,}", "measurements"))
    tiles.append((f"{len(content.failures):,}", "failures"))
    inside = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>'
        for value, what in tiles
    )
    return f'<div class="tiles">{inside}</div>'


def _unit(ns: float) -> tuple[float, str]:
    return (1e9, "s") if ns >= 1e10 else (1e6, "ms") if ns >= 1e6 else (1e3, "µs")


def _change(before: float, after: float) -> str:
    unit, name = _unit(before)
    digits = 0 if after / unit >= 100 else 1 if after / unit >= 10 else 2
    return f"{before / unit:.{digits}f} → {after / unit:.{digits}f} {name}"


def _sections(content: Content) -> Iterator[str]:
    subjects = content.subjects

    def section(title: str, about: str, inside: str) -> str:
        return f"<section><h2>{escape(title)}</h2><p>{about}</p>{inside}</section>"

    if subjects:
        most = f" The {_BARS} that gain most, of {len(subjects)}." if len(subjects) > _BARS else ""
        yield section(
            "Before and after",
            '<i class="swatch before"></i>the default plan, <i class="swatch after"></i>the winner,'
            f" per call.{most}",
            _bars(subjects),
        )
        charts = []
        for threads in sorted({s.threads for s in subjects if not s.on_gpu})[:3]:
            mine = [s for s in subjects if s.threads == threads and not s.on_gpu]
            title = f"<h2>{threads} thread{'s' * (threads > 1)}</h2>"
            charts.append(
                f"<div>{title}{_roofline(mine, content.peaks.get(threads), threads)}</div>"
            )
        measured = (
            "The roofs were measured when this page was made: multiply-adds in registers, and the "
            "sum of two arrays from memory and from the second cache. "
            if content.peaks
            else ""
        )
        yield section(
            "Roofline",
            f"{measured}Each point is a winner; its line shows where the default plan was. Bytes "
            "count operands and result once.",
            _legend(subjects) + f'<div class="rooflines">{"".join(charts)}</div>',
        )
        if history := _history(subjects):
            yield section(
                "How the search went",
                "Time relative to the default plan: each measurement, and the best so far, for "
                "those convolutions that gain most.",
                history,
            )
        if maps := _heat_maps(subjects):
            yield section(
                "Register tiles",
                "Rows (MR) by vectors (NV) in registers: the best time with that tile relative to "
                "the best of the convolution, the geometric mean over convolutions. 1.00 is best.",
                maps,
            )
        if charts_of := _importances(subjects):
            yield section(
                "Which parameters matter",
                "How much of the variance of (log) time a parameter explains alone, among the "
                "candidates that were measured.",
                charts_of,
            )
        some = f" The first {_WINNERS} of {len(subjects)}." if len(subjects) > _WINNERS else ""
        yield section(
            "Winners",
            f"Noise is the spread of the winner's samples.{some}",
            _winners(subjects, content.peaks),
        )
    if content.failures:
        yield section(
            "Failures",
            "Candidates that were not right or did not run. None of them can win.",
            _failures(content.failures),
        )
    else:
        yield section("Failures", "None: every candidate had the bits of the default plan.", "")
