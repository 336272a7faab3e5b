# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune compare`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

import click

from jaxwin.tuner import bench, compare, exits, machine, output

_LIST = "\n".join(f"  {name:<11} {c.title}" for name, c in compare.COMPARISONS.items())

_HELP = f"""Remake the comparisons of the papers on this machine.

NAME is one or more of these, without any it is all of them:

\b
{_LIST}

Each prints the papers' figures beside those measured here, the time of every layer and the memory
that a call needs. --html writes all of it as one page with charts. It measures as `jaxwin-tune
bench` does: in one process, in turns of random order, medians, every result compared with jax.lax
in float64. With one thread the clock is the CPU time of the process.

--quick takes a few layers and few samples, for a first look; --full every layer by every contender,
also where one of them takes ten seconds a call. Files are written anew after each comparison, and
when the command is stopped: after Ctrl-C, or a SIGTERM, it prints what was measured so far and
exits with 130. Exits with 1 where a result of jaxwin is wrong. A figure that is not met is said,
and is no error.

\b
Example:
  jaxwin-tune compare --threads 1 --html papers.html
  jaxwin-tune compare transposed conv1d --quick --markdown -
"""


@click.command("compare", help=_HELP)
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice([*compare.COMPARISONS]))
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--quick", is_flag=True, help="A few layers, few samples.")
@click.option("--full", is_flag=True, help="Every layer by every contender; takes long.")
@click.option("--rounds", type=click.IntRange(min=1), help="Samples.  [default: 7; --quick: 3]")
@click.option("--html", "html_file", type=output.Output(), help="A page with charts; - for stdout.")
@click.option("--markdown", "markdown_file", type=output.Output(), help="- for stdout.")
@click.option("--json", "json_file", type=output.Output(), help="Every number; - for stdout.")
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and stop.")
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    names: tuple[str, ...],
    threads: int,
    quick: bool,
    full: bool,
    rounds: int | None,
    html_file: str | None,
    markdown_file: str | None,
    json_file: str | None,
    dry_run: bool,
    quiet: bool,
) -> None:
    chosen = [name for name in compare.COMPARISONS if name in names or not names]
    if quick and full:
        raise click.UsageError("--quick and --full exclude each other")
    extent = "quick" if quick else "full" if full else "usual"
    usable = len(machine.usable_cpus())
    if threads > usable:
        raise click.UsageError(f"--threads: {threads}, but this process may use {usable} CPUs")
    if dry_run:
        for name in chosen:
            for task in compare.COMPARISONS[name].tasks(extent):
                for conv in task.convs:
                    click.echo(f"{name} {','.join(task.directions)}: {conv.name}: {conv}")
                click.echo(f"{name}: {' '.join(task.peers)}")
        return
    settings = bench.Options(
        threads=threads,
        rounds=rounds or (3 if quick else 7),
        min_seconds=0.002 if quick else 0.02,
        budget_seconds=1.0 if quick else 5.0,
    )
    try:
        base = bench.prepare(compare.contenders(chosen, extent), settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for name, reason in base.missing.items():
        click.echo(f"missing peer {name}: {reason}", err=True)
    if warning := base.load_warning():
        click.echo(f"WARNING: {warning}", err=True)
    progress = output.Progress(compare.rows(chosen, extent), quiet)
    run = compare.Run(base, extent)

    texts = {
        html_file: lambda: compare.page(run),
        markdown_file: lambda: bench.markdown(*_text(run)),
        json_file: lambda: output.as_json(run.to_json()),
    }
    files = {name: text for name, text in texts.items() if name != "-"}
    try:
        with _stopped_by_sigterm():
            compare.measured(run, chosen, progress, lambda: output.write(files))
    except KeyboardInterrupt:
        pass  # what was measured is printed; the exit code tells
    finally:
        progress.done()
    if not output.write(texts):
        tables, lines = _text(run)
        output.tables(tables)
        output.notes(lines)
    if not run.complete:
        sys.exit(exits.INTERRUPTED)
    sys.exit(exits.FOUND if run.wrong() else exits.OK)


def _text(run: compare.Run) -> tuple[dict[str, bench.Grid], list[str]]:
    tables = {title: grid for s in run.sections for title, grid in compare.grids(s).items()}
    lines = [line for section in run.sections for line in compare.notes(section)]
    return tables, lines + [f"WRONG: {text}" for text in run.wrong()]


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM is Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
