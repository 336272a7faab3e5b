# SPDX-License-Identifier: Apache-2.0
"""The reading side of the tuning database: SQLite files, loaded once into dictionaries.

Files are looked at in tiers, the first has priority: those that JAXWIN_TUNING_DB names, the
user's, the site's, the package's. Only `jaxwin.tuner` writes. A file that cannot be used behaves
as an empty one, with one warning. What is loaded stays as it is for the life of the process, so
that a program compiled twice is compiled alike.

A row is used for the problem, instruction set and thread count that it was measured with, on this
kind of machine, as long as its algorithm's kernels are those of this build, and if a comparison
confirmed it as the fastest ("tuned"): the fastest of many may be the luckiest. Otherwise
the nearest row of the same class of problems, instruction set and thread count lends its parameters
("transferred"). Rows only propose: the native core checks the parameters as it does those of any
plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import stat
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxwin import _ffi, _registry, _settings
from jaxwin._machine import Machine, this_machine
from jaxwin._problem import Problem

if TYPE_CHECKING:
    import sqlite3

APPLICATION_ID = 0x6A78776E  # in the header of the file: "jxwn"
SCHEMA_VERSION = 1
# Rows for CPUs that were measured, shipped with jaxwin; the last file that is looked at.
PACKAGED = Path(__file__).with_name("tuning.db")
# States of a file that nobody misses, unless it was asked for. Hidden: in a folder that is closed.
ABSENT = ("missing", "empty", "hidden")

_BUSY_SECONDS = 5.0
_MAX_PARAMETERS = 4096  # characters of a row's parameters that are worth parsing


class Unusable(Exception):
    """A file that cannot be used: `state` is one word, the text one line for the user."""

    def __init__(self, path: Path, state: str, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.path, self.state = path, state


# --- files -----------------------------------------------------------------------------------


def named_files() -> list[Path]:
    """The files that `JAXWIN_TUNING_DB` names."""
    text = _settings.settings().tuning_db
    return [Path(os.path.expanduser(part)) for part in text.split(os.pathsep) if part]


def user_file() -> Path | None:
    """The user's own file; None where there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as the XDG specification wants it
        cache = os.path.expanduser("~/.cache")
    return Path(cache, "jaxwin", "tuning.db") if os.path.isabs(cache) else None


def files() -> list[tuple[str, Path]]:
    """Every place where a file may be, with the name of its tier, the first first."""
    found = [("environment", path) for path in named_files()]
    if (user := user_file()) is not None:
        found.append(("user", user))
    shares = (Path(sys.prefix, "share"), Path("/usr/local/share"), Path("/usr/share"))
    found += [("site", share / "jaxwin" / "tuning.db") for share in dict.fromkeys(shares)]
    found.append(("package", PACKAGED))
    unique: dict[Path, str] = {}
    for tier, path in found:
        unique.setdefault(path.absolute(), tier)
    return [(tier, path) for path, tier in unique.items()]


def describe_error(error: sqlite3.Error) -> tuple[str, str]:
    """The state that an error of SQLite tells of, and what to say of it."""
    import sqlite3

    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return "corrupt", f"is damaged ({error})"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL):
        return "locked", "is locked by another process"
    if code == sqlite3.SQLITE_FULL:
        return "full", "cannot be written: the disk is full"
    return "unreadable", f"cannot be used ({error})"


def check_header(path: Path, connection: sqlite3.Connection) -> int:
    """The schema version of a tuning database; 0 for an empty file.

    The connection must have a transaction open: another process may just be making the file, and
    what is read here must be all of it or nothing.

    Raises:
        Unusable: it is another program's database, or of a newer schema.
        sqlite3.Error: whatever reading its header meets.
    """
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application == 0 and version == 0 and objects == 0:
        return 0
    if application != APPLICATION_ID or version < 1:
        raise Unusable(path, "foreign", "is not a tuning database of jaxwin")
    if version > SCHEMA_VERSION:
        text = f"has schema {version}, this jaxwin knows {SCHEMA_VERSION}: upgrade jaxwin"
        raise Unusable(path, "newer", text)
    return int(version)


def require_sqlite(path: Path) -> None:
    """Refuses versions of SQLite that do not know STRICT tables.

    Raises:
        Unusable: this Python has one.
    """
    import sqlite3

    if sqlite3.sqlite_version_info < (3, 37):
        text = f"needs SQLite 3.37, this Python has {sqlite3.sqlite_version}"
        raise Unusable(path, "unreadable", text)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write, to a tuning database of the present schema.

    Raises:
        Unusable: there is none, or it cannot be used. Errors of SQLite inside the block too.
    """
    import sqlite3

    try:
        with contextlib.closing(_connect(path)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise Unusable(path, *describe_error(error)) from error


def _connect(path: Path) -> sqlite3.Connection:
    """A connection with an open read transaction: what it sees does not change any more."""
    import sqlite3

    require_sqlite(path)
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise Unusable(path, "missing", "does not exist") from None
    except (OSError, ValueError) as error:
        raise Unusable(path, "hidden", f"cannot be looked at ({error})") from None
    if not stat.S_ISREG(kind):
        raise Unusable(path, "foreign", "is not a regular file")
    if not os.access(path, os.R_OK):
        raise Unusable(path, "unreadable", "cannot be read: permission denied")
    uri = path.absolute().as_uri() + "?mode=ro"
    # A file with a write-ahead log needs a writable folder even to be read, unless SQLite is told
    # that nobody writes to it: which is right where nobody can and no log is left over.
    closed = not os.access(path.absolute().parent, os.W_OK)
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return _connect_once(path, uri)
        except sqlite3.OperationalError as error:
            code = error.sqlite_errorcode & 0xFF
            cannot_open = code == sqlite3.SQLITE_CANTOPEN
            if closed and (cannot_open or code == sqlite3.SQLITE_READONLY):
                break
            # SQLite does not wait for a writer that comes or goes.
            busy = cannot_open or describe_error(error)[0] == "locked"
            if not busy or time.monotonic() > deadline:
                raise
        time.sleep(0.01)
    if any(_size(f"{path}{suffix}") for suffix in ("-wal", "-journal")):
        text = (
            "holds an interrupted write that cannot be completed in a read-only folder: "
            "`jaxwin-tune doctor --repair` completes it for those who may write there"
        )
        raise Unusable(path, "unreadable", text)
    return _connect_once(path, uri + "&immutable=1")


def _connect_once(path: Path, uri: str) -> sqlite3.Connection:
    import sqlite3

    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("BEGIN")
        version = check_header(path, connection)
    except BaseException:
        connection.close()
        raise
    if version == SCHEMA_VERSION:
        return connection
    connection.close()
    if version == 0:
        raise Unusable(path, "empty", "is empty")
    text = f"has the old schema {version}, this jaxwin knows {SCHEMA_VERSION}"
    raise Unusable(path, "older", f"{text}: `jaxwin-tune doctor --repair` upgrades it")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


# --- rows ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """An algorithm's best measurement for one problem, instruction set and thread count in a file.

    params: in the order of the registry. nanoseconds: the median of the measurement. wins: whether
    no other algorithm's is better; outside of the canonical family ("xla" among them) whether it
    was found to be faster than the winner of that family.
    """

    problem: Problem
    algorithm: str
    params: tuple[int, ...]
    isa: str
    threads: int
    nanoseconds: float
    same_machine: bool
    created: str
    path: Path
    wins: bool = True
    family: str = _registry.CANONICAL

    @functools.cached_property
    def confirms_the_heuristic(self) -> bool:
        """Whether it is what the heuristic takes for this problem.

        Then the heuristic is to be trusted for the problems near it too. Its parameters follow
        their sizes, which those of the row do not.
        """
        native = self.problem.native()
        return _ffi.is_heuristic(native, self.algorithm, self.isa, self.threads, self.params)

    def __str__(self) -> str:
        return f"{self.nanoseconds / 1e3:.1f} us on {self.created[:10]}, {self.path}"


@dataclasses.dataclass(frozen=True)
class File:
    """What became of one file: its state is "ok", or what hindered, which `text` then tells.

    rows: problems with a usable row. bad: rows of this machine that make no sense.
    """

    tier: str
    path: Path
    state: str
    text: str = ""
    rows: int = 0
    bad: int = 0


def parse_parameters(algorithm: str, text: Any, isa: str = "") -> tuple[int, ...]:
    """An algorithm's parameters from JSON (values by name), in the order of the registry.

    Raises:
        ValueError: they are not the parameters of an algorithm that this build has.
    """
    names = _registry.parameter_names(algorithm, isa)
    if names is None:
        raise ValueError(f"there is no algorithm {str(algorithm)[:40]!r}")
    try:
        values = json.loads(text) if len(text) <= _MAX_PARAMETERS else None
    except (TypeError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.keys() != set(names):
        raise ValueError(f"{algorithm} takes the parameters {', '.join(names) or 'none'}")
    if not all(type(v) is int and abs(v) < 2**62 for v in values.values()):
        raise ValueError(f"{algorithm}: parameters must be integers")
    return tuple(values[name] for name in names)


def machines(connection: sqlite3.Connection) -> dict[str, Machine]:
    """The machines of a database, by their id there."""
    names = [field.name for field in dataclasses.fields(Machine)]
    rows = connection.execute(f"SELECT id, {', '.join(names)} FROM machines")
    return {row[0]: Machine(**dict(zip(names, row[1:], strict=True))) for row in rows}


# One row per problem, instruction set, thread count and algorithm, the winner first: the bare
# columns are those of the row that has the least preference, as SQLite promises. Of other families
# the last comparison with the winner counts, and in that the one that was confirmed.
_BEST = """
SELECT p.key, m.algorithm, m.parameters, m.isa, m.threads, m.ns_median, m.created, m.confirmed,
       m.family, min(m.preference)
FROM eligible AS m JOIN problems AS p ON p.id = m.problem_id
WHERE m.machine_id IN (SELECT value FROM json_each(?1))
  AND (m.family = 'canonical' AND m.algorithm || ' ' || m.abi IN (SELECT value FROM json_each(?2))
       OR m.family = 'tensor' AND m.isa = 'cuda-tensor' AND m.algorithm <> 'xla'
         AND m.algorithm || ' ' || m.abi IN (
           SELECT value FROM json_each(?2) UNION SELECT value FROM json_each(?3)))
GROUP BY m.problem_id, m.isa, m.threads, m.algorithm
UNION ALL
SELECT key, algorithm, parameters, isa, threads, ns_median, created, confirmed, family, 0
FROM (
  SELECT p.key, m.*,
         max(m.created || m.confirmed || printf('%020d', 1000000000000000000 - m.ns_median))
  FROM eligible AS m JOIN problems AS p ON p.id = m.problem_id
  WHERE m.family <> 'canonical' AND (m.family <> 'tensor' OR m.isa <> 'cuda-tensor')
    AND m.machine_id IN (SELECT value FROM json_each(?1))
    AND m.algorithm || ' ' || m.abi IN (SELECT value FROM json_each(?3))
  GROUP BY m.problem_id, m.isa, m.threads, m.algorithm, m.family)
ORDER BY 10
"""


def _load_file(tier: str, path: Path, here: Machine) -> tuple[File, list[Row]]:
    kernels = json.dumps(_registry.kernels(canonical=True))
    xla = f"{_registry.XLA} {_registry.abi(_registry.XLA)}"
    others = json.dumps([*_registry.kernels(canonical=False), xla])
    rows: list[Row] = []
    bad = 0
    parsed: dict[str, Problem] = {}
    try:
        with reading(path) as connection:
            likeness: dict[str, list[str]] = {"same": [], "related": [], "other": []}
            for identity, machine in machines(connection).items():
                likeness[here.likeness(machine)].append(identity)
            for kind in ("same", "related"):
                if not likeness[kind]:
                    continue
                seen: set[tuple[str, Any, Any]] = set()
                found = connection.execute(_BEST, (json.dumps(likeness[kind]), kernels, others))
                for values in found:
                    key, algorithm, parameters, isa, threads, ns, created, confirmed = values[:8]
                    family = str(values[8])
                    usual = _registry.is_usual(family, str(isa))
                    try:
                        if key not in parsed:
                            parsed[key] = Problem.from_key(key)
                        if not usual and family != _registry.family(algorithm, str(isa)):
                            raise ValueError(f"{algorithm} is of another family")
                        row = Row(
                            problem=parsed[key],
                            algorithm=algorithm,
                            params=parse_parameters(algorithm, parameters, str(isa)),
                            isa=str(isa),
                            threads=max(1, int(threads)),
                            nanoseconds=float(ns),
                            same_machine=kind == "same",
                            created=str(created),
                            path=path,
                            # What no comparison confirmed was the fastest of many by luck.
                            wins=bool(confirmed) and not (usual and (key, isa, threads) in seen),
                            family=family,
                        )
                    except (TypeError, ValueError, KeyError, OverflowError):
                        bad += 1
                    else:
                        rows.append(row)
                        if usual:
                            seen.add((key, isa, threads))
    except Unusable as error:
        return File(tier, path, error.state, str(error)), []
    text = f"{path}: {bad} rows make no sense" if bad else ""
    return File(tier, path, "ok", text, sum(row.wins for row in rows), bad), rows


# --- the table -------------------------------------------------------------------------------

# Who lends: of the rows of a problem's class those with the closest channels and groups, of these
# the one that is closest in its other sizes. What counts is the sum of |log2 ratio| times these
# ("image": its pixels); it must not be more than the limit, else the heuristic is the better guess.
# Image size moves the best tile little, channels much: those of a row may differ by a factor of two
# in all. (A row of 320 to 1280 channels took twice the heuristic's time at 512 to 2048, where
# filters that are read in place fall upon the same cache sets.) Batch was measured with
# the packaged rows of one image, as time of the heuristic's plan by time of theirs: 1.02 with 2
# images, 1.03 with 4, 1.00 with 8 (five of eight rows below), 0.90 with 32. So 8 is too far.
_WEIGHTS = {
    "input channels per group": 2.0,
    "output features per group": 2.0,
    "groups": 0.5,
    "image": 0.5,
    "batch": 0.75,
    "epilogue": 0.1,
    "machine": 1.0,
}
_LIMIT = 2.0
_CHANNELS = 3  # how many of these are channels and groups


class Table:
    """The rows of all files that this process may use. It never changes."""

    def __init__(self, loaded: list[tuple[File, list[Row]]]) -> None:
        self.files = tuple(file for file, _ in loaded)
        self._exact: dict[tuple[Problem, str, int], Row] = {}
        self._named: dict[tuple[Problem, str, int, str], Row] = {}
        self._others: dict[tuple[Problem, str, int], Row] = {}
        self._lenders: list[Row] = []
        self._near = _ffi.Neighbours([*_WEIGHTS.values()], _CHANNELS, _LIMIT)
        for _, rows in loaded:
            for row in rows:
                key = row.problem, row.isa, row.threads
                if row.same_machine:
                    self._named.setdefault((*key, row.algorithm), row)
                if row.wins and not _registry.is_usual(row.family, row.isa):
                    known = self._others.get(key)
                    if row.same_machine and (known is None or known.path == row.path):
                        if known is None or row.nanoseconds < known.nanoseconds:
                            self._others[key] = row
                elif row.wins:
                    if row.same_machine:
                        self._exact.setdefault(key, row)
                    self._lenders.append(row)
                    _ = row.confirms_the_heuristic  # now, not when a program is compiled
                    self._near.add(row.problem.asked(), row.isa, row.threads, row.same_machine)

    def rows(self) -> int:
        """How many problems its files have a row for; one may be in several."""
        return sum(file.rows for file in self.files)

    def exact(self, problem: Problem, isa: str, threads: int) -> Row | None:
        """The winner of exactly this problem, within the canonical family."""
        return self._exact.get((problem, isa, threads))

    def other(self, problem: Problem, isa: str, threads: int) -> Row | None:
        """The fastest row of exactly this problem in other families, XLA's among them.

        Only what was found to be faster than the winner of the canonical family.
        """
        return self._others.get((problem, isa, threads))

    def named(self, problem: Problem, isa: str, threads: int, algorithm: str) -> Row | None:
        """An algorithm's best row of exactly this problem, whether it wins or not."""
        return self._named.get((problem, isa, threads, algorithm))

    def nearest(self, problem: Problem, isa: str, threads: int) -> list[Row]:
        """Some rows of the same class, the nearest first; of equals that of the first file."""
        found = self._near.nearest(problem.asked(), isa, threads)
        return [self._lenders[number] for number in found]


def difference(row: Row, problem: Problem) -> str:
    """In what a row's problem differs from another of its class."""
    theirs = _ffi.sizes(row.problem.asked(), row.same_machine)
    ours = _ffi.sizes(problem.asked(), True)
    words = []
    for name, there, here in zip(_WEIGHTS, theirs, ours, strict=True):
        if there == here:
            continue
        if name in ("epilogue", "machine"):
            words.append(f"another {name}")
        else:
            words.append(f"{name} {there} instead of {here}")
    return ", ".join(words) or "another border"


_lock = threading.Lock()
_loaded: Table | None = None


def table() -> Table:
    """The rows that this process uses; reads the files when first called."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _read_files()
    return _loaded


def reload() -> None:
    """Forgets what was read. For tests, and for programs that tune: compiled programs stay."""
    global _loaded
    with _lock:
        _loaded = None


def read_table(places: Iterable[tuple[str, Path]]) -> Table:
    """The rows of these files (with the names of their tiers) that are of use here."""
    here = this_machine()
    return Table([_load_file(tier, path, here) for tier, path in places])


def _read_files() -> Table:
    found = read_table(files())
    for file in found.files:
        named = file.tier == "environment"
        if file.state in ABSENT and not named:
            continue
        if file.text:
            warnings.warn(f"jaxwin: tuning database {file.text}", RuntimeWarning, stacklevel=2)
        elif named and file.rows == 0:
            text = "holds no winner for this machine and these kernels; see `jaxwin-tune doctor`"
            warnings.warn(
                f"jaxwin: tuning database {file.path} {text}", RuntimeWarning, stacklevel=2
            )
    return found


# --- explanations ----------------------------------------------------------------------------

_ABOUT = """
SELECT m.machine_id, m.algorithm, m.parameters, m.isa, m.threads, m.family, m.abi, m.status,
       min(coalesce(m.ns_median, 0)), m.error, max(m.confirmed)
FROM measurements AS m JOIN problems AS p ON p.id = m.problem_id
WHERE p.key = ?
GROUP BY m.machine_id, m.algorithm, m.isa, m.threads, m.family, m.abi, m.status
ORDER BY 9 LIMIT 50
"""


_UNSURE = "no comparison confirmed it as the fastest: tune again when the machine is quiet"


@dataclasses.dataclass(frozen=True)
class Unused:
    """A measurement of a problem that dispatch may not take as it is, and why."""

    what: str  # the algorithm, or "anything" where a whole file cannot be used
    reason: str
    path: Path

    def __str__(self) -> str:
        return f"{self.what} in {self.path}: {self.reason}"


def unused(loaded: Table, problem: Problem, isa: str, threads: int) -> list[Unused]:
    """Why measurements of this very problem are not taken as they are. Reads the files again."""
    here = this_machine()
    late, unsure = "written after this process read the file", _UNSURE
    if loaded.exact(problem, isa, threads):
        late = unsure = ""
    found = []
    for file in loaded.files:
        if file.state != "ok":
            if file.state not in ABSENT:
                found.append(Unused("anything", file.text, file.path))
            continue
        try:
            with reading(file.path) as connection:
                known = machines(connection)
                for row in connection.execute(_ABOUT, (problem.key,)):
                    reason = _why_not(row[:-1], known, here, isa, threads)
                    reason = reason or (late if row[-1] else unsure)
                    if reason:
                        found.append(Unused(str(row[1]), reason, file.path))
        except Unusable as error:
            found.append(Unused("anything", str(error), file.path))
    return found


def _why_not(
    row: tuple[Any, ...], known: dict[str, Machine], here: Machine, isa: str, threads: int
) -> str:
    machine_id, algorithm, parameters, row_isa, row_threads, family, abi, status, _, error = row
    if family != _registry.CANONICAL and _settings.family() == "any":
        return ""
    if family == "any" and row_isa == _registry.TENSOR_ISA:
        return ""
    if not _registry.is_usual(family, row_isa):
        return f"the numbers of the family {family} were not asked for"
    machine = known.get(machine_id)
    if machine is None or here.likeness(machine) == "other":
        return f"measured on another machine ({machine or 'unknown'})"
    if _registry.parameter_names(algorithm, row_isa) is None:
        return "this jaxwin has no such algorithm"
    if abi != _registry.abi(algorithm, row_isa):
        return f"measured with other kernels (abi {abi}, here {_registry.abi(algorithm, row_isa)})"
    if status != "ok":
        return f"{status}: {error}" if error else str(status)
    if row_isa != isa:
        return f"measured with {row_isa}, this process uses {isa}"
    if row_threads != threads:
        return f"measured with {row_threads} threads, here are {threads}"
    if here.likeness(machine) != "same":
        return f"measured on a related machine ({machine}: other caches)"
    try:
        parse_parameters(algorithm, parameters, row_isa)
    except ValueError as wrong:
        return str(wrong)
    return ""
