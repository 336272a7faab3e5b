# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune deviation`."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator

import click
import jax
import jax.numpy as jnp
import numpy as np

import jaxwin
from jaxwin import _dispatch, _fused
from jaxwin._problem import Problem
from jaxwin.tuner import bench, exits, options, problems

_HELP = f"""Show by how much results depend on what computes a convolution.

Each convolution is computed by dispatch's plan, by every algorithm that can, with other instruction
sets and numbers of threads, and by XLA, on the same operands: standard normal ones. What differs
from the plan's result is printed in units in the last place (ulp) and absolutely; and the median,
99th percentile and maximum of the errors against float64, as multiples of the dtype's epsilon times
the root mean square of the exact results. In Python `jaxwin.deviation` does the same for a program.

{options.catalogue()}
\b
Example:
  jaxwin-tune deviation "56x56 c64 k64 w3 p1"
  jaxwin-tune deviation --preset resnet50 --variant xla --variant winograd --json

Exits with 3 where none of the convolutions has a native kernel.
"""


@click.command("deviation", help=_HELP)
@click.argument("shapes", metavar="[SHAPE]...", nargs=-1)
@options.preset
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@options.padding
@options.direction
@options.dtype
@click.option("--layout", type=click.Choice(problems.LAYOUTS), default="nhwc", show_default=True)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    help="Only these: isa=NAME, threads=N, xla or an algorithm; may be given several times.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the operands.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def command(
    shapes: tuple[str, ...],
    presets: tuple[str, ...],
    batch: int,
    padding: str,
    directions: tuple[str, ...],
    dtype: str,
    layout: str,
    variants: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """See _HELP."""
    given = {"batch": batch, "padding": padding, "dtype": dtype}
    convs = options.convolutions(shapes, presets, **given)  # type: ignore[arg-type]
    with jax.enable_x64(any(conv.dtype == "float64" for conv in convs)):
        try:
            found = dict.fromkeys(conv.problem(d, layout) for conv in convs for d in directions)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        native = [problem for problem in found if not _dispatch.unsupported(problem)]
        results: list[tuple[Problem, jaxwin.Deviation]] = []
        try:
            for result in _deviations(native, variants or None, seed):
                results.append(result)
                if not as_json:
                    click.echo(str(result[1]).split("\nresults of the program")[0])
        except ValueError as error:
            raise click.UsageError(str(error)) from error
    if as_json:
        rows = [
            dataclasses.asdict(row) | {"text": str(problem)}
            for problem, found_ in results
            for row in found_
        ]
        click.echo(json.dumps(rows))
    if not native:
        click.echo("none of the convolutions has a native kernel", err=True)
        sys.exit(exits.UNSUPPORTED)


def _deviations(
    found: list[Problem], variants: tuple[str, ...] | None, seed: int
) -> Iterator[tuple[Problem, jaxwin.Deviation]]:
    for problem in found:
        rng = np.random.default_rng(seed)
        operands = [
            jnp.asarray(bench.draw(rng, shape, name))
            for shape, name in (
                (problem.lhs_shape, problem.lhs_dtype),
                (problem.rhs_shape, problem.rhs_dtype),
            )
        ]
        call = functools.partial(_fused.of_problem, problem)
        yield problem, jaxwin.deviation(call, *operands, variants=variants)
