# SPDX-License-Identifier: Apache-2.0
"""Machines of one kind that share a search through a database server, which is started here."""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_search import DENSE, GOAL, THREADS, Fake, _towards

from jaxwin import _dispatch, _tuning
from jaxwin.tuner import tune
from jaxwin.tuner.cli import main
from jaxwin.tuner.database import Database

_SECONDS = 60


def _binaries() -> Path | None:
    """Where PostgreSQL's programs are; Debian keeps them out of PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def _account() -> str | None:
    """As whom to run the server, which refuses to be root; None for this user."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a server on the loopback interface."""
    binaries = _binaries()
    if binaries is None or not (binaries / "postgres").exists():
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (pip install 'jaxwin[fleet]')")
    account = _account()
    with tempfile.TemporaryDirectory(prefix="jaxwin-fleet-", dir="/tmp") as folder:
        if account is not None:
            shutil.chown(folder, account)
        data, sockets = f"{folder}/data", f"{folder}/sockets"
        flags = ("-D", data, "-U", "tuner", "-A", "trust", "--no-sync")
        options: dict = {"user": account} if account is not None else {}
        options |= {"cwd": folder, "stdin": subprocess.DEVNULL}
        subprocess.run([binaries / "initdb", *flags], check=True, capture_output=True, **options)
        subprocess.run(["mkdir", sockets], check=True, **options)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = ("-c", "fsync=off", "-c", "shared_buffers=16MB", "-c", "max_connections=20")
        place = ("-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", sockets)
        process = subprocess.Popen(
            [binaries / "postgres", *place, *settings],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **options,
        )
        try:
            _wait(process, port)
            yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # it does not wait for clients then
            process.wait(_SECONDS)


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    import psycopg

    deadline = time.monotonic() + _SECONDS
    while True:
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(host="127.0.0.1", port=port, user="tuner", dbname="postgres").close()
            return
        assert time.monotonic() < deadline, f"{getpass.getuser()}: the server does not answer"
        time.sleep(0.1)


def _shared(server: str) -> tuple[int, int]:
    """How many studies and trials the server has."""
    import psycopg

    with psycopg.connect(server) as connection:
        counts = [
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("studies", "trials")
        ]
    return counts[0], counts[1]


def _clients(server: str) -> int:
    """How many connections the server has besides the one that asks."""
    import psycopg

    query = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    with psycopg.connect(server) as connection:
        (count,) = connection.execute(query).fetchone()
        return count - 1


_NODE = """
    import json, sys
    from pathlib import Path
    from test_search import DENSE, GOAL, THREADS, Fake, _towards
    from jaxwin.tuner import search, tune
    search.EFFORTS["quick"] = search.Effort(40, 60.0, 1, 1e-6, 2, 3)
    url, database, seed = sys.argv[1:]
    fake = Fake(_towards(GOAL))
    options = tune.Options(
        threads=THREADS, storage=url, database=Path(database), seed=int(seed), effort="quick"
    )
    result = tune.run([tune.Task("dense", DENSE)], options, measurer=fake)
    ((_, outcome),) = result.outcomes
    print(json.dumps([outcome.status, [outcome.winner.algorithm, *outcome.winner.params],
                      outcome.measured, len(fake.seen)]))
"""


def _node(url: str, database: Path, seed: int) -> subprocess.Popen[str]:
    folders = (Path(__file__).parent, Path(__file__).parents[1], Path(tune.__file__).parents[2])
    paths = os.pathsep.join(map(str, (*folders, os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-c", textwrap.dedent(_NODE), url, str(database), str(seed)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "JAXWIN_MODE": "cached"},
    )


def test_two_machines_and_one_database(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    databases = [tmp_path / "node1.db", tmp_path / "node2.db", tmp_path / "node3.db"]
    together = [_node(server, database, seed) for seed, database in enumerate(databases[:2])]
    told = []
    for node in together:
        out, err = node.communicate(timeout=120)
        assert node.returncode == 0, err
        told.append(json.loads(out))
    assert [status for status, *_ in told] == ["tuned", "tuned"]
    studies, trials = _shared(server)
    assert studies > 0 and trials > 0
    late = Fake(_towards(GOAL))
    options = tune.Options(threads=THREADS, storage=server, database=databases[2], effort="quick")
    tune.run([tune.Task("dense", DENSE)], options, measurer=late)
    deadline = time.monotonic() + _SECONDS
    while _clients(server) > 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _clients(server) == 0, "a run closes its connections"
    now = _shared(server)
    assert now[0] == studies and now[1] > trials, "the one that comes late joins the same studies"

    merged = tmp_path / "all.db"
    arguments = ["merge", *map(str, databases), "--into", str(merged), "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    counts = {entry["file"]: entry["new"] for entry in json.loads(done.stdout)["files"]}
    assert set(counts) == set(map(str, databases)) and min(counts.values()) > 0
    with Database(merged) as database:
        assert sum(1 for _ in database.measurements()) == sum(counts.values())
    monkeypatch.setenv("JAXWIN_MODE", "cached")
    monkeypatch.setenv("JAXWIN_TUNING_DB", str(merged))
    _tuning.reload()
    decision = _dispatch.decide(DENSE)
    _tuning.reload()
    assert decision.tier == "tuned" and decision.row.path == merged


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (pip install 'jaxwin[fleet]')")
    url = "postgresql://tuner:secret@127.0.0.1:1/postgres"
    arguments = ["n1 6x7 c4 k8 w3", "--storage", url, "--database", str(tmp_path / "a.db")]
    done = CliRunner().invoke(main, ["run", *arguments])
    assert done.exit_code == 2 and "cannot be used" in done.output
    assert "secret" not in done.output
