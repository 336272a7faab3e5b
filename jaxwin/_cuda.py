# SPDX-License-Identifier: Apache-2.0
"""CUDA: which kernel computes a convolution there, and the call that runs it.

Nothing here needs a GPU, so programs can be lowered and exported for CUDA anywhere. Kernels are
compiled by NVRTC for the device that a program runs on.
"""

from __future__ import annotations

import functools
import os
import site
import sys
from pathlib import Path
from typing import Any

import jax
from jax import lax

from jaxwin import _ffi, _settings, _tuning
from jaxwin._plan import Decision, Plan
from jaxwin._problem import Problem

ISA = "cuda"
MODES = ("auto", "all", "off")
_SIXTEEN_BITS = ("bfloat16", "float16")
_INCUMBENT = "cuDNN through XLA, until a kernel is measured to be faster on this GPU"


def register(target: str) -> None:
    """Registers the handler of a custom-call target, and says where NVRTC and the cache may be."""
    jax.ffi.register_ffi_target(target, _ffi.cuda_handler(), platform="CUDA")
    _ffi.cuda_configure(nvrtc=nvrtc_libraries(), cache=cache_folder())


def nvrtc_libraries() -> list[str]:
    """Where NVRTC may be, the best place first: NVIDIA's wheels, the loader's path, the toolkit."""
    found: list[str] = []
    folders = dict.fromkeys([*sys.path, *site.getsitepackages(), site.getusersitepackages()])
    for folder in folders:
        wheels = Path(folder or ".", "nvidia")
        if wheels.is_dir():
            for version in (13, 12):
                found += map(str, sorted(wheels.glob(f"*/lib/libnvrtc.so.{version}")))
    names = [f"libnvrtc.so.{version}" for version in (13, 12)]
    return [*found, *names, *(f"/usr/local/cuda/lib64/{name}" for name in names)]


def cache_folder() -> str:
    """Where compiled kernels are kept: `JAXWIN_KERNEL_CACHE`, or the user's cache; "" for "off"."""
    named = _settings.settings().kernel_cache
    if named:
        return "" if named.lower() in ("0", "off") else os.path.expanduser(named)
    tuning = _tuning.user_file()
    return "" if tuning is None else str(tuning.with_name("kernels"))


@functools.cache
def registry() -> dict[str, dict[str, Any]]:
    """The CUDA algorithms of the native core's registry, by name."""
    return {row["name"]: row for row in _ffi.registry()["cuda"]["algorithms"]}


def mode() -> str:
    """What `JAXWIN_GPU` says: "auto" (the default), "all" or "off".

    Raises:
        ValueError: it says something else.
    """
    text = _settings.settings().gpu
    if text not in MODES:
        raise ValueError(f"JAXWIN_GPU: {text!r} is not one of {', '.join(MODES)}")
    return text


def is_exact(precision: Any) -> bool:
    """Whether a convolution's precision asks for float32 arithmetic, not for tensor cores."""
    high = (lax.Precision.HIGH, lax.Precision.HIGHEST)
    return isinstance(precision, tuple) and any(p in high for p in precision)


def decide(
    problem: Problem,
    *,
    algorithm: str = "auto",
    max_workspace: int | None = None,
    exact: bool = False,
) -> Decision:
    """The plan for a problem on CUDA under the environment as it is now.

    algorithm: "auto", "xla", or the name of a CUDA algorithm. exact: whether precision forbids
    tensor cores.

    Raises:
        ValueError: the algorithm is unknown, was asked for by name and cannot compute the problem
            within max_workspace, or is below the precision asked for; JAXWIN_GPU or JAXWIN_MODE is
            no mode.
    """
    table = None if _settings.mode() == "off" else _tuning.table()
    return _decide(problem, algorithm, max_workspace, exact, mode(), table)


@functools.lru_cache(maxsize=4096)
def _decide(
    problem: Problem,
    algorithm: str,
    max_workspace: int | None,
    exact: bool,
    gpu_mode: str,
    table: _tuning.Table | None,
) -> Decision:
    if algorithm not in ("auto", "any", "xla", *registry()):
        names = ", ".join(("auto", *registry(), "xla", "any"))
        raise ValueError(f"algorithm: {algorithm!r} is on CUDA not one of {names}")
    if algorithm == "xla":
        return Decision("xla", None, "asked for")
    if algorithm in ("auto", "any"):
        return _automatic(problem, max_workspace, exact, gpu_mode, table)
    family = registry()[algorithm]["family"]
    if exact and family != "canonical":
        raise ValueError(f"algorithm: {algorithm!r} is below the precision that was asked for")
    plan = _make_plan(problem, algorithm, (), max_workspace)
    if isinstance(plan, str):
        raise ValueError(f"algorithm: {algorithm!r} cannot compute {problem}: {plan}")
    return Decision("requested", plan)


def _automatic(
    problem: Problem,
    max_workspace: int | None,
    exact: bool,
    gpu_mode: str,
    table: _tuning.Table | None,
) -> Decision:
    if gpu_mode == "off":
        return Decision("xla", None, "JAXWIN_GPU=off")
    if problem.lhs_dtype != "float32":
        return Decision("xla", None, f"{problem.lhs_dtype}: {_INCUMBENT}")
    if not exact and gpu_mode != "all":
        return Decision("xla", None, "precision below HIGHEST: tensor cores are allowed")
    row = table.exact(problem, ISA, 1) if table is not None else None
    if row is not None:
        plan = _make_plan(problem, row.algorithm, row.params, max_workspace)
        if isinstance(plan, Plan):
            return Decision("tuned", plan, row=row)
    if gpu_mode != "all" and not _weak_in_cudnn(problem):
        return Decision("xla", None, _INCUMBENT)
    plan = _make_plan(problem, "auto", (), max_workspace)
    if isinstance(plan, str):
        return Decision("xla", None, plan)
    return Decision("heuristic", plan)


def _weak_in_cudnn(problem: Problem) -> bool:
    """Groups and transposed convolutions, with their gradients: users' reports, not measured."""
    groups = max(problem.feature_group_count, problem.batch_group_count)
    return groups > 1 or any(d > 1 for d in problem.lhs_dilation)


def unsupported(problem: Problem) -> str:
    """Why no CUDA kernel can take a problem, as far as Python knows; else empty."""
    if problem.lhs_dtype != problem.rhs_dtype:
        return f"no kernels for {problem.lhs_dtype} with {problem.rhs_dtype}"
    if problem.lhs_dtype not in ("float32", *_SIXTEEN_BITS):
        return f"no kernels for {problem.lhs_dtype}"
    if problem.out_dtype not in (problem.lhs_dtype, "float32"):
        return f"no kernels for {problem.lhs_dtype} with a result in {problem.out_dtype}"
    if not 1 <= problem.spatial_rank <= 3:
        return f"no kernels for {problem.spatial_rank} spatial dimensions"
    return ""


def operand_dtype(problem: Problem, algorithm: str) -> str:
    """The dtype in which an algorithm reads a problem: its own, or float32 after conversion."""
    own = algorithm != "auto" and problem.lhs_dtype in registry()[algorithm]["dtypes"]
    return problem.lhs_dtype if own else "float32"


def _make_plan(
    problem: Problem, algorithm: str, params: tuple[int, ...], max_workspace: int | None
) -> Plan | str:
    reason = unsupported(problem)
    if reason:
        return reason
    dtype = operand_dtype(problem, algorithm)
    answer = _ffi.cuda_make_plan(
        problem.native(),
        algorithm=algorithm,
        dtype=dtype,
        wide_result=dtype != "float32" and problem.out_dtype == "float32",
        max_workspace=-1 if max_workspace is None else max_workspace,
        params=params,
    )
    if "plan" not in answer:
        return str(answer["error"])
    plan = answer["plan"]
    return Plan(
        algorithm=plan["algorithm"],
        isa=ISA,
        threads=1,
        params=tuple(plan["params"]),
        workspace_bytes=plan["workspace_bytes"],
    )


def rejections(problem: Problem, decision: Decision) -> dict[str, str]:
    """Why each of the other algorithms was not taken, by name."""
    if decision.plan is None or unsupported(problem):
        return {}
    rejected = {}
    for name, row in registry().items():
        if name == decision.plan.algorithm:
            continue
        answer = _make_plan(problem, name, (), None)
        if isinstance(answer, str):
            rejected[name] = answer
        elif decision.tier == "requested":
            rejected[name] = "not asked for"
        elif row["family"] != "canonical":
            rejected[name] = "another numerical family: only where asked for"
        else:
            rejected[name] = "slower by the cost model"
    return rejected
