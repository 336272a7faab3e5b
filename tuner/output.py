# SPDX-License-Identifier: Apache-2.0
"""What commands that measure print and write."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from jaxwin.tuner import bench


def show(table: Table, width: int = 200) -> None:
    # A pipe has no width: do not wrap what a program reads.
    Console(width=None if sys.stdout.isatty() else width).print(table)


class Output(click.ParamType):  # type: ignore[type-arg]
    """A file to be written after a long run, or -. What is wrong with it is said before."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        file = Path(value)
        if value != "-" and file.is_dir():
            self.fail(f"{value}: is a folder", param, ctx)
        if value != "-" and not os.access(file if file.exists() else file.parent, os.W_OK):
            self.fail(f"{value}: cannot be written, or its folder is not there", param, ctx)
        return str(value)


class Progress:
    """Where a run is: one line that is overwritten on a terminal, else one line per row.

    Nothing moves by itself: a clock or spinner would take CPU time from what is measured.
    """

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._quiet = total, quiet
        self._done = 0
        self._live = sys.stderr.isatty()

    def __call__(self, row: str, what: str) -> None:
        if not what:
            self._done += 1
        if self._quiet or (what and not self._live):
            return
        line = f"[{self._done}/{self._total}] {row}" + f"  {what}" * bool(what)
        if self._live:
            click.echo(f"\r\x1b[K{line[:78]}", err=True, nl=False)
        else:
            click.echo(line, err=True)

    def done(self) -> None:
        if self._live and not self._quiet:
            click.echo("\r\x1b[K", err=True, nl=False)


def write(files: Mapping[str | None, Callable[[], str]]) -> bool:
    """Writes texts into files, "-" is standard output; whether that is taken now.

    Raises:
        click.ClickException: a file cannot be written.
    """
    for file, text in files.items():
        if file == "-":
            click.echo(text(), nl=False)
        elif file is not None:
            try:
                Path(file).write_text(text(), encoding="utf-8")
            except OSError as error:
                raise click.ClickException(f"{file}: {error.strerror}") from error
    return "-" in files


def as_json(data: Any) -> str:
    """One line."""
    return json.dumps(data) + "\n"


def tables(grids: Mapping[str, bench.Grid]) -> None:
    """Prints tables, without frames where a program reads them."""
    for title, (header, *lines) in grids.items():
        plain = not sys.stdout.isatty()
        table = Table(title=title, title_justify="left", box=None if plain else box.SIMPLE_HEAD)
        for column in header:
            table.add_column(column, justify="left" if column in bench.WORDS else "right")
        for line in lines:
            table.add_row(*line)
        show(table, 500)
        click.echo()


def notes(lines: Sequence[str]) -> None:
    """Prints what is to be said below tables."""
    for note in lines:
        click.echo(note)
