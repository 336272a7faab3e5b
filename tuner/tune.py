# SPDX-License-Identifier: Apache-2.0
"""Tuning: the searches of many problems, one after the other."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxwin import _compat, _cuda, _explain, _machine, _record, _registry, _settings, _tuning
from jaxwin._problem import Problem
from jaxwin.tuner import exits, gpu, machine, search
from jaxwin.tuner.database import Database, default_path
from jaxwin.tuner.laboratory import Laboratory, LaboratoryError
from jaxwin.tuner.search import EFFORTS, Outcome
from jaxwin.tuner.space import Space

SCHEMA_VERSION = 1
DEVICES = ("cpu", "cuda")
BUSY = 0.05  # share of the CPUs' time that others may use without a warning
_LEAST_SECONDS = 1.0  # of a search
_STORAGE_ATTEMPTS = 4
_SEARCHING = 0.6  # part of a budget for the search; the rest is for the last comparisons


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem to tune; count: how often it occurs. exact: whether its precision forbids tensor
    cores; None for what the options say. Of meaning on a GPU only.
    """

    name: str
    problem: Problem
    count: int = 1
    exact: bool | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """How to tune.

    threads: None for as many as dispatch would use. budget_seconds: for everything, None for no
    limit but the effort's. timeout_seconds: how long a candidate may be silent. again: measure also
    what is in the database. storage: URL of an optuna storage that machines of one kind share.
    database: None for the default. family: "canonical", or "any" for a comparison with other
    families and XLA; None for what JAXWIN_FAMILY says. device: "cpu" or "cuda"; None for the GPU
    where there is one that JAX can use. exact: whether float32 on a GPU is tuned for precision
    HIGHEST.
    """

    effort: str = "quick"
    threads: int | None = None
    budget_seconds: float | None = None
    timeout_seconds: float = 10.0
    again: bool = False
    storage: str | None = None
    database: Path | None = None
    seed: int = 0
    family: str | None = None
    device: str | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.family not in (None, *_settings.FAMILIES):
            raise ValueError(f"family: {self.family!r} is not one of {_settings.FAMILIES}")
        if self.device not in (None, *DEVICES):
            raise ValueError(f"device: {self.device!r} is not one of {', '.join(DEVICES)}")
        if self.effort not in EFFORTS:
            raise ValueError(f"effort: {self.effort!r} is not one of {', '.join(EFFORTS)}")
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise ValueError(f"budget_seconds: {self.budget_seconds} must be more than 0")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: {self.threads} must be at least 1")


@dataclasses.dataclass
class Result:
    """A whole run, complete or interrupted; outcomes are in the order of the tasks done."""

    tasks: list[Task]
    options: Options
    threads: int
    isa: str
    database: Path
    outcomes: list[tuple[Task, Outcome]] = dataclasses.field(default_factory=list)
    complete: bool = False
    others_share: float = 0.0
    stolen_share: float = 0.0

    def gpu_isa(self, task: Task) -> str:
        """What a task's measurements are filed under, if they were made on a GPU; else empty."""
        return _isa_of(task, self.isa, self.options) if _registry.side(self.isa) else ""

    def warnings(self) -> list[str]:
        """What should make a reader doubt the result, or tell the authors."""
        found = []
        measured = any(outcome.measured for _, outcome in self.outcomes)
        if measured and self.others_share > BUSY:
            text = f"the machine is busy: other processes used {self.others_share:.0%} of its CPUs"
            found.append(f"{text}; `--again` measures anew on a calmer one")
        if measured and self.stolen_share > BUSY:
            found.append(f"the hypervisor took {self.stolen_share:.0%} of the CPUs' time")
        noisy = [o for _, o in self.outcomes if (o.noise or 0) > search.NOISY]
        if noisy:
            found.append(
                f"for {len(noisy)} of {len(self.outcomes)} problems samples spread by more than "
                f"{search.NOISY:.0%}"
            )
        for task, outcome in self.outcomes:
            if outcome.bad:
                counts = ", ".join(f"{n} {status}" for status, n in sorted(outcome.bad.items()))
                found.append(f"{task.name}: candidates did not pass: {counts}; please report it")
        if not self.complete:
            found.append("interrupted: what was measured is kept, another run goes on from there")
        return found

    def exit_code(self) -> int:
        """As `jaxwin-tune --help` says."""
        statuses = {outcome.status for _, outcome in self.outcomes}
        if not self.complete:
            return exits.INTERRUPTED
        if "failed" in statuses:
            return exits.FOUND
        if statuses == {"unsupported"}:
            return exits.UNSUPPORTED
        return exits.BUSY if "undecided" in statuses else exits.OK

    def __str__(self) -> str:
        lines = [f"{task.name}: {outcome}" for task, outcome in self.outcomes]
        lines += [f"WARNING: {warning}" for warning in self.warnings()]
        return "\n".join(lines) or "no convolutions"

    def to_json(self) -> dict[str, Any]:
        """Everything, for `json.dumps`."""
        rows = []
        for task, outcome in self.outcomes:
            row = dataclasses.asdict(outcome)
            row["problem"] = json.loads(task.problem.key)
            for role in ("default", "winner"):
                candidate = getattr(outcome, role)
                if candidate is not None:
                    parameters = candidate.parameters
                    row[role] = {"algorithm": candidate.algorithm, "parameters": parameters}
            about = {"name": task.name, "text": str(task.problem), "count": task.count}
            rows.append(about | {"isa": _isa_of(task, self.isa, self.options)} | row)
        return {
            "schema_version": SCHEMA_VERSION,
            "threads": self.threads,
            "isa": self.isa,
            "effort": self.options.effort,
            "database": str(self.database),
            "complete": self.complete,
            "others_share": self.others_share,
            "stolen_share": self.stolen_share,
            "rows": rows,
            "warnings": self.warnings(),
        }


class Progress:
    """What a run tells while it runs; this one keeps it to itself."""

    def start(self, task: Task, number: int, total: int) -> None:
        """A search begins."""

    def step(self, what: str, done: int, total: int) -> None:
        """It has measured `done` of at most `total` candidates."""

    def finish(self, task: Task, outcome: Outcome) -> None:
        """It has ended."""


def merged(tasks: Iterable[Task]) -> list[Task]:
    """Every problem once, with the sum of its counts, under the first of its names."""
    found: dict[tuple[Problem, bool | None], Task] = {}
    for task in tasks:
        key = task.problem, task.exact
        before = found.get(key)
        count = task.count + (before.count if before else 0)
        found[key] = dataclasses.replace(before or task, count=count)
    return list(found.values())


def nothing(options: Options) -> Result:
    """The result of tuning no problem."""
    threads = _registry.threads() if options.threads is None else options.threads
    path = options.database or default_path()
    return Result([], options, threads, _registry.isa(), path, complete=True)


def device(asked: str | None) -> str:
    """Where candidates are to run: "cuda" where there is a GPU that JAX can use, else "cpu".

    Raises:
        ValueError: "cuda" was asked for, and there is none.
    """
    if asked == "cpu":
        return "cpu"
    reason = ""
    if not gpu.rehearsing():
        if not _compat.may_use_cuda():
            reason = "JAX has no CUDA plugin here, or JAX_PLATFORMS excludes it"
        elif _machine.this_gpu() is None:
            reason = "the CUDA driver finds no GPU"
        else:
            reason = _cuda.unusable()
    if reason and asked == "cuda":
        raise ValueError(f"device: {reason}")
    return "cpu" if reason else "cuda"


def _isa_of(task: Task, isa: str, options: Options) -> str:
    """Under which instruction set a task's measurements are filed."""
    if not _registry.side(isa):
        return isa
    return _cuda.isa_of(task.problem, options.exact if task.exact is None else task.exact)


def run(
    tasks: Sequence[Task],
    options: Options,
    progress: Progress | None = None,
    measurer: search.Measurer | None = None,
) -> Result:
    """Tunes the problems of some tasks, and stores measurements and winners in the database.

    With a budget the problems that take most of a program's time by the cost model come first and
    get the larger shares. Ctrl-C ends the run; its result is then not `complete`. measurer: takes
    the place of the measuring process, for tests.

    Raises:
        ValueError: there are not as many CPUs as threads, or no GPU where one was asked for, the
            storage cannot be used, or JAXWIN_MAX_ISA is no instruction set.
        DatabaseError: the database cannot be used.
    """
    progress = progress or Progress()
    on_gpu = device(options.device) == "cuda"
    tasks = merged(task if on_gpu else dataclasses.replace(task, exact=None) for task in tasks)
    isa = _cuda.ISA if on_gpu else _registry.isa()
    threads = _registry.threads() if options.threads is None else options.threads
    usable = len(machine.usable_cpus())
    if on_gpu:
        threads = 1  # GPU plans have no threads
    elif threads > usable:
        raise ValueError(f"threads: {threads} asked for, but this process may use {usable} CPUs")
    path = options.database or default_path()
    result = Result(tasks, options, threads, isa, path)
    isas = [_isa_of(task, isa, options) for task in tasks]
    weights = [_weight(task, each, threads) for task, each in zip(tasks, isas, strict=True)]
    order = list(range(len(tasks)))
    if options.budget_seconds is not None:
        order.sort(key=lambda number: -weights[number])
    before = _load()
    deadline = time.monotonic() + (options.budget_seconds or float("inf"))
    laboratory = Laboratory(threads, options.timeout_seconds, options.seed, isa if on_gpu else "")
    try:
        with Database(path) as database, laboratory, _storage(options.storage) as storage:
            context = search.Context(
                measurer or laboratory,
                database,
                threads,
                isa,
                EFFORTS[options.effort],
                again=options.again,
                storage=storage,
                seed=options.seed,
                family=options.family or _settings.family(),
            )
            for place, number in enumerate(order):
                task, each = tasks[number], isas[number]
                progress.start(task, place, len(order))
                rest = sum(weights[later] for later in order[place:])
                share = weights[number] / rest if rest else 1.0
                left = deadline - time.monotonic()
                if on_gpu:
                    laboratory.isa = each
                own = dataclasses.replace(context, isa=each, near=_near(path, each, threads))
                outcome = _tune(task, own, left, share, progress)
                result.outcomes.append((task, outcome))
                progress.finish(task, outcome)
        result.complete = True
    except KeyboardInterrupt:
        pass  # what was measured is stored; `complete` tells
    finally:
        _tuning.reload()
        if not on_gpu:  # others on the CPUs do not slow a GPU down
            others, stolen = machine.disturbance(before, _load())
            result.others_share, result.stolen_share = others, stolen
    return result


def _load() -> machine.Load:
    """With the measuring processes, which have ended, among this process's own work."""
    now, times = machine.Load.now(machine.usable_cpus()), os.times()
    return dataclasses.replace(now, own=now.own + times.children_user + times.children_system)


def _tune(
    task: Task, context: search.Context, left: float, share: float, progress: Progress
) -> Outcome:
    if left <= 0:
        return Outcome(task.problem, "skipped", "the budget was used up")
    seconds = min(context.effort.seconds, max(_LEAST_SECONDS, left * share * _SEARCHING))
    try:
        return search.tune_problem(task.problem, context, seconds=seconds, progress=progress.step)
    except LaboratoryError as error:
        return Outcome(task.problem, "failed", str(error))


def _weight(task: Task, isa: str, threads: int) -> float:
    """A program's time in a problem, by the cost model."""
    space = Space(task.problem, isa, threads, search.MAX_WORKSPACE)
    default = space.incumbent()
    return task.count * space.cost(default) if default is not None else 0.0


def _near(path: Path, isa: str, threads: int) -> Callable[[Problem], Iterable[_tuning.Row]]:
    """Winners of near problems: of earlier runs, and of this one so far."""

    def near(problem: Problem) -> Iterable[_tuning.Row]:
        table = _tuning.read_table([("environment", path), *_tuning.files()])
        return table.nearest(problem, isa, threads)

    return near


@contextlib.contextmanager
def _storage(url: str | None) -> Iterator[Any]:
    """Optuna's storage at this URL, whose connections are closed in the end."""
    if url is None:
        yield None
        return
    storage = _opened(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _opened(url: str) -> Any:
    import optuna

    plain = "postgresql://"
    if url.startswith(plain) and importlib.util.find_spec("psycopg2") is None:
        if importlib.util.find_spec("psycopg") is None:
            raise ValueError(
                f"storage: {_hidden(url)}: `pip install 'jaxwin[fleet]'` for PostgreSQL"
            )
        url = f"postgresql+psycopg://{url.removeprefix(plain)}"  # SQLAlchemy means the old driver
    for attempt in range(_STORAGE_ATTEMPTS):
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # of optuna, SQLAlchemy or a driver
            if attempt + 1 == _STORAGE_ATTEMPTS:
                words = str(error).splitlines()[0]
                raise ValueError(f"storage: {_hidden(url)} cannot be used: {words}") from error
        # Where several machines are the first at a time, all but one fail to make the tables.
        time.sleep(random.uniform(0.2, 1.0))
    raise AssertionError("unreachable")


def _hidden(url: str) -> str:
    """Without a password."""
    return re.sub(r"(//[^:/@]*):[^@]*@", r"\1:***@", url)


# --- sources ---------------------------------------------------------------------------------


def traced(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Task]:
    """The convolutions of a function with these arguments, which is traced, not run."""
    found = _explain.problems_by_precision(fn, *args, **kwargs)
    return [Task(str(problem), problem, count, exact) for (problem, exact), count in found.items()]


def recorded(lines: Iterable[str], name: str = "file") -> list[Task]:
    """The tasks of JSON lines such as {"count": 3, "problem": {...}}; `count` may be missing.

    What `jaxwin.record` writes. "problem" holds the fields of `Problem.key`.

    Raises:
        ValueError: a line is not one; the text begins with its place.
    """
    tasks = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem, count, *_ = _record.parse(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}:{number}: {error}") from None
        tasks.append(Task(str(problem), problem, count))
    return tasks


def missed(threads: int, where: str) -> tuple[list[Task], dict[tuple[str, str], int]]:
    """What programs were seen to miss on a device, what takes most time first.

    On "cpu" those with so many threads; on "cuda" any. Also how many problems were missed
    otherwise: how that was, and the option that tunes them. What dispatch has a tuned row for by
    now is left out.

    Raises:
        OSError: the file of missed problems cannot be read.
        ValueError: JAXWIN_MAX_ISA is no instruction set.
    """
    isa, table = _registry.isa(), _tuning.read_table(_tuning.files())  # without warnings
    weights, others = dict[Task, float](), collections.Counter[tuple[str, str]]()
    for (problem, count_threads, gpu_isa), count in _record.misses().items():
        if table.exact(problem, gpu_isa or isa, count_threads) is not None:
            continue
        if gpu_isa and where != "cuda":
            others["on a GPU", "--device cuda"] += 1
        elif where == "cuda" and not gpu_isa:
            others["on the CPU", "--device cpu"] += 1
        elif not gpu_isa and count_threads != threads:
            others[f"with {count_threads} threads", f"--threads {count_threads}"] += 1
        else:
            exact = gpu_isa == _cuda.ISA if gpu_isa else None
            task = Task(str(problem), problem, count, exact)
            weights[task] = _weight(task, gpu_isa or isa, count_threads)
    return sorted(weights, key=lambda task: -weights[task]), dict(others)


def tune(
    fn: Callable[..., Any],
    *args: Any,
    effort: str = "quick",
    budget: float | None = None,
    threads: int | None = None,
    again: bool = False,
    database: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> Result:
    """Tunes the convolutions of `fn(*args, **kwargs)` for this machine.

    The function is traced, not run. What is compiled from now on takes the winners; programs that
    are compiled already stay as they are.

    effort: "quick", "normal" or "full". budget: seconds for everything. threads: as many as the
    program uses, which is the default. again: measures also what was measured before. database:
    the file; by default the first of JAXWIN_TUNING_DB, else the user's.

    Raises:
        ValueError: an option is wrong.
        DatabaseError: the database cannot be used.
    """
    options = Options(
        effort=effort,
        budget_seconds=budget,
        threads=threads,
        again=again,
        database=None if database is None else Path(database),
    )
    result = run(traced(fn, *args, **kwargs), options)
    if not result.complete:
        raise KeyboardInterrupt
    return result
