# SPDX-License-Identifier: Apache-2.0
"""What the native core can do, and what this process lets it do."""

from __future__ import annotations

import functools
import os
from typing import Any

import jaxlib.version

from jaxwin import _ffi
from jaxwin._settings import settings

XLA = "xla"  # lax's own convolution, where it is named beside the algorithms with kernels
TENSOR = "tensor"  # the numerical family of tensor cores
TENSOR_ISA = "cuda-tensor"  # of measurements where tensor cores and other sums are allowed
GPU_ISAS = ("cuda", TENSOR_ISA)
CANONICAL = "canonical"  # the numerical family with the bits that the README promises


@functools.cache
def registry() -> dict[str, Any]:
    """The registry of the native core: algorithms, instruction sets with their tiles, caches."""
    result: dict[str, Any] = _ffi.registry()
    return result


@functools.cache
def algorithm_names() -> tuple[str, ...]:
    """Names of the algorithms with kernels, in the order of the registry."""
    return tuple(row["name"] for row in registry()["algorithms"])


def side(isa: str) -> str:
    """Whose kernels an instruction set's rows are of: "" the CPU's, "cuda" the GPU's."""
    return "cuda" if isa.startswith("cuda") else ""


def rows(isa: str = "") -> list[dict[str, Any]]:
    """The registry's algorithms for an instruction set: the CPU's, or CUDA's."""
    found: list[dict[str, Any]] = (registry()["cuda"] if side(isa) else registry())["algorithms"]
    return found


@functools.cache
def parameter_names(algorithm: str, isa: str = "") -> tuple[str, ...] | None:
    """Names of an algorithm's parameters in their order; None where there is no such algorithm.

    isa: one of CUDA's for the algorithms of CUDA.
    """
    if algorithm == XLA:
        return ()
    for row in rows(isa):
        if row["name"] == algorithm:
            return tuple(spec["name"] for spec in row["params"])
    return None


@functools.cache
def takes_packed(algorithm: str, dtype: str) -> bool:
    """Whether an algorithm reads filters of this dtype that were packed before the call."""
    rows = registry()["algorithms"]
    return registry()["dtypes"][dtype]["takes_packed"] and any(
        row["name"] == algorithm and row["takes_packed"] for row in rows
    )


def activation_number(activation: str | None) -> int:
    """How the native core is told an activation."""
    numbers: list[str] = registry()["activations"]
    return numbers.index(activation or "none")


@functools.cache
def width(isa: str, dtype: str) -> int:
    """Lanes of an instruction set's vectors where operands are of this dtype.

    Raises:
        KeyError: there is no such instruction set, or there are no kernels for the dtype.
    """
    for row in registry()["isas"]:
        if row["name"] == isa:
            return int(row["width"]) * 4 // int(registry()["dtypes"][dtype]["word"])
    raise KeyError(isa)


def isa() -> str:
    """The instruction set that kernels use: the CPU's best, capped by `JAXWIN_MAX_ISA`.

    Raises:
        ValueError: `JAXWIN_MAX_ISA` names no instruction set.
    """
    return best_isa(settings().max_isa)


@functools.cache
def best_isa(cap: str) -> str:
    """`isa()` with this cap; none where it is empty."""
    best: str = _ffi.best_isa(cap)
    if not best:
        names = ", ".join(row["name"] for row in registry()["isas"])
        raise ValueError(f"JAXWIN_MAX_ISA: {cap!r} is not one of {names}")
    return best


def threads() -> int:
    """How many threads XLA's pool has here: `NPROC`, or the CPUs of the affinity mask."""
    return settings().threads or cpus()


def cpus() -> int:
    """The CPUs of the affinity mask."""
    return len(os.sched_getaffinity(0))


@functools.cache
def abi(algorithm: str, isa: str = "") -> str:
    """The state of an algorithm's kernels: measurements hold as long as it stays the same.

    Of "xla" it is the version of jaxlib. isa: one of CUDA's for the algorithms of CUDA.

    Raises:
        KeyError: there is no such algorithm.
    """
    if algorithm == XLA:
        return f"jaxlib {jaxlib.version.__version__}"
    for row in rows(isa):
        if row["name"] == algorithm:
            return str(row["abi"])
    raise KeyError(algorithm)


def is_usual(family: str, isa: str) -> bool:
    """Whether measurements of a family compete for an instruction set where nobody asked for more.

    That is the canonical family; and for `TENSOR_ISA` all kernels, under the name "tensor".
    """
    return family == CANONICAL or (isa == TENSOR_ISA and family == TENSOR)


@functools.cache
def family(algorithm: str, isa: str = "") -> str:
    """The numerical family of an algorithm; algorithms of one family give the same bits.

    Of "xla" it is "any": its numbers are whatever XLA makes them. isa: "cuda" for the algorithms
    of CUDA.

    Raises:
        KeyError: there is no such algorithm.
    """
    if algorithm == XLA:
        return "any"
    for row in rows(isa):
        if row["name"] == algorithm:
            return str(row["family"])
    raise KeyError(algorithm)


def kernels(canonical: bool | None = None) -> list[str]:
    """Every algorithm with the state of its kernels, as "algorithm abi"; those of CUDA too.

    canonical: only those of the canonical family, or only those of the others.
    """
    return [
        f"{row['name']} {row['abi']}"
        for isa in ("", "cuda")
        for row in rows(isa)
        if canonical is None or canonical == (row["family"] == CANONICAL)
    ]
