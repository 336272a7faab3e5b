# SPDX-License-Identifier: Apache-2.0
"""The writing side of the tuning database: nothing is lost, whatever happens."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import problems
import pytest
import tuning

from jaxwin import _registry, _tuning
from jaxwin._machine import Machine
from jaxwin.tuner import database
from jaxwin.tuner.database import Database, DatabaseError, Measurement

OTHER = problems.make(1, 4, 8, (9, 9), (3, 3))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The default file: none yet."""
    place = tmp_path / "folder" / "tuning.db"
    monkeypatch.setenv("JAXWIN_TUNING_DB", str(place))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield place
    _tuning.reload()


def _writers(*arguments: str) -> str:
    script = Path(__file__).with_name("writers.py")
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")
    return done.stdout


# --- rows ------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were(path: Path) -> None:
    rows = [
        tuning.measurement(),
        tuning.measurement(OTHER, confirmed=True, family="winograd"),
        tuning.measurement(
            status="crashed", ns_min=None, ns_median=None, error="signal 11\n\udcff"
        ),
        tuning.measurement(machine={"gpu_name": "A GPU", "gpu_sm_count": 3}, repeats=0),
    ]
    with Database() as db:
        assert db.path == path
        assert db.add(rows) == 4
        assert db.add(rows) == 0
        assert list(db.measurements()) == rows
        assert list(db.measurements(OTHER)) == rows[1:2]
        assert [row["uid"] for row in db.winners()] == [rows[1].uid], "the others crashed"
    assert rows[2].error == "signal 11\n?"


def test_the_winners_view(path: Path) -> None:
    with Database() as db:
        fast = tuning.measurement(ns_median=10.0, ns_min=9.0, confirmed=False)
        slow = tuning.measurement(confirmed=False)
        db.add([slow, fast, tuning.measurement(OTHER)])
        db.add([tuning.measurement(ns_median=1.0, threads=9), tuning.measurement(status="timeout")])
        view = list(db.db.query("SELECT * FROM winners"))
        assert sorted(row["uid"] for row in db.winners()) == sorted(row["uid"] for row in view)
        winners = {(row["problem"], row["threads"]): row for row in view}
        assert len(winners) == 3
        row = winners[str(tuning.DENSE), fast.threads]
        assert row["uid"] == fast.uid
        assert row["direction"] == "fwd"
        assert row["gflops"] == pytest.approx(tuning.DENSE.flops / 10.0)
        db.add([tuning.measurement(ns_median=2.0, abi="of-yesterday")])
        found = [row for row in db.winners() if row["problem"] == str(tuning.DENSE)]
        assert {(row["threads"], row["stale"]) for row in found} == {
            (fast.threads, 0),
            (fast.threads, 1),
            (9, 0),
        }


def test_the_schema(path: Path) -> None:
    with Database() as db:
        strict = db.db.query("SELECT name, strict FROM pragma_table_list WHERE type = 'table'")
        tables = {row["name"]: row["strict"] for row in strict if "sqlite_" not in row["name"]}
        assert tables == {"machines": 1, "problems": 1, "measurements": 1}
        columns = list(db.db.table("machines").columns_dict)
        assert columns == ["id", *(field.name for field in dataclasses.fields(Machine))]
        db.add([tuning.measurement()])
        with pytest.raises(sqlite3.IntegrityError):
            db.db.execute("UPDATE measurements SET threads = 'many'")
    assert len(database.MIGRATIONS) == _tuning.SCHEMA_VERSION
    assert path.read_bytes()[18] == 1, "a file at rest has a rollback journal"


def test_records_stand_alone() -> None:
    for row in (tuning.measurement(), tuning.measurement(OTHER, status="refused", ns_min=None)):
        record = json.loads(json.dumps(row.record()))
        assert Measurement.from_record(record) == row


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": 2}, "schema: 2"),
        ({"status": "fine"}, "status: 'fine' is not one of ok, wrong"),
        ({"ns_median": None}, "are missing though the status is ok"),
        ({"ns_median": float("nan")}, "are no times"),
        ({"ns_min": -1}, "are no times"),
        ({"ns_mad": "1"}, "ns_mad: '1' is not float"),
        ({"threads": 0}, "threads, repeats"),
        ({"threads": 2**80}, "threads"),
        ({"confirmed": 1}, "confirmed: 1 is not bool"),
        ({"parameters": {"mr": "6"}}, "parameters"),
        ({"problem": {"lhs_shape": [1]}}, "problem: fields are missing"),
        ({"machine": {}}, "machine: fields are missing"),
        ({"machine": {"arch": "x", "family": "y"}}, "family: 'y' is not int"),
        ({"created": "yesterday"}, "yesterday"),
        ({"uid": ""}, "uid: is empty"),
        ({"isa": "\ud800"}, "isa"),
        ({"colour": "red"}, "unknown fields: colour"),
    ],
)
def test_records_that_are_wrong(change: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Measurement.from_record(tuning.measurement().record() | change)


def test_no_record_at_all() -> None:
    for record in (None, [], "x", {}, {"schema": 1}):
        with pytest.raises(ValueError):
            Measurement.from_record(record)


def test_merge_keeps_every_row_once(path: Path) -> None:
    common, ours, theirs = (tuning.measurement() for _ in range(3))
    source = path.with_name("theirs.db")
    with Database(source) as db:
        db.add([common, theirs, tuning.measurement(OTHER, machine={"model": 7})])
    with Database() as db:
        db.add([ours, common])
        assert db.merge(source) == (3, 2)
        assert db.merge(source) == (3, 0)
        rows = list(db.measurements())
        assert len(rows) == 4
        assert {row.uid for row in rows} >= {common.uid, ours.uid, theirs.uid}
        with pytest.raises(DatabaseError, match="into itself"):
            db.merge(path)
        with pytest.raises(DatabaseError, match="does not exist"):
            db.merge(path.with_name("none.db"))
    with Database(source) as db:
        assert len(list(db.measurements())) == 3, "the source stays as it is"


def test_prune(path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    old = (now - datetime.timedelta(days=9)).isoformat()
    rows = [
        tuning.measurement(),
        tuning.measurement(OTHER, created=old),
        tuning.measurement(abi="of-yesterday", machine={"model": 7}),
        tuning.measurement(algorithm="abacus", abi="x"),
        tuning.measurement(algorithm="xla", abi="0.1", parameters={}),
    ]
    with Database() as db:
        db.add(rows)
        week = now - datetime.timedelta(days=7)
        assert db.prune(before=week, dry_run=True) == 1
        assert db.prune(stale=True, dry_run=True) == 2
        assert len(list(db.measurements())) == 5
        assert db.prune(before=week) == 1
        assert db.prune(stale=True) == 2
        assert list(db.measurements()) == [rows[0], rows[4]]
        assert db.db.table("problems").count == db.db.table("machines").count == 1
        with pytest.raises(ValueError, match="before, stale"):
            db.prune()


# --- several processes, and their deaths -----------------------------------------------------


def test_a_file_that_is_just_being_made_is_seen_whole_or_not_at_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its marks are read in one transaction, by writers and by readers, of any file."""
    check = _tuning.check_header
    seen: list[int] = []

    def checked(path: Path, connection: sqlite3.Connection) -> int:
        assert connection.in_transaction
        seen.append(check(path, connection))
        return seen[-1]

    monkeypatch.setattr(_tuning, "check_header", checked)
    with Database(path), _tuning.reading(path), Database(path):
        pass
    assert seen == [0, 0, *[_tuning.SCHEMA_VERSION] * 2]


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_eight_writers(journal: str, path: Path) -> None:
    _writers("many", str(path), journal)


def test_a_writer_is_killed_at_fifty_moments(path: Path) -> None:
    _writers("kill", str(path), "50")


def test_two_writers_take_turns(path: Path) -> None:
    with Database() as first, Database() as second:
        for _ in range(3):
            first.add([tuning.measurement()])
            second.add([tuning.measurement()])
        assert len(list(first.measurements())) == 6
    with Database() as db:
        assert len(list(db.measurements())) == 6


def test_a_writer_that_waits_in_vain(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Database().close()
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.01)
    monkeypatch.setattr(database, "_PATIENCE_SECONDS", 0.05)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DatabaseError, match="is locked by another process: wait for it, or"):
        Database()
    connection.close()


def test_a_full_disk(path: Path) -> None:
    output = _writers("fill", str(path), "200000")
    assert f"DatabaseError: {path}: " in output
    assert "disk not full?" in output or "the disk is full" in output


def test_no_place_to_write() -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        path = Path(folder, "tuning.db")
        with Database(path) as db:
            db.add([tuning.measurement()])
        os.chmod(folder, 0o555)
        output = _writers("denied", str(path))
        os.chmod(folder, 0o755)
    assert output.count("DatabaseError: ") == 3
    assert output.count("JAXWIN_TUNING_DB") == 3
    assert "(1,)" in output


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_TUNING_DB", "")
    monkeypatch.setattr(_tuning, "user_file", lambda: None)
    with pytest.raises(DatabaseError, match="name a file in JAXWIN_TUNING_DB"):
        Database()


def test_a_folder_that_is_a_file(path: Path) -> None:
    path.parent.write_text("")
    with pytest.raises(DatabaseError, match="cannot be written"):
        Database()


def test_which_file_systems_are_local(path: Path) -> None:
    assert not database.is_local(Path("/proc/self/tuning.db"))
    assert isinstance(database.is_local(path), bool)


# --- damaged files, and others' --------------------------------------------------------------


def _random(data: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(data))


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _overwritten(data: bytes) -> bytes:
    return data[:2000] + _random(data[2000:])


@pytest.mark.parametrize("damage", [_random, _truncated, _overwritten])
def test_a_damaged_file_is_set_aside(damage, path: Path) -> None:
    with Database() as db:
        db.add(tuning.measurement() for _ in range(50))
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.warns(RuntimeWarning, match="was damaged: it is tuning.db.corrupt-") as warned:
        db = Database()
    assert len(warned) == 1
    with db:
        assert list(db.measurements()) == []
        assert db.add([tuning.measurement()]) == 1
    (aside,) = path.parent.glob("tuning.db.corrupt-*")
    assert aside.read_bytes() == damaged, "nothing is deleted"


def test_it_is_set_aside_once(path: Path) -> None:
    """With its log; and a process that saw the damage late does not move the new file away."""
    Database().close()
    path.write_bytes(_random(path.read_bytes()))
    first = Database.__new__(Database)
    first.path = path
    inode = path.stat().st_ino
    Path(f"{path}-wal").write_bytes(b"log")
    with pytest.warns(RuntimeWarning, match="was damaged"):
        first._set_aside(inode)
    assert not list(path.parent.glob(path.name))
    assert not list(path.parent.glob(f"{path.name}-wal"))
    Database().close()
    first._set_aside(inode)
    assert path.exists()
    assert len(list(path.parent.glob("tuning.db.corrupt-*"))) == 2


def test_a_file_that_was_cut_to_nothing(path: Path) -> None:
    Database().close()
    path.write_bytes(b"")
    with Database() as db:
        assert db.add([tuning.measurement()]) == 1


@pytest.mark.parametrize("kind", ["text", "foreign", "newer"])
def test_files_of_others_are_left_alone(kind: str, path: Path) -> None:
    path.parent.mkdir()
    if kind == "text":
        path.write_text('{"a": "line of JSON"}\n')
    else:
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE t (x)")
        if kind == "newer":
            connection.execute(f"PRAGMA application_id = {_tuning.APPLICATION_ID}")
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    before = path.read_bytes()
    complaint = {
        "text": "is a text file",
        "foreign": "is not a tuning database",
        "newer": "has schema 99.*upgrade jaxwin",
    }[kind]
    with pytest.raises(DatabaseError, match=complaint):
        Database()
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_older_schema_is_upgraded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Database() as db:
        db.add([tuning.measurement()])

    def second(db) -> None:
        db.execute("ALTER TABLE measurements ADD COLUMN mood TEXT")

    monkeypatch.setattr(database, "MIGRATIONS", [*database.MIGRATIONS, second])
    monkeypatch.setattr(_tuning, "SCHEMA_VERSION", 2)
    with pytest.raises(_tuning.Unusable, match="has the old schema 1"), _tuning.reading(path):
        pass
    with Database() as db, Database():
        assert "mood" in db.db.table("measurements").columns_dict
        assert len(list(db.measurements())) == 1
    with _tuning.reading(path) as connection:
        assert _tuning.check_header(path, connection) == 2


def test_a_failed_upgrade_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Database().close()

    def second(db) -> None:
        db.execute("ALTER TABLE measurements ADD COLUMN mood TEXT")
        db.execute("ALTER TABLE none ADD COLUMN mood TEXT")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", [*database.MIGRATIONS, second])
        patch.setattr(_tuning, "SCHEMA_VERSION", 2)
        with pytest.raises(DatabaseError, match="no such table: none"):
            Database()
    with Database() as db:
        assert "mood" not in db.db.table("measurements").columns_dict


def test_an_abi_is_filled_in() -> None:
    row = tuning.measurement()
    assert row.abi == _registry.abi(row.algorithm)
    with pytest.raises(KeyError):
        tuning.measurement(algorithm="abacus")


def test_winners_alone_are_merged(path: Path, tmp_path: Path) -> None:
    slow = tuning.measurement(ns_median=5000.0, confirmed=False)
    fast = tuning.measurement(ns_median=900.0)
    other = tuning.problems.make(1, 8, 16, (5, 5), (3, 3))
    stale = tuning.measurement(other, abi="of-yesterday")
    unsure = tuning.measurement(other, confirmed=False)
    with Database(path) as db:
        db.add([slow, fast, stale, unsure])
    small = tmp_path / "small.db"
    with Database(small) as db:
        assert db.merge(path, winners=True) == (1, 1)
        assert list(db.measurements()) == [fast]
