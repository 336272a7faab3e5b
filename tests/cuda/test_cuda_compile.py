# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel through NVRTC for several architectures, and its registers; no GPU is needed.

Skipped where the wheels nvidia-cuda-nvrtc and nvidia-cuda-nvcc (extra `cuda-test`) are missing,
unless JAXWIN_REQUIRE_NVRTC is set.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import problems
import pytest

from jaxwin import _cuda, _ffi, _registry
from jaxwin._problem import Problem

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
ACTIVATIONS = _registry.registry()["activations"]
REGISTRY = {row["name"]: row for row in _registry.registry()["cuda"]["algorithms"]}


def _make(*args: Any, **kwargs: Any) -> Problem:
    problem = problems.make(*args, **kwargs)
    assert problem is not None
    return problem


# What each algorithm is made for, at the size of real layers: the default tiles are large there.
PROBLEMS = {
    "im2win": _make(64, 64, 128, (56, 56), (3, 3)),
    "im2win_full": _make(64, 64, 64, (56, 56), (3, 3)),
    "segregated": _make(64, 64, 64, (28, 28), (4, 4), lhs_dilation=(2, 2)),
    "weight_grad": _make(64, 64, 64, (56, 56), (54, 54), layout=("CHWN", "IHWO")),
    "two_stage": _make(1, 256, 256, (14, 14), (3, 3)),
    "few_channels": _make(64, 3, 64, (224, 224), (7, 7), stride=(2, 2)),
    "depthwise": _make(64, 128, 128, (56, 56), (3, 3), groups=128),
    "lanes_grad": _make(
        128, 64, 128, (56, 56), (54, 54), batch_groups=128, layout=("CHWN", "IHWO")
    ),
    "grouped": _make(64, 128, 128, (56, 56), (3, 3), groups=32),
    "direct": _make(2, 8, 8, (9, 9), (3, 3)),
    "tensor": _make(64, 64, 128, (56, 56), (3, 3)),
}
MORE = {
    "first layer": ("im2win", _make(64, 3, 64, (224, 224), (7, 7), stride=(2, 2))),
    "few features": ("im2win", _make(64, 64, 24, (56, 56), (3, 3))),
    "batch 1": ("im2win", _make(1, 256, 256, (14, 14), (3, 3))),
    "volume": ("im2win", _make(4, 16, 32, (16, 28, 28), (3, 3, 3))),
    "planes": ("im2win", _make(64, 64, 128, (56, 56), (3, 3), layout=("NCHW", "OIHW"))),
    "rgb 3x3": ("few_channels", _make(64, 3, 32, (224, 224), (3, 3), stride=(2, 2))),
    "depthwise gradient 5x5": (
        "lanes_grad",
        _make(240, 64, 240, (28, 28), (24, 24), batch_groups=240, layout=("CHWN", "IHWO")),
    ),
    "tensor planes": (
        "tensor",
        _make(64, 64, 128, (56, 56), (3, 3), layout=("NCHW", "OIHW")),
    ),
    "tensor gradient": (
        "tensor",
        _make(64, 64, 64, (56, 56), (54, 54), layout=("CHWN", "IHWO")),
    ),
    "tensor transposed": (
        "tensor",
        _make(64, 64, 64, (28, 28), (4, 4), lhs_dilation=(2, 2)),
    ),
    "gradient planes": (
        "weight_grad",
        _make(64, 64, 64, (56, 56), (54, 54), layout=("CNHW", "IOHW")),
    ),
    "depthwise line": ("depthwise", _make(32, 512, 512, (4096,), (4,), groups=512)),
    "depthwise planes": (
        "depthwise",
        _make(64, 128, 128, (56, 56), (3, 3), groups=128, layout=("NCHW", "OIHW")),
    ),
    "depthwise 5x5": ("depthwise", _make(64, 128, 128, (28, 28), (5, 5), groups=128)),
    "depthwise 7x7": ("depthwise", _make(64, 96, 96, (28, 28), (7, 7), groups=96)),
}
ALIGNED = {"x": 256, "w": 256, "y": 256, "workspace": 256}


def _missing(reason: str) -> None:
    if os.environ.get("JAXWIN_REQUIRE_NVRTC"):
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _runtime() -> Any:
    return _ffi.CudaRuntime([], _cuda.nvrtc_libraries())


def _images(
    problem: Problem, algorithm: str, architecture: str, dtype: str = "float32", epilogue: str = ""
) -> list[dict[str, Any]]:
    """Compiled; with an epilogue of bias, residual and an activation, if one is named."""
    buffers = dict(ALIGNED)
    if epilogue:
        buffers |= {"bias": 256, "residual": 256, "activation": ACTIVATIONS.index(epilogue)}
    try:
        images: list[dict[str, Any]] = _runtime().images(
            problem.native(), algorithm, dtype=dtype, architecture=architecture, buffers=buffers
        )
    except RuntimeError as error:
        if "NVRTC cannot be opened" in str(error):
            _missing(str(error))
        raise
    return images


def test_every_algorithm_has_a_problem_here() -> None:
    assert PROBLEMS.keys() == REGISTRY.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("algorithm", REGISTRY)
def test_compiles(algorithm: str, architecture: str) -> None:
    for dtype in REGISTRY[algorithm]["dtypes"]:
        for image in _images(PROBLEMS[algorithm], algorithm, architecture, dtype, "relu"):
            assert image["image"][:4] == b"\x7fELF"


@functools.cache
def _ptxas() -> str:
    wheels = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/ptxas"))
    found = str(wheels[-1]) if wheels else shutil.which("ptxas")
    if not found:
        _missing("no ptxas: pip install nvidia-cuda-nvcc")
    return str(found)


@pytest.mark.parametrize("name", [*REGISTRY, *MORE])
def test_default_tiles_do_not_spill(name: str, tmp_path: Path) -> None:
    algorithm, problem = MORE[name] if name in MORE else (name, PROBLEMS[name])
    epilogue = "" if name in MORE else "gelu"  # the one with the most registers
    for dtype in REGISTRY[algorithm]["dtypes"]:
        for image in _images(problem, algorithm, "compute_90a", dtype, epilogue):
            source = tmp_path / "kernel.ptx"
            source.write_bytes(image["image"].rstrip(b"\0"))
            command = [_ptxas(), "-arch=sm_90a", "-v", "-o", "/dev/null", str(source)]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            registers = re.search(r"Used (\d+) registers", report)
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
            assert registers and len(spills) == 2, report
            assert spills == [0, 0], f"{dtype} {image['kernel']} {image['options']}: {report}"
