# SPDX-License-Identifier: Apache-2.0
"""The commands of `jaxwin-tune` that look after the tuning database."""

from __future__ import annotations

import collections
import datetime
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxwin import _record, _registry, _settings, _tuning
from jaxwin._machine import this_machine
from jaxwin.tuner import exits
from jaxwin.tuner.database import (
    Database,
    DatabaseError,
    Measurement,
    default_path,
    read_measurements,
    read_winners,
)

_MAX_COMPLAINTS = 10  # wrong lines that are told one by one
_LEAST_BYTES = 1 << 20  # that a disk should have left

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
database_option = click.option(
    "--database",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file.  [default: the first of JAXWIN_TUNING_DB, else the user's]",
)


class Failure(click.ClickException):
    """A database cannot be used: one line, exit code 4."""

    exit_code = exits.DATABASE


class Command(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (DatabaseError, _tuning.Unusable) as error:
            raise Failure(str(error)) from error


def _print(table: Table) -> None:
    # A pipe has no width: do not wrap what a program reads.
    Console(width=None if sys.stdout.isatty() else 250).print(table)


@click.command(cls=Command)
@click.argument("text", required=False)
@click.option("--all", "everything", is_flag=True, help="Of other machines and old kernels, too.")
@database_option
@_json
def show(text: str | None, everything: bool, database: Path | None, as_json: bool) -> None:
    """Show the fastest measured candidate for each problem.

    TEXT selects the problems whose description contains it. Without --all, only what dispatch may
    use here is shown.

    \b
    Example:
      jaxwin-tune show
      jaxwin-tune show "w3x3 s2x2" --all --json
    """
    path = database or default_path()
    here = this_machine()
    with _tuning.reading(path) as connection:
        machines = _tuning.machines(connection)
        rows = read_winners(connection)
    found = []
    for row in rows:
        machine = machines.get(row["machine_id"])
        row["machine"] = here.likeness(machine) if machine else "other"
        usable = row["machine"] != "other" and not row["stale"]
        if (everything or usable) and (text or "") in row["problem"]:
            found.append(row)
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table(title=escape(str(path)))
    for column in ("problem", "is", "algorithm", "parameters", "threads", "time", "GFLOP/s"):
        table.add_column(column)
    if everything:
        table.add_column("machine")
    for row in found:
        parameters = " ".join(f"{k}={v}" for k, v in json.loads(row["parameters"]).items())
        cells = [row["problem"], row["direction"], row["algorithm"], parameters]
        cells += [f"{row['threads']} {row['isa']}", f"{row['ns_median'] / 1e3:.1f} us"]
        cells.append(f"{row['gflops'] or 0:.1f}")
        if everything:
            notes = ", other kernels" if row["stale"] else ""
            cells.append(f"{row['brand']} ({row['machine']}{notes})")
        table.add_row(*map(escape, cells))
    _print(table)
    hidden = len(rows) - len(found)
    click.echo(f"{len(found)} winners" + (f", {hidden} others not shown" if hidden else ""))


@click.command(cls=Command)
@click.argument("output", type=click.Path(allow_dash=True), default="-")
@database_option
@_json
def export(output: str, database: Path | None, as_json: bool) -> None:
    """Write every measurement as one JSON object per line, to OUTPUT or standard output.

    --json prints a summary, where OUTPUT is a file. `jaxwin-tune import` reads the lines.

    \b
    Example:
      jaxwin-tune export mine.jsonl
      jaxwin-tune export | gzip > mine.jsonl.gz
    """
    path = database or default_path()
    count = total = 0
    try:
        stream = click.open_file(output, "w", encoding="utf-8", atomic=output != "-")
        with _tuning.reading(path) as connection, stream:
            (total,) = connection.execute("SELECT count(*) FROM measurements").fetchone()
            for measurement in read_measurements(connection):
                stream.write(json.dumps(measurement.record(), sort_keys=True) + "\n")
                count += 1
    except OSError as error:
        raise Failure(f"{output}: cannot be written ({error.strerror})") from error
    if total > count:
        click.echo(f"{path}: {total - count} rows make no sense and were left out", err=True)
    if output != "-":
        summary = {"database": str(path), "file": output, "rows": count, "wrong": total - count}
        click.echo(json.dumps(summary) if as_json else f"{output}: {count} measurements")


@click.command("import", cls=Command)
@click.argument("files", nargs=-1, required=True, type=click.File("r", encoding="utf-8"))
@database_option
@_json
def import_(files: tuple[IO[str], ...], database: Path | None, as_json: bool) -> None:
    """Add the measurements of files that `jaxwin-tune export` wrote; "-" is standard input.

    Measurements that are there already are not added twice. Lines that are wrong are told and left
    out; it then exits with 1.

    \b
    Example:
      jaxwin-tune import theirs.jsonl
      zcat mine.jsonl.gz | jaxwin-tune import -
    """
    summaries = []
    with Database(database) as db:
        for file in files:
            reader = _Lines(file)
            new = db.add(reader)
            summaries.append({"file": file.name, "rows": reader.right, "new": new})
            summaries[-1]["wrong"] = reader.wrong
            for complaint in reader.complaints:
                click.echo(complaint, err=True)
        path = str(db.path)
    if as_json:
        click.echo(json.dumps({"database": path, "files": summaries}))
    else:
        for s in summaries:
            click.echo(
                f"{s['file']}: {s['rows']} measurements, {s['new']} of them new, {s['wrong']} wrong"
            )
    sys.exit(1 if any(s["wrong"] for s in summaries) else 0)


class _Lines:
    """The measurements of a file of JSON lines; counts the right and the wrong ones."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.right = self.wrong = 0
        self.complaints: list[str] = []

    def __iter__(self) -> Iterator[Measurement]:
        try:
            for number, line in enumerate(self._file, 1):
                if not line.strip():
                    continue
                try:
                    measurement = Measurement.from_record(json.loads(line))
                except (ValueError, RecursionError) as error:
                    self.wrong += 1
                    if self.wrong <= _MAX_COMPLAINTS:
                        self.complaints.append(f"{self._file.name}:{number}: {error}")
                else:
                    self.right += 1
                    yield measurement
        except (OSError, UnicodeDecodeError) as error:
            self.wrong += 1
            self.complaints.append(f"{self._file.name}: cannot be read further: {error}")


@click.command(cls=Command)
@click.argument(
    "sources", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False, exists=True)
)
@click.option(
    "--into",
    "database",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file that is added to.  [default: the first of JAXWIN_TUNING_DB, else the user's]",
)
@click.option(
    "--winners",
    is_flag=True,
    help="Only the fastest plan of each problem, for a small file that is shipped.",
)
@_json
def merge(sources: tuple[Path, ...], database: Path | None, winners: bool, as_json: bool) -> None:
    """Add the measurements of other databases to one; every measurement is kept once.

    \b
    Example:
      jaxwin-tune merge node1.db node2.db --into site.db
      jaxwin-tune merge site.db --winners --into /usr/share/jaxwin/tuning.db
    """
    summaries = []
    with Database(database) as db:
        for source in sources:
            rows, new = db.merge(source, winners=winners)
            with _tuning.reading(source) as connection:
                (total,) = connection.execute("SELECT count(*) FROM measurements").fetchone()
            summaries.append({"file": str(source), "rows": rows, "new": new})
            summaries[-1]["wrong"] = 0 if winners else total - rows
        path = str(db.path)
    if as_json:
        click.echo(json.dumps({"database": path, "files": summaries}))
        return
    for s in summaries:
        wrong = f", {s['wrong']} that make no sense left out" if s["wrong"] else ""
        click.echo(
            f"{s['file']}: {s['rows']} measurements, {s['new']} of them new in {path}{wrong}"
        )


@click.command(cls=Command)
@click.option("--older-than", type=click.IntRange(min=0), metavar="DAYS", help="Older rows.")
@click.option("--stale", is_flag=True, help="Rows of kernels that this jaxwin does not have.")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@database_option
@_json
def prune(
    older_than: int | None, stale: bool, dry_run: bool, database: Path | None, as_json: bool
) -> None:
    """Delete measurements that are old, or of kernels that have changed.

    With both options, those to which either applies.

    \b
    Example:
      jaxwin-tune prune --stale --dry-run
      jaxwin-tune prune --stale --older-than 365
    """
    if older_than is None and not stale:
        raise click.UsageError("say what to delete: --older-than DAYS, --stale or both")
    before = None
    if older_than is not None:
        before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=older_than)
    path = database or default_path()
    if not path.exists():
        raise Failure(f"{path}: does not exist")
    with Database(path) as db:
        count = db.prune(before=before, stale=stale, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps({"database": str(path), "rows": count, "dry_run": dry_run}))
    else:
        click.echo(f"{path}: {count} measurements {'would be ' if dry_run else ''}deleted")


COMMANDS = (show, export, import_, merge, prune)


# --- doctor ----------------------------------------------------------------------------------


def repair() -> list[str]:
    """Upgrades, completes or sets aside the files that may be written; what was done."""
    done = []
    for tier, path in _tuning.files():
        if tier not in ("environment", "user") or not path.exists():
            continue
        before = _state(path)
        if before == "ok":
            continue
        try:
            Database(path).close()
        except DatabaseError as error:
            done.append(f"{error}")
        else:
            done.append(f"{path}: was {before}, is {_state(path)}")
    _tuning.reload()
    return done


def _state(path: Path) -> str:
    try:
        with _tuning.reading(path) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except _tuning.Unusable as error:
        return error.state
    return "ok" if verdict == "ok" else "corrupt"


def examine() -> tuple[dict[str, Any], list[str]]:
    """What the tuning databases hold, and what is wrong with them; for `jaxwin-tune doctor`."""
    here = this_machine()
    facts: dict[str, Any] = {"machine": f"{here} ({here.id})"}
    problems = []
    seen = []
    for tier, path in _tuning.files():
        entry: dict[str, Any] = {"tier": tier, "path": str(path)}
        try:
            with _tuning.reading(path) as connection:
                entry |= {"state": "ok", "schema": _tuning.SCHEMA_VERSION}
                (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    problems.append(
                        f"{path}: is damaged: `jaxwin-tune doctor --repair` sets it aside"
                    )
                    entry["state"] = "corrupt"
                else:
                    entry["rows"] = _count(connection)
        except _tuning.Unusable as error:
            entry["state"] = error.state
            if error.state in ("missing", "hidden") and tier != "environment":
                seen.append(entry)
                continue
            advice = {
                "corrupt": ": `jaxwin-tune doctor --repair` sets it aside",
                "missing": ": the tuner makes it",
            }.get(error.state, "")
            if error.state not in ("missing", "empty"):
                problems.append(f"{error}{advice}")
            entry["about"] = f"{error}{advice}"
        seen.append(entry)
    facts["tuning databases"] = seen
    facts["measurements go to"], cramped = _target()
    problems += cramped
    missed, wrong = _missed()
    facts["missed problems"] = missed
    return facts, problems + wrong


def _target() -> tuple[str, list[str]]:
    """The file that the tuner writes, and whether it has the room for it."""
    try:
        path = default_path()
    except DatabaseError as error:
        return f"nowhere: {error}", []
    folder = next(place for place in (path.parent, *path.parent.parents) if place.exists())
    if not os.access(path if path.exists() else folder, os.W_OK):
        # Many programs only read: that is nothing wrong.
        return f"{path}, which cannot be written: name another in JAXWIN_TUNING_DB", []
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < _LEAST_BYTES:
        return str(path), [f"{path}: the disk is full: {free >> 10} KiB are left"]
    return str(path), []


def _missed() -> tuple[str, list[str]]:
    """What is known of problems that programs missed, and what is wrong with that."""
    path = _record.misses_file()
    if path is None:
        return "not remembered: there is no home directory", []
    if not _settings.settings().misses:
        return "not remembered: JAXWIN_MISSES says so", []
    try:
        counts = collections.Counter(
            "on GPUs" if isa else f"with {threads} threads" for _, threads, isa in _record.misses()
        )
    except OSError as error:
        return str(path), [f"{path}: cannot be read ({error.strerror}): delete it"]
    folder = next(place for place in (path, *path.parents) if place.exists())
    text = ", ".join(f"{n} {how}" for how, n in sorted(counts.items()))
    told = f"{text or 'none'} ({path})" + ("; `jaxwin-tune run` tunes them" if counts else "")
    if not os.access(folder, os.W_OK):
        told += f"; no more are remembered: {folder} cannot be written"
    return told, []


def as_text(value: Any) -> str:
    """A fact of `examine()` for people: entries on lines of their own."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return str(value)
    lines = [""]
    for entry in value:
        rows = ", ".join(f"{count} {name}" for name, count in entry.get("rows", {}).items())
        held = f", {rows or 'no'} rows" if entry["state"] == "ok" else ""
        about = entry.get("about") or f"{entry['path']}: {entry['state']}{held}"
        lines.append(f"  {entry['tier']}: {about}")
    return "\n".join(lines)


def _count(connection: Any) -> dict[str, int]:
    """How many measurements a database has, and how many of them may count here."""
    here = this_machine()
    likeness = {k: here.likeness(m) for k, m in _tuning.machines(connection).items()}
    kernels = {*_registry.kernels(), f"{_registry.XLA} {_registry.abi(_registry.XLA)}"}
    counts: collections.Counter[str] = collections.Counter()
    query = (
        "SELECT machine_id, algorithm, abi, status, count(*) FROM measurements GROUP BY 1, 2, 3, 4"
    )
    for machine, algorithm, abi, status, count in connection.execute(query):
        counts["all"] += count
        if likeness.get(machine, "other") == "other":
            counts["of other machines"] += count
        elif f"{algorithm} {abi}" not in kernels:
            counts["of other kernels"] += count
        elif status != "ok":
            counts["failed"] += count
        else:
            counts["usable"] += count
    return dict(counts)
