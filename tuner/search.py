# SPDX-License-Identifier: Apache-2.0
"""The search for the fastest plan of one problem.

The default plan runs beside the candidates in every comparison, and what counts is the time
relative to it: so what was measured minutes apart, or on another machine of a kind, can be
compared. A small space is measured whole. Else these are measured, as far as the effort goes: the
default plan of each algorithm, the winners of near problems, what the native cost model likes best,
the neighbours of the fastest so far for as long as that helps, and what optuna's TPE proposes.
Those that may be the fastest are measured once more, so that a disturbed sample decides nothing.
Then the fastest few and the default plan are compared again, in a process of their own, and one of
them is stored as confirmed. It replaces what was there only if it is faster beyond doubt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from jaxwin import _registry
from jaxwin._machine import Machine, this_gpu, this_machine
from jaxwin._plan import Plan
from jaxwin._problem import Problem
from jaxwin._tuning import Row
from jaxwin.tuner import measure
from jaxwin.tuner.database import Database, Measurement, now
from jaxwin.tuner.laboratory import Finding
from jaxwin.tuner.space import Candidate, Space

# Statuses after which a candidate is never tried again.
BAD = ("wrong", "crashed", "timeout", "refused")
MAX_WORKSPACE = 2**30  # bytes; no candidate needs more

LEAST_GAIN = 0.01  # what a new winner must gain at least
NOISY = 0.1  # spread of the default plan's samples that deserves a warning
_UNDECIDED_GAIN = 0.05  # where a candidate may be that much faster for all we know, ask again
_FEW_ERROR = 0.02  # standard error of one or two samples, which say nothing of their spread
SURE = 2.0  # standard errors that leave no doubt
_EXTRA_COMPARISONS = 2  # of finalists, where the samples do not tell
_SLOWER_THAN = 2.0  # a candidate that much slower than the fastest is dropped early
_PLAUSIBLE = 3.0  # algorithms that the cost model finds that much slower have their default tried
_RANKED_PER_ALGORITHM = 3
_OTHERS = 8  # candidates of other numerical families that are compared with the winner
_CENTRES = 2  # of the fastest candidates, whose neighbours are tried


@dataclasses.dataclass(frozen=True)
class Effort:
    """How thorough a search is.

    candidates: how many are measured at most; spaces up to that size are measured whole. seconds:
    per problem. rounds, min_seconds: of a comparison in the search, samples per candidate and
    length of a sample. finalists, final_rounds: of the last comparison.
    """

    candidates: int
    seconds: float
    rounds: int
    min_seconds: float
    finalists: int
    final_rounds: int


EFFORTS = {
    "quick": Effort(32, 8.0, 3, 0.005, 3, 11),
    "normal": Effort(120, 45.0, 5, 0.01, 4, 21),
    "full": Effort(600, 600.0, 7, 0.02, 6, 41),
}


class Measurer(Protocol):
    """What `jaxwin.tuner.laboratory.Laboratory` does."""

    def compare(
        self,
        problem: Problem,
        plans: Sequence[Plan],
        *,
        rounds: int,
        min_seconds: float,
        slower_than: float,
        budget_seconds: float = math.inf,
    ) -> list[Finding]:
        """One finding per plan; the first plan must run."""

    def stop(self) -> None:
        """The next comparison starts from nothing."""


@dataclasses.dataclass
class Outcome:
    """What a search came to.

    status: "tuned" (another plan than the default), "default" (that is the fastest), "known" (was
    tuned before, nothing new was measured), "undecided" (too noisy), "unsupported" (no native
    kernel), "failed", "skipped" (no time left); reason: why.
    ratio: the default plan's time relative to the winner's, in the last comparison. noise: the
    spread of the default plan's samples there (scaled median absolute deviation, relative).
    measured: how many candidates this search measured. known: how many were known before.
    bad: candidates that did not pass, by status. others: where JAXWIN_FAMILY=any has them take
    part, the times of XLA and of the best candidates of algorithms of other numerical families,
    relative to the winner's.
    """

    problem: Problem
    status: str
    reason: str = ""
    default: Candidate | None = None
    winner: Candidate | None = None
    default_ns: float | None = None
    winner_ns: float | None = None
    ratio: float | None = None
    noise: float | None = None
    measured: int = 0
    known: int = 0
    bad: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    others: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        times = [f"{name} takes {ratio:.2f} of its time" for name, ratio in self.others.items()]
        return "; ".join([self._words(), *times])

    def _words(self) -> str:
        if self.winner is None or self.status == "undecided":
            return f"{self.status}: {self.reason}"
        if self.status == "known":
            return f"known: {self.winner}; nothing new to measure"
        measured = f"{self.measured} measured in {self.seconds:.1f} s"
        found = f"{self.winner}; {duration(self.winner_ns)}, {measured}"
        if self.status == "default":
            return f"the default plan is the fastest: {found}"
        return f"{self.ratio:.2f}x faster: {found}"


def duration(ns: float | None) -> str:
    """Nanoseconds for people."""
    if ns is None:
        return "-"
    return f"{ns / 1e6:.3f} ms" if ns >= 1e6 else f"{ns / 1e3:.1f} us"


@dataclasses.dataclass(frozen=True)
class Context:
    """What the searches of a run share.

    again: measures also what is in the database. storage: of optuna, shared with other machines
    of this kind; None for none. near: rows of near problems. family: "any" compares the winner with
    XLA and with algorithms of other numerical families, too. On a GPU it is compared with XLA, the
    incumbent there, in any case.
    """

    measurer: Measurer
    database: Database
    threads: int
    isa: str
    effort: Effort
    again: bool = False
    storage: Any = None
    seed: int = 0
    near: Callable[[Problem], Iterable[Row]] = lambda problem: ()
    family: str = "canonical"


def tune_problem(
    problem: Problem,
    context: Context,
    *,
    seconds: float,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Outcome:
    """Searches, and stores what was measured and the winner. Ctrl-C keeps what was measured.

    seconds: for the search; the last comparison comes on top. progress: what happens, and how many
    of how many candidates were measured.

    Raises:
        LaboratoryError: the default plan does not run.
        DatabaseError: the database cannot be used.
    """
    search = _Search(problem, context, progress)
    start = time.monotonic()
    try:
        return search.run(start + seconds)
    finally:
        search.close()
        search.outcome.seconds = time.monotonic() - start


class _Search:
    def __init__(
        self, problem: Problem, context: Context, progress: Callable[[str, int, int], None]
    ) -> None:
        self.problem, self.context, self._progress = problem, context, progress
        self.space = Space(problem, context.isa, context.threads, MAX_WORKSPACE)
        self.outcome = Outcome(problem, "unsupported", "no native kernel")
        self.machine = machine_of(context.isa)
        self.ratios: dict[Candidate, float] = {}  # time relative to the default plan's
        self.bad: dict[Candidate, str] = {}
        self.current: Candidate | None = None  # the confirmed winner so far
        self._previous: Candidate | None = None  # what `again` starts from
        self._hopes: dict[Candidate, float] = {}  # likewise, of the fastest samples
        self._samples: dict[Candidate, list[float]] = {}  # ratios, sample by sample
        self._shared: dict[Candidate, float] = {}  # ratios that other machines of this kind found
        self._studies: dict[str, _Study] = {}
        self._default_ns: list[float] = []
        self._others_known: set[str] = set()  # algorithms

    def run(self, deadline: float) -> Outcome:
        outcome, effort = self.outcome, self.context.effort
        default = self.space.incumbent()
        if default is None:
            return outcome
        self.default = outcome.default = default
        self._read()
        outcome.known = len(self.ratios.keys() | self.bad.keys())
        everything = self.space.everything(effort.candidates)
        total = effort.candidates if everything is None else len(everything)
        batches = self._adaptive() if everything is None else self._whole(everything)
        for batch in batches:
            done = len(self.ratios.keys() | self.bad.keys())
            if done >= total or time.monotonic() > deadline:
                break
            self._progress(self._best_so_far(), done, total)
            self._compare(batch[: total - done])
        if not outcome.measured and self.current is not None:
            outcome.status, outcome.winner = "known", self.current
        else:
            self._progress("the fastest once more", total, total)
            self._final(self._hopeful())
        compares = self.context.family == "any" or self.space.side != ""
        if compares and outcome.winner is not None:
            self._progress("other families", total, total)
            self._compare_others(outcome.winner)
        return outcome

    def close(self) -> None:
        """Ends trials that were not measured; others share the study."""
        for study in self._studies.values():
            study.close()

    # --- what is known -----------------------------------------------------------------------

    def _read(self) -> None:
        """What earlier runs measured with these kernels, on machines like this one."""
        context = self.context
        rows: dict[Candidate, Measurement] = {}
        confirmed: list[Measurement] = []
        for row in context.database.measurements(self.problem):
            names = _registry.parameter_names(row.algorithm, context.isa)
            known = names is not None
            if row.family != _family(context.isa):
                same = row.machine.id == self.machine.id and row.threads == context.threads
                current = known and row.abi == _registry.abi(row.algorithm, context.isa)
                if same and current and row.isa == context.isa and not context.again:
                    self._others_known.add(row.algorithm)
                continue
            if not known or row.isa != context.isa or row.parameters.keys() != set(names or ()):
                continue
            if row.abi != _registry.abi(row.algorithm, context.isa):
                continue
            candidate = self._candidate(row)
            same = (
                self.machine.likeness(row.machine) == "same"
                or row.machine.id == self.machine.id  # a CPU that does not say what it is
            ) and row.threads == context.threads
            # What is wrong or crashes once is out everywhere; what takes long may not elsewhere.
            if row.status in ("wrong", "crashed") or (row.status in BAD and same):
                self.bad[candidate] = row.status
            elif row.status == "ok" and same and self.space.plan(candidate) is not None:
                rows[candidate] = row
                confirmed += [row] * row.confirmed
        if confirmed:
            newest = max(confirmed, key=lambda row: row.created)
            winner = self._candidate(newest)
            self.current = None if winner in self.bad else winner
        if context.again:
            self._previous, self.current = self.current, None
            return
        anchor = rows.get(self.default)
        if anchor is None or not anchor.ns_median:
            self.current = None
            return
        for candidate, row in rows.items():
            if candidate not in self.bad and row.ns_median is not None:
                self.ratios[candidate] = row.ns_median / anchor.ns_median
                self._hopes[candidate] = (row.ns_min or 0.0) / (anchor.ns_min or row.ns_median)

    def _candidate(self, row: Measurement) -> Candidate:
        names = _registry.parameter_names(row.algorithm, self.context.isa) or ()
        return self.space.candidate(row.algorithm, (row.parameters[name] for name in names))

    # --- what to try -------------------------------------------------------------------------

    def _untried(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        normal = self.space.normal
        seen = {normal(c) for c in (*self.ratios, *self.bad, *self._shared)}
        found = []
        for candidate in candidates:
            if normal(candidate) not in seen:
                seen.add(normal(candidate))
                found.append(candidate)
        return found

    def _size(self) -> int:
        """Candidates per comparison: few where a call takes long, so that the deadline holds."""
        if not self._default_ns:
            return 3
        seconds = statistics.median(self._default_ns) / 1e9
        return max(2, min(8, int(1.0 / (10 * seconds + 0.02))))

    def _whole(self, everything: list[Candidate]) -> Iterator[list[Candidate]]:
        order = sorted(everything, key=lambda c: (self.space.cost(c), c))
        while remaining := self._untried([self.default, *order]):
            yield remaining[: self._size()]

    def _adaptive(self) -> Iterator[list[Candidate]]:
        first = self._first()
        self._read_shared()
        while remaining := self._untried(first):
            yield remaining[: self._size()]
        while True:
            self._read_shared()
            fastest = self._fastest()
            moves = self._untried(
                move for centre in fastest[:_CENTRES] for move in self.space.neighbours(centre)
            )
            proposals = moves or self._untried(self._proposed(fastest))
            if not proposals:
                return
            yield proposals[: self._size()]

    def _first(self) -> list[Candidate]:
        space = self.space
        lent = []
        for row in self.context.near(self.problem):
            candidate = space.candidate(row.algorithm, row.params)
            if space.plan(candidate) is not None:
                lent.append(candidate)
        defaults = sorted(space.defaults.values(), key=lambda c: (space.cost(c), c))
        limit = _PLAUSIBLE * space.cost(defaults[0])
        plausible = [c for c in defaults if space.cost(c) <= limit]
        counts: dict[str, int] = {}
        ranked = []
        for candidate in space.ranked():
            counts[candidate.algorithm] = counts.get(candidate.algorithm, 0) + 1
            if (
                counts[candidate.algorithm] <= _RANKED_PER_ALGORITHM
                and space.cost(candidate) <= limit
            ):
                ranked.append(candidate)
        previous = [self._previous] if self._previous is not None else []
        # Half of the effort is for the neighbours of what turns out to be fast.
        first = dict.fromkeys([self.default, *previous, *lent, *plausible, *ranked])
        return list(first)[: max(3, self.context.effort.candidates // 2)]

    def _read_shared(self) -> None:
        """What other machines of this kind measured, where they share a storage with this one."""
        if self.context.storage is None:
            return
        for algorithm in self.space.defaults:
            for candidate, ratio in self._study(algorithm).known().items():
                if self.space.plan(candidate) is not None and candidate not in self.bad:
                    self._shared[candidate] = ratio

    def _fastest(self) -> list[Candidate]:
        """The candidates with a time that differ, the fastest first."""
        ratios = self._shared | self.ratios
        order = sorted(ratios.keys() - self.bad.keys(), key=lambda c: (ratios[c], c))
        once: dict[Candidate, Candidate] = {}
        for candidate in order:  # other machines may have measured others that do the same
            once.setdefault(self.space.normal(candidate), candidate)
        return list(once.values())

    def _proposed(self, fastest: list[Candidate]) -> list[Candidate]:
        """What TPE proposes for the algorithms of the fastest, mostly for that of the fastest."""
        algorithms = list(dict.fromkeys(c.algorithm for c in fastest))[:2]
        found: list[Candidate] = []
        for algorithm, count in zip(algorithms, (self._size(), 1), strict=False):
            study = self._study(algorithm)
            # Of a model that has converged most proposals are known.
            for _ in range(20 * count):
                candidate = study.ask()
                if candidate in self.bad or self.space.plan(candidate) is None:
                    study.tell(candidate, None)
                elif (ratio := self._ratio(candidate)) is not None:
                    study.tell(candidate, ratio)
                elif candidate not in found:
                    found.append(candidate)
                if len(found) >= count:
                    break
        return found

    def _ratio(self, candidate: Candidate) -> float | None:
        """The time of a candidate or of one that does the same."""
        ratios, normal = self._shared | self.ratios, self.space.normal
        if candidate in ratios:
            return ratios[candidate]
        wanted = normal(candidate)
        return next((ratio for c, ratio in ratios.items() if normal(c) == wanted), None)

    def _study(self, algorithm: str) -> _Study:
        if algorithm not in self._studies:
            study = _Study(self.space, algorithm, self.context, self.machine)
            for candidate, ratio in self.ratios.items():
                if candidate.algorithm == algorithm:
                    study.tell(candidate, ratio)
            self._studies[algorithm] = study
        return self._studies[algorithm]

    # --- measuring ---------------------------------------------------------------------------

    def _plans(self, candidates: Iterable[Candidate]) -> list[Plan]:
        plans = []
        for candidate in candidates:
            plan = self.space.plan(candidate)
            assert plan is not None, candidate
            plans.append(plan)
        return plans

    def _compare(self, batch: Sequence[Candidate]) -> None:
        """Measures candidates beside the default plan, and stores what came out."""
        effort = self.context.effort
        candidates = [self.default, *(c for c in batch if c != self.default)]
        findings = self.context.measurer.compare(
            self.problem,
            self._plans(candidates),
            rounds=effort.rounds,
            min_seconds=effort.min_seconds,
            slower_than=_SLOWER_THAN,
            budget_seconds=effort.seconds / 4,
        )
        self._default_ns += findings[0].ns
        self._store(candidates, findings)
        self.outcome.measured += sum(c not in self.ratios for c in batch)
        for candidate, finding in zip(candidates, findings, strict=True):
            ratio = None
            if finding.status == "ok":
                samples = self._samples.setdefault(candidate, [])
                samples += finding.ratios(findings[0])
                ratio = self.ratios[candidate] = statistics.median(samples)
                self._hopes[candidate] = min(finding.ns) / min(findings[0].ns)
            if self.context.storage is not None or candidate.algorithm in self._studies:
                self._study(candidate.algorithm).tell(candidate, ratio)

    def _store(
        self,
        candidates: Sequence[Candidate],
        findings: Sequence[Finding],
        confirmed: Candidate | None = None,
    ) -> None:
        rows = []
        for candidate, finding in zip(candidates, findings, strict=True):
            ok = finding.status == "ok"
            if not ok:
                self.bad[candidate] = finding.status
                self.ratios.pop(candidate, None)
                counts = self.outcome.bad
                counts[finding.status] = counts.get(finding.status, 0) + 1
            rows.append(
                self._measurement(
                    candidate,
                    finding,
                    family=_family(self.context.isa),
                    confirmed=ok and candidate == confirmed,
                )
            )
        self.context.database.add(rows)

    def _measurement(self, candidate: Candidate, finding: Finding, **more: Any) -> Measurement:
        ok = finding.status == "ok"
        return Measurement(
            self.problem,
            candidate.algorithm,
            candidate.parameters,
            self.context.isa,
            self.context.threads,
            finding.status,
            ns_min=min(finding.ns) if ok else None,
            ns_median=finding.median_ns if ok else None,
            ns_mad=finding.mad_ns if ok else None,
            repeats=finding.calls,
            error=finding.error,
            machine=self.machine,
            **more,
        )

    def _best_so_far(self) -> str:
        if not self.ratios or self.default not in self.ratios:
            return "the default plan"
        best = min(self.ratios, key=lambda c: self.ratios[c])
        return f"{1 / self.ratios[best]:.2f}x {best}"

    # --- the last comparison -----------------------------------------------------------------

    def _hopeful(self) -> list[Candidate]:
        """Measures those that may be the fastest once more; what then is the fastest, first.

        Disturbances only ever make a sample slower: the fastest sample of a candidate tells what
        it may be capable of.
        """

        def hope(candidate: Candidate) -> float:
            measured = self.ratios.get(candidate, self._shared.get(candidate, 1.0))
            return min(measured, self._hopes.get(candidate, measured))

        candidates = sorted(self._fastest(), key=hope)
        candidates = [c for c in candidates if c != self.default]
        candidates = candidates[: 2 * self.context.effort.finalists + 2]
        if candidates:
            self._compare(candidates)
        return sorted((c for c in candidates if c in self.ratios), key=lambda c: self.ratios[c])

    def _final(self, hopeful: list[Candidate]) -> None:
        """Compares the fastest with the default plan and the winner so far; stores the winner."""
        effort, outcome = self.context.effort, self.outcome
        holders = [self.default]
        if self.current is not None and self.current not in (self.default, *self.bad):
            holders.append(self.current)
        promising = [c for c in hopeful if c not in holders][: effort.finalists]
        # Chosen as the fastest of many, they were lucky too: a new process has other luck.
        self.context.measurer.stop()
        found = self._compared([*holders, *promising])
        for _ in range(_EXTRA_COMPARISONS):
            unsure = [
                c
                for c in promising
                if found[c].status == "ok" and Paired.of(found[c], found[self.default]).unsure()
            ]
            if not unsure:
                break
            more = self._compared([*holders, *unsure])
            found |= {c: found[c].joined(finding) for c, finding in more.items()}
        candidates, findings = list(found), list(found.values())
        sound = [c for c in candidates if found[c].status == "ok"]
        current = holders[-1] if holders[-1] in sound else self.default
        challengers = {c: Paired.of(found[c], found[current]) for c in sound if c != current}
        winners = [c for c, paired in challengers.items() if paired.faster()]
        winner = min(winners, key=lambda c: challengers[c].cautious, default=current)
        anchor = found[self.default]
        outcome.noise = 1.4826 * anchor.mad_ns / anchor.median_ns
        undecided = winner == current and any(p.may_be_faster() for p in challengers.values())
        self._store(candidates, findings, None if undecided else winner)
        outcome.default_ns, outcome.winner_ns = anchor.median_ns, found[winner].median_ns
        outcome.winner, outcome.ratio = winner, 1.0
        if winner != self.default:
            outcome.ratio = 1 / Paired.of(found[winner], anchor).cautious
        outcome.status = "default" if winner == self.default else "tuned"
        outcome.reason = ""
        if undecided:
            outcome.status = "undecided"
            outcome.reason = f"the machine is too busy: samples spread by {outcome.noise:.0%}"

    def _compare_others(self, winner: Candidate) -> None:
        """Whether XLA or an algorithm of another family is faster than the winner.

        Their numbers are others, so they are no candidates.
        """
        outcome, context = self.outcome, self.context
        space, candidates = self.space, []
        if not space.side:
            space = Space(
                self.problem, context.isa, context.threads, MAX_WORKSPACE, canonical=False
            )
            candidates = [*space.defaults.values()]
            candidates += [c for c in space.ranked() if c not in candidates]
            candidates = candidates[:_OTHERS]
        candidates.append(self.space.candidate(_registry.XLA, ()))
        known = {candidate.algorithm for candidate in candidates} <= self._others_known
        if known and not outcome.measured:
            return
        plan = self.space.plan(winner)
        assert plan is not None
        plans = [space.plan(c) or _xla_plan(context) for c in candidates]
        ours, *theirs = context.measurer.compare(
            self.problem,
            [plan, *plans],
            rounds=context.effort.final_rounds,
            min_seconds=context.effort.min_seconds,
            slower_than=_SLOWER_THAN,
            budget_seconds=context.effort.seconds / 2,
        )
        paired = {
            c: Paired.of(finding, ours)
            for c, finding in zip(candidates, theirs, strict=True)
            if finding.status == "ok"
        }
        best: dict[str, Candidate] = {}
        for candidate in sorted(paired, key=lambda c: paired[c].cautious):
            best.setdefault(candidate.algorithm, candidate)
        confirmed = {c for c in best.values() if paired[c].faster()}
        created = now()
        context.database.add(
            self._measurement(
                candidate,
                finding,
                family=_registry.family(candidate.algorithm, context.isa),
                confirmed=candidate in confirmed,
                created=created,
            )
            for candidate, finding in zip(candidates, theirs, strict=True)
        )
        outcome.others = {name: paired[candidate].ratio for name, candidate in best.items()}

    def _compared(self, candidates: list[Candidate]) -> dict[Candidate, Finding]:
        effort = self.context.effort
        findings = self.context.measurer.compare(
            self.problem,
            self._plans(candidates),
            rounds=effort.final_rounds,
            min_seconds=effort.min_seconds,
            slower_than=_SLOWER_THAN,
            budget_seconds=effort.seconds / 2,
        )
        return dict(zip(candidates, findings, strict=True))


def _xla_plan(context: Context) -> Plan:
    return Plan(_registry.XLA, context.isa, context.threads, (), 0)


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two computations that were timed in turn: how much time one takes relative to the other.

    ratio: the median over the rounds; error: its standard error, from the median absolute
    deviation. medians, minima: the ratios of the medians and of the fastest samples.
    """

    ratio: float
    error: float
    medians: float
    minima: float

    @classmethod
    def of(cls, one: Finding, other: Finding) -> Paired:
        """How much time `one` takes relative to `other`."""
        ratios = one.ratios(other)
        error = measure.error(ratios)
        return cls(
            statistics.median(ratios),
            error if len(ratios) > 2 else max(error, _FEW_ERROR),
            one.median_ns / other.median_ns,
            min(one.ns) / min(other.ns),
        )

    @property
    def cautious(self) -> float:
        """The ratio that promises less; they differ where the machine's speed jumps."""
        return max(self.ratio, self.medians)

    def may_be_faster(self) -> bool:
        """Whether the samples leave room for a gain that would be a pity to miss."""
        return self.ratio - SURE * self.error < 1 - _UNDECIDED_GAIN

    def unsure(self) -> bool:
        """Whether more samples could show that the first is faster by enough to matter."""
        seems = self.may_be_faster() or 1 - self.ratio >= LEAST_GAIN
        return seems and not self.faster()

    def faster(self) -> bool:
        """Whether the first is faster beyond doubt, and by enough to matter."""
        gain = 1 - self.cautious
        return gain >= LEAST_GAIN and gain > SURE * self.error and self.minima < 1


class _Study:
    """One algorithm's parameters as a study of optuna, alone or shared with other machines.

    The value is the time relative to the default plan's, which machines of one kind can share.
    """

    def __init__(self, space: Space, algorithm: str, context: Context, machine: Machine) -> None:
        import optuna  # takes its time: only where it is needed

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._algorithm = algorithm
        self._side = space.side
        names = _registry.parameter_names(algorithm, space.side) or ()
        self._distributions: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution(values)
            for name, values in zip(names, space.values[algorithm], strict=True)
        }
        self._study = optuna.create_study(
            storage=context.storage,
            study_name=study_name(space.problem, algorithm, context, machine),
            load_if_exists=True,
            sampler=optuna.samplers.TPESampler(
                seed=context.seed, multivariate=True, n_startup_trials=5
            ),
        )
        self._asked: dict[Candidate, Any] = {}
        self._told: set[Candidate] = set()

    def _candidate(self, params: dict[str, Any]) -> Candidate:
        values = tuple(params[name] for name in self._distributions)
        return Candidate(self._algorithm, values, self._side)

    def known(self) -> dict[Candidate, float]:
        """What the study knows."""
        trials = self._study.get_trials(
            deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,)
        )
        return {self._candidate(trial.params): trial.values[0] for trial in trials}

    def ask(self) -> Candidate:
        """A candidate that TPE hopes for; it may be invalid or known."""
        trial = self._study.ask(self._distributions)
        candidate = self._candidate(trial.params)
        if candidate in self._asked:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._asked[candidate] = trial
        return candidate

    def tell(self, candidate: Candidate, ratio: float | None) -> None:
        """What became of a candidate, asked for or not; None where it has no time."""
        trial = self._asked.pop(candidate, None)
        if trial is not None:
            state = None if ratio is not None else self._optuna.trial.TrialState.FAIL
            self._study.tell(trial, ratio, state=state)
        elif ratio is not None and candidate not in self._told:
            params = dict(zip(self._distributions, candidate.params, strict=True))
            if any(v not in self._distributions[n].choices for n, v in params.items()):
                return  # a near problem's default, which is none of this study's values
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=params, distributions=self._distributions, value=ratio
                )
            )
        self._told.add(candidate)

    def close(self) -> None:
        """Gives up what was asked for and not told."""
        for trial in self._asked.values():
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        self._asked.clear()


def machine_of(isa: str) -> Machine:
    """What measurements with an instruction set are filed under: for CUDA's the GPU, too."""
    found = this_gpu() if _registry.side(isa) else None
    return found or this_machine()


def _family(isa: str) -> str:
    """The numerical family within which candidates are compared."""
    return _registry.TENSOR if isa == _registry.TENSOR_ISA else _registry.CANONICAL


def study_name(problem: Problem, algorithm: str, context: Context, machine: Machine) -> str:
    """The same for the same problem and kernels on machines of one kind."""
    kind = dataclasses.replace(machine, brand="", stepping=0, isa_flags="", usable_cores=1).id
    abi = _registry.abi(algorithm, context.isa)
    facts = (problem.key, kind, algorithm, abi, context.isa, context.threads)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return f"jaxwin {algorithm} {digest}: {problem}"[:200]
