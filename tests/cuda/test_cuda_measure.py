# SPDX-License-Identifier: Apache-2.0
"""tests/gpu/measure.py, without a GPU: all its phases, and a plan that kills its process."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxwin import _registry

SCRIPT = Path(__file__).parents[1] / "gpu" / "measure.py"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("measure")


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def test_ended_from_outside_it_takes_all_with_it(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--dry", "--out", str(out)],
        stdout=subprocess.PIPE,
        text=True,
    )
    begin = time.monotonic()
    while not (found := _children(process.pid)):
        assert time.monotonic() - begin < 60
        time.sleep(0.05)
    time.sleep(0.5)  # it knows its child, too
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "ended by a signal" in said
    assert not any(map(_runs, found))
    data = json.loads(out.read_text())
    assert "ended by a signal" in data["error"] and data["summary"] == {}


@pytest.mark.parametrize("late", [True, False])
def test_nothing_goes_on_behind_a_phase(measure: Any, tmp_path: Path, late: bool) -> None:
    note = tmp_path / "pid"
    script = f"sleep 60 & echo $! >{note}; echo said; {'wait' if late else 'exit 3'}"
    begin = time.monotonic()
    told = measure.command(["sh", "-c", script], 1.0)
    assert time.monotonic() - begin < 30
    assert (told["code"], told["output"]) == ("timeout" if late else 3, "said\n")
    pid = int(note.read_text())
    for _ in range(100):
        if not _runs(pid):
            break
        time.sleep(0.05)
    assert not _runs(pid)


def test_the_sanitizer_s_tools_one_after_the_other(
    measure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\ncat\necho ERROR SUMMARY of $2\n[ $2 != racecheck ] || exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    report = measure.Report(tmp_path / "out.json")
    report.data["seed"] = 5
    measure.sanitize(report, 60.0, ["im2win", "direct"])
    data = json.loads(report.path.read_text())["sanitizer"]
    assert data["code"] == 9
    assert {n: t["code"] for n, t in data["tools"].items()} == {
        "memcheck": 0,
        "racecheck": 9,
        "synccheck": 0,
    }
    asked = {n: t["output"].splitlines()[:-1] for n, t in data["tools"].items()}
    assert json.loads(asked["memcheck"][0]) == {"algorithm": "im2win", "seeds": [[5, 0]]}
    assert len(asked["memcheck"]) == 2 and len(asked["racecheck"]) == len(asked["synccheck"]) == 1
    names = {row["name"] for row in _registry.rows("cuda")}
    assert names >= set(measure.WITH_BARRIERS)


def test_a_dry_run_survives_a_crash(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = [sys.executable, str(SCRIPT), "--dry", "--seconds", "500", "--out", str(out)]
    done = subprocess.run(
        [*words, "--only", "batch 1", "--skip", "tune"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAXWIN_MEASURE_FAULT": "batch 1/0/float32/highest direct"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(out.read_text())
    assert data["complete"] and "error" not in data
    assert all(row["right"] == 1 and not row["wrong"] for row in data["bits"].values())
    assert [row["key"] for row in data["rows"]] == [
        "batch 1/0/float32/highest",
        "batch 1/0/bfloat16/",
    ]
    for row in data["rows"]:
        cells = {
            cell["algorithm"] if "algorithm" in cell else n: cell
            for n, cell in row["cells"].items()
        }
        assert cells["xla"]["median_us"] > 0 and row["speed_against_xla"] > 0
        crashed = row["key"].endswith("highest")
        assert (cells["direct"]["status"] == "lost") == crashed, row["cells"]
        if crashed:
            assert "exit status -6" in cells["direct"]["error"]
    assert len(data["rows"][0]["cells"]) > len(data["rows"][1]["cells"])  # a second pass
    summary = data["summary"]["batch 1, float32 highest"]
    assert summary["compared"] == 1 and summary["bad"] == ["b1 56: direct: lost"]
    assert "batch 1, bfloat16" in done.stdout
