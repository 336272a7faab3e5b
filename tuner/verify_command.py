# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune verify`: are the stored winners still right, and still fast?"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, NoReturn

import click

from jaxwin import _registry, _tuning
from jaxwin._machine import this_machine
from jaxwin.tuner import against as _against
from jaxwin.tuner import database_commands, exits, machine, search
from jaxwin.tuner.database import (
    Database,
    Measurement,
    default_path,
    read_measurements,
    read_winners,
)
from jaxwin.tuner.laboratory import Finding, Laboratory, LaboratoryError
from jaxwin.tuner.search import MAX_WORKSPACE, Measurer, Paired, duration
from jaxwin.tuner.space import Space

# Of what times are compared with: their own spread, and at least this.
_LEAST_NOISE = 0.05
_ROUNDS = 11
_MIN_SECONDS = 0.01


@dataclasses.dataclass
class Verdict:
    """What became of one stored winner.

    status: "ok"; "drifted" (right, and no slower than the default plan, but its time is not what is
    stored); "regressed" (right, but slower than the default plan by more than the noise); "wrong",
    "crashed", "timeout", "refused", "error" (as in the database); "skipped"; reason: why.
    ratio: its time relative to the stored one. default_ratio: relative to the default plan's.
    """

    measurement: Measurement
    status: str
    reason: str = ""
    ns: float | None = None
    ratio: float | None = None
    default_ratio: float | None = None

    @property
    def bad(self) -> bool:
        """Whether something must be done about it."""
        return self.status not in ("ok", "drifted", "skipped")

    def __str__(self) -> str:
        text = f"{self.measurement.problem}: {self.status}"
        if self.ns is not None and self.ratio is not None and self.default_ratio is not None:
            text += (
                f", {duration(self.ns)} ({self.ratio:.2f} of the stored time, "
                f"{self.default_ratio:.2f} of the default plan's)"
            )
        return text + (f": {self.reason}" if self.reason else "")

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        m = self.measurement
        return {
            "problem": str(m.problem),
            "algorithm": m.algorithm,
            "parameters": m.parameters,
            "isa": m.isa,
            "threads": m.threads,
            "stored_ns": m.ns_median,
            "uid": m.uid,
            "status": self.status,
            "reason": self.reason,
            "ns": self.ns,
            "ratio": self.ratio,
            "default_ratio": self.default_ratio,
        }


def stored_winners(path: Path) -> list[Measurement]:
    """The winners that dispatch may use on this machine with these kernels.

    Raises:
        Unusable: the database cannot be read.
    """
    here, isa = this_machine(), _registry.isa()
    with _tuning.reading(path) as connection:
        likeness = {k: here.likeness(m) for k, m in _tuning.machines(connection).items()}
        uids = {
            row["uid"]
            for row in read_winners(connection)
            if not row["stale"]
            and (row["isa"] == isa or _registry.side(row["isa"]))
            and row["family"] != "any"
            and row["confirmed"]
            and (likeness.get(row["machine_id"]) == "same" or row["machine_id"] == here.id)
        }
        return [m for m in read_measurements(connection) if m.uid in uids]


def verify(winners: Iterable[Measurement], measurer: Measurer) -> Iterator[Verdict]:
    """Checks winners of one number of threads against the default plan's bits, and times them."""
    for winner in winners:
        space = Space(winner.problem, winner.isa, winner.threads, MAX_WORKSPACE)
        default = space.incumbent()
        plan = space.plan(_against.candidate_of(space, winner))
        default_plan = None if default is None else space.plan(default)
        if default_plan is None or plan is None:
            yield Verdict(winner, "refused", "the native core does not take its parameters")
            continue
        try:
            found = measurer.compare(
                winner.problem,
                [default_plan, plan],
                rounds=_ROUNDS,
                min_seconds=_MIN_SECONDS,
                slower_than=float("inf"),
            )
        except LaboratoryError as error:
            yield Verdict(winner, "error", str(error))
            continue
        yield _judge(winner, *found)


def _judge(winner: Measurement, default: Finding, found: Finding) -> Verdict:
    if found.status != "ok":
        return Verdict(winner, found.status, found.error)
    ns = found.median_ns
    stored = winner.ns_median or ns
    paired = Paired.of(found, default)
    spread = 3 * 1.4826 * max((winner.ns_mad or 0.0) / stored, found.mad_ns / ns)
    noise = max(_LEAST_NOISE, spread)
    ratio, default_ratio = ns / stored, paired.ratio
    if default_ratio - 2 * paired.error > 1 + _LEAST_NOISE and paired.minima > 1:
        return Verdict(winner, "regressed", "tune it again", ns, ratio, default_ratio)
    if abs(ratio - 1) > noise:
        reason = f"the noise is {noise:.0%}: another clock speed, or other work on this machine?"
        return Verdict(winner, "drifted", reason, ns, ratio, default_ratio)
    return Verdict(winner, "ok", "", ns, ratio, default_ratio)


@click.command("verify", cls=database_commands.Command)
@click.argument("text", required=False)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds that a plan may be silent before it counts as hanging.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Of winners; the newest come first.")
@click.option(
    "--against",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="OTHER",
    help="Another database: compare its winners with these.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    metavar="PERCENT",
    help="With --against: how far times may be apart.  [default: 3]",
)
@database_commands.database_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    text: str | None,
    timeout: float,
    limit: int | None,
    against: Path | None,
    tolerance: float | None,
    database: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the stored winners again: same bits as the default plan, and still as fast.

    TEXT selects the problems whose description contains it. Each winner runs in another process,
    with a time limit, beside the default plan. One that is wrong, crashes or hangs is stored as
    such and never used again. "drifted" says that a time is not what is stored, within the noise of
    both; "regressed" that the winner is slower than the default plan now.

    With --against the winners of two databases, such as of two tunings of this machine, are
    compared instead, and nothing is stored. Where both have the same plan for a problem they are
    "same". Else the two plans run in turn, with more rounds for as long as the samples do not tell:
    their times "agree" within the tolerance, "differ" by more, or are "unsure" where the machine is
    too busy. A ratio is the first database's time relative to the other's.

    Exits with 1 where a winner is wrong or has regressed. With --against with 1 where winners
    differ or are wrong, or where nothing could be compared; else with 5 where one is unsure.

    \b
    Example:
      jaxwin-tune verify
      jaxwin-tune verify "w3x3" --limit 10 --json
      jaxwin-tune verify --database monday.db --against tuesday.db
    """
    path = database or default_path()
    winners = [m for m in stored_winners(path) if (text or "") in str(m.problem)]
    winners.sort(key=lambda m: m.created, reverse=True)
    if against is not None:
        percent = 3.0 if tolerance is None else tolerance
        _command_against(path, winners, against, percent / 100, timeout, limit, as_json, quiet)
    if tolerance is not None:
        raise click.UsageError("--tolerance: is for --against")
    winners = winners[:limit]
    verdicts: list[Verdict] = []
    interrupted = False
    try:
        for group, laboratory, reason in _laboratories(winners, timeout):
            if laboratory is None:
                verdicts += [Verdict(winner, "skipped", reason) for winner in group]
                continue
            for verdict in verify(group, laboratory):
                verdicts.append(verdict)
                _tell(quiet, verdict, verdicts, winners)
    except KeyboardInterrupt:
        interrupted = True
    _store(path, verdicts)
    counts = collections.Counter(verdict.status for verdict in verdicts)
    if as_json:
        rows = [verdict.to_json() for verdict in verdicts]
        click.echo(json.dumps({"database": str(path), "complete": not interrupted, "rows": rows}))
    else:
        for verdict in verdicts:
            if verdict.bad:
                click.echo(str(verdict))
        told = _counts(counts)
        click.echo(f"{path}: {len(verdicts)} winners checked" + (f": {told}" if told else ""))
    if interrupted:
        sys.exit(exits.INTERRUPTED)
    sys.exit(exits.FOUND if any(verdict.bad for verdict in verdicts) else exits.OK)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))


def _tell(quiet: bool, what: object, done: Sized, total: Sized) -> None:
    if not quiet:
        click.echo(f"[{len(done)}/{len(total)}] {what}", err=True)


def _laboratories(
    winners: Iterable[Measurement], timeout: float
) -> Iterator[tuple[list[Measurement], Laboratory | None, str]]:
    """Winners that run in one process, and a laboratory for them; or none, and why."""
    groups: dict[tuple[int, str], list[Measurement]] = collections.defaultdict(list)
    for winner in winners:
        groups[winner.threads, winner.isa if _registry.side(winner.isa) else ""].append(winner)
    usable = len(machine.usable_cpus())
    for (threads, gpu_isa), group in sorted(groups.items()):
        if threads > usable:
            yield group, None, f"for {threads} threads, this process may use {usable} CPUs"
            continue
        with Laboratory(threads, timeout, isa=gpu_isa) as laboratory:
            yield group, laboratory, ""


def _command_against(
    path: Path,
    winners: list[Measurement],
    against_path: Path,
    tolerance: float,
    timeout: float,
    limit: int | None,
    as_json: bool,
    quiet: bool,
) -> NoReturn:
    others = stored_winners(against_path)
    pairs = _against.pairs(winners, others)[:limit]
    other_of = {pair.one.uid: pair for pair in pairs}
    found: list[_against.Agreement] = []
    interrupted = False
    try:
        for group, laboratory, reason in _laboratories([pair.one for pair in pairs], timeout):
            paired = [other_of[winner.uid] for winner in group]
            if laboratory is None:
                found += [_against.Agreement(pair, "skipped", reason) for pair in paired]
                continue
            for agreement in _against.compare(paired, laboratory, tolerance):
                found.append(agreement)
                _tell(quiet, agreement, found, pairs)
    except KeyboardInterrupt:
        interrupted = True
    summary = _against.summary(found)
    if as_json:
        facts = {"database": str(path), "against": str(against_path), "tolerance": tolerance}
        rows = [agreement.to_json() for agreement in found]
        click.echo(json.dumps({**facts, "complete": not interrupted, **summary, "rows": rows}))
    else:
        for agreement in found:
            click.echo(str(agreement))
        text = f"{path}, {against_path}: {len(pairs)} problems with a winner in both"
        text += f", {len(found)} compared" if interrupted else ""
        text += f": {_counts(summary['counts'])}" if found else ""
        if summary["geomean"] is not None:
            text += f"; geometric mean of the ratios {summary['geomean']:.3f}"
            text += f", at most {summary['distance']:.1%} apart"
        click.echo(text)
    if interrupted:
        sys.exit(exits.INTERRUPTED)
    if summary["geomean"] is None or any(agreement.bad for agreement in found):
        sys.exit(exits.FOUND)
    sys.exit(exits.BUSY if "unsure" in summary["counts"] else exits.OK)


def _store(path: Path, verdicts: list[Verdict]) -> None:
    """Keeps what went wrong, so that it does not win again."""
    rows = [v.measurement.again(v.status, v.reason) for v in verdicts if v.status in search.BAD]
    if rows:
        with Database(path) as db:
            db.add(rows)
