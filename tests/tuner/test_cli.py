# SPDX-License-Identifier: Apache-2.0
"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import jaxwin
from jaxwin import _record, _registry, _settings
from jaxwin.tuner import cli, exits
from jaxwin.tuner.cli import main


def _run(*arguments: str, **kwargs):
    return CliRunner().invoke(main, list(arguments), **kwargs)


def test_help_has_an_example_for_each_command() -> None:
    assert _run("--help").exit_code == 0
    assert "Exit codes" in _run("--help").output
    for command in main.commands:
        result = _run(command, "--help")
        assert result.exit_code == 0
        assert f"jaxwin-tune {command}" in result.output


def test_list_shows_the_registry() -> None:
    text = _run("list").output
    data = json.loads(_run("list", "--json").output)
    for row in _registry.registry()["algorithms"]:
        assert row["name"] in text and row["family"] in text
        assert row["name"] in {entry["name"] for entry in data["algorithms"]}


@pytest.mark.parametrize("grad", ["none", "input", "filter"])
def test_explain_says_what_dispatch_decides(grad: str) -> None:
    arguments = ("explain", "--input", "8,20,20,6", "--filter", "3,3,1,6", "--groups", "6")
    result = _run(*arguments, "--stride", "2", "--grad", grad, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)
    expected = {"none": "depthwise", "input": "segregated", "filter": "depthwise"}[grad]
    assert row["algorithm"] == expected
    assert "not im2win: " in _run(*arguments).output


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "--input", "8,20,20,6", "--filter", "3,3,5,6"),
        ("explain", "--input", "8,x,20,6", "--filter", "3,3,6,6"),
        ("explain", "--input", "8,0,20,6", "--filter", "3,3,6,6"),
        ("explain", "--input", "8,20,20,6", "--filter", "3,3,6,6", "--padding", "WIDE"),
        ("explain", "--input", "8,20,20,6", "--filter", "3,3,6,6", "--dtype", "float33"),
        ("explain", "8x8 c4 k8 w3", "--dtype", "float33"),
        ("explain", "8x8 c4 k8 w3 int8", "--direction", "dw"),
        ("deviation", "8x8 c4 k8 w3 int8", "--direction", "dx"),
        ("layout", "8x8 c4 k8 w3 int8"),
        ("explain", "--input", "8,20,20,6"),
        ("explain", "--input", f"{10**20},20,20,6", "--filter", "3,3,6,6"),
        ("nonsense",),
    ],
)
def test_wrong_usage_exits_with_two(arguments: tuple[str, ...]) -> None:
    result = _run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.output
    assert "Traceback" not in result.output


def test_doctor() -> None:
    result = _run("doctor")
    assert result.exit_code == 0, result.output
    assert "all is well" in result.output
    assert json.loads(_run("doctor", "--json").output)["problems"] == []
    sick = _run("doctor", env={"JAXWIN_MAX_ISA": "mmx"})
    assert sick.exit_code == 1
    assert "JAXWIN_MAX_ISA" in sick.output
    disabled = _run("doctor", env={"JAXWIN_DISABLE": "1"})
    assert disabled.exit_code == 1
    assert "JAXWIN_DISABLE" in disabled.output


def test_doctor_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "Made-up GPU", "processors": 7, "capability": "9.0"}
    monkeypatch.setattr(cli.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cli._compat, "platform_version", lambda: "PJRT, CUDA 13000")
    monkeypatch.setattr(cli._ffi, "cuda_device", lambda ordinal: gpu)
    monkeypatch.setattr(cli._cuda, "unusable", lambda: "")
    tested = []
    monkeypatch.setattr(cli, "_self_test", lambda on_gpu: tested.append(on_gpu) or [])
    told = json.loads(_run("doctor", "--json").output)
    assert told["problems"] == [] and tested == [True]
    assert told["facts"]["GPU"] == "Made-up GPU, 7 processors, compute capability 9.0"
    monkeypatch.setattr(cli._cuda, "unusable", lambda: "NVRTC cannot be opened")
    sick = _run("doctor")
    assert sick.exit_code == 1 and tested == [True]
    assert "the kernels of the GPU cannot run: NVRTC cannot be opened" in sick.output
    monkeypatch.setattr(cli._ffi, "cuda_device", lambda ordinal: {"error": "no driver"})
    assert "cannot run: no driver" in _run("doctor").output
    monkeypatch.setattr(cli._compat, "platform_version", lambda: "rocm 7")
    assert "default platform is gpu: jaxwin has kernels for CPUs" in _run("doctor").output


def test_doctor_s_convolution_may_name_its_kernel() -> None:
    assert cli._self_test(on_gpu=False) == cli._self_test(on_gpu=True) == []


def test_ctrl_c_has_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in commands that have nothing to keep."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._registry, "registry", interrupted)
    stopped = _run("list")
    assert stopped.exit_code == exits.INTERRUPTED and "stopped" in stopped.output


def test_doctor_where_jax_cannot_start() -> None:
    # Another process: this one's JAX has started.
    result = subprocess.run(
        [sys.executable, "-m", "jaxwin.tuner", "doctor"],
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "problem: Unable to initialize backend 'nonsense'" in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_says_what_moves_times_and_where_it_looks() -> None:
    facts = json.loads(_run("doctor", "--json").output)["facts"]
    for name in ("CPUs", "governor", "transparent huge pages", "just now", "kernels", "family"):
        assert facts[name], name
    tiers = [entry["tier"] for entry in facts["tuning databases"]]
    assert tiers[-1] == "package" and "site" in tiers
    assert all(entry["state"] for entry in facts["tuning databases"])
    assert "missed problems" in facts


def test_exit_codes_are_in_one_table() -> None:
    text = _run("--help").output
    for code, meaning in exits.MEANINGS.items():
        assert str(code) in text and " ".join(meaning.split()[:4]) in text
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    for code, meaning in exits.MEANINGS.items():
        assert f"| {code} | {meaning} |" in readme, code


def test_every_variable_is_in_the_readme() -> None:
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    for name in _settings.VARIABLES:
        assert f"| `{name}=" in readme, name


def test_explain_takes_shapes_presets_and_files(tmp_path: Path) -> None:
    shape = "n2 12x13 c8 k16 w3 p1"
    rows = json.loads(_run("explain", shape, "--direction", "fwd,dx,dw", "--json").output)
    assert next(jaxwin.Problem(**_tuples(row["problem"])).direction for row in rows) == "fwd"
    assert len(rows) == 3 and all(row["tier"] and row["rejected"] for row in rows)
    preset = json.loads(_run("explain", "--preset", "paper", "--json").output)
    assert len(preset) == 12
    recorded = tmp_path / "shapes.jsonl"
    recorded.write_text(_record.line(jaxwin.Problem(**_tuples(rows[1]["problem"]))))
    assert json.loads(_run("explain", str(recorded), "--json").output) == [rows[1]]
    for wrong in ((shape, "--input", "1,2,2,1"), (shape, "--padding", "3"), ("nonsense",), ()):
        assert _run("explain", *wrong).exit_code == 2, wrong


def _tuples(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _tuples(value) for name, value in values.items()}
    return tuple(map(_tuples, values)) if isinstance(values, list) else values


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("no bash")
    result = _run("completion", shell)
    assert result.exit_code == 0 and "_JAXWIN_TUNE_COMPLETE" in result.output
    words = {"COMP_WORDS": "jaxwin-tune r", "COMP_CWORD": "1"}
    variables = {"_JAXWIN_TUNE_COMPLETE": "bash_complete"} | words
    completed = _run(env=variables, prog_name="jaxwin-tune")
    assert {line.split(",")[1] for line in completed.output.split()} == {"record", "report", "run"}


def test_import_jaxwin_is_light() -> None:
    code = (
        "import sys, jaxwin; "
        "print([m for m in ('optuna', 'sqlalchemy', 'click', 'rich', 'sqlite_utils', 'flax') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
