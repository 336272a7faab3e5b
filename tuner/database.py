# SPDX-License-Identifier: Apache-2.0
"""The writing side of the tuning database; `jaxwin._tuning` is the reading side.

One SQLite file, one row per measurement. Several processes may write to one file at a time. A
process that is killed loses at most the transaction that it was in. A damaged file is renamed, and
a new one begun; nothing but `prune` deletes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import itertools
import json
import os
import random
import re
import sqlite3
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import sqlite_utils

from jaxwin import _registry, _tuning
from jaxwin._machine import Machine, this_machine
from jaxwin._problem import Problem

# "wrong": other values than the reference. "refused": the native core does not take the
# parameters. "error": everything else. Of a "wrong" or "crashed" candidate no measurement counts.
STATUSES = ("ok", "wrong", "crashed", "timeout", "refused", "error")

_BUSY_SECONDS = 30.0
_PATIENCE_SECONDS = 120.0
_ERROR_LENGTH = 2000  # characters of an error's text that are kept
_BATCH = 1000
# Where SQLite's shared-memory log works. All others (NFS, SMB, Lustre, 9p, FUSE, ...) get the
# rollback journal.
_LOCAL_FILE_SYSTEMS = frozenset(
    "bcachefs btrfs ext2 ext3 ext4 f2fs jfs overlay ramfs reiserfs tmpfs xfs zfs".split()
)

_T = TypeVar("_T")


class DatabaseError(Exception):
    """A database that cannot be used; the text is one line for the user."""


def now() -> str:
    return _utc(datetime.datetime.now(datetime.UTC))


def _utc(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).isoformat(timespec="microseconds")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One candidate for one problem, measured once.

    parameters: by name. ns_min, ns_median, ns_mad: nanoseconds per call (mad: the median absolute
    deviation), None where nothing was measured. repeats: how many calls were timed. abi: the state
    of the kernels, `_registry.abi(algorithm, isa)`. family: the numerical family. confirmed: the
    outcome of a comparison among finalists; the newest of them wins over every row without.
    created: UTC, ISO 8601. uid: the same in every copy of the row.
    """

    problem: Problem
    algorithm: str
    parameters: dict[str, int]
    isa: str
    threads: int
    status: str
    ns_min: float | None = None
    ns_median: float | None = None
    ns_mad: float | None = None
    repeats: int = 0
    error: str = ""
    abi: str = ""
    family: str = "canonical"
    confirmed: bool = False
    machine: Machine = dataclasses.field(default_factory=this_machine)
    created: str = dataclasses.field(default_factory=now)
    uid: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status: {self.status!r} is not one of {', '.join(STATUSES)}")
        if self.threads < 1 or self.repeats < 0:
            raise ValueError(f"threads, repeats: {self.threads}, {self.repeats} are too small")
        times = (self.ns_min, self.ns_median, self.ns_mad)
        if any(t is not None and not 0 <= t < 1e18 for t in times):
            raise ValueError(f"ns_min, ns_median, ns_mad: {times} are no times")
        if self.status == "ok" and None in times:
            raise ValueError("ns_min, ns_median, ns_mad: are missing though the status is ok")
        if not self.uid:
            raise ValueError("uid: is empty")
        created = datetime.datetime.fromisoformat(self.created)
        # Texts of dying processes may be long, and not text at all.
        error = self.error.encode("utf-8", "replace").decode()[:_ERROR_LENGTH]
        object.__setattr__(self, "created", _utc(created))
        object.__setattr__(self, "error", error)
        object.__setattr__(self, "abi", self.abi or _registry.abi(self.algorithm, self.isa))

    def again(self, status: str, error: str) -> Measurement:
        """This candidate as something else that happened to it now, without times."""
        return dataclasses.replace(
            self,
            status=status,
            error=error,
            ns_min=None,
            ns_median=None,
            ns_mad=None,
            repeats=0,
            confirmed=False,
            created=now(),
            uid=uuid.uuid4().hex,
        )

    def record(self) -> dict[str, Any]:
        """The measurement as one JSON object that stands alone."""
        machine = {k: v for k, v in dataclasses.asdict(self.machine).items() if v is not None}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {
            "schema": _tuning.SCHEMA_VERSION,
            "problem": json.loads(self.problem.key),
            "machine": machine,
        }

    @classmethod
    def from_record(cls, record: Any) -> Measurement:
        """The measurement that `record()` gave; the object may come from anywhere.

        Raises:
            ValueError: it is not one; the text begins with the field that is wrong.
        """
        if not isinstance(record, dict):
            raise ValueError("not an object")
        values = dict(record)
        schema = values.pop("schema", None)
        if schema != _tuning.SCHEMA_VERSION:
            raise ValueError(f"schema: {schema!r}, this jaxwin knows {_tuning.SCHEMA_VERSION}")
        try:
            values["problem"] = Problem.from_key(json.dumps(values["problem"]))
            values["machine"] = _typed(Machine, values["machine"])
            return _typed(cls, values)
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: is missing") from None


def _is_text(value: Any) -> bool:
    try:
        return type(value) is str and len(value.encode()) < 100_000
    except UnicodeEncodeError:  # half a character, from an escape in JSON
        return False


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": _is_text,
    "int": lambda v: type(v) is int and abs(v) < 2**62,
    "bool": lambda v: type(v) is bool,
    "float": lambda v: type(v) in (int, float),
    "None": lambda v: v is None,
    "Problem": lambda v: type(v) is Problem,
    "Machine": lambda v: type(v) is Machine,
    "dict[str, int]": lambda v: (
        type(v) is dict
        and all(_is_text(name) and type(x) is int and abs(x) < 2**62 for name, x in v.items())
    ),
}


def _typed(cls: type[_T], values: Any) -> _T:
    """An instance of a dataclass from values of any origin, checked against its annotations."""
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__.lower()}: not an object")
    fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"unknown fields: {', '.join(unknown)[:80]}")
    for name, value in values.items():
        if not any(_CHECKS[kind](value) for kind in fields[name].split(" | ")):
            raise ValueError(f"{name}: {repr(value)[:80]} is not {fields[name]}")
    try:
        return cls(**values)
    except TypeError:
        missing = ", ".join(fields.keys() - values.keys())
        raise ValueError(f"{cls.__name__.lower()}: fields are missing among {missing}") from None


# --- schema ----------------------------------------------------------------------------------


def _create(db: sqlite_utils.Database) -> None:
    for statement in (
        """CREATE TABLE machines (
            id TEXT PRIMARY KEY, arch TEXT NOT NULL, vendor TEXT NOT NULL,
            family INTEGER NOT NULL, model INTEGER NOT NULL, stepping INTEGER NOT NULL,
            brand TEXT NOT NULL, isa_flags TEXT NOT NULL, l1d_bytes INTEGER NOT NULL,
            l2_bytes INTEGER NOT NULL, l3_bytes INTEGER NOT NULL, usable_cores INTEGER NOT NULL,
            gpu_name TEXT, gpu_sm_count INTEGER, gpu_compute_capability TEXT
        ) STRICT""",
        """CREATE TABLE problems (
            id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE CHECK (json_valid(key)),
            text TEXT NOT NULL, direction TEXT NOT NULL, flops REAL NOT NULL
        ) STRICT""",
        """CREATE TABLE measurements (
            id INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE,
            problem_id INTEGER NOT NULL REFERENCES problems (id),
            machine_id TEXT NOT NULL REFERENCES machines (id),
            algorithm TEXT NOT NULL, parameters TEXT NOT NULL CHECK (json_valid(parameters)),
            isa TEXT NOT NULL, threads INTEGER NOT NULL CHECK (threads > 0),
            family TEXT NOT NULL, abi TEXT NOT NULL,
            status TEXT NOT NULL, ns_min REAL, ns_median REAL, ns_mad REAL,
            repeats INTEGER NOT NULL,
            confirmed INTEGER NOT NULL CHECK (confirmed IN (0, 1)), error TEXT NOT NULL,
            created TEXT NOT NULL CHECK (julianday(created) IS NOT NULL),
            preference REAL GENERATED ALWAYS AS
              (CASE confirmed WHEN 1 THEN -julianday(created) ELSE ns_median END) VIRTUAL,
            CHECK (status <> 'ok' OR ns_median IS NOT NULL)
        ) STRICT""",
        "CREATE INDEX measurements_by_problem ON measurements (problem_id, machine_id)",
        """CREATE INDEX measurements_that_disqualify
            ON measurements (problem_id, algorithm, parameters, isa, abi)
            WHERE status IN ('wrong', 'crashed')""",
        # The measurements that may win. The least preference wins: the newest confirmed row, else
        # the smallest median. A candidate that was once wrong is out, on whatever machine.
        """CREATE VIEW eligible AS
            SELECT * FROM measurements AS m WHERE status = 'ok' AND NOT EXISTS (
              SELECT 1 FROM measurements AS bad
              WHERE bad.status IN ('wrong', 'crashed') AND bad.problem_id = m.problem_id
                AND bad.algorithm = m.algorithm AND bad.parameters = m.parameters
                AND bad.isa = m.isa AND bad.abi = m.abi)""",
        # Of the kernels that they were measured with, be they those of today or not.
        """CREATE VIEW winners AS
            SELECT p.text AS problem, p.direction, m.algorithm, m.parameters, m.isa, m.threads,
              m.ns_median, m.ns_min, m.ns_mad, p.flops / m.ns_median AS gflops, c.brand, m.family,
              m.abi, m.confirmed, m.created, m.uid, m.problem_id, m.machine_id,
              min(m.preference) AS preference
            FROM eligible AS m JOIN problems AS p ON p.id = m.problem_id
              JOIN machines AS c ON c.id = m.machine_id
            GROUP BY m.problem_id, m.machine_id, m.isa, m.threads, m.family""",
    ):
        db.execute(statement)


# The schema's version is how many of these were applied. What is here was published: append.
MIGRATIONS: list[Callable[[sqlite_utils.Database], None]] = [_create]


# --- the file --------------------------------------------------------------------------------


def default_path() -> Path:
    """The file that is written to: the first of JAXWIN_TUNING_DB, else the user's.

    Raises:
        DatabaseError: there is neither.
    """
    path = next(iter(_tuning.named_files()), None) or _tuning.user_file()
    if path is None:
        raise DatabaseError("there is no home directory: name a file in JAXWIN_TUNING_DB")
    return path


def _octal(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))


def is_local(path: Path) -> bool:
    """Whether a file lies on a file system of this machine, as far as the system tells."""
    folder = os.path.realpath(path.parent)
    best, kind = "", ""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                mount, _, system = line.partition(" - ")
                point = re.sub(r"\\([0-7]{3})", _octal, mount.split()[4])
                inside = folder == point or folder.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, system.split()[0]
    except (OSError, IndexError):
        return False  # unknown: the way that works everywhere
    return kind in _LOCAL_FILE_SYSTEMS


class Database:
    """A tuning database, open for writing; made, upgraded or set aside as need be.

    path: `default_path()` by default. A context manager; not for use across fork or threads.

    Raises:
        DatabaseError: at any call, where the file cannot be used; one line says why and what to do.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = (Path(path) if path is not None else default_path()).absolute()
        for _ in range(5):
            connection = self._open()
            if connection is not None:
                self._connection = connection
                self.db = sqlite_utils.Database(connection)
                return
        raise DatabaseError(f"{self.path}: is damaged again and again: is the disk all right?")

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; the last of several writers gives it a rollback journal.

        So a file that nobody writes to is one file, and can be read where its folder is read-only.
        """
        with self._errors(), contextlib.closing(self._connection):
            self._connection.execute("PRAGMA busy_timeout = 0")
            with contextlib.suppress(sqlite3.OperationalError):  # another writer is there
                self._connection.execute("PRAGMA journal_mode = DELETE").fetchone()

    def _open(self) -> sqlite3.Connection | None:
        """A usable connection; None where the file was damaged and is out of the way now."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            inode = self.path.stat().st_ino if self.path.exists() else 0
        except OSError as error:
            raise DatabaseError(
                f"{self.path}: cannot be written ({error.strerror}): name a file in a folder that "
                "can be written with JAXWIN_TUNING_DB"
            ) from error
        connection = None
        try:
            _tuning.require_sqlite(self.path)
            connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            _patiently(lambda: self._prepare(connection, existing=bool(inode)))
            return connection
        except (sqlite3.Error, _tuning.Unusable) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, _tuning.Unusable):
                raise DatabaseError(str(error)) from error
            if _tuning.describe_error(error)[0] != "corrupt":
                raise _database_error(self.path, error) from error
        self._set_aside(inode)
        return None

    def _prepare(self, connection: sqlite3.Connection, *, existing: bool) -> None:
        with _transaction(connection, "DEFERRED"):
            version = _tuning.check_header(self.path, connection)
        if existing:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise _Damaged(verdict)
        wanted = "wal" if is_local(self.path) else "delete"
        (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
        if journal != wanted:
            connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
        connection.execute("PRAGMA foreign_keys = ON")
        if version < len(MIGRATIONS):
            with _transaction(connection):
                # Another process may have done it while this one waited.
                version = _tuning.check_header(self.path, connection)
                db = sqlite_utils.Database(connection)
                for migration in MIGRATIONS[version:]:
                    migration(db)
                connection.execute(f"PRAGMA application_id = {_tuning.APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _set_aside(self, inode: int) -> None:
        """Renames a damaged file and what belongs to it, unless another process has done so."""
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not inode or self.path.stat().st_ino != inode:
                    return
                head = file.read(4096)
                if head and not head.startswith(b"SQLite format 3\0") and _looks_like_text(head):
                    raise DatabaseError(f"{self.path}: is a text file: name another one")
                aside = self.path.with_name(f"{self.path.name}.corrupt-{time.time_ns()}")
                # The log first: a new file must not find the log of the old one.
                for suffix in ("-wal", "-shm", "-journal", ""):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        except FileNotFoundError:
            return  # another process was faster
        except OSError as error:
            raise DatabaseError(
                f"{self.path}: is damaged and cannot be moved away: {error}"
            ) from error
        warnings.warn(
            f"jaxwin: tuning database {self.path} was damaged: it is {aside.name} now, and a new "
            "one begins",
            RuntimeWarning,
            stacklevel=2,
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _database_error(self.path, error) from error

    def _write(self, work: Callable[[], _T]) -> _T:
        def transaction() -> _T:
            with _transaction(self._connection):
                return work()

        with self._errors():
            return _patiently(transaction)

    # --- rows --------------------------------------------------------------------------------

    def add(self, measurements: Iterable[Measurement]) -> int:
        """Adds measurements, those that are there already excepted; how many were new.

        They are durable when this returns, a thousand to a transaction.
        """
        added = 0
        iterator = iter(measurements)
        while batch := list(itertools.islice(iterator, _BATCH)):
            added += self._write(functools.partial(self._insert, batch))
        return added

    def _insert(self, batch: list[Measurement]) -> int:
        execute = self._connection.execute
        before = self._connection.total_changes
        machines = {m.machine.id: m.machine for m in batch}
        for identity, machine in machines.items():
            _insert_row(execute, "machines", {"id": identity} | dataclasses.asdict(machine), "id")
        problems: dict[Problem, int] = {}
        for problem in dict.fromkeys(m.problem for m in batch):
            key = problem.key
            values: dict[str, Any] = {"key": key, "text": str(problem), "flops": problem.flops}
            _insert_row(execute, "problems", values | {"direction": problem.direction}, "key")
            (found,) = execute("SELECT id FROM problems WHERE key = ?", (key,)).fetchone()
            problems[problem] = found
        others = self._connection.total_changes - before
        for m in batch:
            values = {field.name: getattr(m, field.name) for field in dataclasses.fields(m)}
            del values["problem"], values["machine"]
            values["parameters"] = json.dumps(m.parameters, sort_keys=True, separators=(",", ":"))
            values["confirmed"] = int(m.confirmed)
            values |= {"problem_id": problems[m.problem], "machine_id": m.machine.id}
            _insert_row(execute, "measurements", values, "uid")
        return self._connection.total_changes - before - others

    def measurements(self, problem: Problem | None = None) -> Iterator[Measurement]:
        """Every measurement, or those of one problem, the oldest first.

        Rows that make no sense to this version are left out.
        """
        with self._errors():
            yield from read_measurements(self._connection, problem)

    def winners(self) -> list[dict[str, Any]]:
        """What `read_winners` gives."""
        with self._errors():
            return read_winners(self._connection)

    def merge(self, source: Path, *, winners: bool = False) -> tuple[int, int]:
        """Adds the measurements of another database; (how many it has, how many were new).

        winners: only those that dispatch may take with these kernels, one for each problem,
        machine, instruction set and number of threads.
        """
        if source.exists() and source.samefile(self.path):
            raise DatabaseError(f"{source}: cannot be merged into itself")
        total = 0

        def counted(rows: Iterator[Measurement]) -> Iterator[Measurement]:
            nonlocal total
            for row in rows:
                total += 1
                yield row

        try:
            with _tuning.reading(source) as connection:
                rows = read_measurements(connection)
                if winners:
                    best = {
                        row["uid"]
                        for row in read_winners(connection)
                        if row["confirmed"] and not row["stale"]
                    }
                    rows = (row for row in rows if row.uid in best)
                added = self.add(counted(rows))
        except _tuning.Unusable as error:
            raise DatabaseError(str(error)) from error
        return total, added

    def prune(
        self,
        *,
        before: datetime.datetime | None = None,
        stale: bool = False,
        dry_run: bool = False,
    ) -> int:
        """Deletes measurements; how many.

        before: those that are older. stale: those of kernels that this build has not (another abi
        or an unknown algorithm), but not those of XLA. dry_run: deletes nothing.
        """
        conditions, values = [], []
        if before is not None:
            conditions.append("julianday(created) < julianday(?)")
            values.append(_utc(before))
        if stale:
            conditions.append(
                "(algorithm <> 'xla' AND algorithm || ' ' || abi NOT IN "
                "(SELECT value FROM json_each(?)))"
            )
            values.append(json.dumps(_registry.kernels()))
        if not conditions:
            raise ValueError("before, stale: one of them must be given")
        where = " OR ".join(conditions)

        def work() -> int:
            count = self.db.table("measurements").count_where(where, values)
            if not dry_run and count:
                self.db.execute(f"DELETE FROM measurements WHERE {where}", values)
                for table, column in (("problems", "problem_id"), ("machines", "machine_id")):
                    self.db.execute(
                        f"DELETE FROM {table} WHERE id NOT IN (SELECT {column} FROM measurements)"
                    )
            return int(count)

        count = self._write(work)
        if count and not dry_run:
            with self._errors():
                _patiently(self.db.vacuum)
        return count


def read_measurements(
    connection: sqlite3.Connection, problem: Problem | None = None
) -> Iterator[Measurement]:
    """The measurements of an open database, the oldest first, but for those that make no sense."""
    machines: dict[str, Machine] = {}
    for identity, machine in _tuning.machines(connection).items():
        with contextlib.suppress(ValueError):
            machines[identity] = _typed(Machine, dataclasses.asdict(machine))
    problems: dict[int, Problem] = {}
    for number, key in connection.execute("SELECT id, key FROM problems"):
        with contextlib.suppress(ValueError):
            problems[number] = Problem.from_key(key)
    names = [
        f.name for f in dataclasses.fields(Measurement) if f.name not in ("problem", "machine")
    ]
    query = f"SELECT problem_id, machine_id, {', '.join(names)} FROM measurements"
    wanted: tuple[str, ...] = ()
    if problem is not None:
        query += " WHERE problem_id = (SELECT id FROM problems WHERE key = ?)"
        wanted = (problem.key,)
    for problem_id, machine_id, *rest in connection.execute(query + " ORDER BY id", wanted):
        values = dict(zip(names, rest, strict=True))
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            values["parameters"] = json.loads(values["parameters"])
            values["confirmed"] = bool(values["confirmed"])
            values |= {"problem": problems[problem_id], "machine": machines[machine_id]}
            yield _typed(Measurement, values)


_WINNERS = """
SELECT p.text AS problem, p.direction, m.algorithm, m.parameters, m.isa, m.threads, m.ns_median,
  m.ns_min, m.ns_mad, p.flops / m.ns_median AS gflops, c.brand, m.machine_id, m.family, m.abi,
  m.confirmed, m.created, m.uid, min(m.preference) AS preference,
  m.algorithm || ' ' || m.abi NOT IN (SELECT value FROM json_each(?)) AS stale
FROM eligible AS m JOIN problems AS p ON p.id = m.problem_id
  JOIN machines AS c ON c.id = m.machine_id
GROUP BY m.problem_id, m.machine_id, m.isa, m.threads, m.family, stale
ORDER BY problem, brand, threads
"""


def read_winners(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """The fastest row for each problem, machine, instruction set, thread count and family.

    `stale` is 1 for the fastest of kernels that this build has not; they are apart.
    """
    kernels = [*_registry.kernels(), f"{_registry.XLA} {_registry.abi(_registry.XLA)}"]
    cursor = connection.execute(_WINNERS, (json.dumps(kernels),))
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


class _Damaged(sqlite3.DatabaseError):
    """What `PRAGMA quick_check` found."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def _insert_row(
    execute: Callable[..., Any], table: str, values: dict[str, Any], unique: str
) -> None:
    # Not OR IGNORE: that would swallow rows that break a constraint, too.
    execute(
        f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))}) "
        f"ON CONFLICT ({unique}) DO NOTHING",
        tuple(values.values()),
    )


def _looks_like_text(head: bytes) -> bool:
    try:
        return "\0" not in head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and b"\0" not in head  # cut within a character


def _database_error(path: Path, error: sqlite3.Error) -> DatabaseError:
    state, text = _tuning.describe_error(error)
    advice = {
        "corrupt": "`jaxwin-tune doctor --repair` sets it aside",
        "locked": "wait for it, or name another file in JAXWIN_TUNING_DB",
        "full": "make room, or name another file in JAXWIN_TUNING_DB",
    }.get(state, "is its folder writable, and the disk not full? JAXWIN_TUNING_DB names another")
    return DatabaseError(f"{path}: {text}: {advice}")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _patiently(work: Callable[[], _T]) -> _T:
    """Calls `work` until no other process is in the way.

    SQLite waits by itself, but not everywhere: not while another connection changes the journal
    mode, recovers the log, or is the last to close.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            busy = _tuning.describe_error(error)[0] == "locked"
            if not busy or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(0.001, 0.05))
