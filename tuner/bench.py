# SPDX-License-Identifier: Apache-2.0
"""jaxwin beside other libraries: the same convolutions, on the same threads, in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from numpy.typing import NDArray

import jaxwin
from jaxwin import _ffi, _registry
from jaxwin._machine import Machine, this_machine
from jaxwin.tuner import machine, measure, peers
from jaxwin.tuner.problems import (
    INTEGERS,
    Conv,
    computation,
    from_layout,
    result_operand,
    to_layout,
)

SCHEMA_VERSION = 2
PACKAGES = ("jax", "jaxlib", "numpy", "torch", "onnxruntime", "ai-edge-litert")
# Largest error that still is a right answer, relative to the largest value of the result.
TOLERANCE = {"float32": 1e-4, "float64": 1e-11, "float16": 1e-2, "bfloat16": 5e-2}
TOLERANCE |= dict.fromkeys(INTEGERS, 0.0)
BUSY = 0.05  # share of the CPUs' time that others may use without a warning
BUSY_LOAD = 0.5  # load average at the start, likewise
PEAK = "peak"
PEAK_ITERATIONS = 100_000
NOISY = 0.1  # deviation of a timing from its median, likewise


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure; `min_seconds` per sample, `budget_seconds` per peer and row.

    keep_memory: whether the process keeps its memory, for every peer: `jaxwin.keep_memory`.
    """

    threads: int = 1
    layout: str = "nhwc"
    rounds: int = 11
    min_seconds: float = 0.02
    budget_seconds: float = 20.0
    seed: int = 0
    keep_memory: bool = False


@dataclasses.dataclass
class Cell:
    """What one peer did with one row.

    status: "ok", "wrong" (the result is not the convolution; not counted anywhere), "unsupported"
    or "failed"; reason: why. Times in nanoseconds per call; `wall_ns` and `cpu_ns` are medians of
    both clocks, `median_ns` is of the one that counts. faults: page faults per call. error:
    largest difference from the reference, relative to its largest value.
    """

    status: str
    reason: str = ""
    median_ns: float | None = None
    mad_ns: float | None = None
    min_ns: float | None = None
    wall_ns: float | None = None
    cpu_ns: float | None = None
    samples_ns: list[float] = dataclasses.field(default_factory=list)
    calls_per_sample: int | None = None
    gflops: float | None = None
    peak_share: float | None = None
    faults: float | None = None
    error: float | None = None
    workspace_bytes: int | None = None
    plan: dict[str, Any] | None = None


class Versus(NamedTuple):
    """jaxwin against a peer, in one row.

    ours: the form of jaxwin that met it. ratio: how many times faster that is. error: the ratio's
    standard error, None where there were fewer than three rounds.
    """

    peer: str
    ours: str
    ratio: float
    error: float | None


@dataclasses.dataclass
class Row:
    """One convolution in one direction, and what the peers did with it.

    peak_gflops: float32 multiply-adds that these threads could do in the same minutes.
    """

    name: str
    problem: str
    direction: str
    dtype: str
    layout: str
    count: int
    flops: float
    result_bytes: int
    peak_gflops: float
    cells: dict[str, Cell]

    def time(self, peer: str) -> float | None:
        """Median nanoseconds of a peer that got it right, else None."""
        cell = self.cells.get(peer)
        return cell.median_ns if cell is not None and cell.status == "ok" else None

    def relative(self, ours: str, theirs: str) -> float | None:
        """How many times faster the first is than the second, of two that got it right."""
        if self.time(ours) is None or self.time(theirs) is None:
            return None
        return measure.relative(self.cells[ours].samples_ns, self.cells[theirs].samples_ns)

    def against(self, peer: str, alike: bool = False) -> Versus | None:
        """jaxwin against a peer, both with or both without fresh output.

        It is given its weights in each call; alike: or packed before, where the peer's are.
        """
        ours = self.form(peer, alike)
        ratio = None if ours is None else self.relative(ours, peer)
        if ours is None or ratio is None:
            return None
        samples = self.cells[ours].samples_ns, self.cells[peer].samples_ns
        return Versus(peer, ours, ratio, measure.relative_error(*samples))

    def form(self, peer: str, alike: bool) -> str | None:
        """The form of jaxwin that meets a peer, of those that got it right."""
        theirs = peers.make(peer)
        forms = {name: peers.make(name) for name in self.cells if peers.is_ours(name)}
        packed = [self.cells[name] for name, form in forms.items() if form.packs_ahead]
        # What cannot be packed is for the form that there is.
        unpackable = packed and all(cell.status == "unsupported" for cell in packed)
        ahead = alike and theirs.packs_ahead and not unpackable
        ours = [
            name
            for name, form in forms.items()
            if form.packs_ahead == ahead and self.time(name) is not None
        ]
        like = [name for name in ours if forms[name].reuses_output == theirs.reuses_output]
        if theirs.reuses_output:
            like.reverse()  # the last has least of what a call from Python costs, as theirs have
        return next(iter([*like, *ours]), None)

    def best(self, alike: bool = False) -> Versus | None:
        """jaxwin against the peer that does best against it; alike: as for `against`."""
        found = (self.against(name, alike) for name in self.cells if not peers.is_ours(name))
        known = [versus for versus in found if versus is not None]
        return min(known, key=lambda versus: versus.ratio) if known else None


@dataclasses.dataclass
class Result:
    """A whole run, complete or interrupted."""

    options: Options
    peers: list[str]
    missing: dict[str, str]
    machine: Machine
    cpus: tuple[int, ...]
    versions: dict[str, str]
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float] | None = None
    others_share: float | None = None
    stolen_share: float | None = None
    complete: bool = False
    rows: list[Row] = dataclasses.field(default_factory=list)

    def directions(self) -> list[str]:
        """Directions of the rows, in order."""
        return list(dict.fromkeys(row.direction for row in self.rows))

    def mean(self, direction: str, value: Callable[[Row], float | None]) -> tuple[float, int]:
        """Geometric mean of a value over a direction's rows that have it, and how many have."""
        values = [v for row in self.rows if row.direction == direction if (v := value(row))]
        return (measure.geomean(values), len(values)) if values else (float("nan"), 0)

    def mean_ratio(self) -> float | None:
        """Geometric mean over all rows of jaxwin's speed relative to the best peer's."""
        values = [best.ratio for row in self.rows if (best := row.best()) is not None]
        return measure.geomean(values) if values else None

    def wrong(self) -> list[tuple[Row, str]]:
        """Rows and peers whose result was wrong."""
        return [
            (row, name)
            for row in self.rows
            for name, cell in row.cells.items()
            if cell.status == "wrong"
        ]

    def warnings(self) -> list[str]:
        """What should make a reader doubt the numbers."""
        found = []
        if self.others_share is not None and self.others_share > BUSY:
            found.append(
                f"the machine is busy: other processes used {self.others_share:.0%} of these CPUs"
            )
        if self.stolen_share is not None and self.stolen_share > BUSY:
            found.append(f"the hypervisor took {self.stolen_share:.0%} of these CPUs' time")
        if warning := self.load_warning():
            found.append(warning)
        timed = [c for row in self.rows for c in row.cells.values() if c.median_ns and c.mad_ns]
        noisy = sum((c.mad_ns or 0) / (c.median_ns or 1) > NOISY for c in timed)
        if noisy:
            found.append(
                f"{noisy} of {len(timed)} timings vary by more than {NOISY:.0%} (median absolute "
                "deviation)"
            )
        if not self.complete:
            found.append("interrupted: not all rows were measured")
        return found

    def load_warning(self) -> str:
        """What the load average at the start says; empty if nothing."""
        load = self.load_before[0]
        if load <= BUSY_LOAD:
            return ""
        return f"the load average was {load:.2f} at the start: others use CPUs, caches and memory"

    def to_json(self) -> dict[str, Any]:
        """Everything, for `json.dumps`."""
        fields = dataclasses.asdict(self)
        fields["cpus"] = list(self.cpus)
        for data, row in zip(fields["rows"], self.rows, strict=True):
            data |= _ratios(row, alike=False)
            data["like_for_like"] = _ratios(row, alike=True)
        means = {}
        for direction in self.directions():
            gflops = {name: self._mean_or_none(direction, name) for name in self.peers}
            means[direction] = {
                "gflops": gflops,
                "ratio_to_best": self._mean_best(direction, alike=False),
                "like_for_like": {"ratio_to_best": self._mean_best(direction, alike=True)},
            }
        return {
            "schema_version": SCHEMA_VERSION,
            **fields,
            "means": means,
            "warnings": self.warnings(),
        }

    def _mean_best(self, direction: str, alike: bool) -> float | None:
        ratio, count = self.mean(direction, lambda row: _value(row.best(alike)))
        return ratio if count else None

    def _mean_or_none(self, direction: str, peer: str) -> dict[str, Any] | None:
        value, count = self.mean(direction, functools.partial(gflops, peer))
        return {"geomean": value, "rows": count} if count else None


def _ratios(row: Row, alike: bool) -> dict[str, Any]:
    """jaxwin against each peer and the best of them, for `json.dumps`."""
    best = row.best(alike)
    met = {name: row.against(name, alike) for name in row.cells if not peers.is_ours(name)}
    return {
        "best_peer": best and best.peer,
        "best_of_ours": best and best.ours,
        "ratio_to_best": best and best.ratio,
        "ratio_to_best_error": best and best.error,
        "ratios": {name: _value(versus) for name, versus in met.items()},
    }


def _value(versus: Versus | None) -> float | None:
    return versus and versus.ratio


def gflops(peer: str, row: Row) -> float | None:
    """GFLOP/s of a peer that got it right, else None."""
    return row.cells[peer].gflops if row.time(peer) is not None else None


def prepare(
    names: Sequence[str], options: Options, make: Callable[[str], peers.Peer] = peers.make
) -> Result:
    """Takes the CPUs, imports the peers, and says what there is to compare on.

    To be called once in a process, before it has computed anything with JAX. make: a peer by name.

    Raises:
        ValueError: there are not enough CPUs, or JAX has its threads already; one line.
    """
    here = this_machine()  # before it is confined to some of its CPUs
    cpus = machine.pin(options.threads)
    jax.devices()
    threads = machine.pool_threads()
    if threads not in (0, options.threads):
        raise ValueError(
            f"threads: {options.threads} asked for, but XLA has {threads} in this process already"
        )
    missing = {name: reason for name in names if (reason := make(name).missing())}
    versions = {"jaxwin": jaxwin.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Result(
        options=options,
        peers=[name for name in names if name not in missing],
        missing=missing,
        machine=here,
        cpus=cpus,
        versions=versions,
        load_before=os.getloadavg(),
    )


def run(
    result: Result,
    tasks: Iterable[tuple[Conv, str]],
    progress: Callable[[str, str], None] = lambda row, what: None,
) -> None:
    """Measures every (convolution, direction), adding rows to `result`; may be interrupted."""
    rng = random.Random(result.options.seed)
    data = np.random.default_rng(result.options.seed)
    with watched(result), jax.enable_x64(True):  # for the reference
        for conv, direction in tasks:
            title = f"{conv.name} {direction}"
            progress(title, "")
            detail = functools.partial(progress, title)
            result.rows.append(_row(result, conv, direction, rng, data, detail))
        result.complete = True


@contextlib.contextmanager
def watched(result: Result) -> Iterator[None]:
    """Notes in `result` what else the machine did meanwhile."""
    start = machine.Load.now(result.cpus)
    try:
        yield
    finally:
        others, stolen = machine.disturbance(start, machine.Load.now(result.cpus))
        result.others_share, result.stolen_share = others, stolen
        result.load_after = os.getloadavg()


def peak_loop() -> tuple[measure.Timed, float]:
    """A loop of nothing but multiply-adds on one thread, and its FLOPs.

    It is timed in turn with the peers: the peak of a core moves with its clock and with what its
    neighbours do.
    """
    isa = _registry.isa()
    flops = _ffi.measure_peak(isa, PEAK_ITERATIONS)
    return measure.Timed(lambda: _ffi.measure_peak(isa, PEAK_ITERATIONS)), flops


def _row(
    result: Result,
    conv: Conv,
    direction: str,
    rng: random.Random,
    data: np.random.Generator,
    progress: Callable[[str], None],
) -> Row:
    options = result.options

    task = peers.Task(
        conv,
        direction,
        options.layout,
        options.threads,
        **{name: draw(data, conv.shape(name), conv.dtype_of(name)) for name in "xwy"},
    )
    progress("reference")
    expected = reference(task)
    cells: dict[str, Cell] = {}
    timed: dict[str, measure.Timed] = {}
    for name in result.peers:
        progress(f"{name}: preparing")
        cells[name], computation_ = _prepare(name, task, expected)
        if computation_ is not None:
            timed[name] = computation_
    del expected
    timed[PEAK], peak_flops = peak_loop()
    samples = measure.interleave(
        timed,
        threads=options.threads,
        rounds=options.rounds,
        min_seconds=options.min_seconds,
        budget_seconds=options.budget_seconds,
        rng=rng,
        progress=progress,
    )
    peak_gflops = peak_flops / samples.pop(PEAK).median_ns * options.threads
    flops = conv.flops
    for name, taken in samples.items():
        fill(cells[name], taken, flops)
        if cells[name].gflops and conv.dtype == "float32":
            cells[name].peak_share = (cells[name].gflops or 0.0) / peak_gflops
    kind = result_operand(direction)
    return Row(
        name=conv.name,
        problem=str(conv),
        direction=direction,
        dtype=conv.dtype,
        layout=options.layout,
        count=conv.count,
        flops=flops,
        result_bytes=math.prod(conv.shape(kind)) * jax.numpy.dtype(conv.dtype_of(kind)).itemsize,
        peak_gflops=peak_gflops,
        cells=cells,
    )


def draw(data: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Standard normal; integers from the whole of their range."""
    kind = jax.numpy.dtype(dtype)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return data.integers(limits.min, limits.max, shape, kind, endpoint=True)
    word = np.float64 if kind == np.float64 else np.float32
    return data.standard_normal(shape, word).astype(kind)


def _prepare(
    name: str, task: peers.Task, expected: NDArray[Any]
) -> tuple[Cell, measure.Timed | None]:
    try:
        prepared = peers.make(name).prepare(task)
        got = prepared.result()
    except peers.Unsupported as reason:
        return Cell("unsupported", str(reason)), None
    except Exception as error:  # any library may fail in its own way; the others go on
        return Cell("failed", measure.first_line(error)), None
    cell = Cell("ok", **prepared.facts)
    if got.shape != expected.shape:
        cell.status, cell.reason = "wrong", f"shape {got.shape} instead of {expected.shape}"
        return cell, None
    scale = float(np.max(np.abs(expected))) or 1.0
    difference = float(np.max(np.abs(got.astype(np.float64) - expected))) / scale
    if not np.isfinite(difference):
        cell.status, cell.reason = "wrong", "the result is not finite"
        return cell, None
    cell.error = difference
    if difference > TOLERANCE[task.conv.dtype]:
        cell.status, cell.reason = "wrong", f"differs by {difference:.1e} of the largest value"
        return cell, None
    return cell, prepared.timed


def fill(cell: Cell, samples: measure.Samples, flops: float) -> None:
    if samples.error:
        cell.status, cell.reason = "failed", samples.error
        return
    cell.median_ns, cell.mad_ns, cell.min_ns = samples.median_ns, samples.mad_ns, min(samples.ns)
    cell.wall_ns = statistics.median(samples.wall_ns)
    cell.cpu_ns = statistics.median(samples.cpu_ns)
    cell.samples_ns, cell.calls_per_sample = samples.ns, samples.inner
    cell.faults = statistics.median(samples.faults)
    cell.gflops = flops / samples.median_ns


def reference(task: peers.Task) -> NDArray[Any]:
    """The result of a task by `jax.lax` in float64, channels last; of integers it is exact.

    Their sums have less than 53 bits; as int32 they wrap.
    """
    wide = dataclasses.replace(task.conv, dtype="float64")
    fn, operands = computation(wide, task.direction, "nhwc", lax.conv_general_dilated)
    arrays = [
        jax.device_put(to_layout(task.operand(name).astype(np.float64), name, "nhwc"))
        for name in operands
    ]
    compiled = jax.jit(fn).lower(*arrays).compile(compiler_options=peers.XlaEigen.options)
    kind = result_operand(task.direction)
    found = np.asarray(from_layout(np.asarray(compiled(*arrays)), kind, "nhwc"))
    if task.conv.dtype in INTEGERS:
        found = found.astype(np.int64).astype(np.int32).astype(np.float64)
    return found


# --- text ------------------------------------------------------------------------------------

Grid = list[list[str]]
WORDS = (
    # columns without numbers
    *("layer", "model", "convolution", "jaxwin's plan", "best peer", "best alike"),
    *("figure", "in the paper", "here", "met", "source"),
)


def grids(result: Result) -> dict[str, Grid]:
    """Title -> header and lines: the speeds per direction, then what memory says."""
    found: dict[str, Grid] = {}
    for direction in result.directions():
        rows = [row for row in result.rows if row.direction == direction]
        found[f"{direction}, GFLOP/s"] = _speeds(result, direction, rows)
        found[f"{direction}, plan and memory in MiB"] = _memory(result, rows)
        faults = _faults(result, rows)
        if len(faults[0]) > 1:
            found[f"{direction}, page faults per call"] = faults
    return found


def _speeds(result: Result, direction: str, rows: Sequence[Row]) -> Grid:
    having = [n for n in result.peers if any(row.cells[n].status != "unsupported" for row in rows)]
    compared = comparisons(having)
    header = ["layer", *having, *(name for column in compared for name in column.header)]
    grid = [header]
    for row in rows:
        line = [row.name, *(_speed(row.cells[name]) for name in having)]
        grid.append(line + [text for column in compared for text in column.texts(row)])
    if len(rows) > 1:
        line = ["geomean"]
        for name in having:
            value, count = result.mean(direction, functools.partial(gflops, name))
            line.append(_mean(value, count, len(rows)))
        for column in compared:
            value, count = result.mean(direction, column.value)
            line += [""] * (len(column.header) - 1) + [_mean(value, count, len(rows), ".2f")]
        grid.append(line)
    if any(row.count > 1 for row in rows):
        line = ["network, ms"]
        for name in having:
            times = [row.time(name) for row in rows]
            known = [t * row.count for t, row in zip(times, rows, strict=True) if t is not None]
            line.append(f"{sum(known) / 1e6:.2f}" if len(known) == len(rows) else "-")
        grid.append(line + [""] * (len(header) - len(line)))
    return grid


class Comparison(NamedTuple):
    """One or two columns of a table: the peer, if the header has two names, and the ratio."""

    header: tuple[str, ...]
    versus: Callable[[Row], Versus | None]

    def value(self, row: Row) -> float | None:
        """A row's ratio."""
        return _value(self.versus(row))

    def texts(self, row: Row) -> list[str]:
        """A row's cells, such as "xla" and "1.25 ±0.02"."""
        found = self.versus(row)
        ratio = "-" if found is None else f"{found.ratio:.2f}"
        if found is not None and found.error is not None:
            ratio += f" ±{found.error:.2f}"
        return [found.peer if found else "-", ratio][-len(self.header) :]


def comparisons(
    having: Sequence[str], make: Callable[[str], peers.Peer] = peers.make
) -> list[Comparison]:
    """How a table compares jaxwin with the peers that it has. make: a peer by name."""
    ours = [name for name in having if peers.is_ours(name)]
    found = []
    if ours:
        found.append(Comparison(("best peer", "jaxwin / best"), lambda row: row.best()))
    if any(make(name).packs_ahead for name in ours):
        header = ("best alike", "jaxwin / best alike")
        found.append(Comparison(header, lambda row: row.best(alike=True)))
    if ours and "xla" in having:
        found.append(Comparison(("jaxwin / xla",), lambda row: row.against("xla")))
    return found


def _memory(result: Result, rows: Sequence[Row]) -> Grid:
    """jaxwin's plan, result and workspace as XLA knows it, what a fresh output costs jaxwin."""
    known = [
        n for n in result.peers if any(row.cells[n].workspace_bytes is not None for row in rows)
    ]
    known = [name for name in known if not peers.make(name).reuses_output]
    fresh = {"jaxwin", "jaxwin-donated"} <= set(result.peers)
    planned = "jaxwin" in result.peers
    header = ["layer", "convolution", *["jaxwin's plan"] * planned, "result"]
    header += [f"workspace of {name}" for name in known]
    grid = [header + ["fresh result, part of jaxwin's time"] * fresh]
    for row in rows:
        line = [row.name, row.problem]
        line += [_plan(row.cells["jaxwin"])] if planned else []
        line.append(mib(row.result_bytes))
        line += [mib(row.cells[name].workspace_bytes) for name in known]
        if fresh:
            new, kept = row.time("jaxwin"), row.time("jaxwin-donated")
            line.append("-" if new is None or kept is None else f"{(new - kept) / new:z.0%}")
        grid.append(line)
    return grid


def _faults(result: Result, rows: Sequence[Row]) -> Grid:
    """Page faults per call, of the peers that have any."""
    having = [n for n in result.peers if any((row.cells[n].faults or 0) >= 1 for row in rows)]
    grid = [["layer", *having]]
    for row in rows:
        faults = (row.cells[name].faults for name in having)
        grid.append([row.name, *("-" if f is None else f"{f:.0f}" for f in faults)])
    return grid


def _plan(cell: Cell) -> str:
    if cell.plan is None:
        return "-"
    parameters = (f"{name}={value}" for name, value in cell.plan["parameters"].items())
    return " ".join((cell.plan["algorithm"], *parameters))


def mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def _speed(cell: Cell) -> str:
    if cell.status != "ok" or cell.gflops is None:
        return {"unsupported": "-", "ok": "-"}.get(cell.status, cell.status.upper())
    text = f"{cell.gflops:.1f}" if cell.gflops >= 9.95 else f"{cell.gflops:.2f}"
    if cell.peak_share is not None:
        text += f" ({cell.peak_share:.0%})"
    if cell.mad_ns and cell.median_ns and cell.mad_ns / cell.median_ns > NOISY:
        text += "~"
    return text


def _mean(value: float, count: int, rows: int, spec: str = ".1f") -> str:
    if not count:
        return "-"
    return format(value, spec) + (f" ({count} rows)" if count < rows else "")


BEST = (
    "best peer: the one that does best against jaxwin; ratios are times jaxwin is faster, "
    "against jaxwin-loop where the peer keeps its output too"
)
ERROR = "±: standard error of a ratio, from how the rounds differ"
ALIKE = (
    "alike: peers that have their weights before the clock starts ({}) against jaxwin with weights "
    "from jaxwin.pack where it can have them, the others against jaxwin without"
)


def notes(
    result: Result, best: str = BEST, make: Callable[[str], peers.Peer] = peers.make
) -> list[str]:
    """Lines below the tables: how it was measured, what is missing, what to doubt.

    best: what the best peer and the ratios are; empty where there are none. make: a peer by name.
    """
    options = result.options
    clock = "CPU time of the process" if options.threads == 1 else "wall-clock time"
    lines = [
        f"{result.machine}, {options.threads} used; {_registry.isa()}; caches "
        f"{_bytes(result.machine.l1d_bytes)}, {_bytes(result.machine.l2_bytes)}, "
        f"{_bytes(result.machine.l3_bytes)}",
        ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        f"median of {options.rounds} samples of at least {options.min_seconds * 1e3:g} ms, "
        f"{clock}; arrays of jax peers are {options.layout.upper()}",
    ]
    if options.keep_memory:
        lines.append("the process keeps its memory (jaxwin.keep_memory), for every peer")
    if result.load_after is not None:
        lines.append(
            f"load average {result.load_before[0]:.2f} before, {result.load_after[0]:.2f} after"
        )
    peaks = sorted(row.peak_gflops for row in result.rows)
    if peaks:
        lines.append(
            f"measured FMA peak {peaks[0]:.0f} to {peaks[-1]:.0f} GFLOP/s; (%) of the row's"
        )
    if best and any(peers.is_ours(name) for name in result.peers):
        lines += [best, ERROR]
        ahead = [name for name in result.peers if make(name).packs_ahead]
        if any(map(peers.is_ours, ahead)):
            theirs = [name for name in ahead if not peers.is_ours(name)]
            lines.append(ALIKE.format(", ".join(theirs) or "none here"))
    lines += [f"missing peer {name}: {reason}" for name, reason in result.missing.items()]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in result.rows:
        for name, cell in row.cells.items():
            if cell.status != "ok":
                key = (name, cell.status, cell.reason)
                reasons.setdefault(key, []).append(f"{row.name} {row.direction}")
    for (name, status, reason), where in reasons.items():
        rows = f"{len(where)} rows" if len(where) > 1 else where[0]
        lines.append(f"{name} {status} ({rows}): {reason}")
    return lines + [f"WARNING: {text}" for text in result.warnings()]


def _bytes(count: int) -> str:
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count // 1024} KiB"


def markdown(tables: Mapping[str, Grid], below: Sequence[str]) -> str:
    """Tables and notes as GitHub's Markdown."""
    parts = []
    for title, (header, *lines) in tables.items():
        rule = ["---" if name in WORDS else "---:" for name in header]
        table = [header, rule, *lines]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in table))
    parts.append("\n".join(f"- {line}" for line in below))
    return "\n\n".join(parts) + "\n"


def select(names: Sequence[str]) -> list[str]:
    """Peers by name, in the registry's order, then baselines and jaxwin with algorithms.

    Raises:
        ValueError: a name is unknown; one line.
    """
    known = peers.names()
    every = (*known, *peers.baselines())
    for name in names:
        if name not in every and not name.startswith("jaxwin:"):
            raise ValueError(f"{name!r} is not one of {', '.join(every)}")
    extra = [name for name in dict.fromkeys(names) if name not in known]
    return [name for name in known if name in names] + extra
