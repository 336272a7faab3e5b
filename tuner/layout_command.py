# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune layout`: which layout a chain of convolutions should stay in."""

from __future__ import annotations

import sys

import click
import jax
from rich.table import Table

from jaxwin._problem import Problem
from jaxwin.tuner import exits, layout, machine, options, output, tune
from jaxwin.tuner.problems import Conv

_HELP = f"""Say which layout a chain of convolutions should stay in.

The SHAPEs, or a preset's, are the convolutions of a chain in their order. A SHAPE may be a file
that jaxwin.record wrote: then the chain is a program, and gradients in it are counted with the
convolutions whose they are. Each is timed in every layout, in turn, as jaxwin would compute it; so
are the conversions at both ends of the chain, and, with --direction fwd,dx,dw, that of the last
cotangent. What lies between the convolutions is not counted. The layout with the least sum wins.
Nothing is stored: pass the name to jaxwin.to_layout and jaxwin.conv. In Python jaxwin.best_layout
does the same for a function.

{options.catalogue()}
\b
Example:
  jaxwin-tune layout "56x56 c64 k64 w3 p1" "56x56 c64 k64 w3 p1" --batch 32
  jaxwin-tune layout --preset paper --direction fwd,dx,dw --threads 1 --json
  jaxwin-tune layout recorded.jsonl

Exits with 3 where none of the convolutions has a native kernel, and with 5 where the machine was
too busy to tell.
"""


@click.command("layout", help=_HELP)
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
    type=click.Choice(layout.LAYOUTS[:3]),
    default="NHWC",
    show_default=True,
    help="The layout at both ends of the chain.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="With 1 the clock is the CPU time of the process.  [default: all, by the wall clock]",
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
    threads: int | None,
    rounds: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """See _HELP."""
    files = [shape for shape in shapes if options.is_file(shape)]
    convs, directions = _program(files, directions)
    if presets or len(files) < len(shapes) or not files:
        others = [shape for shape in shapes if shape not in files]
        convs += options.convolutions(others, presets, batch=batch, padding=padding, dtype=dtype)
    for conv in convs:
        if reason := layout.why_not(conv):
            raise click.UsageError(reason)
    if threads:
        _take_cpus(threads)

    def progress(number: int, conv: Conv) -> None:
        if not quiet:
            click.echo(f"[{number + 1}/{len(convs)}] {conv.name}", err=True)

    with jax.enable_x64(True):
        if not any(map(layout.native, convs)):
            click.echo("none of the convolutions has a native kernel", err=True)
            sys.exit(exits.UNSUPPORTED)
    try:
        choice = layout.choose(
            convs,
            directions,
            source=source,
            rounds=rounds,
            threads=threads or 2,
            progress=progress,
        )
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    if as_json:
        click.echo(output.as_json(choice.to_json()), nl=False)
    else:
        _print(choice)
    if choice.busy:
        click.echo("the machine was too busy to tell; try again", err=True)
        sys.exit(exits.BUSY)


def _program(files: list[str], directions: tuple[str, ...]) -> tuple[list[Conv], tuple[str, ...]]:
    """The convolutions of recorded files; the directions, with those that they have."""
    found: dict[Problem, int] = {}
    for file in files:
        for task in tune.merged(options.recorded(file)):
            found[task.problem] = found.get(task.problem, 0) + task.count
    convs, seen = layout.of_program(found)
    if files and not convs:
        raise click.UsageError(f"{', '.join(files)}: no convolutions of a forward pass")
    convs = [conv for conv in convs if not layout.why_not(conv)] or convs
    return convs, tuple(dict.fromkeys((*directions, *seen)))


def _take_cpus(threads: int) -> None:
    usable = len(machine.usable_cpus())
    if threads > usable:
        raise click.UsageError(f"--threads: {threads}, but this process may use {usable} CPUs")
    machine.pin(threads)
    jax.devices()
    pool = machine.pool_threads()
    if pool not in (0, threads):
        raise click.UsageError(f"--threads: {threads}, but XLA has {pool} in this process already")


def _print(choice: layout.Choice) -> None:
    table = Table(title="milliseconds")
    table.add_column("convolution")
    table.add_column("times")
    for name in layout.LAYOUTS:
        table.add_column(name, justify="right")
    for row in choice.rows:
        cells = [f"{row.ns[name] / 1e6:.3f}" for name in layout.LAYOUTS]
        table.add_row(row.name, str(row.count), *cells, end_section=row is choice.rows[-1])
    totals = choice.total_ns
    table.add_row("all", "", *(f"{totals[name] / 1e6:.3f}" for name in layout.LAYOUTS))
    fastest = totals[choice.best]
    table.add_row("ratio", "", *(f"{totals[name] / fastest:.2f}" for name in layout.LAYOUTS))
    output.show(table)
    table = Table(title="time relative to NHWC, geometric mean and range of the convolutions")
    table.add_column("direction")
    for name in layout.LAYOUTS[1:]:
        table.add_column(name, justify="right")
    for direction, found in choice.relative().items():
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*found[name]) for name in layout.LAYOUTS[1:]]
        table.add_row(direction, *cells)
    output.show(table)
    ties = f" (within the noise: {', '.join(choice.ties)})" if choice.ties else ""
    click.echo(f"best for the whole: {choice.best}{ties}")
