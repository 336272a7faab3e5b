# SPDX-License-Identifier: Apache-2.0
"""The commands around the tuning database as a user meets them."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import problems
import pytest
import tuning
from click.testing import CliRunner, Result

from jaxwin import _tuning
from jaxwin.tuner import database_commands
from jaxwin.tuner.cli import main
from jaxwin.tuner.database import Database

OTHER = problems.make(1, 4, 8, (9, 9), (3, 3))


@pytest.fixture
def path(own_database: Path) -> Path:
    """The default file, with two measurements that count here, one that is old, one of others."""
    rows = [
        tuning.measurement(),
        tuning.measurement(OTHER),
        tuning.measurement(OTHER, abi="old", created="2001-01-01T00:00:00+00:00"),
        tuning.measurement(machine={"model": 999, "brand": "Abacus [red]"}),
    ]
    with Database(own_database) as db:
        db.add(rows)
    _tuning.reload()
    return own_database


def _run(*arguments: str, code: int = 0, **kwargs) -> Result:
    result = CliRunner().invoke(main, list(arguments), **kwargs)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def _rows(path: Path) -> int:
    with Database(path) as db:
        return len(list(db.measurements()))


def test_show(path: Path) -> None:
    output = _run("show").output
    assert str(tuning.DENSE) in output and str(OTHER) in output
    assert "2 winners, 2 others not shown" in output
    rows = json.loads(_run("show", "--json").output)
    assert {row["problem"] for row in rows} == {str(tuning.DENSE), str(OTHER)}
    assert len(json.loads(_run("show", "c4", "--json").output)) == 1
    everything = _run("show", "--all").output
    assert "Abacus [red] (other)" in everything
    assert "other kernels" in everything
    assert "0 winners" in _run("show", "nothing like it").output


def test_export_and_import(path: Path, tmp_path: Path) -> None:
    lines = _run("export").output
    assert len([json.loads(line) for line in lines.splitlines()]) == 4
    target, copy = tmp_path / "rows.jsonl", tmp_path / "copy.db"
    summary = json.loads(_run("export", str(target), "--json").output)
    assert summary == {"database": str(path), "file": str(target), "rows": 4, "wrong": 0}
    assert target.read_text() == lines
    for new in (4, 0):
        output = _run("import", str(target), "--database", str(copy), "--json").output
        assert json.loads(output)["files"] == [
            {"file": str(target), "rows": 4, "new": new, "wrong": 0}
        ]
    assert "4 measurements, 0 of them new" in _run("import", "-", input=lines).output
    assert _run("export", "--database", str(copy)).output == lines


def test_import_tells_wrong_lines(path: Path, tmp_path: Path) -> None:
    good = json.dumps(tuning.measurement().record())
    bad = json.dumps(tuning.measurement().record() | {"threads": 0})
    source = tmp_path / "rows.jsonl"
    source.write_text(f"{good}\n\nnot json\n{bad}\n{'[' * 100_000}\n")
    result = _run("import", str(source), code=1)
    assert f"{source}:3: " in result.output
    assert f"{source}:4: threads" in result.output
    assert "1 measurements, 1 of them new, 3 wrong" in result.output
    assert _rows(path) == 5
    source.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read further" in _run("import", str(source), code=1).output


def test_merge(path: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.db"
    for new in (4, 0):
        (summary,) = json.loads(_run("merge", str(path), "--into", str(site), "--json").output)[
            "files"
        ]
        assert summary == {"file": str(path), "rows": 4, "new": new, "wrong": 0}
    assert "4 measurements, 0 of them new" in _run("merge", str(site)).output
    assert _rows(site) == 4
    assert "into itself" in _run("merge", str(site), "--into", str(site), code=4).output


def test_prune(path: Path) -> None:
    assert "1 measurements would be deleted" in _run("prune", "--stale", "--dry-run").output
    assert _rows(path) == 4
    summary = json.loads(_run("prune", "--older-than", "30", "--json").output)
    assert summary == {"database": str(path), "rows": 1, "dry_run": False}
    assert _rows(path) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune",),
        ("prune", "--older-than", "-1"),
        ("prune", "--older-than", "soon"),
        ("import",),
        ("import", "no/such/file"),
        ("merge", "no/such/file"),
        ("show", "--database", "/"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], path: Path) -> None:
    assert "Error: " in _run(*arguments, code=2).output
    assert _rows(path) == 4


@pytest.mark.parametrize("command", ["show", "export", "prune"])
def test_no_database(command: str, path: Path) -> None:
    path.unlink()
    options = ["--stale"] if command == "prune" else []
    assert f"Error: {path}: does not exist" in _run(command, *options, code=4).output
    assert not path.exists()


@pytest.mark.parametrize("command", ["show", "export", "merge", "import", "prune"])
def test_a_foreign_database(command: str, path: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    more = {"merge": [str(path), "--into"], "import": ["-", "--database"]}
    options = more.get(command, ["--database"])
    options = ["--stale", *options] if command == "prune" else options
    output = _run(command, *options, str(foreign), code=4).output
    assert f"Error: {foreign}: is not a tuning database of jaxwin" in output
    if command == "merge":
        assert "is not a tuning" in _run("merge", str(foreign), code=4).output


def test_an_output_that_cannot_be_written(path: Path) -> None:
    output = _run("export", "/no/such/folder/rows.jsonl", code=4).output
    assert "/no/such/folder/rows.jsonl: cannot be written" in output


def test_doctor_counts_the_rows(path: Path) -> None:
    facts = json.loads(_run("doctor", "--json").output)["facts"]
    entries = facts["tuning databases"]
    assert [entry["state"] for entry in entries[1:]] == ["missing"] * (len(entries) - 1)
    assert entries[0] == {
        "tier": "environment",
        "path": str(path),
        "state": "ok",
        "schema": _tuning.SCHEMA_VERSION,
        "rows": {"all": 4, "usable": 2, "of other machines": 1, "of other kernels": 1},
    }
    assert facts["JAXWIN_TUNING_DB"] == str(path)
    assert "2 usable" in _run("doctor").output


def test_doctor_when_every_problem_must_be_tuned(path: Path) -> None:
    assert "all is well" in _run("doctor", env={"JAXWIN_MODE": "require"}).output
    assert "JAXWIN_MODE: 'x'" in _run("doctor", env={"JAXWIN_MODE": "x"}, code=1).output


def test_doctor_says_where_measurements_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(_run("doctor", "--json").output)["facts"]
    assert facts["measurements go to"] == str(path)
    full = os.statvfs_result((4096, 4096, 1000, 3, 3, 100, 10, 10, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda place: full)
        assert "the disk is full: 12 KiB are left" in _run("doctor", code=1).output
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda place, how: how != os.W_OK)
        assert "cannot be written: name another" in _run("doctor").output
    with monkeypatch.context() as patch:
        patch.setattr(database_commands, "default_path", lambda: Path("/no/such/place"))
        assert json.loads(_run("doctor", "--json").output)["problems"] == []


@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")
def test_doctor_repairs(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5000:] = bytes(len(data) - 5000)  # the header is whole
    path.write_bytes(data)
    assert (
        "is damaged: `jaxwin-tune doctor --repair` sets it aside" in _run("doctor", code=1).output
    )
    output = _run("doctor", "--repair").output
    assert f"{path}: was corrupt, is ok" in output
    assert "all is well" in output
    assert len(list(path.parent.glob("tuning.db.corrupt-*"))) == 1


@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")
def test_doctor_leaves_others_alone(path: Path) -> None:
    path.write_text("my notes\n")
    assert "is a text file" in _run("doctor", "--repair", code=1).output
    assert path.read_text() == "my notes\n"
    path.unlink()
    assert "the tuner makes it" in _run("doctor").output
