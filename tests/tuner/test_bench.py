# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune bench`: what it measures, what it says, how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import jaxwin
from jaxwin import _record, _registry
from jaxwin._machine import this_machine
from jaxwin.tuner import bench, machine, measure, peers, problems
from jaxwin.tuner.cli import main

TINY = "n2 6x7 c4 k8 w3"
FAST = ("--rounds", "2", "--min-time", "0.01", "--threads", "1", "--peers", "xla,jaxwin")


@pytest.fixture
def not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the tests keeps its CPUs."""
    monkeypatch.setattr(machine, "pin", lambda threads: machine.usable_cpus()[:threads])
    monkeypatch.setattr(machine, "pool_threads", lambda: 0)


def _run(*arguments: str, **kwargs):
    return CliRunner().invoke(main, ["bench", *arguments], **kwargs)


NUMBER = (int, float)
OPTIONAL_NUMBER = (int, float, type(None))
CELL = {
    "status": str,
    "reason": str,
    "median_ns": OPTIONAL_NUMBER,
    "mad_ns": OPTIONAL_NUMBER,
    "min_ns": OPTIONAL_NUMBER,
    "wall_ns": OPTIONAL_NUMBER,
    "cpu_ns": OPTIONAL_NUMBER,
    "samples_ns": [NUMBER],
    "calls_per_sample": OPTIONAL_NUMBER,
    "gflops": OPTIONAL_NUMBER,
    "peak_share": OPTIONAL_NUMBER,
    "faults": OPTIONAL_NUMBER,
    "error": OPTIONAL_NUMBER,
    "workspace_bytes": OPTIONAL_NUMBER,
    "plan": (dict, type(None)),
}
RATIOS = {
    "best_peer": (str, type(None)),
    "best_of_ours": (str, type(None)),
    "ratio_to_best": OPTIONAL_NUMBER,
    "ratio_to_best_error": OPTIONAL_NUMBER,
    "ratios": {"*": OPTIONAL_NUMBER},
}
ROW = {
    "name": str,
    "problem": str,
    "direction": str,
    "dtype": str,
    "layout": str,
    "count": int,
    "flops": NUMBER,
    "result_bytes": int,
    "peak_gflops": NUMBER,
    "cells": {"*": CELL},
    **RATIOS,
    "like_for_like": RATIOS,
}
SCHEMA = {
    "schema_version": int,
    "options": {
        "threads": int,
        "layout": str,
        "rounds": int,
        "min_seconds": NUMBER,
        "budget_seconds": NUMBER,
        "seed": int,
        "keep_memory": bool,
    },
    "peers": [str],
    "missing": {"*": str},
    "machine": {
        "arch": str,
        "vendor": str,
        "family": int,
        "model": int,
        "stepping": int,
        "brand": str,
        "isa_flags": str,
        "l1d_bytes": int,
        "l2_bytes": int,
        "l3_bytes": int,
        "usable_cores": int,
        "gpu_name": (str, type(None)),
        "gpu_sm_count": (int, type(None)),
        "gpu_compute_capability": (str, type(None)),
    },
    "cpus": [int],
    "versions": {"*": str},
    "load_before": [NUMBER],
    "load_after": [NUMBER],
    "others_share": NUMBER,
    "stolen_share": NUMBER,
    "complete": bool,
    "rows": [ROW],
    "means": {
        "*": {
            "gflops": {"*": ({"geomean": NUMBER, "rows": int}, type(None))},
            "ratio_to_best": OPTIONAL_NUMBER,
            "like_for_like": {"ratio_to_best": OPTIONAL_NUMBER},
        }
    },
    "warnings": [str],
}


def _conforms(value, schema, where: str = "$") -> None:
    if isinstance(schema, dict):
        if "*" not in schema:
            assert list(value) == list(schema), where
        for key, inner in value.items():
            _conforms(inner, schema.get(key, schema.get("*")), f"{where}.{key}")
    elif isinstance(schema, list):
        for number, inner in enumerate(value):
            _conforms(inner, schema[0], f"{where}[{number}]")
    elif isinstance(schema, tuple) and isinstance(schema[0], dict):
        if not isinstance(value, schema[1]):
            _conforms(value, schema[0], where)
    else:
        assert isinstance(value, schema), (where, value)


def _forbid(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("can", [True, False])
def test_memory_is_kept_if_that_is_asked_for_and_possible(
    can: bool, not_pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(jaxwin, "keep_memory", lambda: asked.append(True) or can)
    done = _run(TINY, "--keep-memory", *FAST)
    assert asked == [True]
    if can:
        assert done.exit_code == 0, done.output
        assert "the process keeps its memory (jaxwin.keep_memory), for every peer" in done.output
    else:
        assert done.exit_code == 2
        assert "--keep-memory: needs glibc" in done.output


def test_json(not_pinned: None) -> None:
    arguments = (TINY, "--direction", "fwd,dx,dw", "--algorithm", "im2win", "--json", "-")
    done = _run(*arguments, *FAST)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout, parse_constant=_forbid)
    _conforms(data, SCHEMA)
    assert data["schema_version"] == bench.SCHEMA_VERSION
    assert not data["options"]["keep_memory"]
    assert data["peers"] == ["xla", "jaxwin", "jaxwin:im2win"]
    assert data["complete"]
    assert [row["direction"] for row in data["rows"]] == ["fwd", "dx", "dw"]
    for row in data["rows"]:
        assert row["problem"] == "n2 6x7 c4 k8 w3x3"
        assert row["best_peer"] == "xla"
        assert row["best_of_ours"] == "jaxwin"
        assert row["ratio_to_best_error"] is None  # of two rounds
        assert row["like_for_like"] == {name: row[name] for name in RATIOS}  # nothing is packed
        for name in ("xla", "jaxwin"):
            cell = row["cells"][name]
            assert cell["status"] == "ok"
            assert 0 < cell["min_ns"] <= cell["median_ns"]
            assert len(cell["samples_ns"]) == 2
            assert cell["median_ns"] == cell["cpu_ns"]  # one thread
            assert cell["gflops"] == pytest.approx(row["flops"] / cell["median_ns"])
            assert cell["error"] < bench.TOLERANCE["float32"]
        expected = row["cells"]["xla"]["median_ns"] / row["cells"]["jaxwin"]["median_ns"]
        assert row["ratio_to_best"] == row["ratios"]["xla"] == pytest.approx(expected)
    # im2win has no weight gradient: said, and not counted
    assert data["rows"][2]["cells"]["jaxwin:im2win"]["status"] == "failed"
    assert data["means"]["dw"]["gflops"]["jaxwin:im2win"] is None
    assert data["means"]["fwd"]["gflops"]["jaxwin:im2win"]["rows"] == 1


def test_tables_on_stdout_and_progress_on_stderr(not_pinned: None, tmp_path: Path) -> None:
    markdown, numbers = tmp_path / "out.md", tmp_path / "out.json"
    files = ("--markdown", str(markdown), "--json", str(numbers))
    done = _run("--preset", "tiny", TINY, *FAST, *files)
    assert done.exit_code == 0, done.output
    names = [conv.name for conv in problems.preset("tiny")] + ["n2 6x7 c4 k8 w3x3"]
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[0] == "fwd, GFLOP/s"
    starts = [line for line in lines if line.startswith(tuple(names))]
    assert len(starts) >= 2 * len(names)  # speed and memory
    assert [line.startswith(name) for line, name in zip(starts, names, strict=False)] == [
        True
    ] * len(names)
    assert any(line.startswith("geomean") for line in lines)
    assert "[7/7] n2 6x7" in done.stderr
    assert "[7/7]" not in done.stdout
    assert "\x1b" not in done.stdout
    table = markdown.read_text()
    assert "| layer | xla | jaxwin | best peer | jaxwin / best | jaxwin / xla |" in table
    assert all(f"| {name} |" in table for name in names)
    assert len(json.loads(numbers.read_text())["rows"]) == 7
    assert "[7/7]" not in _run(TINY, *FAST, "--quiet").stderr


def test_order_follows_the_command_line_and_the_registry(not_pinned: None) -> None:
    arguments = (TINY, "5 c2 k2 w2", "--direction", "dw,fwd", "--peers", "jaxwin,xla-eigen,xla")
    data = json.loads(_run(*FAST[:-2], *arguments, "--json", "-").stdout)
    assert data["peers"] == ["xla", "xla-eigen", "jaxwin"]
    assert [(row["direction"], row["problem"][:2]) for row in data["rows"]] == [
        ("dw", "n2"),
        ("dw", "n1"),
        ("fwd", "n2"),
        ("fwd", "n1"),
    ]


@pytest.mark.parametrize("kind", ["values", "shape", "nan", "raises"])
def test_a_peer_that_is_wrong_is_not_counted(
    kind: str, not_pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(peers.Xla):
        name = "wrong"
        summary = "wrong numbers"

        def prepare(self, task: peers.Task) -> peers.Prepared:
            good = super().prepare(task)

            def result():
                if kind == "raises":
                    raise RuntimeError("it broke\nbadly")
                found = np.array(good.result())
                if kind == "shape":
                    return found[:1]
                found.flat[0] = np.nan if kind == "nan" else 1e3
                return found

            return peers.Prepared(measure.Timed(lambda: None), result)  # very fast, if counted

    monkeypatch.setitem(peers._REGISTRY, "wrong", Wrong)
    done = _run(TINY, *FAST[:-1], "xla,wrong,jaxwin", "--json", "-")
    assert done.exit_code == 0  # it is not jaxwin that is wrong
    (row,) = json.loads(done.stdout, parse_constant=_forbid)["rows"]
    cell = row["cells"]["wrong"]
    assert cell["status"] == ("failed" if kind == "raises" else "wrong")
    assert cell["median_ns"] is None
    assert row["best_peer"] == "xla"
    assert row["ratios"]["wrong"] is None
    text = _run(TINY, *FAST[:-1], "xla,wrong,jaxwin").stdout
    assert "FAILED" in text if kind == "raises" else "WRONG" in text
    reasons = {"values": "differs", "shape": "shape", "nan": "not finite", "raises": "it broke"}
    assert reasons[kind] in cell["reason"] and reasons[kind] in text


def test_jaxwin_wrong_ends_with_one(not_pinned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.reference
    monkeypatch.setattr(bench, "reference", lambda task: right(task) + 1)
    done = _run(TINY, *FAST)
    assert done.exit_code == 1
    assert "jaxwin wrong" in done.stdout


def test_fail_under(not_pinned: None) -> None:
    assert _run(TINY, *FAST, "--fail-under", "0").exit_code == 0
    done = _run(TINY, *FAST, "--fail-under", "1e9")
    assert done.exit_code == 1
    assert "jaxwin / best is " in done.stderr
    assert "below 1e+09" in done.stderr


def test_a_missing_peer_is_named(not_pinned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.OnnxRuntime, "modules", ("no_such_module_at_all",))
    done = _run(TINY, *FAST[:-1], "ort,xla,jaxwin", "--json", "-")
    assert done.exit_code == 0
    assert "missing peer ort: " in done.stderr
    data = json.loads(done.stdout)
    assert "no_such_module_at_all" in data["missing"]["ort"]
    assert data["peers"] == ["xla", "jaxwin"]
    alone = _run(TINY, *FAST[:-1], "ort")
    assert alone.exit_code == 1
    assert "jaxwin[bench]" in alone.output


def _cell(ns: float) -> bench.Cell:
    return bench.Cell("ok", median_ns=ns, mad_ns=0.0, gflops=1e3 / ns, samples_ns=[ns])


def _row(cells: dict[str, bench.Cell]) -> bench.Row:
    return bench.Row("r", "p", "fwd", "float32", "nhwc", 1, 1e3, 4, None, cells)


def test_peers_that_keep_their_output_meet_what_keeps_its_own() -> None:
    row = _row(
        {
            "onednn": _cell(30.0),
            "ort": _cell(20.0),
            "jaxwin": _cell(40.0),
            "jaxwin-donated": _cell(10.0),
            "jaxwin-loop": _cell(5.0),
        }
    )
    assert row.against("onednn").ratio == 30 / 40
    assert row.against("ort").ratio == 20 / 5
    assert row.best() == ("onednn", "jaxwin", 0.75, None)
    row.cells["onednn"].status = "wrong"
    assert row.best() == ("ort", "jaxwin-loop", 4.0, None)
    del row.cells["jaxwin-loop"]
    assert row.best() == ("ort", "jaxwin-donated", 2.0, None)
    del row.cells["jaxwin-donated"]
    assert row.best() == ("ort", "jaxwin", 0.5, None)
    del row.cells["jaxwin"]
    assert row.best() is None


def test_peers_that_pack_ahead_meet_what_is_packed() -> None:
    row = _row(
        {
            "onednn": _cell(30.0),
            "onednn-packed": _cell(16.0),
            "ort": _cell(18.0),
            "jaxwin": _cell(40.0),
            "jaxwin-loop": _cell(36.0),
            "jaxwin-packed": _cell(10.0),
            "jaxwin-packed-loop": _cell(9.0),
        }
    )
    assert row.best() == ("onednn-packed", "jaxwin", 0.4, None)  # whatever was packed
    assert row.against("ort") == ("ort", "jaxwin-loop", 0.5, None)
    assert row.best(alike=True) == ("onednn", "jaxwin", 0.75, None)
    assert row.against("onednn-packed", True) == ("onednn-packed", "jaxwin-packed", 1.6, None)
    assert row.against("ort", True) == ("ort", "jaxwin-packed-loop", 2.0, None)
    del row.cells["jaxwin-packed-loop"]
    assert row.against("ort", True) == ("ort", "jaxwin-packed", 1.8, None)
    row.cells["jaxwin-packed"] = bench.Cell("unsupported")  # there is nothing to pack
    assert row.best(alike=True) == row.best()
    row.cells["jaxwin-packed"] = bench.Cell("wrong")
    assert row.against("onednn-packed", True) is None
    del row.cells["jaxwin-packed"]
    assert row.against("onednn-packed", True) is None
    assert row.best(alike=True) == ("onednn", "jaxwin", 0.75, None)


def test_packed_weights_in_the_tables(not_pinned: None, tmp_path: Path) -> None:
    depthwise = "n2 6x7 c4 k4 w3 g4"
    wide = "n2 6x7 c4 k40 w3"
    arguments = (wide, depthwise, *FAST[:-1], "xla,jaxwin,jaxwin-packed,jaxwin-packed-loop")
    numbers = tmp_path / "out.json"
    rounds = ("--rounds", "3")
    done = _run(*arguments, *rounds, "--json", str(numbers), "--markdown", "-")
    assert done.exit_code == 0, done.output
    ends = "| best peer | jaxwin / best | best alike | jaxwin / best alike | jaxwin / xla |"
    header = next(line for line in done.stdout.splitlines() if line.startswith("| layer | xla"))
    assert header.endswith(ends)
    data = json.loads(numbers.read_text())
    _conforms(data, SCHEMA)
    first, second = data["rows"]
    cells = first["cells"]
    assert [cells[name]["status"] for name in data["peers"]] == ["ok"] * 4
    assert {cells[name]["plan"]["algorithm"] for name in data["peers"][1:]} != {"xla"}
    samples = [cells[name]["samples_ns"] for name in ("jaxwin", "xla")]
    assert first["ratio_to_best_error"] == measure.relative_error(*samples)
    best = f"| xla | {first['ratio_to_best']:.2f} ±{first['ratio_to_best_error']:.2f} "
    (line,) = (line for line in done.stdout.splitlines() if f"{best}| xla | " in line)
    assert line.startswith("| n2 6x7 c4 k40 w3x3 |")
    assert second["cells"]["jaxwin-packed"]["status"] == "unsupported"
    assert "reads packed weights" in done.stdout
    mean = measure.geomean(row["like_for_like"]["ratio_to_best"] for row in data["rows"])
    assert data["means"]["fwd"]["like_for_like"]["ratio_to_best"] == pytest.approx(mean)


def test_ratios_are_of_the_samples_of_a_round() -> None:
    fast, slow = [10.0, 10.0, 10.0, 20.0, 20.0], [15.0, 15.0, 30.0, 30.0, 30.0]
    assert measure.relative(fast, slow) == 1.5  # the medians say 3
    assert measure.relative(slow, fast) == 1 / 1.5
    assert measure.relative(fast[:2], slow) == 3.0
    assert measure.relative(fast[1:], slow[1:]) == 1.5
    cells = {"xla": _cell(30.0), "jaxwin": _cell(20.0)}
    cells["xla"].samples_ns, cells["jaxwin"].samples_ns = slow, fast
    assert _row(cells).against("xla").ratio == 1.5
    assert _row(cells).against("xla").error == measure.relative_error(fast, slow)


def test_shares_are_of_the_peak_that_the_core_measures(
    not_pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = bench._ffi.measure_peak, []

    def loop(isa: str, iterations: int) -> float:
        asked.append(isa)
        return real(isa, iterations)

    monkeypatch.setattr(bench._ffi, "measure_peak", loop)
    (row,) = json.loads(_run(TINY, *FAST, "--json", "-").stdout)["rows"]
    assert set(asked) == {_registry.isa()}
    assert row["peak_gflops"] > 0
    assert set(row["cells"]) == {"xla", "jaxwin"}
    cell = row["cells"]["jaxwin"]
    assert cell["peak_share"] == pytest.approx(cell["gflops"] / row["peak_gflops"])
    assert "measured FMA peak" in _run(TINY, *FAST).stdout


def test_counts_weigh_a_network(not_pinned: None) -> None:
    done = _run(TINY + " *3", TINY, *FAST)
    (line,) = (line for line in done.stdout.splitlines() if "network, ms" in line)
    assert float(line.split()[2]) >= 0


def test_dry_run() -> None:
    done = _run("--preset", "paper", "--batch", "4", "--dry-run")
    assert done.exit_code == 0
    assert done.output.splitlines()[0] == ("cv1: n4 227x227 c3 k96 w11x11 s4x4, 843.3 MFLOP")
    counted = _run("--preset", "resnet50", "--dry-run").output.splitlines()[2]
    assert counted == "s1.3x3: n1 56x56 c64 k64 w3x3 p1:1x1:1, 3 times 231.2 MFLOP"
    assert len(done.output.splitlines()) == 12


@pytest.mark.parametrize(
    ("arguments", "blame"),
    [
        ((), "--preset"),
        (("56x56 c64 k64",), "window"),
        (("56x56 c64 k64 w3", "--direction", "sideways"), "sideways"),
        (("56x56 c64 k64 w3", "--peers", "xla,nonsense"), "nonsense"),
        (("56x56 c64 k64 w3", "--algorithm", "nonsense"), "nonsense"),
        (("--preset", "nonsense"), "nonsense"),
        (("56x56 c64 k64 w3", "--threads", "100000"), "--threads"),
        (("56x56 c64 k64 w3", "--threads", "0"), "--threads"),
        (("56x56 c64 k64 w3", "--dtype", "float33"), "float33"),
        (("56x56 c64 k64 w3", "--dtype", "int8", "--direction", "fwd,dx"), "gradients (dx)"),
        (("56x56 c64 k64 w3", "--fail-under", "1", "--peers", "xla"), "--fail-under"),
        (("56x56 c64 k64 w3", "--min-time", "0"), "--min-time"),
        (("9999999x9999999 c64 k64 w3",), "GiB"),
        (("56x56 c64 k64 w3", "--json", "/nonexistent/a.json"), "/nonexistent/a.json"),
        (("56x56 c64 k64 w3", "--markdown", "/"), "folder"),
    ],
)
def test_wrong_usage_exits_with_two(arguments: tuple[str, ...], blame: str) -> None:
    done = _run(*arguments)
    assert done.exit_code == 2
    assert blame in done.output.splitlines()[-1]
    assert "Error: " in done.output
    assert "Traceback" not in done.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(not_pinned: None) -> None:
    done = _run(TINY, *FAST, "--json", "/dev/full")
    assert done.exit_code == 1
    assert "/dev/full: No space left" in done.output


def test_another_number_of_threads_than_jax_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "pin", lambda threads: machine.usable_cpus()[:threads])
    monkeypatch.setattr(machine, "pool_threads", lambda: 99)
    done = _run(TINY, *FAST)
    assert done.exit_code == 2
    assert "XLA has 99" in done.output


def test_interrupted(tmp_path: Path) -> None:
    """In a process of its own: it is confined to one CPU, and gets Ctrl-C in the second row."""
    out = tmp_path / "out.json"
    shapes = [TINY] * 50
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxwin.tuner", "bench", *shapes, *FAST, "--json", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("[2/"):
            process.send_signal(signal.SIGINT)
            break
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, (seen, stderr)
    data = json.loads(out.read_text())
    assert not data["complete"]
    assert 1 <= len(data["rows"]) < 50
    assert len(data["cpus"]) == data["options"]["threads"] == 1
    assert data["machine"]["usable_cores"] == this_machine().usable_cores
    assert "interrupted" in stdout
    assert "Traceback" not in stderr


def test_recorded_problems_that_have_no_dtype_of_ours(tmp_path: Path) -> None:
    whole = dataclasses.replace(problems.parse(TINY).problem(), lhs_dtype="int32")
    recorded = tmp_path / "recorded.jsonl"
    recorded.write_text(_record.line(whole))
    done = _run(str(recorded), *FAST)
    assert done.exit_code == 2 and "no convolution is left" in done.output
    recorded.write_text(_record.line(whole) + _record.line(problems.parse(TINY).problem()))
    done = _run(str(recorded), "--dry-run")
    assert done.exit_code == 0 and "left out" in done.stderr
    assert len(done.stdout.splitlines()) == 1
