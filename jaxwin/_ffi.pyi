# SPDX-License-Identifier: Apache-2.0
"""The native core (ffi/module.cc)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def registrations() -> dict[str, Any]: ...
def registry() -> dict[str, Any]: ...
def make_plan(
    problem: Mapping[str, Any],
    algorithm: str = "auto",
    isa: str = "",
    threads: int = 1,
    max_workspace: int = -1,
    params: Sequence[int] = (),
) -> dict[str, Any]: ...
def candidates(
    problem: Mapping[str, Any], isa: str = "", threads: int = 1
) -> dict[str, dict[str, Any]]: ...
def describe(problem: Mapping[str, Any], threads: int = 1) -> dict[str, Any]: ...
def best_isa(cap: str = "") -> str: ...
def measure_peak(isa: str, iterations: int) -> float: ...
def run(
    problem: Mapping[str, Any],
    algorithm: str,
    isa: str,
    threads: int,
    params: Sequence[int],
    x: NDArray[np.float32],
    w: NDArray[np.float32],
    y: NDArray[np.float32],
    workspace: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    residual: NDArray[np.float32] | None = None,
    activation: int = 0,
) -> str: ...
