# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune run` and `jaxwin.tune` as a user meets them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import problems
import pytest
from click.testing import CliRunner, Result

import jaxwin
from jaxwin import _record, _registry
from jaxwin.tuner import search
from jaxwin.tuner.cli import main
from jaxwin.tuner.database import Database

TINY = "n1 6x7 c4 k8 w3"
FAST = search.Effort(3, 60.0, 1, 1e-6, 1, 2)


@pytest.fixture
def path(own_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(search.EFFORTS, "quick", FAST)
    return own_database


def _run(*arguments: str, **kwargs) -> Result:
    return CliRunner().invoke(main, ["run", *arguments], **kwargs)


def test_a_run(path: Path) -> None:
    done = _run(TINY, "--effort", "quick", "--threads", "1", "--json")
    assert done.exit_code in (0, 5), done.output
    data = json.loads(done.stdout)
    assert list(data) == [
        "schema_version",
        "threads",
        "isa",
        "effort",
        "database",
        "complete",
        "others_share",
        "stolen_share",
        "rows",
        "warnings",
    ]
    assert (data["threads"], data["isa"], data["complete"]) == (1, _registry.isa(), True)
    assert data["database"] == str(path)
    (row,) = data["rows"]
    names = {field.name for field in dataclasses.fields(search.Outcome)}
    assert row.keys() == names | {"name", "text", "count", "isa"}
    problem = jaxwin.Problem.from_key(json.dumps(row["problem"]))
    assert str(problem) == row["text"]
    assert row["measured"] == 3 and row["default"]["algorithm"]
    with Database(path) as database:
        rows = list(database.measurements(problem))
    assert len({(r.algorithm, *r.parameters.values()) for r in rows}) == 3
    confirmed = [r for r in rows if r.confirmed]
    assert len(confirmed) == (row["status"] != "undecided")
    assert "[1/1]" in done.stderr
    if confirmed:
        again = _run(TINY, "--effort", "quick", "--threads", "1")
        assert again.exit_code == 0 and "known" in again.stdout
        assert "[1/1]" not in _run(TINY, "--effort", "quick", "--threads", "1", "--quiet").stderr


def test_sources(tmp_path: Path) -> None:
    recorded = tmp_path / "recorded.jsonl"
    problem = problems.make(2, 4, 8, (9, 9), (3, 3))
    recorded.write_text(json.dumps({"count": 7, "problem": json.loads(problem.key)}) + "\n")
    done = _run("--from", str(recorded), "--dry-run")
    assert done.exit_code == 0
    assert done.output == f"{problem}: {problem}, 7 times\n"
    both = _run(TINY, "--from", str(recorded), "--direction", "fwd,dw", "--dry-run").output
    assert len(both.splitlines()) == 3 and "dw: " in both
    preset = _run("--preset", "paper", "--batch", "4", "--layout", "nchw", "--dry-run").output
    assert len(preset.splitlines()) == 12 and "n4 " in preset
    once = _run(TINY, f"{TINY} *4", "--dry-run").output
    assert len(once.splitlines()) == 1 and "5 times" in once


@pytest.mark.parametrize(
    ("arguments", "blame"),
    [
        (("nonsense",), "nonsense"),
        ((TINY, "--threads", "10000"), "threads"),
        ((TINY, "--budget", "0"), "--budget"),
        ((TINY, "--direction", "up"), "--direction"),
        (("--from", "/does/not/exist"), "/does/not/exist"),
        (("--preset", "nobody"), "--preset"),
        ((TINY, "--storage", "abacus://"), "storage"),
    ],
)
def test_wrong_usage(path: Path, arguments: tuple[str, ...], blame: str) -> None:
    done = _run(*arguments)
    assert done.exit_code == 2, done.output
    assert blame in done.output.splitlines()[-1]
    assert "Traceback" not in done.output


def test_a_recorded_file_that_is_wrong(tmp_path: Path) -> None:
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text('{"problem": 1}\n')
    done = _run("--from", str(recorded))
    assert done.exit_code == 2
    assert "recorded.jsonl:1: problem: not an object" in done.output
    recorded.write_bytes(b"\xff\xfe")
    done = _run("--from", str(recorded))
    assert done.exit_code == 2 and "recorded.jsonl: not a text file" in done.output
    recorded.write_text("\n")
    done = _run("--from", str(recorded))
    assert done.exit_code == 2 and "recorded.jsonl: holds no convolution" in done.output


def test_exit_codes_of_what_cannot_be_tuned(path: Path) -> None:
    dtypes = dict.fromkeys(("lhs_dtype", "rhs_dtype", "out_dtype"), "int32")
    recorded = path.with_name("recorded.jsonl")
    whole = dataclasses.replace(problems.make(1, 4, 8, (6, 7), (3, 3)), **dtypes)
    recorded.write_text(_record.line(whole))
    nothing = _run("--from", str(recorded), "--quiet")
    assert nothing.exit_code == 3 and "unsupported" in nothing.output
    path.unlink(missing_ok=True)
    path.mkdir()
    unusable = _run(TINY)
    assert unusable.exit_code == 4 and "Error: " in unusable.output


def test_integers_are_tuned_and_verified(path: Path) -> None:
    """Beside XLA, too: its sums of integers are the same."""
    done = _run("6x7 c4 k8 w3", "--dtype", "uint8", *"--effort quick --threads 1 --json".split(),
                "--family", "any")  # fmt: skip
    (row,) = json.loads(done.stdout)["rows"]
    assert row["status"] in ("tuned", "default", "undecided"), done.output
    with Database(path) as database:
        rows = list(database.measurements())
    assert {m.problem.out_dtype for m in rows} == {"int32"}
    assert {m.status for m in rows} == {"ok"}
    if row["status"] != "undecided":
        assert "xla" in {m.algorithm for m in rows}
    # Those of other families are compared with the plan that stays, too, where none is decided on.
    confirmed = {m.family for m in rows if m.confirmed} - {_registry.family("xla")}
    assert (_registry.family("direct") in confirmed) == (row["status"] != "undecided")
    checked = json.loads(CliRunner().invoke(main, ["verify", "--json"]).stdout)["rows"]
    assert len(checked) == len(confirmed)
    assert {row["status"] for row in checked} <= {"ok", "drifted", "regressed"}


def test_without_arguments_what_was_missed_is_tuned(path: Path) -> None:
    nothing = _run("--threads", "1")
    assert nothing.exit_code == 0 and "nothing to tune: no program with 1 threads" in nothing.stderr
    assert json.loads(_run("--threads", "1", "--json").stdout)["rows"] == []
    small, large, other = (problems.make(1, 4, 8, (n, 7), (3, 3)) for n in (6, 60, 8))
    for problem, threads in ((small, 1), (small, 1), (large, 1), (other, 77)):
        _record.miss(problem, threads)
    listed = _run("--threads", "1", "--dry-run")
    assert [line.split(":")[0] for line in listed.stdout.splitlines()] == [str(large), str(small)]
    assert "1 more with 77 threads: `--threads 77` tunes them" in listed.stderr
    done = _run("--threads", "1", "--effort", "quick", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["text"] for row in rows] == [str(large), str(small)]
    settled = {row["text"] for row in rows if row["status"] != "undecided"}
    left = {str(problem) for problem, *_ in _record.misses()}
    assert left == {str(small), str(large), str(other)} - settled


def test_help_names_exit_codes_and_efforts() -> None:
    text = _run("--help").output
    for word in ("Exits with 1", "quick", "normal", "full", "jaxwin-tune run --preset resnet50"):
        assert word in text


def test_stopped_by_ctrl_c(path: Path) -> None:
    shapes = [f"n1 {size}x7 c4 k8 w3" for size in range(6, 40)]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxwin.tuner", "run", *shapes, "--effort", "quick", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAXWIN_MODE": "off"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("[1/"):
            process.send_signal(signal.SIGINT)
            break
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    data = json.loads(stdout)
    assert not data["complete"] and 1 <= len(data["rows"]) < len(shapes)
    assert "Traceback" not in stderr
    with Database(path) as database:
        assert len(list(database.measurements())) >= data["rows"][0]["measured"]


@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")  # if undecided
def test_tuning_a_function(path: Path) -> None:
    def model(x, w):
        return jaxwin.conv(jaxwin.conv(x, w, activation="relu"), w)

    x, w = jnp.ones((1, 6, 7, 8)), jnp.ones((3, 3, 8, 8))
    with pytest.warns(RuntimeWarning, match="does not exist"):
        before = jaxwin.explain(model, x, w)
    assert {row.tier for row in before} == {"heuristic"}
    result = jaxwin.tune(model, x, w, effort="quick")
    assert result.complete and len(result.outcomes) == 2
    assert {task.problem.activation for task, _ in result.outcomes} == {None, "relu"}
    for row, (_, outcome) in zip(jaxwin.explain(model, x, w), result.outcomes, strict=True):
        assert row.tier == ("tuned" if outcome.status in ("tuned", "default") else row.tier)
        assert outcome.status in str(result) or outcome.winner is not None
    with pytest.raises(ValueError, match="effort"):
        jaxwin.tune(model, x, w, effort="heroic")
    assert str(jaxwin.tune(jnp.sin, 1.0)) == "no convolutions"
