# SPDX-License-Identifier: Apache-2.0
"""Problems written down while programs compile: on request, and those that were missed."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tuning
from click.testing import CliRunner

import jaxwin
from jaxwin import _dispatch, _record, _registry, _tuning
from jaxwin.tuner import tune
from jaxwin.tuner.cli import main
from jaxwin.tuner.database import Database

X, W = jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 4, 4))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where missed problems are remembered: no file yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAXWIN_MODE", "cached")
    monkeypatch.setenv("JAXWIN_MISSES", "1")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    _record._missed.clear()
    _tuning.reload()
    yield tmp_path / "cache" / "jaxwin" / "missed.jsonl"
    _record._missed.clear()
    _tuning.reload()


def _tasks(path: Path) -> dict[jaxwin.Problem, int]:
    return {
        task.problem: task.count
        for task in tune.merged(tune.recorded(path.read_text().splitlines()))
    }


def _network(x: jax.Array, w: jax.Array) -> jax.Array:
    def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jaxwin.conv(x, w), None

    x, _ = jax.lax.scan(layer, x, length=3)
    return jaxwin.conv(jaxwin.conv(x, w), w, stride=2).sum()


# --- record ----------------------------------------------------------------------------------


def test_what_is_compiled_is_recorded_with_its_counts(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    with jaxwin.record(path) as seen:
        jax.jit(_network).lower(X, W)
        jax.jit(jax.grad(_network, 1)).lower(X, W)
    jax.jit(lambda x, w: _network(x, w) + 1).lower(X, W)  # afterwards: not recorded
    assert _tasks(path) == seen.problems
    plain = next(p for p in seen.problems if p.window_strides == (1, 1) and p.direction == "fwd")
    assert seen.problems[plain] >= 4, "the scan's body and the layer after it, twice"
    assert any(p.direction == "dw" for p in seen.problems)
    again = jaxwin.record(path)
    jax.jit(lambda x, w: _network(x, w) - 1).lower(X, W)
    again.close()
    assert _tasks(path)[plain] == seen.problems[plain] + again.problems[plain]


def test_asking_dispatch_is_not_compiling(tmp_path: Path, home: Path) -> None:
    with jaxwin.record(tmp_path / "shapes.jsonl") as seen:
        jaxwin.explain(_network, X, W)
    assert not seen.problems and not _record._missed


def test_two_recordings_at_a_time(tmp_path: Path) -> None:
    with jaxwin.record(tmp_path / "all.jsonl") as everything:
        with jaxwin.record(tmp_path / "some.jsonl") as some:
            jax.jit(lambda x, w: jaxwin.conv(x, w, stride=3)).lower(X, W)
        jax.jit(lambda x, w: jaxwin.conv(x, w, stride=4)).lower(X, W)
    assert len(some.problems) == 1 and len(everything.problems) == 2


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        jaxwin.record(tmp_path)
    with jaxwin.record(tmp_path / "shapes.jsonl") as seen:
        seen.path = tmp_path
        with pytest.warns(RuntimeWarning, match="not recorded any more"):
            jax.jit(lambda x, w: jaxwin.conv(x, w, stride=5)).lower(X, W)
        jax.jit(lambda x, w: jaxwin.conv(x, w, stride=6)).lower(X, W)  # warns once
    assert len(seen.problems) == 2


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    program = f"""
        import resource, signal
        import tuning
        from jaxwin import _record
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            while True:
                _record.append({str(path)!r}, _record.line(tuning.DENSE))
        except OSError as error:
            print(error)
    """
    done = _python(program)
    assert done.returncode == 0 and done.stdout, done.stderr
    (count,) = _tasks(path).values()
    assert count == 2000 // len(_record.line(tuning.DENSE))


def test_a_line_that_somebody_else_broke(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    path.write_text('{"count": 1, "prob')
    _record.append(path, _record.line(tuning.DENSE))
    assert path.read_text().splitlines()[1] == _record.line(tuning.DENSE).strip()
    with pytest.raises(ValueError, match=r"shapes.jsonl:1: "):
        tune.recorded(path.read_text().splitlines(), "shapes.jsonl")


def _append_many(path: Path, writer: int) -> None:
    for number in range(50):
        _record.append(path, _record.line(tuning.DENSE, 1 + 100 * writer + number))


def test_many_processes_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "shapes.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    counts = [json.loads(line)["count"] for line in path.read_text().splitlines()]
    assert sorted(counts) == sorted(1 + 100 * w + n for w in range(4) for n in range(50))


def _python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folder = str(Path(__file__).parent)
    paths = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )


# --- jaxwin-tune record ----------------------------------------------------------------------

_PROGRAM = """
import multiprocessing, sys
import jax, jax.numpy as jnp
import jaxwin

def work(stride):
    x, w = jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 4, 4))
    def layer(x, _):
        return jaxwin.conv(x, w), None
    jax.jit(lambda x: jax.lax.scan(layer, x, length=2)).lower(x)
    jaxwin.conv(x, w, stride=stride)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=work, args=(stride,)) for stride in (2, 3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    print("of the program", *sys.argv[1:])
    sys.exit(7)
"""


def _tune(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxwin.tuner", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_recording_a_program(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(_PROGRAM)
    done = _tune("record", "--", sys.executable, "train.py", "--output", "x", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "of the program --output x\n"
    assert "4 convolutions compiled, 3 different ones" in done.stderr
    assert sorted(_tasks(tmp_path / "recorded.jsonl").values()) == [1, 1, 2]
    listed = CliRunner().invoke(main, ["run", "--dry-run", str(tmp_path / "recorded.jsonl")])
    assert listed.exit_code == 0 and len(listed.stdout.splitlines()) == 3
    benched = CliRunner().invoke(main, ["bench", "--dry-run", str(tmp_path / "recorded.jsonl")])
    assert benched.exit_code == 0 and len(benched.stdout.splitlines()) == 3, benched.output


def test_exit_codes_of_record(tmp_path: Path) -> None:
    killed = _tune("record", "--", "sh", "-c", "kill -9 $$", cwd=tmp_path)
    assert killed.returncode == 128 + 9
    assert "no convolution went through jaxwin" in killed.stderr
    missing = CliRunner().invoke(main, ["record", "-o", str(tmp_path / "a"), "--", "/not/there"])
    assert missing.exit_code == 127 and "/not/there: No such file" in missing.stderr
    nowhere = CliRunner().invoke(main, ["record", "-o", str(tmp_path / "b" / "c"), "--", "true"])
    assert nowhere.exit_code == 2 and "--output" in nowhere.stderr
    done = CliRunner().invoke(main, ["record", "--json", "-o", str(tmp_path / "a"), "--", "true"])
    assert done.exit_code == 0
    assert json.loads(done.stderr) == {"file": f"{tmp_path}/a", "compiled": 0, "problems": 0}


# --- missed problems -------------------------------------------------------------------------


def _compile(stride: int) -> None:
    jax.jit(lambda x, w: jaxwin.conv(x, w, stride=stride)).lower(X, W)


def test_what_was_missed_is_remembered(home: Path) -> None:
    _compile(2)
    _compile(2)
    _compile(3)
    assert not home.exists(), "dispatch does not wait for it"
    missed = _record.misses()
    assert sorted(missed.values()) == [1, 2]
    assert {(threads, isa) for _, threads, isa in missed} == {(_registry.threads(), "")}
    assert home.stat().st_mode & 0o777 == 0o600
    _compile(3)
    assert sorted(_record.misses().values()) == [2, 2]


def test_it_is_written_by_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "_PAUSE_SECONDS", 0.01)
    _compile(2)
    deadline = time.monotonic() + 30
    while not home.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(home.read_text().splitlines()) == 1


def test_a_process_that_ends_at_once_writes_it(home: Path) -> None:
    program = """
        import os, jax, jax.numpy as jnp, jaxwin
        jaxwin.conv(jnp.ones((1, 8, 9, 4)), jnp.ones((3, 3, 4, 4)))
    """
    done = _python(program)
    assert done.returncode == 0, done.stderr
    assert len(_record.misses()) == 1


@pytest.mark.parametrize("variable", ["JAXWIN_MISSES=0", "JAXWIN_MODE=off", "JAXWIN_DISABLE=1"])
def test_it_can_be_switched_off(home: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(*variable.split("="))
    _compile(2)
    assert not _record.misses() and not home.exists()


def test_what_is_tuned_or_asked_for_by_name_is_not_missed(home: Path) -> None:
    with Database(home.with_name("tuning.db")) as database:
        database.add([tuning.measurement()])
    _tuning.reload()
    assert _dispatch.decide(tuning.DENSE).tier == "tuned"
    assert _dispatch.decide(tuning.DENSE, algorithm="im2win").tier == "requested"
    assert not _record.misses()
    with _record.misses_ignored():
        _compile(2)
    assert not _record.misses()


def test_the_file_stays_small(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_record, "MISSES_BYTES", 8000)
    frequent = tuning.DENSE
    for stride in range(2, 60):
        _record.miss(frequent, 2)
        _record.miss(tuning.problems.make(2, 8, stride, (12, 13), (3, 3)), 2)
        _record.flush_misses()
        assert home.stat().st_size <= 8000
    assert _record.misses()[frequent, 2, ""] == 58, "the most frequent stays, with its count"
    assert [path.name for path in home.parent.iterdir()] == [home.name]


@pytest.mark.parametrize("kind", ["folder", "garbage", "read-only", "no home"])
def test_a_place_that_is_no_use(home: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "folder":
        home.mkdir(parents=True)
    elif kind == "garbage":
        home.parent.mkdir(parents=True)
        home.write_bytes(b"\xff\0garbage\n{}\n[1]\n")
    elif kind == "read-only":
        home.parent.parent.mkdir()
        home.parent.symlink_to("/proc/self")  # where not even root can make a file
    else:
        monkeypatch.setattr(_tuning, "user_file", lambda: None)
    _compile(2)
    _record.flush_misses()
    if kind == "garbage":
        assert len(_record.misses()) == 1


def test_children_of_fork_start_anew(home: Path) -> None:
    program = """
        import os, tuning
        from jaxwin import _record
        _record.miss(tuning.DENSE, 1)
        pid = os.fork()
        if pid == 0:
            _record.miss(tuning.DENSE, 2)
            _record.flush_misses()
            os._exit(0)
        os.waitpid(pid, 0)
    """
    done = _python(program)
    assert done.returncode == 0, done.stderr
    assert _record.misses() == {(tuning.DENSE, 1, ""): 1, (tuning.DENSE, 2, ""): 1}


def test_forgetting(home: Path) -> None:
    other = tuning.problems.make(2, 8, 9, (12, 13), (3, 3))
    kept = {(tuning.DENSE, 2, ""), (other, 1, ""), (tuning.DENSE, 1, "cuda")}
    for missed in ((tuning.DENSE, 1, ""), *kept):
        _record.miss(*missed)
    _record.flush_misses()
    _record.forget([(tuning.DENSE, 1, "")])
    assert set(_record.misses()) == kept
    _record.forget([])
