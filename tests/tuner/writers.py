# SPDX-License-Identifier: Apache-2.0
"""Processes that write to one tuning database; run by test_database.py.

`writers.py many FILE JOURNAL` prints what went wrong with eight writers. `writers.py kill FILE
MOMENTS` kills a writer again and again. `writers.py fill FILE BYTES` writes until the file may not
grow. `writers.py denied FILE` tries it as a user who may not. A process of its own, since it forks.
"""

from __future__ import annotations

import os
import random
import resource
import select
import signal
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import tuning

from jaxwin import _tuning
from jaxwin._machine import this_machine
from jaxwin.tuner import database
from jaxwin.tuner.database import Database, DatabaseError, Measurement

warnings.simplefilter("error")
_MACHINE = this_machine()
_ALGORITHM, _PARAMETERS = tuning.unusual(tuning.DENSE)


def _row(uid: str) -> Measurement:
    return Measurement(
        tuning.DENSE, _ALGORITHM, _PARAMETERS, "avx2", 1, "ok", 1.0, 1.0, 0.0, 1,
        machine=_MACHINE, uid=uid,
    )  # fmt: skip


def _fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)


def _uids(path: Path) -> set[str]:
    with _tuning.reading(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not connection.execute("PRAGMA foreign_key_check").fetchall()
        return {uid for (uid,) in connection.execute("SELECT uid FROM measurements")}


def many(path: Path, journal: str) -> None:
    """Eight writers that open and close, and a reader, from the file's first moment."""
    local = journal == "wal"
    database.is_local = lambda path: local
    _tuning._BUSY_SECONDS = 60.0  # eight writers and a slow disk can keep a reader out for long

    def write(writer: int) -> None:
        for session in range(3):
            with Database(path) as db:
                (found,) = next(iter(db.db.query("PRAGMA journal_mode"))).values()
                assert found in (journal, "delete"), found
                for batch in range(4):
                    assert db.add(_row(f"{writer} {session} {batch} {i}") for i in range(5)) == 5

    def read() -> None:
        for _ in range(30):
            try:
                with _tuning.reading(path) as connection:
                    connection.execute("SELECT count(*) FROM winners").fetchone()
            except _tuning.Unusable as error:
                assert error.state in ("missing", "empty"), str(error)
            time.sleep(0.01)

    children = [_fork(lambda writer=writer: write(writer)) for writer in range(8)]
    children.append(_fork(read))
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 9
    expected = {
        f"{w} {s} {b} {i}" for w in range(8) for s in range(3) for b in range(4) for i in range(5)
    }
    assert _uids(path) == expected
    with Database(path):
        pass  # a reader that is the last to close leaves the journal to the next writer
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name], "nothing is left behind"


def kill(path: Path, moments: str) -> None:
    """Kills a writer at random moments; what it has said to be there must be there."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    promised: set[str] = set()
    ever = 0
    for moment in range(int(moments)):
        if moment % 10 == 0 and path.exists():  # also while the file is being made
            assert _uids(path) >= promised
            path.unlink()
            promised = set()
        database.is_local = lambda path, wal=moment % 2: bool(wal)
        ours, theirs = os.pipe()

        def write(moment: int = moment, pipe: int = theirs) -> None:
            with Database(path) as db:
                for number in range(100_000):
                    uids = [f"{moment} {number} {i}" for i in range(3)]
                    db.add(map(_row, uids))
                    os.write(pipe, "".join(f"{uid}\n" for uid in uids).encode())

        pid = _fork(write)
        os.close(theirs)
        if chance.random() < 0.6:  # while it writes, else while it opens
            select.select([ours], [], [])
        time.sleep(chance.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(ours) as pipe:
            told = pipe.read().splitlines()
        promised.update(told)
        ever += len(told)
        Database(path).close()
        found = _uids(path)
        assert promised <= found, f"lost at moment {moment}: {sorted(promised - found)}"
        whole = {tuple(uid.split()[:2]) for uid in found}
        assert len(found) == 3 * len(whole), "half a transaction"
    assert not list(path.parent.glob("*corrupt*"))
    assert ever > 0
    print(f"{ever} rows kept")


def fill(path: Path, limit: str) -> None:
    """Writes until the file must not grow; what was there before stays, and can be read."""
    with Database(path) as db:
        db.add(_row(f"first {i}") for i in range(10))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    kept = {f"first {i}" for i in range(10)}
    with Database(path) as db:
        try:
            for batch in range(100_000):
                uids = [f"{batch} {i}" for i in range(20)]
                db.add(map(_row, uids))
                kept.update(uids)
        except DatabaseError as error:
            print(f"DatabaseError: {error}")
        else:
            raise AssertionError("the limit was not met")
    assert len(kept) > 10
    assert _uids(path) == kept
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with Database(path) as db:
        assert db.add([_row("afterwards")]) == 1


def denied(path: Path) -> None:
    """As a user who may not write there: one clear line, at opening and for a new file."""
    if os.getuid() == 0:
        os.setuid(65534)  # root may write everywhere
    for place in (path, path.with_name("new.db"), path.parent / "new" / "new.db"):
        try:
            Database(place)
        except DatabaseError as error:
            print(f"DatabaseError: {error}")
        else:
            raise AssertionError(f"{place} could be written")
    with _tuning.reading(path) as connection:
        print(connection.execute("SELECT count(*) FROM measurements").fetchone())


if __name__ == "__main__":
    {"many": many, "kill": kill, "fill": fill, "denied": denied}[sys.argv[1]](
        Path(sys.argv[2]), *sys.argv[3:]
    )
    assert sqlite3.sqlite_version_info >= (3, 37)
    print("done")
