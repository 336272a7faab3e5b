# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune record`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click

from jaxwin import _record
from jaxwin.tuner import tune

DEFAULT = "recorded.jsonl"
_CANNOT_START = 127  # as of shells: there is no such command


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT,
    show_default=True,
    help="The file that is added to.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON on standard error.")
def record(command: tuple[str, ...], output: Path, as_json: bool) -> None:
    """Run a program and write down every convolution that it compiles.

    The program needs no change: the variable JAXWIN_RECORD tells jaxwin in it, and in every process
    that it starts, to add what is compiled to the file. Only convolutions that go through jaxwin
    are seen; `jaxwin.install()` sends all of a process there. The file holds shapes and nothing
    else; `jaxwin-tune run --from FILE` tunes them. What the file holds already stays.

    Exits as the program does: with its own code, with 128 + N where the signal N ended it, with 127
    where it cannot be started, and with 2 for wrong usage of this command.

    \b
    Example:
      jaxwin-tune record -- python train.py --epochs 1
      jaxwin-tune record -o shapes.jsonl -- torchrun.sh && jaxwin-tune run --from shapes.jsonl
    """
    output = output.absolute()
    try:
        _record.append(output, "")
    except OSError as error:
        raise click.UsageError(f"--output: {output}: {error.strerror}") from error
    before = output.stat().st_size
    environment = os.environ | {"JAXWIN_RECORD": str(output)}
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        click.echo(f"{command[0]}: {error.strerror}", err=True)
        sys.exit(_CANNOT_START)
    code = _wait(process)
    _summary(output, before, as_json)
    sys.exit(code if code >= 0 else 128 - code)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The program's return code; it gets Ctrl-C from the terminal, other signals through here."""

    def forward(number: int, frame: object) -> None:
        process.send_signal(number)

    before = {
        number: signal.signal(number, action)
        for number, action in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, forward))
    }
    try:
        return process.wait()
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _summary(output: Path, before: int, as_json: bool) -> None:
    """Says on standard error, since standard output is the program's, what was recorded."""
    with output.open("rb") as file:
        file.seek(before)
        tasks = tune.recorded(file.read().decode("utf-8", "replace").splitlines(), str(output))
    seen = sum(task.count for task in tasks)
    found = {"file": str(output), "compiled": seen, "problems": len(tune.merged(tasks))}
    if as_json:
        click.echo(json.dumps(found), err=True)
    elif not tasks:
        click.echo(
            "jaxwin-tune: no convolution went through jaxwin: does the program use jaxwin, "
            "jaxwin.accelerate() or jaxwin.install()?",
            err=True,
        )
    else:
        click.echo(
            f"jaxwin-tune: {seen} convolutions compiled, {found['problems']} different ones, "
            f"in {output}; `jaxwin-tune run --from {output}` tunes them",
            err=True,
        )
