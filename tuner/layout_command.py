# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune layout`: which layout a chain of convolutions should stay in."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

import click
import jax
import numpy as np
from rich.table import Table

import jaxwin
from jaxwin import _explain
from jaxwin.tuner import exits, measure, options, output
from jaxwin.tuner.problems import INTEGERS, Conv, friendly

LAYOUTS = ("NHWC", "NCHW", "CHWN", "CHWN8", "CHWN16")
_LEAST_SECONDS = 0.005  # of a sample
_BUDGET_SECONDS = 10.0  # of one computation in one layout
# Totals whose noise is a larger part of them tell nothing.
_MOST_NOISE = 0.1


@dataclasses.dataclass
class Row:
    """One convolution, or the conversions at the ends, in every layout.

    ns, mad_ns: median and its deviation by layout, all directions and `count` together.
    algorithms: of the directions, by layout; none for conversions.
    """

    name: str
    count: int
    ns: dict[str, float]
    mad_ns: dict[str, float]
    algorithms: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return dataclasses.asdict(self)


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
    return jax.numpy.asarray(rng.standard_normal(shape), dtype)


def _timed(function: Any, *arrays: Any) -> measure.Timed:
    compiled = jax.jit(function).lower(*arrays).compile()
    finished: Any = jax.block_until_ready
    return measure.Timed(lambda: finished(compiled(*arrays)))


def _measured(
    name: str, count: int, computations: dict[str, dict[str, measure.Timed]], rounds: int
) -> Row:
    """computations: by layout, then by what they are; all are taken in turn."""
    flat = {(at, what): t for at, group in computations.items() for what, t in group.items()}
    samples = measure.interleave(
        {f"{layout} {what}": timed for (layout, what), timed in flat.items()},
        threads=2,  # the wall clock: what waits in memory counts too
        rounds=rounds,
        min_seconds=_LEAST_SECONDS,
        budget_seconds=_BUDGET_SECONDS,
        rng=random.Random(0),
    )
    row = Row(name, count, {}, {}, {})
    for layout, group in computations.items():
        found = [samples[f"{layout} {what}"] for what in group]
        for one in found:
            if one.error:
                raise click.ClickException(f"{name} in {layout}: {one.error}")
        row.ns[layout] = count * sum(one.median_ns for one in found)
        row.mad_ns[layout] = count * sum(one.mad_ns for one in found)
    return row


def measure_convolution(conv: Conv, directions: Sequence[str], rounds: int) -> Row:
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
    row = _measured(conv.name, conv.count, computations, rounds)
    row.algorithms = algorithms
    return row


def measure_conversions(first: Conv, last: Conv, source: str, backward: bool, rounds: int) -> Row:
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
    row = _measured("conversions", 1, computations, rounds)
    row.ns[source] = row.mad_ns[source] = 0.0
    return row


def _check(convs: Sequence[Conv]) -> None:
    for conv in convs:
        if conv.dtype in INTEGERS:
            raise click.UsageError(f"{conv}: jaxwin.conv has no int32 sums of {conv.dtype}")
        if conv.batch_groups != 1 or conv.reversed or set(conv.lhs_dilation) != {1}:
            raise click.UsageError(
                f"{conv}: a gradient or a transposed convolution; give the convolutions of the "
                "forward pass, and --direction for their gradients"
            )


def _native(conv: Conv) -> bool:
    shapes: Any = [jax.ShapeDtypeStruct(s, conv.dtype) for s in (conv.x_shape, conv.w_shape)]  # type: ignore[no-untyped-call]
    (problem,) = _explain.problems(friendly(conv, "NHWC"), *shapes)
    return next(iter(jaxwin.explain(problem))).algorithm != "xla"


@click.command("layout")
@click.argument("shapes", metavar="[SHAPE]...", nargs=-1)
@options.preset
@click.option(
    "--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Of shapes."
)
@options.padding
@options.direction
@options.dtype
@click.option(
    "--source",
    type=click.Choice(LAYOUTS[:3]),
    default="NHWC",
    show_default=True,
    help="The layout at both ends of the chain.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    shapes: tuple[str, ...],
    presets: tuple[str, ...],
    batch: int,
    padding: str,
    directions: tuple[str, ...],
    dtype: str,
    source: str,
    rounds: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say which layout a chain of convolutions should stay in.

    The SHAPEs, or a preset's, are the convolutions of a chain in their order. Each is timed in
    every layout, in turn, as jaxwin would compute it; so are the conversions at both ends of the
    chain, and, with --direction fwd,dx,dw, that of the last cotangent. What lies between the
    convolutions is not counted. The layout with the least sum wins. Nothing is stored: pass the
    name to jaxwin.to_layout and jaxwin.conv.

    \b
    Example:
      jaxwin-tune layout "56x56 c64 k64 w3 p1" "56x56 c64 k64 w3 p1" --batch 32
      jaxwin-tune layout --preset paper --direction fwd,dx,dw --json
    """
    convs = options.convolutions(shapes, presets, batch=batch, padding=padding, dtype=dtype)
    _check(convs)
    rows: list[Row] = []
    try:
        with jax.enable_x64(True):  # else float64 would become float32
            if not any(map(_native, convs)):
                click.echo("none of the convolutions has a native kernel", err=True)
                sys.exit(exits.UNSUPPORTED)
            for number, conv in enumerate(convs):
                if not quiet:
                    click.echo(f"[{number + 1}/{len(convs)}] {conv.name}", err=True)
                rows.append(measure_convolution(conv, directions, rounds))
            backward = bool({"dx", "dw"} & {*directions})
            rows.append(measure_conversions(convs[0], convs[-1], source, backward, rounds))
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    totals = {layout: sum(row.ns[layout] for row in rows) for layout in LAYOUTS}
    noise = {layout: sum(row.mad_ns[layout] for row in rows) for layout in LAYOUTS}
    best = min(LAYOUTS, key=totals.__getitem__)
    busy = noise[best] > _MOST_NOISE * totals[best]
    if as_json:
        click.echo(
            json.dumps(
                {
                    "best": best,
                    "total_ns": totals,
                    "noise_ns": noise,
                    "source": source,
                    "directions": directions,
                    "rows": [row.to_json() for row in rows],
                }
            )
        )
    else:
        _print(rows, totals, best, noise)
    if busy:
        click.echo("the machine was too busy to tell; try again", err=True)
        sys.exit(exits.BUSY)


def _print(rows: list[Row], totals: dict[str, float], best: str, noise: dict[str, float]) -> None:
    table = Table(title="milliseconds")
    table.add_column("convolution")
    table.add_column("times")
    for layout in LAYOUTS:
        table.add_column(layout, justify="right")
    for row in rows:
        cells = [f"{row.ns[layout] / 1e6:.3f}" for layout in LAYOUTS]
        table.add_row(row.name, str(row.count), *cells, end_section=row is rows[-1])
    table.add_row("all", "", *(f"{totals[layout] / 1e6:.3f}" for layout in LAYOUTS))
    fastest = totals[best]
    table.add_row("ratio", "", *(f"{totals[layout] / fastest:.2f}" for layout in LAYOUTS))
    output.show(table)
    ties = [
        layout
        for layout in LAYOUTS
        if layout != best and totals[layout] - fastest <= noise[layout] + noise[best]
    ]
    text = f"best for the whole: {best}"
    click.echo(text + (f" (within the noise: {', '.join(ties)})" if ties else ""))
