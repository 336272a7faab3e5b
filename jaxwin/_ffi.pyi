# SPDX-License-Identifier: Apache-2.0
"""The native core (ffi/module.cc)."""

from collections.abc import Mapping, Sequence
from typing import Any

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

class Asked:
    def __init__(self, problem: Mapping[str, Any], widened: bool) -> None: ...

def plan(
    problem: Asked,
    algorithm: str,
    isa: str,
    threads: int,
    max_workspace: int,
    params: Sequence[int],
) -> tuple[str, str, int, tuple[int, ...], int] | str: ...
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
    x: NDArray[Any],
    w: NDArray[Any],
    y: NDArray[Any],
    workspace: NDArray[Any],
    bias: NDArray[Any] | None = None,
    residual: NDArray[Any] | None = None,
    activation: int = 0,
) -> str: ...
def cuda_handler() -> Any: ...
def cuda_configure(nvrtc: Sequence[str], cache: str) -> None: ...
def cuda_device(ordinal: int = 0) -> dict[str, Any]: ...
def cuda_unusable(ordinal: int = 0) -> str: ...
def cuda_source(source: str) -> str: ...
def cuda_make_plan(
    problem: Mapping[str, Any],
    algorithm: str = "auto",
    dtype: str = "float32",
    wide_result: bool = False,
    max_workspace: int = -1,
    params: Sequence[int] = (),
) -> dict[str, Any]: ...
def cuda_candidates(
    problem: Mapping[str, Any], dtype: str = "float32", wide_result: bool = False
) -> dict[str, dict[str, Any]]: ...
def cuda_launches(
    problem: Mapping[str, Any],
    algorithm: str,
    dtype: str,
    wide_result: bool,
    params: Sequence[int],
    buffers: Mapping[str, int],
) -> list[dict[str, Any]]: ...
def direction(problem: Mapping[str, Any]) -> str: ...
def sizes(problem: Asked, same_machine: bool) -> list[int]: ...
def is_heuristic(
    problem: Mapping[str, Any], algorithm: str, isa: str, threads: int, params: Sequence[int]
) -> bool: ...

class Neighbours:
    def __init__(self, weights: Sequence[float], leading: int, limit: float) -> None: ...
    def add(self, problem: Asked, isa: str, threads: int, same_machine: bool) -> None: ...
    def nearest(self, problem: Asked, isa: str, threads: int) -> list[int]: ...

class CudaRuntime:
    def __init__(
        self, cuda: Sequence[str], nvrtc: Sequence[str], cache: str = "", cache_bytes: int = ...
    ) -> None: ...
    def run(
        self,
        problem: Mapping[str, Any],
        algorithm: str,
        dtype: str = "float32",
        wide_result: bool = False,
        params: Sequence[int] = (),
        buffers: Mapping[str, int] = ...,
        stream: int = 0,
        only: int = -1,
    ) -> tuple[str, str]: ...
    def unusable(self, ordinal: int = 0) -> str: ...
    def images(
        self,
        problem: Mapping[str, Any],
        algorithm: str,
        dtype: str = "float32",
        wide_result: bool = False,
        params: Sequence[int] = (),
        architecture: str = "sm_80",
        buffers: Mapping[str, int] = ...,
    ) -> list[dict[str, Any]]: ...
    def device(self, ordinal: int = 0) -> dict[str, Any]: ...
    def counters(self) -> dict[str, int]: ...
