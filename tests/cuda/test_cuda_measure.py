# SPDX-License-Identifier: Apache-2.0
"""tests/gpu/measure.py, without a GPU: all its phases, and a plan that kills its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "gpu" / "measure.py"


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
