# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune`: what the native core can do, what dispatch decides, whether all is well."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any, cast

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxwin
from jaxwin import _registry, _tuning
from jaxwin.tuner import database_commands

VARIABLES = (
    "JAXWIN_DISABLE",
    "JAXWIN_MAX_ISA",
    "JAXWIN_MODE",
    "JAXWIN_TUNING_DB",
    "JAXWIN_VERBOSE",
    "NPROC",
)
PACKAGES = ("jaxwin", "jax", "jaxlib", "numpy", "flax", "optuna", "sqlite-utils")

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 all is well, 1 a problem was found, 2 wrong usage, 4 a tuning database "
    "cannot be used.",
)
@click.version_option(jaxwin.__version__, prog_name="jaxwin-tune")
def main() -> None:
    """Ask jaxwin what it can do and what it decides."""


for _command in database_commands.COMMANDS:
    main.add_command(_command)


def _print(table: Table) -> None:
    # A pipe has no width: do not wrap what a program reads.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@main.command("list")
@_json
def list_(as_json: bool) -> None:
    """List the algorithms with their parameters, and the instruction sets with their tiles.

    \b
    Example:
      jaxwin-tune list --json | python -m json.tool
    """
    registry = _registry.registry()
    if as_json:
        click.echo(json.dumps(registry))
        return
    algorithms = Table(title="algorithms")
    for column in ("name", "what", "parameters", "source"):
        algorithms.add_column(column)
    for row in registry["algorithms"]:
        parameters = " ".join(spec["name"] for spec in row["params"])
        algorithms.add_row(row["name"], row["summary"], parameters, row["source"])
    _print(algorithms)
    sets = Table(title="instruction sets")
    for column in ("name", "lanes", "register tiles (rows x vectors)", "runs here"):
        sets.add_column(column)
    for row in registry["isas"]:
        tiles = ", ".join(f"{mr}x{nv}" for mr, nv in row["tiles"])
        sets.add_row(row["name"], str(row["width"]), tiles, "yes" if row["runnable"] else "no")
    _print(sets)


class _Sizes(click.ParamType):  # type: ignore[type-arg]
    """Positive integers with commas between them."""

    name = "sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 8,56,56,64", param, ctx)
        if any(size < 1 for size in sizes):
            self.fail(f"{value!r} holds a size below 1", param, ctx)
        return sizes


@main.command()
@click.option("--input", "x_shape", type=_Sizes(), required=True, help="N,[[D,]H,]W,C")
@click.option("--filter", "w_shape", type=_Sizes(), required=True, help="[[KD,]KH,]KW,C/groups,K")
@click.option("--stride", type=_Sizes(), default=(1,), help="One value, or one per dimension.")
@click.option("--dilation", type=_Sizes(), default=(1,), help="Of the filter.")
@click.option("--padding", default="SAME", help="SAME, VALID or a number.", show_default=True)
@click.option("--groups", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--grad", type=click.Choice(["none", "input", "filter"]), default="none")
@_json
def explain(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    padding: str,
    groups: int,
    dtype: str,
    grad: str,
    as_json: bool,
) -> None:
    """Show what dispatch decides for a convolution, and why not otherwise.

    \b
    Example:
      jaxwin-tune explain --input 8,56,56,64 --filter 3,3,64,128 --stride 2
      jaxwin-tune explain --input 1,56,56,128 --filter 3,3,1,128 --groups 128 --grad filter
    """
    try:
        x, w = (_abstract(shape, dtype) for shape in (x_shape, w_shape))
        rank = len(x_shape) - 2

        def f(x: jax.Array, w: jax.Array) -> jax.Array:
            return jaxwin.conv(
                x,
                w,
                stride=stride * rank if len(stride) == 1 else stride,
                dilation=dilation * rank if len(dilation) == 1 else dilation,
                padding=cast(Any, int(padding) if padding.lstrip("-").isdecimal() else padding),
                groups=groups,
            )

        if grad == "none":
            explanation = jaxwin.explain(f, x, w)
        else:
            y = jax.eval_shape(f, x, w)
            argument = ("input", "filter").index(grad)

            def transposed(operand: jax.Array, cotangent: jax.Array) -> Any:
                def linear(v: jax.Array) -> jax.Array:
                    return f(v, operand) if argument == 0 else f(operand, v)

                return jax.linear_transpose(linear, (x, w)[argument])(cotangent)

            explanation = jaxwin.explain(transposed, (w, x)[argument], y)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error).splitlines()[0]) from error
    if as_json:
        rows = [dataclasses.asdict(row) | {"text": str(row.problem)} for row in explanation]
        click.echo(json.dumps(rows))
        return
    click.echo(str(explanation))
    for row in explanation:
        for name, reason in row.rejected.items():
            click.echo(f"  not {name}: {reason}")


@main.command()
@click.option(
    "--repair", is_flag=True, help="Upgrade old tuning databases, set aside damaged ones."
)
@_json
def doctor(repair: bool, as_json: bool) -> None:
    """Say what jaxwin sees of this machine, and what is wrong.

    Exits with 1 where something is wrong.

    \b
    Example:
      jaxwin-tune doctor
      jaxwin-tune doctor --repair
    """
    problems: list[str] = []
    repairs = database_commands.repair() if repair else []
    facts: dict[str, Any] = {"python": platform.python_version(), "cpu": _cpu()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    registry = _registry.registry()
    facts["instruction sets"] = [row["name"] for row in registry["isas"] if row["runnable"]]
    try:
        facts["instruction set in use"] = _registry.isa()
        _tuning.mode()
    except ValueError as error:
        problems.append(str(error))
    facts["threads"] = _registry.threads()
    facts["caches"] = registry["caches"]
    facts["jax platform"] = jax.default_backend()
    for variable in VARIABLES:
        if variable in os.environ:
            facts[variable] = os.environ[variable]
    if facts["jax platform"] != "cpu":
        problems.append(
            "JAX's default platform is not the CPU: jaxwin has kernels for the CPU only"
        )
    if not problems:
        problems += _self_test()
    database_facts, database_problems = database_commands.examine()
    facts |= database_facts
    if repair:
        facts["repairs"] = repairs
    problems += database_problems
    if as_json:
        click.echo(json.dumps({"facts": facts, "problems": problems}))
    else:
        for name, value in facts.items():
            click.echo(f"{name}: {database_commands.as_text(value)}")
        for problem in problems:
            click.echo(f"problem: {problem}", err=True)
        if not problems:
            click.echo("all is well")
    sys.exit(1 if problems else 0)


def _abstract(shape: tuple[int, ...], dtype: str) -> Any:
    """An array's shape and dtype without the array."""
    return jax.eval_shape(lambda: jnp.zeros(shape, jnp.dtype(dtype)))


def _self_test() -> list[str]:
    """One small convolution against lax: what is wrong with it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 12, 13, 8), np.float32))
    w = jnp.asarray(rng.standard_normal((3, 3, 8, 16), np.float32))
    numbers = ("NHWC", "HWIO", "NHWC")
    (row,) = jaxwin.explain(jaxwin.conv, x, w)
    if row.algorithm == "xla":
        return [row.reason]
    try:  # by name: this convolution needs no tuned row
        ours = jax.jit(functools.partial(jaxwin.conv, algorithm=row.algorithm))(x, w)
    except Exception as error:  # whatever it is, the user wants to read it here
        return [f"a small convolution failed: {error}"]
    theirs = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
    if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-5):
        return ["a small convolution differs from lax's"]
    return []


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
