# SPDX-License-Identifier: Apache-2.0
"""Tuners that are killed, run side by side, or have no room: nothing is lost, and it is said.

JAXWIN_TEST_KILLS says how many tuners are killed; a long run has 50.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jaxwin import _tuning
from jaxwin.tuner import tune

KILLS = int(os.environ.get("JAXWIN_TEST_KILLS", "2"))
SHAPES = ("n1 6x7 c4 k8 w3", "n1 9x7 c8 k8 w3", "n1 20x8 c8 k8 w5")


def _environment(folder: Path) -> dict[str, str]:
    here = Path(__file__).parent
    paths = (here, here.parent, Path(tune.__file__).parents[2], os.environ.get("PYTHONPATH", ""))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
        "JAXWIN_TUNING_DB": str(folder / "tuning.db"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAXWIN_MODE": "cached",
    }


def _start(folder: Path, *arguments: str, before: str = "", **options) -> subprocess.Popen[str]:
    """The tuner as a process; `before`: what a shell does first."""
    command = [sys.executable, "-m", "jaxwin.tuner", *arguments]
    if before:  # not by preexec_fn: a process with JAX's threads had better not fork
        command = ["bash", "-c", f'{before}; exec "$@"', "tuner", *command]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(folder) | options.pop("variables", {}),
        **options,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def _uids(path: Path) -> set[str]:
    with _tuning.reading(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {uid for (uid,) in connection.execute("SELECT uid FROM measurements")}


def test_a_tuner_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}, {KILLS} kills")
    chance = random.Random(seed)
    path = tmp_path / "tuning.db"
    kept: set[str] = set()
    for _ in range(KILLS):
        process = _start(tmp_path, "run", *SHAPES, "--threads", "1", "--effort", "quick", "--again")
        time.sleep(chance.uniform(0.0, 8.0))
        process.send_signal(signal.SIGKILL)
        _finish(process)
        if path.exists():
            try:
                found = _uids(path)
            except _tuning.Unusable as error:
                assert error.state == "empty" and not kept, str(error)
                found = set()
            assert kept <= found
            kept = found
    code, out, err = _finish(
        _start(tmp_path, "run", SHAPES[0], "--threads", "1", "--budget", "3", "--json")
    )
    assert code in (0, 5), err
    assert json.loads(out)["complete"] and kept < _uids(path)
    code, out, err = _finish(_start(tmp_path, "doctor"))
    assert code == 0, err
    assert not list(tmp_path.glob("*corrupt*"))
    print(f"{len(kept)} measurements survived")


_TUNER = """
    import sys
    from pathlib import Path
    from test_search import DENSE, GOAL, LARGER, Fake, _towards
    from jaxwin.tuner import tune
    fake = Fake(_towards(GOAL))
    tasks = [tune.Task("a", DENSE), tune.Task("b", LARGER)]
    result = tune.run(tasks, tune.Options(threads=1, again=True), measurer=fake)
    assert result.exit_code() == 0, result
    print(sum(map(len, fake.comparisons)))
"""


def test_two_tuners_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_TUNER)]
    tuners = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=_environment(tmp_path),
        )
        for _ in range(2)
    ]  # fmt: skip
    measured = 0
    for tuner in tuners:
        code, out, err = _finish(tuner)
        assert code == 0, err
        measured += int(out)
    assert len(_uids(tmp_path / "tuning.db")) == measured


def test_a_full_disk(tmp_path: Path) -> None:
    arguments = ("run", SHAPES[0], "--threads", "1", "--budget", "3", "--quiet")
    small = "trap '' XFSZ; ulimit -f 48"
    code, _, err = _finish(_start(tmp_path, *arguments, before=small))
    assert code == 4, err
    assert len(err.strip().splitlines()) == 1 and "JAXWIN_TUNING_DB" in err, err
    code, out, err = _finish(_start(tmp_path, *arguments, "--json"))
    assert code in (0, 5), err
    assert json.loads(out)["rows"][0]["status"] in ("tuned", "default", "undecided")


_PROGRAM = """
    import warnings
    warnings.simplefilter("error")
    import jax.numpy as jnp
    import jaxwin
    x, w = jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 4, 4))
    (row,) = jaxwin.explain(jaxwin.conv, x, w)
    print(row.tier in ("heuristic", "transferred"), float(jaxwin.conv(x, w).sum()) > 0)
"""


@pytest.mark.parametrize("home", ["/proc/self", "/dev/null", ""])
def test_a_home_that_cannot_be_written(tmp_path: Path, home: str) -> None:
    variables = {"XDG_CACHE_HOME": f"{home}/cache" if home else "", "HOME": home or "/proc/self"}
    variables["JAXWIN_TUNING_DB"] = ""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_PROGRAM)],
        capture_output=True, text=True, env=_environment(tmp_path) | variables,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr
    assert done.stderr == ""
    if home != "/proc/self":
        return
    code, _, err = _finish(_start(tmp_path, "run", SHAPES[0], "--quiet", variables=variables))
    assert code == 4 and "name a file in a folder that can be written with JAXWIN_TUNING_DB" in err
    code, out, err = _finish(_start(tmp_path, "doctor", variables=variables))
    assert code == 0 and "no more are remembered" in out, err


def test_doctor_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tuning.db"
    path.write_bytes(b"\0garbage" * 100)
    code, _, err = _finish(_start(tmp_path, "doctor"))
    assert code == 1 and f"{path}: is damaged" in err and "doctor --repair" in err
    code, out, err = _finish(_start(tmp_path, "doctor", "--repair"))
    assert code == 0 and "was corrupt, is ok" in out, (out, err)
    assert len(list(tmp_path.glob("tuning.db.corrupt-*"))) == 1
    with sqlite3.connect(path) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        code, _, err = _finish(_start(tmp_path, "doctor"))
        assert code == 1 and "is locked by another process" in err
    holder.close()
