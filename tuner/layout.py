# SPDX-License-Identifier: Apache-2.0
"""Which layout a chain of convolutions should stay in, by the sum of what it takes in each."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxwin
from jaxwin import _explain, _layouts
from jaxwin._problem import Problem
from jaxwin.tuner import measure
from jaxwin.tuner.problems import DIRECTIONS, Conv, friendly, from_problem

LAYOUTS = _layouts.names()
_LEAST_SECONDS = 0.005  # of a sample
_BUDGET_SECONDS = 10.0  # of one computation in one layout
# Totals whose noise is a larger part of them tell nothing.
_MOST_NOISE = 0.1


@dataclasses.dataclass
class Row:
    """One convolution, or the conversions at the ends, in every layout.

    ns, mad_ns: median and its deviation by layout, all directions and `count` together. parts: the
    median of one call by direction, or kind of conversion, and layout. algorithms: of the
    directions, by layout; none for conversions.
    """

    name: str
    count: int
    ns: dict[str, float] = dataclasses.field(default_factory=dict)
    mad_ns: dict[str, float] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    algorithms: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `jaxwin.best_layout` found; `best` is for `jaxwin.to_layout` and `jaxwin.conv`.

    total_ns, noise_ns: nanoseconds of everything, and their median absolute deviation, by layout.
    source: the layout at both ends. rows: each convolution, and the conversions.
    """

    source: str
    directions: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def total_ns(self) -> dict[str, float]:
        return {layout: sum(row.ns[layout] for row in self.rows) for layout in LAYOUTS}

    @property
    def noise_ns(self) -> dict[str, float]:
        return {layout: sum(row.mad_ns[layout] for row in self.rows) for layout in LAYOUTS}

    @property
    def best(self) -> str:
        """The layout with the least sum."""
        totals = self.total_ns
        return min(LAYOUTS, key=totals.__getitem__)

    @property
    def busy(self) -> bool:
        """Whether the machine was too busy to tell."""
        return self.noise_ns[self.best] > _MOST_NOISE * self.total_ns[self.best]

    @property
    def ties(self) -> tuple[str, ...]:
        """The layouts that are as good as the best, within the noise."""
        totals, noise, best = self.total_ns, self.noise_ns, self.best
        return tuple(
            layout
            for layout in LAYOUTS
            if layout != best and totals[layout] - totals[best] <= noise[layout] + noise[best]
        )

    def relative(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        """Time relative to NHWC's by direction and layout: geometric mean, least, most of all
        convolutions.
        """
        found: dict[str, dict[str, tuple[float, float, float]]] = {}
        for direction in self.directions:
            parts = [row.parts[direction] for row in self.rows if direction in row.parts]
            found[direction] = {}
            for layout in LAYOUTS:
                ratios = [part[layout] / part[LAYOUTS[0]] for part in parts]
                found[direction][layout] = measure.geomean(ratios), min(ratios), max(ratios)
        return found

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return {
            "best": self.best,
            "total_ns": self.total_ns,
            "noise_ns": self.noise_ns,
            "relative": self.relative(),
            **dataclasses.asdict(self),
        }

    def __str__(self) -> str:
        totals = self.total_ns
        times = ", ".join(f"{layout} {totals[layout] / 1e6:.3f} ms" for layout in LAYOUTS)
        text = f"best for the whole: {self.best} ({times})"
        text += f"; within the noise: {', '.join(self.ties)}" if self.ties else ""
        return text + ("; the machine was too busy to tell" if self.busy else "")


def _directions(conv: Conv, layout: str, directions: Sequence[str]) -> dict[str, Any]:
    """Functions of (x, w, y), y being the cotangent of the result."""
    convolve = friendly(conv, layout)
    functions = {
        "fwd": lambda x, w, y: convolve(x, w),
        "dx": lambda x, w, y: jax.vjp(lambda x: convolve(x, w), x)[1](y),
        "dw": lambda x, w, y: jax.vjp(lambda w: convolve(x, w), w)[1](y),
    }
    return {direction: functions[direction] for direction in directions}


def _array(shape: Sequence[int], dtype: str, rng: np.random.Generator) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def _timed(function: Any, *arrays: Any) -> measure.Timed:
    compiled = jax.jit(function).lower(*arrays).compile()
    finished: Any = jax.block_until_ready
    return measure.Timed(lambda: finished(compiled(*arrays)))


def _measured(
    name: str,
    count: int,
    computations: dict[str, dict[str, measure.Timed]],
    rounds: int,
    threads: int,
) -> Row:
    """computations: by layout, then by what they are; all are taken in turn."""
    flat = {(at, what): t for at, group in computations.items() for what, t in group.items()}
    samples = measure.interleave(
        {f"{layout} {what}": timed for (layout, what), timed in flat.items()},
        threads=threads,
        rounds=rounds,
        min_seconds=_LEAST_SECONDS,
        budget_seconds=_BUDGET_SECONDS,
        rng=random.Random(0),
    )
    row = Row(name, count)
    for layout, group in computations.items():
        found = [samples[f"{layout} {what}"] for what in group]
        for one in found:
            if one.error:
                raise RuntimeError(f"{name} in {layout}: {one.error}")
        row.ns[layout] = count * sum(one.median_ns for one in found)
        row.mad_ns[layout] = count * sum(one.mad_ns for one in found)
        for what, one in zip(group, found, strict=True):
            row.parts.setdefault(what, {})[layout] = one.median_ns
    return row


def _convolution(conv: Conv, directions: Sequence[str], rounds: int, threads: int) -> Row:
    """One convolution in every layout, from and to that layout."""
    rng = np.random.default_rng(0)
    x, w = (_array(shape, conv.dtype, rng) for shape in (conv.x_shape, conv.w_shape))
    y = _array(conv.y_shape, conv.dtype, rng)
    computations, algorithms = {}, {}
    for layout in LAYOUTS:
        arrays = jaxwin.to_layout(x, layout), w, jaxwin.to_layout(y, layout)
        functions = _directions(conv, layout, directions)
        computations[layout] = {d: _timed(f, *arrays) for d, f in functions.items()}
        algorithms[layout] = [
            list(jaxwin.explain(f, *arrays))[-1].algorithm for f in functions.values()
        ]
    row = _measured(conv.name, conv.count, computations, rounds, threads)
    row.algorithms = algorithms
    return row


def _conversions(
    first: Conv, last: Conv, source: str, backward: bool, rounds: int, threads: int
) -> Row:
    """The way into the layout and back, and, with gradients, that of the last one's cotangent."""
    rng = np.random.default_rng(0)
    x = jaxwin.to_layout(_array(first.x_shape, first.dtype, rng), source)
    y = jaxwin.to_layout(_array(last.y_shape, last.dtype, rng), source)

    def batch(layout: str) -> int | None:
        return last.batch if layout[-1].isdigit() else None

    computations: dict[str, dict[str, measure.Timed]] = {}
    for layout in LAYOUTS:
        if layout == source:
            continue

        def enter(v: jax.Array, layout: str = layout) -> jax.Array:
            return jaxwin.to_layout(v, layout, source=source)

        def leave(v: jax.Array, layout: str = layout) -> jax.Array:
            return jaxwin.from_layout(v, layout, target=source, batch=batch(layout))

        group = {"enter": _timed(enter, x), "leave": _timed(leave, enter(y))}
        if backward:
            group["enter again"] = _timed(enter, y)
        computations[layout] = group
    row = _measured("conversions", 1, computations, rounds, threads)
    row.ns[source] = row.mad_ns[source] = 0.0
    return row


def why_not(conv: Conv) -> str:
    """Why a convolution cannot be compared, else empty."""
    if conv.batch_groups != 1 or conv.reversed or set(conv.lhs_dilation) != {1}:
        return (
            f"{conv}: a gradient or a transposed convolution; give the convolutions of the forward "
            "pass, and --direction for their gradients"
        )
    if not jnp.issubdtype(jnp.dtype(conv.dtype), jnp.floating):
        return f"{conv}: jaxwin.conv has layouts for floating-point types alone"
    return ""


def native(conv: Conv) -> bool:
    """Whether there is a kernel for it."""
    shapes: Any = [jax.ShapeDtypeStruct(s, conv.dtype) for s in (conv.x_shape, conv.w_shape)]  # type: ignore[no-untyped-call]
    (problem,) = _explain.problems(friendly(conv, LAYOUTS[0]), *shapes)
    return next(iter(jaxwin.explain(problem))).algorithm != "xla"


def of_program(found: dict[Problem, int]) -> tuple[list[Conv], tuple[str, ...]]:
    """The convolutions of a forward pass among a program's, and the directions that it has.

    What looks like a gradient says that there are gradients, and counts with its convolution.
    """
    convs = [from_problem(p, count) for p, count in found.items() if p.direction == "fwd"]
    seen = {problem.direction for problem in found}
    return convs, tuple(direction for direction in DIRECTIONS if direction in seen)


def choose(
    convs: Sequence[Conv],
    directions: Sequence[str],
    *,
    source: str = LAYOUTS[0],
    rounds: int = 7,
    threads: int = 2,
    progress: Callable[[int, Conv], None] = lambda number, conv: None,
) -> Choice:
    """Times a chain in every layout. threads: with one the clock is CPU time, else the wall's.

    Raises:
        RuntimeError: a computation failed.
    """
    rows: list[Row] = []
    with jax.enable_x64(True):  # else float64 would become float32
        for number, conv in enumerate(convs):
            progress(number, conv)
            rows.append(_convolution(conv, directions, rounds, threads))
        backward = bool({"dx", "dw"} & {*directions})
        rows.append(_conversions(convs[0], convs[-1], source, backward, rounds, threads))
    return Choice(source, tuple(directions), tuple(rows))


def best_layout(
    fn: Callable[..., Any], *args: Any, source: str = LAYOUTS[0], rounds: int = 7
) -> Choice:
    """See `jaxwin.best_layout`."""
    if source not in LAYOUTS[:3]:
        names = ", ".join(map(repr, LAYOUTS[:3]))
        raise ValueError(f"best_layout: source must be one of {names}, got {source!r}")
    convs, directions = of_program(_explain.problems(jaxwin.accelerate(fn), *args))
    convs = [conv for conv in convs if not why_not(conv)]
    if not convs:
        raise ValueError("best_layout: fn has no convolution that jaxwin.conv could compute")
    return choose(convs, directions, source=source, rounds=rounds)
