# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have: which convolutions they work on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from jaxwin.tuner import problems, tune


class Choices(click.ParamType):  # type: ignore[type-arg]
    """Some of a list of words, with commas between them."""

    name = "words"

    def __init__(self, choices: Sequence[str]) -> None:
        self.choices = choices

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(dict.fromkeys(str(value).split(",")))
        for word in words:
            if word not in self.choices:
                self.fail(f"{word!r} is not one of {', '.join(self.choices)}", param, ctx)
        return words


preset = click.option(
    "--preset",
    "presets",
    multiple=True,
    metavar="NAME",
    type=click.Choice(list(problems.PRESETS)),
    help="See above; may be given several times.",
)
padding = click.option(
    "--padding",
    type=click.Choice(problems.PADDINGS),
    default="valid",
    show_default=True,
    help="Where a shape leaves it open.",
)
direction = click.option(
    "--direction",
    "directions",
    type=Choices(problems.DIRECTIONS),
    default="fwd",
    show_default=True,
    help="Of fwd, dx (input gradient) and dw (weight gradient).",
)
dtype = click.option(
    "--dtype",
    type=click.Choice(problems.DTYPES),
    default="float32",
    show_default=True,
    help="Of operands, where a shape leaves it open; sums of integers are int32.",
)


def catalogue() -> str:
    """The grammar of shapes and the presets, for help texts."""
    presets = [f"  {name:<12} {what}" for name, (what, _) in problems.PRESETS.items()]
    return "\n".join([problems.GRAMMAR, "\b", "Presets:", *presets, ""])


def is_file(shape: str) -> bool:
    """Whether a SHAPE of a command line is the name of a recorded file."""
    return shape == "-" or shape.endswith(".jsonl") or ("/" in shape and Path(shape).is_file())


def recorded(name: str) -> list[tune.Task]:
    """The convolutions of a recorded file; "-" is standard input."""
    try:
        with click.open_file(name, encoding="utf-8") as file:
            tasks = tune.recorded(file, name)
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name}: not a text file") from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except OSError as error:
        raise click.UsageError(f"{name}: {error.strerror}") from error
    if not tasks:
        raise click.UsageError(f"{name}: holds no convolution")
    return tasks


def convolutions(
    shapes: Sequence[str], presets: Sequence[str], *, batch: int, padding: str, dtype: str
) -> list[problems.Conv]:
    """What the shapes, presets and recorded files of a command line say, in order."""
    defaults: dict[str, Any] = {"batch": batch, "padding": padding, "dtype": dtype}
    if not shapes and not presets:
        raise click.UsageError(
            'nothing to do: give --preset NAME, a SHAPE such as "56x56 c64 k64 w3", or the name of '
            "a recorded file"
        )
    try:
        found = [conv for name in presets for conv in problems.preset(name, **defaults)]
        for shape in shapes:
            if is_file(shape):
                for task in tune.merged(recorded(shape)):
                    try:
                        found.append(problems.from_problem(task.problem, task.count))
                    except ValueError as error:
                        click.echo(f"{shape}: left out: {error}", err=True)
            else:
                found.append(problems.parse(shape, **defaults))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not found:
        raise click.UsageError("no convolution is left")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for conv in found:
        arrays = sum(8 * math.prod(shape) for shape in (conv.x_shape, conv.w_shape, conv.y_shape))
        if arrays > memory:
            raise click.UsageError(
                f"{conv}: its arrays in float64, for the reference, take {arrays / 2**30:.0f} GiB; "
                f"this machine has {memory / 2**30:.0f}"
            )
    return found
