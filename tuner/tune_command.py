# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from jaxwin import _record, _registry, _settings
from jaxwin.tuner import database_commands, options, problems, tune
from jaxwin.tuner.search import EFFORTS, Outcome, duration

_EFFORTS = "\n".join(
    f"  {name:<8} at most {e.candidates} candidates and {e.seconds:g} s per convolution"
    for name, e in EFFORTS.items()
)
_HELP = f"""Find the fastest plans for convolutions on this machine, and store them.

Programs that are compiled afterwards take them; no bit of a result changes, only its speed.

{options.catalogue()}
\b
Efforts:
{_EFFORTS}

Candidates run in another process, with a time limit. Their result must have the bits of the default
plan's. What crashes, hangs or is wrong is stored as such, never wins, and is not tried again. What
is right is timed together with the default plan, in turns, as part of a compiled program; with one
thread by the CPU time of the process, with more by the clock on the wall. The fastest are then
compared with the default plan once more, in a new process. A new winner must be faster by 1 % and
by more than the samples' noise.

With --family any the winner is then compared with XLA and with the algorithms of other numerical
families. Where one is faster, programs with JAXWIN_FAMILY=any or `jaxwin.conv(algorithm="any")`
take it. Its numbers differ, so that is for who does not need the same bits everywhere.

On a machine with an NVIDIA GPU that JAX can use, it is the GPU that is tuned (--device). XLA, that
is cuDNN, is compared with the winner there in any case. With --precision default programs take the
faster one; with `highest`, where results have the bits of the CPU, cuDNN is taken by
JAXWIN_FAMILY=any alone.

Results go to the tuning database at once: after Ctrl-C another run goes on where this one stopped.
What is in the database for this machine, these kernels and this number of threads is not measured
again without --again.

FILE is what `jaxwin-tune record` or `jaxwin.record` wrote: one JSON object per line, such as
{{"count": 3, "problem": {{...}}}}; "problem" has the fields of `jaxwin.Problem.key`. A SHAPE that
ends with .jsonl is a FILE, too.

With no convolution at all it tunes what your programs were seen to miss: problems that they
compiled for the device and that have no measurement of their own. What takes most time (how often
it was compiled, times the cost model's time) comes first. jaxwin remembers them, shapes only, in
missed.jsonl beside the user's database, unless JAXWIN_MISSES=0 or JAXWIN_MODE=off is set.

Exits with 1 where the default plan of a convolution did not run, with 3 where none of them has a
native kernel, and with 5 where the machine was too busy.

\b
Example:
  jaxwin-tune run
  jaxwin-tune run --preset resnet50 --batch 8
  jaxwin-tune run --preset paper --threads 1 --effort quick --json > tuned.json
  jaxwin-tune run "n8 56x56 c64 k128 w3 s2 p1" --direction fwd,dx,dw --effort full
  jaxwin-tune run --from recorded.jsonl --budget 600
  jaxwin-tune run --preset unet --storage postgresql://tuner@db.example/studies
"""


class _Lines(tune.Progress):
    """One line per problem."""

    def __init__(self) -> None:
        self._place = ""

    def start(self, task: tune.Task, number: int, total: int) -> None:
        self._place = f"[{number + 1}/{total}] {task.name}"

    def finish(self, task: tune.Task, outcome: Outcome) -> None:
        click.echo(f"{self._place}: {outcome}", err=True)


class _Bar(_Lines):
    """A bar for the problem at hand, and the lines above it.

    It moves only where something happened: a clock would take CPU time from what is measured.
    """

    def __init__(self) -> None:
        super().__init__()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bar = Bar(
            *columns,
            TextColumn("{task.fields[what]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._id = self._bar.add_task("", what="")

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, task: tune.Task, number: int, total: int) -> None:
        super().start(task, number, total)
        self._bar.update(self._id, description=escape(self._place), completed=0, total=None)

    def step(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._id, what=escape(what), completed=done, total=total)
        self._bar.refresh()

    def finish(self, task: tune.Task, outcome: Outcome) -> None:
        self._bar.console.print(escape(f"{self._place}: {outcome}"), highlight=False)


def _print(result: tune.Result) -> None:
    console = Console(width=None if sys.stdout.isatty() else 250)
    wide = console.width >= 120  # else `show` tells the plans
    table = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None)
    words = ("convolution", "outcome")
    for column in (*words, "default", "best", "faster", "noise", "measured", "bad"):
        table.add_column(column, justify="left" if column in words else "right")
    if wide:
        table.add_column("plan")
    for task, o in result.outcomes:
        cells = [
            escape(task.name),
            o.status,
            duration(o.default_ns),
            duration(o.winner_ns),
            "-" if o.ratio is None else f"{o.ratio:.2f}x",
            "-" if o.noise is None else f"{o.noise:.1%}",
            str(o.measured),
            str(sum(o.bad.values())),
        ]
        table.add_row(*cells, *[escape(str(o.winner or o.reason))] * wide)
    console.print(table)
    click.echo(f"{result.isa}, {result.threads} threads; in {result.database}")


def _tasks(
    shapes: tuple[str, ...],
    presets: tuple[str, ...],
    files: tuple[str, ...],
    directions: tuple[str, ...],
    layout: str,
    defaults: dict[str, Any],
) -> list[tune.Task]:
    found = []
    files = (*files, *(shape for shape in shapes if options.is_file(shape)))
    shapes = tuple(shape for shape in shapes if not options.is_file(shape))
    if shapes or presets or not files:
        for conv in options.convolutions(shapes, presets, **defaults):
            for direction in directions:
                name = conv.name if directions == ("fwd",) else f"{conv.name} {direction}"
                try:
                    problem = conv.problem(direction, layout)
                except ValueError as error:
                    raise click.UsageError(str(error)) from error
                found.append(tune.Task(name, problem, conv.count))
    for file in files:
        found += options.recorded(file)
    return tune.merged(found)


def _missed(threads: int, device: str | None) -> list[tune.Task]:
    """What programs were seen to miss; says so where there is nothing."""
    path = _record.misses_file()
    try:
        where = tune.device(device)
        tasks, others = tune.missed(threads, where)
    except OSError as error:
        raise click.UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for (how, option), number in sorted(others.items()):
        click.echo(f"{number} more {how}: `{option}` tunes them", err=True)
    if not tasks:
        how = "on a GPU" if where == "cuda" else f"with {threads} threads"
        click.echo(
            f"nothing to tune: no program {how} was seen to miss a tuned plan "
            f'({path}); give --preset NAME, a SHAPE such as "56x56 c64 k64 w3", or --from FILE',
            err=True,
        )
    return tasks


def _forget(result: tune.Result) -> None:
    """What has been tuned is missed no more."""
    settled = ("tuned", "default", "known", "unsupported")
    done = [task for task, outcome in result.outcomes if outcome.status in settled]
    try:
        _record.forget((task.problem, result.threads, result.gpu_isa(task)) for task in done)
    except OSError as error:
        click.echo(f"{_record.misses_file()}: cannot be written ({error.strerror})", err=True)


@click.command(cls=database_commands.Command, help=_HELP)
@click.argument("shapes", metavar="[SHAPE]...", nargs=-1)
@options.preset
@click.option(
    "--from",
    "files",
    multiple=True,
    metavar="FILE",
    help="Recorded problems; may be given several times. - is standard input.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@options.padding
@options.direction
@options.dtype
@click.option(
    "--layout",
    type=click.Choice(problems.LAYOUTS),
    default="nhwc",
    show_default=True,
    help="Of the arrays.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="That the plans are for.  [default: as many as XLA's pool has here]",
)
@click.option("--effort", type=click.Choice(list(EFFORTS)), default="normal", show_default=True)
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="For everything; what takes most of a program's time comes first.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds that a candidate may be silent before it counts as hanging.",
)
@click.option(
    "--family",
    type=click.Choice(_settings.FAMILIES),
    help="`any` compares winners with XLA and other numerical families, too.  "
    "[default: JAXWIN_FAMILY, else canonical]",
)
@click.option(
    "--device",
    type=click.Choice(tune.DEVICES),
    help="What to tune for.  [default: the GPU where JAX can use one, else the CPU]",
)
@click.option(
    "--precision",
    type=click.Choice(("default", "highest")),
    default="default",
    show_default=True,
    help="Of float32 on a GPU: whether tensor cores may take part.",
)
@click.option("--again", is_flag=True, help="Measure also what is in the database.")
@click.option(
    "--storage",
    envvar="OPTUNA_STORAGE",
    metavar="URL",
    help="Of an optuna storage, through which machines of one kind share their search.",
)
@click.option(
    "--database",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file.  [default: the first of JAXWIN_TUNING_DB, else the user's]",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of data, order and proposals."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--dry-run", is_flag=True, help="List the convolutions and stop.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def run(
    shapes: tuple[str, ...],
    presets: tuple[str, ...],
    files: tuple[str, ...],
    batch: int,
    padding: str,
    directions: tuple[str, ...],
    dtype: str,
    layout: str,
    threads: int | None,
    effort: str,
    budget: float | None,
    timeout: float,
    family: str | None,
    device: str | None,
    precision: str,
    again: bool,
    storage: str | None,
    database: Path | None,
    seed: int,
    as_json: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    defaults = {"batch": batch, "padding": padding, "dtype": dtype}
    asked = bool(shapes or presets or files)
    if asked:
        tasks = _tasks(shapes, presets, files, directions, layout, defaults)
    else:
        tasks = _missed(_registry.threads() if threads is None else threads, device)
    if dry_run:
        for task in tasks:
            times = f", {task.count} times" if task.count > 1 else ""
            click.echo(f"{task.name}: {task.problem}{times}")
        return
    try:
        settings = tune.Options(
            effort=effort,
            threads=threads,
            budget_seconds=budget,
            timeout_seconds=timeout,
            again=again,
            storage=storage,
            database=database,
            seed=seed,
            family=family,
            device=device,
            exact=precision == "highest",
        )
        if not tasks:
            result = tune.nothing(settings)
        elif quiet:
            result = tune.run(tasks, settings)
        elif sys.stderr.isatty():
            with _Bar() as bar:
                result = tune.run(tasks, settings, bar)
        else:
            result = tune.run(tasks, settings, _Lines())
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not asked:
        _forget(result)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    elif tasks:
        _print(result)
    for warning in result.warnings():
        click.echo(f"WARNING: {warning}", err=True)
    sys.exit(result.exit_code())
