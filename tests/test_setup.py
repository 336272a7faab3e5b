# SPDX-License-Identifier: Apache-2.0
"""What .ci/setup_env.sh says of a machine that cannot build jaxwin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "setup_env.sh"
OLD = """#!/bin/sh
exec {python} -c 'import sys; sys.version_info = (3, 9, 2, "final", 0); exec(sys.stdin.read())'
"""
FOREIGN = "#!/bin/sh\necho riscv64\n"


@pytest.mark.parametrize(
    ("stub", "text", "variables", "said"),
    [
        ("old", OLD, {"PYTHON": "old"}, "old is Python 3.9"),
        ("true", "#!/bin/sh\n", {"PYTHON": "true"}, "true is not Python"),
        ("broken", "#!/bin/sh\nexit 3\n", {"PYTHON": "broken"}, "broken does not run"),
        ("", "", {"PYTHON": "/nonexistent/python"}, "PYTHON=/nonexistent/python is not there"),
        ("", "", {"PYTHON": sys.executable, "CXX": "false"}, "CXX=false is not a C++"),
        ("uname", FOREIGN, {}, "must be x86-64, this one is riscv64"),
    ],
)
def test_one_line_says_what_is_missing(
    stub: str, text: str, variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    if not SCRIPT.exists():
        pytest.skip("the tests are not in a checkout")
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    if stub:
        (stubs / stub).write_text(text.format(python=sys.executable))
        (stubs / stub).chmod(0o755)
    result = subprocess.run(
        ["sh", str(tmp_path / ".ci" / "setup_env.sh"), "test"],
        env=os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}"} | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("setup: ") and said in line
    assert not (tmp_path / ".venv").exists()
