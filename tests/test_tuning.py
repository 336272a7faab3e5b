# SPDX-License-Identifier: Apache-2.0
"""Tuned rows at dispatch: which are used, which are not, and that no file can do harm."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import dispatch_speed
import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
import tuning

import jaxwin
from jaxwin import _dispatch, _ffi, _machine, _registry, _tuning
from jaxwin._problem import Problem
from jaxwin.tuner.database import Database

PROBLEM = tuning.DENSE


@pytest.fixture
def path(own_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with a name that an URI would not take as it is."""
    place = own_database.with_name("tuning ?#%41.db")
    monkeypatch.setenv("JAXWIN_TUNING_DB", str(place))
    return place


def _write(path: Path, *measurements) -> None:
    with Database(path) as db:
        assert db.add(measurements) == len(measurements)
    _tuning.reload()


def _sql(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        for statement in statements:
            connection.execute(statement)
    connection.close()
    _tuning.reload()


def _decide(problem: Problem = PROBLEM, **options):
    return _dispatch.decide(problem, **options)


def _convolve() -> np.ndarray:
    """PROBLEM's convolution through jit, not from any cache."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(PROBLEM.lhs_shape, np.float32)
    w = rng.standard_normal(PROBLEM.rhs_shape, np.float32)
    result = jax.jit(lambda x, w: jaxwin.conv(x, w, padding=1))(x, w)
    assert result.shape == PROBLEM.out_shape
    return np.asarray(result)


@functools.cache
def _heuristic() -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXWIN_MODE", "off")
        return _convolve().tobytes()


# --- what is used ----------------------------------------------------------------------------


def test_a_row_decides_the_plan_and_no_bit(path: Path) -> None:
    row = tuning.measurement()
    _write(path, row)
    decision = _decide()
    assert decision.tier == "tuned"
    assert decision.plan.algorithm == row.algorithm
    names = _registry.parameter_names(row.algorithm)
    assert decision.plan.params == tuple(row.parameters[name] for name in names)
    assert _convolve().tobytes() == _heuristic()


def test_the_program_carries_the_tuned_plan(path: Path, capsys: pytest.CaptureFixture) -> None:
    row = tuning.measurement()
    _write(path, row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXWIN_VERBOSE", "1")
        x, w = jnp.ones(PROBLEM.lhs_shape), jnp.ones(PROBLEM.rhs_shape)
        text = jax.jit(lambda x, w: jaxwin.conv(x, w, padding=1)).lower(x, w).as_text()
    assert "(tuned: 1.0 us on" in capsys.readouterr().err
    values = ", ".join(str(v) for v in _decide().plan.params)
    assert not values or f"dense<[{values}]>" in text or f"array<i64: {values}>" in text


def test_a_close_problem_lends_its_parameters(path: Path) -> None:
    _write(path, tuning.measurement())
    close = problems.make(4, 8, 16, (24, 13), (3, 3), padding=((1, 1), (1, 1)))
    decision = _decide(close)
    assert decision.tier == "transferred"
    (row,) = jaxwin.explain(close)
    assert row.tier == "transferred"
    assert "batch 2 instead of 4" in row.measured
    assert "image 156 instead of 312" in row.measured
    assert str(path) in str(jaxwin.explain(close))


@pytest.mark.parametrize(
    "problem",
    [
        problems.make(2, 64, 128, (12, 13), (3, 3), padding=((1, 1), (1, 1))),  # too far
        problems.make(2, 8, 16, (12, 13), (5, 5), padding=((2, 2), (2, 2))),
        problems.make(2, 8, 16, (12, 13), (3, 3), stride=(2, 2), padding=((1, 1), (1, 1))),
        problems.make(2, 8, 16, (12, 13), (3, 3), padding=((1, 1), (1, 1)), groups=8),
        problems.make(2, 8, 16, (12, 13), (3, 3), layout=("NCHW", "OIHW")),
        problems.make(2, 8, 16, (12, 13), (3, 3), lhs_dilation=(2, 2)),
        problems.make(2, 8, 16, (12,), (3,)),
    ],
    ids=str,
)
def test_another_kind_of_problem_lends_nothing(problem: Problem, path: Path) -> None:
    _write(path, tuning.measurement())
    assert _decide(problem).tier == "heuristic"


def test_a_row_that_confirms_the_heuristic_lends_nothing(path: Path) -> None:
    """The heuristic's parameters follow the sizes; those that it had elsewhere would not."""
    usual = _ffi.make_plan(PROBLEM.native(), isa=_registry.isa(), threads=_registry.threads())[
        "plan"
    ]
    names = _registry.parameter_names(usual["algorithm"]) or ()
    parameters = dict(zip(names, usual["params"], strict=True))
    _write(path, tuning.measurement(algorithm=usual["algorithm"], parameters=parameters))
    assert _decide().tier == "tuned"
    assert _decide(problems.make(4, 8, 16, (24, 13), (3, 3), padding=((1, 1), (1, 1)))).tier == (
        "heuristic"
    )


def test_the_nearest_row_lends(path: Path) -> None:
    shapes = [(n, c, k) for n in (1, 2, 16) for c in (4, 8, 10) for k in (8, 16, 30)]
    made = [problems.make(*s, (12, 13), (3, 3), padding=((1, 1), (1, 1))) for s in shapes]
    _write(path, *(tuning.measurement(problem) for problem in made))
    asked = problems.make(3, 9, 29, (12, 13), (3, 3), padding=((1, 1), (1, 1)))
    first = next(iter(_tuning.table().nearest(asked, _registry.isa(), _registry.threads())))
    assert first.problem == made[shapes.index((2, 10, 30))]


def test_batches_far_away_do_not_lend(path: Path) -> None:
    def made(n: int) -> Problem:
        problem = problems.make(n, 8, 16, (12, 13), (3, 3), padding=((1, 1), (1, 1)))
        assert problem is not None
        return problem

    _write(path, tuning.measurement(made(1)))
    table, isa, threads = _tuning.table(), _registry.isa(), _registry.threads()
    lent = [n for n in (1, 2, 4, 8, 32) if table.nearest(made(n), isa, threads)]
    assert lent == [1, 2, 4]


def test_the_nearest_of_many_rows_lends(path: Path) -> None:
    """Channels come first; few rows and many are compared alike."""
    made = [
        problems.make(n, c, 16, (size, 13), (3, 3))
        for c in (8, 12, 16)
        for n in (1, 4)
        for size in range(8, 40, 4)
    ]
    _write(path, *(tuning.measurement(problem) for problem in made))
    table, isa, threads = _tuning.table(), _registry.isa(), _registry.threads()
    for n, c, size, nearest in (
        (1, 8, 13, (1, 8, 12)),
        (3, 12, 33, (4, 12, 32)),
        (1, 13, 25, (1, 12, 24)),
        (4, 17, 8, (4, 16, 8)),
        (1, 24, 8, (1, 16, 8)),
    ):
        rows = list(table.nearest(problems.make(n, c, 16, (size, 13), (3, 3)), isa, threads))
        lhs = rows[0].problem.lhs_shape
        assert (lhs[0], lhs[3], lhs[1]) == nearest and len(rows) == 3
    assert not [*table.nearest(problems.make(1, 80, 16, (8, 13), (3, 3)), isa, threads)]


def test_the_search_for_neighbours_finds_the_nearest(path: Path) -> None:
    """As plain sums of logarithms do, with all rows at the same channels and with few there."""
    rng = np.random.default_rng(3)
    table = _tuning.Table([])
    rows = []
    for _ in range(300):
        n, c, k, size = (int(rng.integers(1, most)) for most in (9, 4, 4, 50))
        problem = problems.make(n, 8 * c, 8 * k, (size, 8), (1, 3))
        rows.append(problem)
        table._near.add(problem.asked(), "isa", 2, True)

    def distance(problem: Problem, other: Problem, first: int, last: int) -> float:
        sizes = zip(
            _tuning._WEIGHTS.values(),
            _ffi.sizes(problem.asked(), True),
            _ffi.sizes(other.asked(), True),
            strict=True,
        )
        return sum(w * abs(np.log2(a / b)) for w, a, b in list(sizes)[first:last])

    assert table._near.nearest(rows[0].asked(), "another", 2) == []
    assert table._near.nearest(rows[0].asked(), "isa", 3) == []
    for _ in range(100):
        n, size = int(rng.integers(1, 20)), int(rng.integers(1, 200))
        asked = problems.make(n, 16, 24, (size, 8), (1, 3))
        alike = [row for row in rows if distance(asked, row, 0, 3) == 0]
        within = sorted(d for row in alike if (d := distance(asked, row, 3, 8)) <= _tuning._LIMIT)
        found = [rows[i] for i in table._near.nearest(asked.asked(), "isa", 2)]
        if within:
            assert {*map(id, found)} <= {*map(id, alike)}
            np.testing.assert_allclose(distance(asked, found[0], 3, 8), within[0], atol=1e-9)
        else:
            assert all(distance(asked, row, 0, 8) <= _tuning._LIMIT + 1e-9 for row in found)


def test_sizes_that_no_array_has_do_no_harm(path: Path) -> None:
    """Of a file's problems only the form is known."""
    usual, most = tuning.measurement(), 2**62
    for uid, changes in {
        "a": dict.fromkeys(("lhs_shape", "rhs_shape", "out_shape"), (most,) * 4),
        "b": {"feature_group_count": most},
    }.items():
        problem = dataclasses.replace(PROBLEM, **changes)
        _write(path, dataclasses.replace(usual, problem=problem, uid=uid * 32))
        assert min(_ffi.sizes(problem.asked(), True)) > 0
        assert _decide(problem).tier == "xla"
    for changes in ({"feature_group_count": 0, "batch_group_count": 0}, {"rhs_spec": ()}):
        with contextlib.suppress(IndexError):  # nor do those that no file has
            _decide(dataclasses.replace(PROBLEM, **changes))


def test_dispatch_asks_the_core_for_the_same_plans(path: Path) -> None:
    """`plan` and `is_heuristic` are short forms of `make_plan`."""
    rng = np.random.default_rng(7)
    isa = _registry.isa()
    for problem in (problems.draw(rng) for _ in range(30)):
        native = problem.native()
        usual = _ffi.make_plan(native, isa=isa)["plan"]
        for name in ("auto", *_registry.algorithm_names()):
            whole = _ffi.make_plan(native, name, isa)
            short = _ffi.plan(problem.asked(), name, isa, 1, -1, ())
            if "error" in whole:
                assert short == whole["error"]
                continue
            plan = whole["plan"]
            params = tuple(plan["params"])
            assert short == (plan["algorithm"], isa, 1, params, plan["workspace_bytes"])
            taken = plan["algorithm"] == usual["algorithm"]
            assert _ffi.is_heuristic(native, plan["algorithm"], isa, 1, params) == taken
            other = (*params[:-1], params[-1] + 1) if params else (1,)
            assert not _ffi.is_heuristic(native, plan["algorithm"], isa, 1, other)
    assert not _ffi.is_heuristic(native, "abacus", isa, 1, ())


@pytest.mark.parametrize("name", dispatch_speed.CASES)
def test_what_is_timed_is_of_the_tier_that_it_is_said_to_be(path: Path, name: str) -> None:
    dispatch_speed.fill(8)
    assert dispatch_speed.microseconds(dispatch_speed.CASES[name], 8) > 0


def test_dispatch_compares_no_row_with_the_heuristic(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That was done when the rows were loaded: it takes as long as a decision may."""
    dispatch_speed.fill(8)
    _tuning.table()
    monkeypatch.delattr(_ffi, "is_heuristic")
    for name in ("transferred, of many", "near a row that confirms it"):
        dispatch_speed.microseconds(dispatch_speed.CASES[name], 8)


def test_no_native_problem_raises_in_the_search_for_neighbours(path: Path) -> None:
    rng = np.random.default_rng(5)
    drawn = [problems.draw(rng) for _ in range(40)]
    _write(path, *(tuning.measurement(p) for p in drawn[:20]))
    tiers = [_decide(problem).tier for problem in drawn]
    assert tiers[:20] == ["tuned"] * 20
    assert set(tiers[20:]) <= {"transferred", "heuristic"}
    empty = dataclasses.replace(PROBLEM, lhs_shape=(0, 12, 13, 8), out_shape=(0, 12, 13, 16))
    assert not [*_tuning.table().nearest(empty, "none", 1)]


@pytest.mark.parametrize(
    ("changes", "tier", "reason"),
    [
        ({"threads": 3}, "heuristic", "measured with 3 threads"),
        ({"machine": {"l3_bytes": 12345}}, "transferred", "related machine"),
        ({"machine": {"stepping": 99, "usable_cores": 77}}, "tuned", ""),
        ({"machine": {"model": 999, "brand": "Abacus"}}, "heuristic", "another machine (Abacus"),
        ({"machine": {"vendor": ""}}, "heuristic", "another machine"),
        ({"machine": {"arch": "riscv64"}}, "heuristic", "another machine"),
        ({"isa": "mmx"}, "heuristic", "measured with mmx, this process uses"),
        ({"abi": "of-yesterday"}, "heuristic", "other kernels (abi of-yesterday"),
        ({"algorithm": "abacus", "abi": "x"}, "heuristic", "no such algorithm"),
        ({"family": "winograd"}, "heuristic", "the family winograd"),
        ({"status": "wrong", "error": "bits"}, "heuristic", "wrong: bits"),
        ({"status": "timeout"}, "heuristic", "timeout"),
    ],
    ids=str,
)
def test_rows_that_were_measured_otherwise(
    changes: dict, tier: str, reason: str, path: Path
) -> None:
    _write(path, tuning.measurement(**changes))
    if tier == "heuristic" and not changes.keys() & {"isa", "threads"}:
        with pytest.warns(RuntimeWarning, match="holds no winner for this machine"):
            _tuning.table()
    assert _decide().tier == tier
    (row,) = jaxwin.explain(PROBLEM)
    assert row.tier == tier
    assert any(reason in text for text in row.unused) == bool(reason), row.unused
    assert reason in str(jaxwin.explain(PROBLEM))


def test_which_of_several_rows_wins(path: Path) -> None:
    usual = _ffi.make_plan(PROBLEM.native(), isa=_registry.isa(), threads=_registry.threads())[
        "plan"
    ]
    names = _registry.parameter_names(usual["algorithm"])
    other = {
        "algorithm": usual["algorithm"],
        "parameters": dict(zip(names, usual["params"], strict=True)),
    }

    def chosen() -> bool:
        plan = _decide().plan
        return (plan.algorithm, plan.params) == (usual["algorithm"], tuple(usual["params"]))

    lucky = tuning.measurement(ns_median=1.0, confirmed=False)
    _write(path, lucky)
    with pytest.warns(RuntimeWarning, match="holds no winner"):
        assert _decide().tier == "heuristic", "none that no comparison confirmed"
    (told,) = _tuning.unused(_tuning.table(), PROBLEM, _registry.isa(), _registry.threads())
    assert "no comparison confirmed it" in told.reason
    _write(path, tuning.measurement(**other, ns_median=999.0))
    assert chosen(), "the confirmed one"
    _write(path, tuning.measurement(created="2998-01-01T00:00:00+00:00", ns_median=1010.0))
    assert not chosen(), "the one confirmed last"
    newer = {"created": "2999-01-01T00:00:00+00:00", "confirmed": True}
    _write(path, tuning.measurement(**other, **newer, ns_median=2000.0))
    assert chosen(), "the one confirmed last"
    elsewhere = {"machine": {"model": 999}, "status": "crashed"}
    _write(path, tuning.measurement(**other, **elsewhere))
    assert not chosen(), "none that crashed anywhere"


@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")
def test_the_first_file_wins(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = _tuning.user_file()
    site = Path(sys.prefix, "share", "jaxwin", "tuning.db")
    second = path.with_name("second.db")
    for number, place in enumerate((site, user, second, path)):
        _write(place, tuning.measurement(ns_median=100.0 + number))
    monkeypatch.setenv("JAXWIN_TUNING_DB", f"{path}{os.pathsep}{second}")
    for place in (path, second, user, site):
        _tuning.reload()
        assert _decide().row.path == place
        assert [file.path for file in _tuning.table().files][:4] == [path, second, user, site]
        _write(place, tuning.measurement(status="wrong"))


def test_packaged_rows_are_the_last(path: Path) -> None:
    """Made by `jaxwin-tune merge --winners`; a file of one's own comes first."""
    _write(path.with_name("all.db"), tuning.measurement(confirmed=True), tuning.measurement())
    with Database(_tuning.PACKAGED) as db:
        assert db.merge(path.with_name("all.db"), winners=True) == (1, 1)
    assert not list(_tuning.PACKAGED.parent.glob("packaged.db-*")), "one file, to be read as it is"
    with pytest.warns(RuntimeWarning, match="does not exist"):
        _tuning.reload()
        assert _decide().row.path == _tuning.PACKAGED
    _write(path, tuning.measurement())
    assert _decide().row.path == path


def test_the_packaged_file_can_be_used_or_is_not_there() -> None:
    place = Path(_tuning.__file__).with_name("tuning.db")
    file, rows = _tuning._load_file("package", place, _machine.this_machine())
    assert file.state in ("ok", "missing") and not file.bad and not file.text.endswith("no sense")
    assert place.exists() or not rows


def test_places_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/somewhere")
    assert _tuning.user_file() == Path("/somewhere/.cache/jaxwin/tuning.db")
    monkeypatch.setenv("JAXWIN_TUNING_DB", str(_tuning.user_file()))
    places = _tuning.files()
    assert places[0] == ("environment", _tuning.user_file())
    assert [tier for tier, _ in places].count("user") == 0, "the same file is read once"


# --- modes -----------------------------------------------------------------------------------


def test_off_reads_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"\0garbage" * 100)
    monkeypatch.setenv("JAXWIN_MODE", "off")
    assert _decide().tier == "heuristic"
    assert jaxwin.explain(PROBLEM).rows[0].unused == ()


def test_a_mode_that_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_MODE", "on")
    with pytest.raises(ValueError, match="JAXWIN_MODE: 'on' is not one of off, cached, require"):
        _decide()


def test_require(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_MODE", "require")
    close = problems.make(4, 8, 16, (12, 13), (3, 3), padding=((1, 1), (1, 1)))
    _write(path, tuning.measurement(close))
    with pytest.raises(Exception, match=f"no tuned row for {PROBLEM}.*{re.escape(str(path))}"):
        _convolve()
    (row,) = jaxwin.explain(PROBLEM)
    assert row.tier == "transferred"
    assert any("compiling this raises" in text for text in row.unused)
    assert _decide(algorithm="im2win").tier == "requested"
    assert _decide(dataclasses.replace(PROBLEM, lhs_dtype="int32")).tier == "xla"
    _write(path, tuning.measurement())
    assert _decide().tier == "tuned"
    assert _convolve().tobytes() == _heuristic()


def test_disable_comes_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXWIN_MODE", "require")
    monkeypatch.setenv("JAXWIN_DISABLE", "1")
    assert _decide().tier == "xla"


def test_max_workspace_holds_for_tuned_rows(path: Path) -> None:
    _write(path, tuning.measurement())
    need = _decide().plan.workspace_bytes
    assert need > 0
    decision = _decide(max_workspace=need - 1)
    assert decision.plan is None or decision.plan.workspace_bytes < need


# --- wrong rows ------------------------------------------------------------------------------

_NAMES = _registry.parameter_names("im2win")


@pytest.mark.parametrize(
    "parameters",
    [
        "{}",
        "[]",
        "3",
        "null",
        "not json",
        "[" * 5000,
        json.dumps(dict.fromkeys(_NAMES, 0)),
        json.dumps(dict.fromkeys(_NAMES, -1)),
        json.dumps(dict.fromkeys(_NAMES, 2**61)),
        json.dumps(dict.fromkeys(_NAMES, 2**63)),
        json.dumps(dict.fromkeys(_NAMES, 10**400)),
        json.dumps(dict.fromkeys(_NAMES, 1.5)),
        json.dumps(dict.fromkeys(_NAMES, True)),
        json.dumps(dict.fromkeys(_NAMES, "1")),
        json.dumps(dict.fromkeys(_NAMES[1:], 1)),
        json.dumps(dict.fromkeys((*_NAMES, "more"), 1)),
    ],
    ids=lambda text: text[:30],
)
@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")
def test_wrong_parameters_never_run(parameters: str, path: Path) -> None:
    _write(path, tuning.measurement(algorithm="im2win"))
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE measurements SET parameters = ?", (parameters,))
    connection.close()
    _tuning.reload()
    assert _decide().tier == "heuristic"
    assert jaxwin.explain(PROBLEM).rows[0].unused, "it says so"
    assert _convolve().tobytes() == _heuristic()


@pytest.mark.parametrize(
    "change",
    [
        "measurements SET algorithm = 'segregated'",  # which cannot compute the problem
        "measurements SET algorithm = ''",
        "measurements SET isa = ''",
        "measurements SET threads = -5",
        "measurements SET ns_median = -9e999",
        "measurements SET created = 'yesterday'",
        "problems SET key = '{}'",
        "problems SET key = 'x'",
        "problems SET key = json_set(key, '$.lhs_shape', json('[1,1e9,0,\"x\"]'))",
        "problems SET key = json_set(key, '$.from_the_future', 1)",
        "machines SET family = 'x'",
    ],
)
@pytest.mark.filterwarnings("ignore:jaxwin. tuning database:RuntimeWarning")
def test_rows_that_make_no_sense(change: str, path: Path) -> None:
    _write(path, tuning.measurement())
    connection = sqlite3.connect(path)
    script = "".join(line + ";\n" for line in connection.iterdump()).replace("STRICT", "")
    connection.close()
    path.unlink()
    connection = sqlite3.connect(path)  # the same tables, but not strict ones
    connection.executescript(script)
    connection.close()
    _sql(
        path,
        f"PRAGMA application_id = {_tuning.APPLICATION_ID}",
        f"PRAGMA user_version = {_tuning.SCHEMA_VERSION}",
        f"UPDATE {change}",
    )
    assert _decide().tier in ("heuristic", "transferred", "tuned")
    assert str(jaxwin.explain(PROBLEM))
    assert _convolve().tobytes() == _heuristic()


# --- files that cannot be used ---------------------------------------------------------------


def _truncated(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    noise = np.random.default_rng(1).bytes(len(data))
    data[2000:] = noise[2000:]
    path.write_bytes(data)


SPOILERS: dict[str, Callable[[Path], object]] = {
    "is damaged": lambda path: path.write_bytes(np.random.default_rng(0).bytes(20_000)),
    "is damaged (cut)": lambda path: _truncated(path, 0.5),
    "is damaged (cut to a header)": lambda path: _truncated(path, 0.01),
    "is damaged (overwritten)": _overwritten,
    "is damaged (text)": lambda path: path.write_text("No database.\n" * 100),
    "is empty": lambda path: path.write_bytes(b""),
    "does not exist": Path.unlink,
    "is not a regular file": lambda path: (path.unlink(), path.mkdir()),
    "is not a regular file (pipe)": lambda path: (path.unlink(), os.mkfifo(path)),
    "is not a tuning database": lambda path: _sql(path, "PRAGMA application_id = 42"),
    "is not a tuning database (version)": lambda path: _sql(path, "PRAGMA user_version = 0"),
    "has schema 99": lambda path: _sql(path, "PRAGMA user_version = 99"),
    "cannot be used (no such table": lambda path: _sql(path, "ALTER TABLE machines RENAME TO m"),
}


@pytest.mark.parametrize("text", SPOILERS)
def test_a_file_that_cannot_be_used(text: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(path, *(tuning.measurement() for _ in range(50)))
    SPOILERS[text](path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.warns(RuntimeWarning) as warned:
        assert _convolve().tobytes() == _heuristic()
        assert _decide().tier == "heuristic"
    assert len(warned) == 1
    expected = text if text.startswith("cannot") else text.split(" (")[0]
    assert expected in str(warned[0].message)
    assert str(path) in str(warned[0].message)
    assert "\n" not in str(warned[0].message)
    if path.is_file():
        assert path.read_bytes() == before, "reading changes nothing"
    monkeypatch.setenv("JAXWIN_MODE", "require")
    with pytest.raises(RuntimeError, match="no tuned row"):
        _decide()


def test_an_old_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(path, tuning.measurement())
    monkeypatch.setattr(_tuning, "SCHEMA_VERSION", _tuning.SCHEMA_VERSION + 1)
    with pytest.warns(RuntimeWarning, match="has the old schema 1.*doctor --repair") as warned:
        assert _decide().tier == "heuristic"
    assert len(warned) == 1


def test_a_locked_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(path, tuning.measurement())
    monkeypatch.setattr(_tuning, "_BUSY_SECONDS", 0.05)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.warns(RuntimeWarning, match="is locked by another process"):
        assert _decide().tier == "heuristic"
    connection.close()
    assert _decide().tier == "heuristic", "what a process has read stays"
    _tuning.reload()
    assert _decide().tier == "tuned"


def test_it_is_read_once(path: Path) -> None:
    _write(path, tuning.measurement())
    tables = []
    readers = [threading.Thread(target=lambda: tables.append(_tuning.table())) for _ in range(8)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len({id(table) for table in tables}) == 1
    path.unlink()
    assert _decide().tier == "tuned"


def test_a_row_written_later_is_told(path: Path) -> None:
    other = problems.make(2, 64, 128, (12, 13), (5, 5))
    _write(path, tuning.measurement(other))
    assert _decide().tier == "heuristic"
    with Database(path) as db:
        db.add([tuning.measurement()])
    assert _decide().tier == "heuristic"
    (row,) = jaxwin.explain(PROBLEM)
    assert "written after this process read the file" in row.unused[0]


_PROGRAM = textwrap.dedent(
    """
    import hashlib, json, sys
    import jax, jax.numpy as jnp, jaxwin
    x, w = jnp.arange(2 * 12 * 13 * 8.0).reshape(2, 12, 13, 8), jnp.ones((3, 3, 8, 16)) / 3
    f = lambda x, w: jaxwin.conv(x, w, padding=1)
    bits = hashlib.sha256(jax.jit(f)(x, w).tobytes()).hexdigest()
    (row,) = jaxwin.explain(f, x, w)
    heavy = ("optuna", "sqlalchemy", "click", "rich", "sqlite_utils")
    found = [row.tier, row.algorithm, row.parameters, bits, [m for m in heavy if m in sys.modules]]
    print(json.dumps(found))
    """
)


def test_a_second_process_picks_the_winner_up(
    path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tuning.measurement()
    _write(path, row)
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = json.loads(done.stdout)
    assert after[:3] == ["tuned", row.algorithm, row.parameters]
    assert after[4] == []
    monkeypatch.setenv("JAXWIN_MODE", "off")
    exec(_PROGRAM, {})
    before = json.loads(capsys.readouterr().out)
    assert before[0] == "heuristic"
    assert after[3] == before[3], "no bit depends on tuning"


_AS_ANOTHER_USER = textwrap.dedent(
    """
    import os, sqlite3, warnings
    from jaxwin import _tuning
    warnings.simplefilter("error")
    if os.getuid() == 0:
        os.setuid(65534)  # root may write everywhere
    for path in _tuning.named_files():
        assert not os.access(path.parent, os.W_OK)
    for file in _tuning.table().files:
        if file.tier == "environment":
            assert (file.state, file.rows, file.text) == ("ok", 1, ""), file
    """
)


def test_read_only_folders(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files at rest, with a write-ahead log at rest, and with one in use."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        places = [Path(folder, name, "tuning.db") for name in ("rest", "log", "used")]
        monkeypatch.setenv("JAXWIN_TUNING_DB", os.pathsep.join(map(str, places)))
        connections = []
        for place in places:
            _write(place, tuning.measurement())
            connections.append(connection := sqlite3.connect(place))
            if place.parent.name != "rest":
                connection.execute("PRAGMA journal_mode = WAL")
            if place.parent.name == "used":
                connection.execute("UPDATE measurements SET repeats = 8")
                connection.commit()
            else:
                connection.close()
            place.parent.chmod(0o555)
        os.chmod(folder, 0o555)
        command = [sys.executable, "-c", _AS_ANOTHER_USER]
        done = subprocess.run(command, capture_output=True, text=True)
        for place, connection in zip(places, connections, strict=True):
            place.parent.chmod(0o755)
            connection.close()
        os.chmod(folder, 0o755)
    assert done.returncode == 0, done.stderr


# --- descriptions ----------------------------------------------------------------------------


def test_a_problem_and_its_key() -> None:
    rng = np.random.default_rng(2)
    drawn = [problems.draw(rng) for _ in range(50)]
    drawn.append(dataclasses.replace(PROBLEM, bias=True, activation="relu", lhs_dtype="bfloat16"))
    for problem in drawn:
        assert Problem.from_key(problem.key) == problem
    assert len({p.key for p in drawn}) == len(set(drawn))


@pytest.mark.parametrize("seed", range(5))
def test_no_text_makes_a_malformed_problem(seed: int) -> None:
    """Whatever replaces a value: refused, or a problem that the native core can judge."""
    rng = np.random.default_rng(seed)
    odd = [
        0,
        -1,
        2**62,
        2**70,
        1.5,
        "x",
        "",
        None,
        True,
        [],
        [0],
        [1, 1],
        [[1, 1]],
        {},
        [2**62] * 4,
    ]
    fields = [field.name for field in dataclasses.fields(Problem)]
    refused = 0
    for _ in range(100):
        values = json.loads(PROBLEM.key)
        values[str(rng.choice(fields))] = odd[int(rng.integers(len(odd)))]
        try:
            problem = Problem.from_key(json.dumps(values))
        except ValueError as error:
            assert str(error).startswith("problem: ")
            refused += 1
        else:
            _ffi.make_plan(problem.native())
            assert str(problem) and hash(problem) == hash(Problem.from_key(problem.key))
    assert refused > 50


def test_likeness_of_machines() -> None:
    here = _machine.this_machine()
    assert here.vendor and here.id == _machine.this_machine().id
    assert here.likeness(dataclasses.replace(here, stepping=77, usable_cores=3)) == "same"
    assert here.likeness(dataclasses.replace(here, l2_bytes=1)) == "related"
    assert here.likeness(dataclasses.replace(here, model=here.model + 1)) == "other"
    assert dataclasses.replace(here, usable_cores=here.usable_cores + 1).id != here.id
    unknown = _machine.Machine("x86_64")
    assert unknown.likeness(unknown) == "other"


def test_a_machine_that_says_nothing_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "_first_processor", lambda: {})
    found = _machine._cpu.__wrapped__()
    assert (found.vendor, found.family, found.brand, found.isa_flags) == ("", 0, "", "")
    assert found.likeness(found) == "other"


def test_a_machine_has_no_name_of_its_own() -> None:
    text = json.dumps(dataclasses.asdict(_machine.this_machine()))
    assert os.uname().nodename not in text or os.uname().nodename in os.uname().machine


def test_an_abi_for_every_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _registry.algorithm_names():
        assert _registry.abi(name)
    with pytest.raises(KeyError):
        _registry.abi("abacus")
    told = {"algorithms": [{"name": "abacus", "abi": "7"}]}
    monkeypatch.setattr(_registry, "registry", lambda: told)
    assert _registry.abi.__wrapped__("abacus") == "7"
